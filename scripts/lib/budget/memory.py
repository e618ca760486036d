"""The memory that a step will need, computed from the model's config before anything is loaded.

Amounts that cannot be counted (libraries, and memory that an allocator holds but does not use) were measured on a CPU,
with one model. docs/results/memory compares predictions with measurements. Nothing was measured on a GPU.

A budget is {part: bytes}.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from lib.core import compute, hardware
from lib.core.cli import OutOfMemory
from lib.model import loading

QUANTISED = {"int8": 1, "nf4": 0.516}  # bytes per weight of the matrices; NF4 with doubly quantised scales
# Memory of the libraries in a process on a CPU: torch and transformers; these with peft, or with trl and datasets;
# llama.cpp without torch.
LIBRARIES, TRAINERS, LLAMACPP = 0.36e9, 0.57e9, 0.32e9
# Memory that glibc's heap holds but does not use, as a share of the used memory: if it keeps freed memory (sft.py), and
# if not.
KEPT, FREED = 0.7, 1.0
# CUDA's own context, and the share that torch's allocator wastes: not measured.
CONTEXT, CUDA_WASTE = 0.5e9, 0.1
CACHE_BLOCK = 64  # columns that lib/engines/batching.py adds to its KV cache at once
TOLERANCE = 1.25  # budgets are accurate to 20 %: a step that exceeds the free memory by less may fit, and is tried


def estimate_training(
    config, adapter: dict, precision: str, rows: int, length: int, checkpointing: bool, labels: int = 0
) -> dict[str, int]:
    """Training of an adapter with Adam: passes of `rows` rows of `length` tokens. TRL holds only a tile of the logits.
    A trainer that scores all `labels` of a row at once holds the logits, their logarithms and the gradients of both in
    fp32."""
    from lib.budget.trace import build_meta_model, trace_forward

    on_cpu = hardware.device() == "cpu"
    casts_frozen = on_cpu and precision == "auto"  # as in sft.py: loaded in fp32, then cast to autocast's dtype
    model = build_meta_model(config, "fp32" if casts_frozen else precision, adapter).train()
    if casts_frozen:
        loading.cast_frozen_linears(model, loading.torch_dtype(precision))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = count_trained(config, adapter)
    weights, activations, _ = trace_forward(model, rows, length, loading.torch_dtype(precision))
    parts = {
        "weights": quantised_bytes(config, precision) or weights - 4 * trainable,
        "adapter": 4 * trainable, "gradients and optimiser": 12 * trainable, "activations": activations,
        "logits": 16 * rows * labels * config.get_text_config().vocab_size,
    }  # fmt: skip
    return add_libraries(add_heap(parts, KEPT), TRAINERS)


def estimate_answering(
    config, adapter: dict | None, precision: str, rows: int, prompt_tokens: int, new_tokens: int
) -> dict[str, int]:
    """Answers of `new_tokens` to `rows` prompts of `prompt_tokens` at once, with transformers."""
    import torch

    from lib.budget.trace import build_meta_model, trace_forward

    with torch.inference_mode():
        weights, cache, peak = trace_forward(build_meta_model(config, precision, adapter).eval(), rows, prompt_tokens)
    weights = quantised_bytes(config, precision) or weights
    parts = {"KV cache": cache * (prompt_tokens + new_tokens) // prompt_tokens, "activations": peak - cache}
    inference = {"weights": weights} | add_heap(parts, FREED)
    return add_libraries(max(inference, loading_parts(config, weights), key=total), TRAINERS if adapter else LIBRARIES)


def estimate_sampling(
    config, adapter: dict | None, precision: str, rows: int, prompts: int, prompt_tokens: int, new_tokens: int
) -> dict[str, int]:
    """Texts of `new_tokens`, sampled by lib/engines/batching.py, `rows` at once, after `prompts` different prompts of
    `prompt_tokens`, which are read at once. An adapter is merged before."""
    import torch

    from lib.budget.trace import build_meta_model, trace_forward

    with torch.inference_mode():
        weights, cache, peak = trace_forward(build_meta_model(config, precision).eval(), prompts, prompt_tokens)
    weights = quantised_bytes(config, precision) or weights
    parts = {
        "KV cache": rows * (prompt_tokens + new_tokens + CACHE_BLOCK) * (cache // (prompts * prompt_tokens)),
        "activations": peak - cache,
        "sampling": 4 * 4 * rows * config.vocab_size,  # logits, probabilities, their sums, likelier tokens
    }  # fmt: skip
    inference = {"weights": weights} | add_heap(parts, FREED)
    return add_libraries(max(inference, loading_parts(config, weights), key=total), TRAINERS if adapter else LIBRARIES)


def estimate_llamacpp(file_bytes: int, values: int, streams: int, context: int) -> dict[str, int]:
    """Answers with llama.cpp, in main memory: for each of `streams`, a 16-bit KV cache of `context` tokens with
    `values` keys and values per token."""
    return {"file": file_bytes, "KV cache": 2 * streams * context * values, "libraries": LLAMACPP}


def estimate_comparison(config, positions: int) -> dict[str, int]:
    """A divergence check: models in fp32 one by one, and distributions of two of them at `positions` positions."""
    return add_libraries(
        loading_parts(config, 4 * count_parameters(config)) | distribution_bytes(config, positions), LIBRARIES
    )


def estimate_merge(config, positions: int) -> dict[str, int]:
    """A merge in fp32 on a CPU, whose memory the heap keeps, and its divergence check."""
    return merge_parts(count_parameters(config)) | distribution_bytes(config, positions)


def merge_parts(parameters: int) -> dict[str, int]:
    """The parts of a merge that a model's size determines, which doctor.py knows before there is a config."""
    weights = 4 * parameters
    return {
        "weights": weights, "file being read": 2 * parameters, "allocator overhead": weights, "libraries": TRAINERS
    }  # fmt: skip


def distribution_bytes(config, positions: int) -> dict[str, int]:
    return {"distributions": 2 * 4 * positions * config.vocab_size}


def estimate_calibration(config, length: int, distilled: bool = False) -> dict[str, int]:
    """Calibrated rounding on a CPU with rows of at most `length` tokens: the second moments of all linear layers'
    inputs. If the scales then learn from the model (`distilled`): that model in 16 bit, gradients of all weights,
    autocast's copies. A long run took 3 to 5 GB for the default model; the heap's share of it is not predicted."""
    from lib.budget.trace import build_meta_model, trace_forward

    model = build_meta_model(config, "fp32").requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda *arguments: arguments[2].requires_grad_())
    weights, activations, _ = trace_forward(model, 1, length, hardware.compute_dtype())
    layers = linear_layers(model)
    moments = sum(layer.in_features**2 for layer in layers) + config.hidden_size**2
    parts = {"activations": activations, "inputs": 4 * length * sum(layer.in_features for layer in layers)}
    distillation = {"gradients": weights + weights // 2, "teacher": weights // 2} if distilled else {}
    return (
        {"weights": weights, "second moments": 4 * moments}
        | distillation
        | add_heap(parts, FREED)
        | {"libraries": LIBRARIES}
    )


# --- sizes from a config ------------------------------------------------------------------------------------


def linear_layers(model) -> list:
    import torch

    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def count_parameters(config) -> int:
    from lib.budget.trace import build_meta_model

    return sum(p.numel() for p in build_meta_model(config, "fp32").parameters())


def count_linear_weights(config) -> int:
    """Weights of the linear layers, without the output matrix."""
    from lib.budget.trace import build_meta_model

    return sum(layer.weight.numel() for layer in linear_layers(build_meta_model(config, "fp32")))


def count_trained(config, adapter: dict) -> int:
    """Parameters of an adapter."""
    from lib.budget.trace import build_meta_model

    return sum(p.numel() for p in build_meta_model(config, "fp32", adapter).parameters() if p.requires_grad)


def count_key_values(config) -> int:
    """Values per token in the KV cache."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * width * config.num_hidden_layers


def count_key_values_of_gguf(file: Path) -> int:
    """Values per token in the KV cache of a GGUF file, from its header. Needs no torch, like llama.cpp."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    family = fields["general.architecture"].contents()

    def read_field(name: str) -> int | None:
        return fields[f"{family}.{name}"].contents() if f"{family}.{name}" in fields else None

    heads = read_field("attention.head_count")
    width = read_field("attention.key_length") or read_field("embedding_length") // heads
    return 2 * (read_field("attention.head_count_kv") or heads) * width * read_field("block_count")


def quantised_bytes(config, precision: str) -> int:
    """Bytes of a model's weights if bitsandbytes rounds the linear layers; the others stay in 16 bit. 0 if it does not
    round this precision."""
    linear = count_linear_weights(config)
    return int(linear * QUANTISED[precision] + 2 * (count_parameters(config) - linear)) if precision in QUANTISED else 0


def loading_parts(config, weights: int) -> dict[str, int]:
    """The parts while a model is loaded: the file is mapped into memory beside the weights."""
    return {"weights": weights, "file being read": 2 * count_parameters(config)}


def add_heap(parts: dict, share: float) -> dict[str, int]:
    """Add the unused memory that a CPU's allocator holds. For a GPU, `add_libraries` adds it."""
    return parts | ({"allocator overhead": share * total(parts)} if hardware.device() == "cpu" else {})


def add_libraries(parts: dict, libraries: float) -> dict[str, int]:
    if hardware.device() == "cpu":
        return parts | {"libraries": libraries}
    return parts | {"CUDA and allocator": CONTEXT + CUDA_WASTE * total(parts)}


# --- compared with what is free -----------------------------------------------------------------------------


def total(parts: dict) -> float:
    return sum(parts.values())


def describe(parts: dict) -> str:
    """1.91 GB (weights 0.54, activations 0.71 …)"""
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size >= 5e6)
    return f"{total(parts) / 1e9:.2f} GB ({sizes})"


def check_fits(need: Callable[..., dict], changes: list[list[tuple[str, dict]]], free: tuple[float, str]) -> int | None:
    """Print the budget of need() and return its total in bytes; OutOfMemory if clearly less is free.

    `changes` are kinds of change, the least harmful first. Each kind is a list of (setting to suggest, arguments of
    `need`). The error suggests the first setting that fits of each kind, up to three. `free` is (bytes, the name of
    that memory).
    """
    room, place = free
    try:
        parts = need()
    except RuntimeError as error:
        from lib.budget.trace import needs_values

        if not needs_values(error):  # a defect in this code, which would leave every model unchecked
            raise
        print(f"estimated memory: unknown for this model: {compute.first_line(error)}")
        return None
    print(f"estimated memory: {describe(parts)}; free: {room / 1e9:.1f} GB ({place})")
    if total(parts) <= TOLERANCE * room:
        return int(total(parts))
    settings = []
    for kind in changes:
        sizes = ((setting, total(need(**change))) for setting, change in kind)
        settings += [f"{setting} ({size / 1e9:.2f} GB)" for setting, size in sizes if size <= room][:1]
        if len(settings) == 3:
            break
    raise OutOfMemory(
        f"this step needs about {describe(parts)}, but only {room / 1e9:.2f} GB is free ({place}); no model was "
        "loaded. "
        + (f"Settings that fit: {'; '.join(settings)}" if settings else "No smaller setting fits: use a smaller model")
    )


def check_disk(output: Path, size: float) -> None:
    """OutOfMemory if the disk has less than `size` bytes free for `output`."""
    folder = next(parent for parent in (output, *output.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutOfMemory(
            f"{output}: this step writes up to {size / 1e9:.2f} GB, but the disk has only {free / 1e9:.2f} GB free; no "
            "model was loaded. Free some space, or choose another --output"
        )
