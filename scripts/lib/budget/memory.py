"""What a step will need in memory, worked out from the model's config before anything is loaded.

What cannot be counted (libraries, and what an allocator holds beside what is in use) was measured on a CPU, with one
model: docs/results/memory has predictions beside what was then measured. Of GPUs nothing was measured here.

A budget is {part: bytes}.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from lib.core import compute, hardware
from lib.core.cli import OutOfMemory
from lib.model import loading

QUANTISED = {"int8": 1, "nf4": 0.516}  # bytes a weight of the matrices; NF4 with doubly quantised scales
# What libraries take of a process, on a CPU: torch and transformers; with peft, or trl and datasets as well; llama.cpp
# without torch.
LIBRARIES, TRAINERS, LLAMACPP = 0.36e9, 0.57e9, 0.32e9
# What glibc's heap holds beside what is in use, as a share of that: where freed memory is kept (sft.py), and where not.
KEPT, FREED = 0.7, 1.0
# CUDA's own context, and the share that torch's allocator wastes: not measured here.
CONTEXT, CUDA_WASTE = 0.5e9, 0.1
CACHE_BLOCK = 64  # columns that lib/engines/batching.py adds to its KV cache at once
TOLERANCE = 1.25  # budgets are right to 20 %: what is over by less may fit, and is tried


def estimate_training(
    config, adapter: dict, how: str, rows: int, length: int, checkpointing: bool, labels: int = 0
) -> dict[str, int]:
    """Training of an adapter with Adam, `rows` at once of `length` tokens. Of logits TRL holds a tile alone; who scores
    all of a row's `labels` at once holds them, their logarithms and the gradients of both in fp32."""
    from lib.budget.trace import build_meta_model, trace_forward

    on_cpu = hardware.device() == "cpu"
    held_twice = on_cpu and how == "auto"  # as in sft.py: loaded in fp32, then autocast's copies in their place
    model = build_meta_model(config, "fp32" if held_twice else how, adapter).train()
    if held_twice:
        loading.cast_frozen_linears(model, loading.torch_dtype(how))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    learnt = count_trained(config, adapter)
    weights, kept, _ = trace_forward(model, rows, length, loading.torch_dtype(how))
    used = {
        "weights": quantised_bytes(config, how) or weights - 4 * learnt,
        "adapter": 4 * learnt, "gradients and optimiser": 12 * learnt, "activations": kept,
        "logits": 16 * rows * labels * config.get_text_config().vocab_size,
    }  # fmt: skip
    return add_libraries(add_heap(used, KEPT), TRAINERS)


def estimate_answering(config, adapter: dict | None, how: str, rows: int, prompt: int, new: int) -> dict[str, int]:
    """Answers of `new` tokens to `rows` prompts of `prompt` tokens at once, through transformers."""
    import torch

    from lib.budget.trace import build_meta_model, trace_forward

    with torch.inference_mode():
        weights, cache, most = trace_forward(build_meta_model(config, how, adapter).eval(), rows, prompt)
    weights = quantised_bytes(config, how) or weights
    used = {"KV cache": cache * (prompt + new) // prompt, "activations": most - cache}
    running = {"weights": weights} | add_heap(used, FREED)
    return add_libraries(max(running, loading_parts(config, weights), key=total), TRAINERS if adapter else LIBRARIES)


def estimate_sampling(
    config, adapter: dict | None, how: str, rows: int, prompts: int, prompt: int, new: int
) -> dict[str, int]:
    """Texts of `new` tokens, sampled by lib/engines/batching.py, `rows` at once, after `prompts` different prompts of
    `prompt` tokens, which are read at once. An adapter is merged before."""
    import torch

    from lib.budget.trace import build_meta_model, trace_forward

    with torch.inference_mode():
        weights, read, most = trace_forward(build_meta_model(config, how).eval(), prompts, prompt)
    weights = quantised_bytes(config, how) or weights
    used = {
        "KV cache": rows * (prompt + new + CACHE_BLOCK) * (read // (prompts * prompt)), "activations": most - read,
        "sampling": 4 * 4 * rows * config.vocab_size,  # logits, probabilities, their sums, those of likelier tokens
    }  # fmt: skip
    running = {"weights": weights} | add_heap(used, FREED)
    return add_libraries(max(running, loading_parts(config, weights), key=total), TRAINERS if adapter else LIBRARIES)


def estimate_llamacpp(file_bytes: int, values: int, streams: int, context: int) -> dict[str, int]:
    """Answers through llama.cpp, in main memory: a KV cache in 16 bit of `context` tokens for each of `streams`, of so
    many key-values a token."""
    return {"file": file_bytes, "KV cache": 2 * streams * context * values, "libraries": LLAMACPP}


def estimate_comparison(config, positions: int) -> dict[str, int]:
    """A divergence check: models in fp32 one after another, and distributions of two of them at so many positions."""
    return add_libraries(
        loading_parts(config, 4 * count_parameters(config)) | distribution_bytes(config, positions), LIBRARIES
    )


def estimate_merge(config, positions: int) -> dict[str, int]:
    """A merge in fp32 on a CPU, whose room the heap keeps, and its divergence check."""
    weights = 4 * count_parameters(config)
    found = loading_parts(config, weights) | distribution_bytes(config, positions)
    return found | {"allocator overhead": weights, "libraries": TRAINERS}


def distribution_bytes(config, positions: int) -> dict[str, int]:
    return {"distributions": 2 * 4 * positions * config.vocab_size}


def estimate_calibration(config, length: int, distilled: bool = False) -> dict[str, int]:
    """Calibrated rounding on a CPU, rows of at most `length` tokens: the second moments of all linear layers' inputs.
    Where the scales then learn from the model: that one in 16 bit, gradients of all weights, autocast's copies; what
    this takes in a long run was 3 to 5 GB for the default model, of which the heap's share is not foreseen."""
    from lib.budget.trace import build_meta_model, trace_forward

    model = build_meta_model(config, "fp32").requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda *given: given[2].requires_grad_())
    weights, kept, _ = trace_forward(model, 1, length, hardware.compute_dtype())
    layers = linear_layers(model)
    moments = sum(layer.in_features**2 for layer in layers) + config.hidden_size**2
    used = {"activations": kept, "inputs": 4 * length * sum(layer.in_features for layer in layers)}
    more = {"gradients": weights + weights // 2, "teacher": weights // 2} if distilled else {}
    return {"weights": weights, "second moments": 4 * moments} | more | add_heap(used, FREED) | {"libraries": LIBRARIES}


# --- sizes from a config ------------------------------------------------------------------------------------


def linear_layers(model) -> list:
    import torch

    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def count_parameters(config) -> int:
    from lib.budget.trace import build_meta_model

    return sum(p.numel() for p in build_meta_model(config, "fp32").parameters())


def count_linear_weights(config) -> int:
    """Weights of the linear layers, but for the output matrix."""
    from lib.budget.trace import build_meta_model

    return sum(layer.weight.numel() for layer in linear_layers(build_meta_model(config, "fp32")))


def count_trained(config, adapter: dict) -> int:
    """Parameters of an adapter."""
    from lib.budget.trace import build_meta_model

    return sum(p.numel() for p in build_meta_model(config, "fp32", adapter).parameters() if p.requires_grad)


def count_key_values(config) -> int:
    """Values that a token takes in the KV cache."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * width * config.num_hidden_layers


def count_key_values_of_gguf(file: Path) -> int:
    """The same of a GGUF file, from its header: without torch, which llama.cpp does not need."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    family = fields["general.architecture"].contents()

    def read_field(name: str) -> int | None:
        return fields[f"{family}.{name}"].contents() if f"{family}.{name}" in fields else None

    heads = read_field("attention.head_count")
    width = read_field("attention.key_length") or read_field("embedding_length") // heads
    return 2 * (read_field("attention.head_count_kv") or heads) * width * read_field("block_count")


def quantised_bytes(config, how: str) -> int:
    """Bytes of weights that bitsandbytes rounds: the linear layers'; all else stays in 16 bit. 0 where it does not."""
    linear = count_linear_weights(config)
    return int(linear * QUANTISED[how] + 2 * (count_parameters(config) - linear)) if how in QUANTISED else 0


def loading_parts(config, weights: int) -> dict[str, int]:
    """While they are read: the file is mapped into memory beside them."""
    return {"weights": weights, "file being read": 2 * count_parameters(config)}


def add_heap(used: dict, share: float) -> dict[str, int]:
    """A CPU's allocator holds more than what is in use; a GPU's too, see on_device."""
    return used | ({"allocator overhead": share * total(used)} if hardware.device() == "cpu" else {})


def add_libraries(used: dict, libraries: float) -> dict[str, int]:
    if hardware.device() == "cpu":
        return used | {"libraries": libraries}
    return used | {"CUDA and allocator": CONTEXT + CUDA_WASTE * total(used)}


# --- held against what there is -----------------------------------------------------------------------------


def total(parts: dict) -> float:
    return sum(parts.values())


def describe(parts: dict) -> str:
    """1.91 GB (weights 0.54, activations 0.71 …)"""
    each = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size >= 5e6)
    return f"{total(parts) / 1e9:.2f} GB ({each})"


def check_fits(need: Callable[..., dict], changes: list[list[tuple[str, dict]]], free: tuple[float, str]) -> int | None:
    """Say what need() takes, and return it in bytes; OutOfMemory when there is clearly less.

    `changes` are kinds of change, the least harmful first: of each a list of (what to say, arguments of `need`), of
    which the first that fits is named, for three kinds. `free` is (bytes, where).
    """
    room, where = free
    try:
        parts = need()
    except RuntimeError as error:
        from lib.budget.trace import needs_values

        if not needs_values(error):  # a defect, which would leave every model without a guard
            raise
        print(f"estimated memory: unknown for this model: {compute.first_line(error)}")
        return None
    print(f"estimated memory: {describe(parts)}; free: {room / 1e9:.1f} GB ({where})")
    if total(parts) <= TOLERANCE * room:
        return int(total(parts))
    fitting = []
    for kind in changes:
        sizes = ((words, total(need(**change))) for words, change in kind)
        fitting += [f"{words} ({size / 1e9:.2f} GB)" for words, size in sizes if size <= room][:1]
        if len(fitting) == 3:
            break
    raise OutOfMemory(
        f"this step needs about {describe(parts)}, but only {room / 1e9:.2f} GB is free ({where}); no model was "
        "loaded. "
        + (f"Settings that fit: {'; '.join(fitting)}" if fitting else "No smaller setting fits: use a smaller model")
    )


def check_disk(output: Path, size: float) -> None:
    """OutOfMemory where the disk has less than `size` bytes for what is written to `output`."""
    place = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if size > free:
        raise OutOfMemory(
            f"{output}: this step writes up to {size / 1e9:.2f} GB, but the disk has only {free / 1e9:.2f} GB free; no "
            "model was loaded. Free some space, or choose another --output"
        )
