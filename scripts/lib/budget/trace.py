"""How many bytes are alive at once in a forward pass, counted on fake tensors: shapes without data, in a second.

The code that will run runs on them, so there is no formula for each architecture.
"""

import weakref

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lib.model import loading

# What a router of experts leads to: it chooses by values, and fake tensors have none.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
# What torch says where experts are multiplied together in fp32 or fp16: real tensors it multiplies so, fake ones not.
GROUPED = "Expected inputs of BF16 type but got mat_a.dtype="


def needs_values(error: Exception) -> bool:
    """Whether a forward pass that failed on fake tensors may run on real ones."""
    return isinstance(error, NEEDS_VALUES) or (type(error) is RuntimeError and str(error).startswith(GROUPED))


def build_meta_model(config, how: str, adapter: dict | None = None):
    """A model on the meta device, in the dtype of --precision `how`, with a fresh adapter."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=loading.torch_dtype(how))
        if not adapter:
            return model
        from peft import LoraConfig, PromptTuningConfig, get_peft_model  # 0.3 GB, spared where there is no adapter

        kind = PromptTuningConfig if "num_virtual_tokens" in adapter else LoraConfig
        return get_peft_model(model, kind(task_type="CAUSAL_LM", **adapter))


def trace_forward(model, rows: int, length: int, dtype=torch.float32) -> tuple[int, int, int]:
    """Bytes of a model on the meta device, of what a forward pass leaves (for a backward pass, or as its KV cache), and
    of what is alive at most on the way beside the weights; logits of one token a row among them. Products in `dtype`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        alive = LiveBytes(make_fake(model))
        weights = alive.bytes
        with alive, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):  # the fakes lie on the CPU
            ids = torch.zeros(rows, length, dtype=torch.long)
            left = model(input_ids=ids, use_cache=not torch.is_grad_enabled(), logits_to_keep=1)
            kept = alive.bytes - weights
        del left
    return weights, kept, alive.most - weights


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and the most that were at once."""

    def __init__(self, tensors):
        super().__init__()
        self.bytes = self.most = 0
        self.known = WeakIdKeyDictionary()
        for tensor in tensors:
            self.add(tensor)

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        made = operation(*given, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return made

    def add(self, tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = storage.nbytes()
            weakref.finalize(storage, self.drop, size)
            self.bytes += size
            self.most = max(self.most, self.bytes)

    def drop(self, size: int) -> None:
        self.bytes -= size


def make_fake(model) -> list:
    """Give a model on the meta device fake weights on the CPU, for autocast goes by the device; all its tensors."""
    made = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and id(tensor) not in made:  # a tied matrix stays one
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, fake)
                if tensor is not None:
                    kind[name] = made[id(tensor)][1]
    return [fake for _, fake in made.values()]
