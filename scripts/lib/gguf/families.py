"""The model families that can be written as GGUF, and the features that llama.cpp would compute differently."""

import math
from pathlib import Path
from typing import NamedTuple


class Family(NamedTuple):
    """What llama.cpp computes for the models of one type. A model with any other feature is refused (check_config)."""

    gguf_name: str  # name of the architecture in src/llama-arch.cpp and in gguf-py's table of tensor names
    activation: str = "silu"
    layer_norm: bool = False  # LayerNorm with layer_norm_eps; else RMSNorm with rms_norm_eps
    rotates_neighbours: bool = False  # rotates row i of a head with the next row; else with row i + half (see permute)
    rotates_part: bool = False  # only the first rows of a head may be rotated
    any_head_dim: bool = False  # heads together may be wider or narrower than the model
    window_is_context: bool = False  # a sliding window becomes the file's context length; else it is refused
    output_bias: bool = False  # the output matrix has a bias, so it cannot be the embedding


# By transformers' model type. A new architecture is one more entry.
FAMILIES = {
    "llama": Family("llama", rotates_neighbours=True, any_head_dim=True),
    "mistral": Family("llama", rotates_neighbours=True, any_head_dim=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", any_head_dim=True),
    "phi": Family("phi2", activation="gelu_new", layer_norm=True, rotates_part=True, output_bias=True),
    "phi3": Family("phi3", rotates_part=True, window_is_context=True),
}


def check_config(config, model_dir: Path) -> None:
    """ValueError for a model that llama.cpp would load but compute differently, or that cannot be written yet."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    architecture = (config.architectures or [type(config).__name__])[0]
    if architecture != CLASSES.get(config.model_type) or config.model_type not in FAMILIES:
        supported = ", ".join(CLASSES[model_type] for model_type in FAMILIES)
        raise ValueError(f"{model_dir}: cannot write {architecture} as GGUF, only {supported}")
    family, rope, size = FAMILIES[config.model_type], config.rope_parameters, head_dim(config)
    part, positions = rope.get("partial_rotary_factor", 1), config.max_position_embeddings
    split = size * config.num_attention_heads != config.hidden_size
    unsupported = {
        f"rope type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        f"rotation of {part} of a head": part != 1 and not family.rotates_part,
        f"heads of {size}": split and not family.any_head_dim,
        f"a sliding window of {longest_context(config)} tokens": longest_context(config) < positions
        and not family.window_is_context,
        "biases in attention or MLP": getattr(config, "attention_bias", 0) or getattr(config, "mlp_bias", 0),
        "normalised queries and keys": getattr(config, "qk_layernorm", 0),
        "a tied output matrix with a bias": config.tie_word_embeddings and family.output_bias,
        f"activation {config.hidden_act!r}": config.hidden_act != family.activation,
    }
    if features := [name for name, applies in unsupported.items() if applies]:
        raise ValueError(f"{model_dir}: cannot write {features[0]} as GGUF")


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def longest_context(config) -> int:
    """The longest context for which llama.cpp agrees with the model: in these families it has no sliding windows."""
    return min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf)


def permute(rows, hf_name: str, config, undo: bool = False):
    """Rows of Q and K in llama.cpp's order, or with `undo` in Hugging Face's. All other tensors are returned unchanged.

    Hugging Face rotates row i of a head with row i + half (rotate_half). So does llama.cpp for families whose
    llama_model_rope_type is NEOX; for NORM it rotates row i with its neighbour (`LlamaModel.permute` in llama.cpp's
    converter). Blocks lie within rows, so this works for weights and for packed blocks.
    """
    if not FAMILIES[config.model_type].rotates_neighbours:
        return rows
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    head_count = next((n for part, n in heads.items() if f".{part}." in hf_name), None)
    if head_count is None:
        return rows
    half = rows.shape[0] // head_count // 2
    split = (head_count, half, 2) if undo else (head_count, 2, half)
    return rows.reshape(*split, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
