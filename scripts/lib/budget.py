"""What a step will need in memory, worked out from the model's config before anything is loaded.

Weights are counted on torch's meta device. What a forward pass keeps for its backward pass is counted on fake tensors,
shapes without data, by the code that will run: no formula for each architecture. What cannot be counted (the libraries'
own code, what an allocator wastes) was measured on a CPU and is named as such; on GPUs it is not measured here.
"""

from typing import NamedTuple

from lib import hardware
from lib.cli import OutOfMemory

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "nf4": 0.516}  # a weight; NF4 with doubly quantised scales


class Shape(NamedTuple):
    """What the sizes follow from: parameters and widths of a model, from its config alone."""

    matrices: int  # weights of linear layers, but for the output matrix
    others: int  # embeddings, output matrix, norms
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    key_values: int  # values a token and layer in the KV cache
    moments: int  # squares of the linear layers' widths, summed: what calibration gathers

    def weights(self, how: str) -> int:
        """Bytes when held as --load says; what bitsandbytes leaves alone stays in 16 bit."""
        return int(self.matrices * BYTES[how] + self.others * max(2, BYTES[how]))


def shape_of(config) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    matrices = sum(layer.weight.numel() for layer in linear)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        matrices, sum(p.numel() for p in model.parameters()) - matrices, config.vocab_size, config.hidden_size,
        config.intermediate_size, config.num_hidden_layers, 2 * heads * size,
        sum(layer.in_features**2 for layer in linear) + config.hidden_size**2,
    )  # fmt: skip


def kept_for_backward(config, lora: dict, how: str, rows: int, length: int, checkpointing: bool = False) -> int:
    """Bytes that a forward pass of a model with an adapter keeps until the backward pass, before the vocabulary."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(how, torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        own = as_fake(model)

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, or the next one could be given its number
            return tensor

        ids = torch.zeros(rows, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), hardware.autocast():
            model.get_base_model().model(ids, use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())


def as_fake(model) -> set:
    """Give a model on the meta device fake weights on the CPU, for autocast goes by the device; their storages."""
    import torch

    made, storages = {}, set()
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # a tied matrix stays one
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, fake)
                kind[name] = made[id(tensor)][1]
                storages.add(kind[name].untyped_storage()._cdata)
    return storages


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def say(parts: dict[str, int]) -> str:
    """1.9 GB: weights 0.54, activations 0.71 …"""
    each = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size >= 5e6)
    return f"{total(parts) / 1e9:.2f} GB ({each})"


def check(need, changes: list[tuple[str, dict]]) -> dict[str, int]:
    """Say what need() bytes a step takes, and raise OutOfMemory when this machine has less.

    `changes` are (what to say, arguments of `need`), the least harmful first; the first three that fit are named.
    """
    parts, (free, where) = need(), hardware.free_memory()
    print(f"memory: expected {say(parts)}; {free / 1e9:.1f} GB free in {where}")
    if total(parts) <= free:
        return parts
    fitting = [(words, total(need(**change))) for words, change in changes]
    fitting = [f"{words} ({size / 1e9:.2f} GB)" for words, size in fitting if size <= free][:3]
    raise OutOfMemory(
        f"this step takes {say(parts)}, and {where} has {free / 1e9:.2f} GB free; nothing was loaded. "
        + (
            f"What would fit: {'; '.join(fitting)}"
            if fitting
            else "No smaller setting of it would fit: a smaller model"
        )
    )
