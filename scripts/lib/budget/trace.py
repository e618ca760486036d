"""The bytes that are alive at once in a forward pass, counted on fake tensors: shapes without data, in a second.

The model's own code runs on the fake tensors, so no architecture needs a formula.
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

from lib.core.cli import InputError
from lib.model import loading

# The errors that a router of experts causes: it chooses by values, and fake tensors have none.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
# torch's message if experts are multiplied together in fp32 or fp16, which works on real tensors but not on fake ones.
GROUPED = "Expected inputs of BF16 type but got mat_a.dtype="


def needs_values(error: Exception) -> bool:
    """Whether a forward pass that failed on fake tensors may succeed on real ones."""
    return isinstance(error, NEEDS_VALUES) or (type(error) is RuntimeError and str(error).startswith(GROUPED))


def build_meta_model(config, precision: str, adapter: dict | None = None):
    """A model on the meta device, in the dtype of --precision, with a fresh adapter. InputError if the model has no
    layer that the adapter could change."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=loading.torch_dtype(precision))
        if not adapter:
            return model
        from peft import LoraConfig, PromptTuningConfig, get_peft_model  # 0.3 GB, so only with an adapter

        if "num_virtual_tokens" in adapter:
            return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", **adapter))
        settings, targets = LoraConfig(task_type="CAUSAL_LM", **adapter), adapter["target_modules"]
        try:
            return get_peft_model(model, settings)
        except ValueError as error:
            names = targets if isinstance(targets, str) else ",".join(targets)
            raise InputError(f"--lora-targets {names}: {error}") from None


def trace_forward(model, rows: int, length: int, dtype=torch.float32) -> tuple[int, int, int]:
    """The bytes of a model on the meta device, of what remains after a forward pass (for a backward pass, or as its KV
    cache), and of the peak during the pass. The last two exclude the weights and include the logits of one token per
    row. Products are in `dtype`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        alive = LiveBytes(make_fake(model))
        weights = alive.bytes
        with alive, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):  # the fakes lie on the CPU
            ids = torch.zeros(rows, length, dtype=torch.long)
            output = model(input_ids=ids, use_cache=not torch.is_grad_enabled(), logits_to_keep=1)
            remaining = alive.bytes - weights
        del output
    return weights, remaining, alive.most - weights


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak."""

    def __init__(self, tensors):
        super().__init__()
        self.bytes = self.most = 0
        self.known = WeakIdKeyDictionary()
        for tensor in tensors:
            self.add(tensor)

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

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
    """Give a model on the meta device fake weights on the CPU, since autocast depends on the device; returns all its
    tensors."""
    fakes = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None and id(tensor) not in fakes:  # a tied matrix stays one
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = (tensor, fake)
                if tensor is not None:
                    kind[name] = fakes[id(tensor)][1]
    return [fake for _, fake in fakes.values()]
