"""GGUF files: write one from a model directory or a LoRA adapter, read one back as a torch model.

Format and metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Blocks hold 32 weights of
a row (ggml/src/ggml-common.h): `block_q4_0` is an fp16 scale d and 32 codes of 4 bits, w = d·(code - 8), 18
bytes; `block_iq4_nl` the same with w = d·level[code]; `block_q5_0` has the codes' fifth bits before them, w = d·(code -
16), 22 bytes; what else there is, lib/ggml.py packs.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lib import ggml, vocabulary

if TYPE_CHECKING:
    import numpy as np

# transformers' model types and llama.cpp's names (src/llama-arch.cpp) of the architectures that can be written.
FAMILIES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi": "phi2", "phi3": "phi3",
}  # fmt: skip
QUANTISATIONS = ("iq4_nl", "q4_0", "q4_1", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0", "f16")
CALIBRATED = ("iq4_nl", "q4_0", "q5_0")  # lib/rounding.py knows how
BLOCK = 32

EMBEDDINGS = ("token_embd.weight", "output.weight")  # GGUF's names of the matrices with a row for each token

# What a PEFT adapter_config.json may say without changing what the adapter computes, or is taken into account.
PLAIN_LORA = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


# --- write -----------------------------------------------------------------------------------------------


def write(
    model_dir: Path,
    out: Path,
    quantisation: str,
    blocks: Mapping[str, "np.ndarray"] | None = None,
    embedding: str | None = None,
) -> None:
    """One GGUF file from a directory of plain weights: matrices quantised, norms and biases f32, tokenizer inside.

    Holds one tensor in memory at a time. `blocks` replaces what rounding would make of the named matrices
    (Hugging Face names; uint8 rows of packed bytes, see `pack`). `embedding` is the quantisation of the token
    embedding and the output matrix where it is not that of the others. Raises ValueError, and leaves no file, for an
    architecture, tokenizer, shape or weight that such a file cannot hold.
    """
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    model_dir, out, blocks = Path(model_dir), Path(out), blocks or {}
    config = AutoConfig.from_pretrained(model_dir)
    plan = plan_file(config, model_dir, quantisation, embedding)
    files = locate_tensors(model_dir, plan)
    for hf_name, packed in blocks.items():
        if hf_name not in plan:
            raise ValueError(f"{model_dir}: blocks for {hf_name}, which it does not hold")
        _, shape, kind = plan[hf_name]
        if packed.shape != gguf.quant_shape_to_byte_shape(shape, kind):
            raise ValueError(f"blocks for {hf_name}: {packed.shape} bytes are not {kind.name} of {shape} weights")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def packed_tensors():
        for hf_name, (_, shape, kind) in plan.items():
            packed = blocks.get(hf_name)
            if packed is None:
                packed = encode(read_tensor(files[hf_name], hf_name, shape), hf_name, kind)
            yield permute(packed, hf_name, config)

    writer = gguf.GGUFWriter(path=None, arch=FAMILIES[config.model_type])
    add_config(writer, config, vocabulary.display_name(model_dir, tokenizer), file_type(quantisation))
    vocabulary.add_tokenizer(writer, tokenizer, config, model_dir)
    write_file(writer, out, plan.values(), packed_tensors())


def plan_file(config, model_dir: Path, quantisation: str, embedding: str | None) -> dict:
    """The tensors (see plan_tensors) of the file that `write` would make; ValueError where it would refuse to."""
    import gguf

    check_config(config, model_dir)
    if unknown := {quantisation, embedding or quantisation} - set(QUANTISATIONS):
        raise ValueError(f"quantisation {unknown.pop()!r}: expected one of {', '.join(QUANTISATIONS)}")
    return plan_tensors(
        config, *(gguf.GGMLQuantizationType[q.upper()] for q in (quantisation, embedding or quantisation))
    )


def write_adapter(adapter_dir: Path, out: Path, config) -> None:
    """A PEFT LoRA adapter as a GGUF file in f16, which llama.cpp adds to the GGUF of its base (of that `config`).

    Keys and names as src/llama-adapter.cpp reads them: A [r, in] and B [out, r] beside the base's name, the update
    being alpha / r · B·A. Raises ValueError, and leaves no file, for anything but plain LoRA on linear layers.
    """
    import gguf

    adapter_dir, out = Path(adapter_dir), Path(out)
    check_config(config, adapter_dir)
    settings = json.loads((adapter_dir / "adapter_config.json").read_text())
    check_adapter(settings, adapter_dir)
    files = stored_tensors(adapter_dir)
    r, f16 = settings["r"], gguf.GGMLQuantizationType.F16
    plan = {}
    for hf_name, (name, shape, _) in plan_tensors(config, f16).items():
        stem = f"base_model.model.{hf_name.removesuffix('.weight')}"
        a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        if len(shape) == 2 and name not in EMBEDDINGS and (a in files or b in files):
            plan |= {a: (f"{name}.lora_a", (r, shape[1]), f16), b: (f"{name}.lora_b", (shape[0], r), f16)}
    if not files or set(files) != set(plan):
        odd = min(set(files) ^ set(plan), default="adapter_model.safetensors")
        raise ValueError(f"{adapter_dir}: {odd}: expected A and B of LoRA on the layers' matrices, and nothing else")

    def packed_tensors():
        for name, (_, shape, kind) in plan.items():
            packed = encode(read_tensor(files[name], name, shape), name, kind)
            yield permute(packed, name, config) if ".lora_B." in name else packed

    writer = gguf.GGUFWriter(path=None, arch=FAMILIES[config.model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp divides by r; rsLoRA (arXiv 2312.03732) by its root.
    writer.add_float32(
        gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"] * (r**0.5 if settings.get("use_rslora") else 1)
    )
    write_file(writer, out, plan.values(), packed_tensors())


def check_adapter(settings: dict, adapter_dir: Path) -> None:
    """Refuse what is more than LoRA: it would be left out of the file in silence."""
    method, task = settings.get("peft_type"), settings.get("task_type")
    if method != "LORA" or task != "CAUSAL_LM":
        raise ValueError(f"{adapter_dir}: expected a LORA adapter for CAUSAL_LM, not {method} for {task}")
    more = {key: value for key, value in settings.items() if value and key not in PLAIN_LORA}
    if more.get("bias") == "none":
        del more["bias"]
    # PiSSA, OLoRA and their like start by taking a part out of the base's weights.
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        more["init_lora_weights"] = settings["init_lora_weights"]
    if not settings["lora_alpha"]:
        more["lora_alpha"] = 0  # which llama.cpp takes for "not scaled"
    for key, value in more.items():
        raise ValueError(f"{adapter_dir}: cannot write an adapter with {key} {value!r} as GGUF")


def write_file(writer, out: Path, plan, tensors: Iterable["np.ndarray"]) -> None:
    """Write the file: (name, shape, ggml type) of each tensor, then each tensor's packed rows, as they come."""
    import gguf

    plan = list(plan)
    for name, shape, kind in plan:
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(name, shape, None, size, raw_dtype=kind)
    try:
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for packed in tensors:
            writer.write_tensor_data(packed)
        writer.close()
    except BaseException:
        writer.close()
        out.unlink(missing_ok=True)
        raise


def check_config(config, model_dir: Path) -> None:
    """Refuse what llama.cpp would load and compute differently, or what is not written yet."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    architecture = (config.architectures or [type(config).__name__])[0]
    if architecture != CLASSES.get(config.model_type) or config.model_type not in FAMILIES:
        known = ", ".join(CLASSES[family] for family in FAMILIES)
        raise ValueError(f"{model_dir}: cannot write {architecture} as GGUF, only {known}")
    family, rope, size = FAMILIES[config.model_type], config.rope_parameters, head_dim(config)
    part, positions = rope.get("partial_rotary_factor", 1), config.max_position_embeddings
    split = size * config.num_attention_heads != config.hidden_size
    refused = {
        f"rope type {rope.get('rope_type')!r}": rope.get("rope_type", "default") != "default",
        f"rotation of {part} of a head": part != 1 and family not in ("phi2", "phi3"),
        f"heads of {size}": split and family not in ("llama", "qwen3"),
        f"a sliding window of {longest_context(config)} tokens": longest_context(config) < positions
        and family != "phi3",
        "biases in attention or MLP": getattr(config, "attention_bias", 0) or getattr(config, "mlp_bias", 0),
        "normalised queries and keys": getattr(config, "qk_layernorm", 0),
        "a tied output matrix with a bias": config.tie_word_embeddings and family == "phi2",
        f"activation {config.hidden_act!r}": config.hidden_act != ("gelu_new" if family == "phi2" else "silu"),
    }
    if what := [name for name, true in refused.items() if true]:
        raise ValueError(f"{model_dir}: cannot write {what[0]} as GGUF")


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def longest_context(config) -> int:
    """Tokens up to which llama.cpp, which has no sliding windows in these families, computes what the model does."""
    return min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf)


def plan_tensors(config, matrix_type, embedding_type=None) -> dict[str, tuple[str, tuple[int, ...], object]]:
    """Hugging Face name -> (GGUF name, shape, ggml type), in the model's order. A tied output matrix is not among them.

    Matrices are what has two dimensions: they get `matrix_type`, or `embedding_type` if they have a row for each token
    and that is given. All else is f32. Raises ValueError for a matrix whose rows blocks do not divide.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[FAMILIES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    plan = {}
    for hf_name, parameter in model.named_parameters():
        name, shape = names.get_name(hf_name, (".weight", ".bias")), tuple(parameter.shape)
        kind = gguf.GGMLQuantizationType.F32
        if len(shape) == 2:
            kind = embedding_type if embedding_type is not None and name in EMBEDDINGS else matrix_type
            block = BLOCK if kind is None else max(BLOCK, gguf.GGML_QUANT_SIZES[kind][0])
            if shape[-1] % block:
                raise ValueError(f"{hf_name}: width {shape[-1]} is not a multiple of {block}")
        plan[hf_name] = (name, shape, kind)
    return plan


def locate_tensors(model_dir: Path, wanted: Iterable[str]) -> dict[str, Path]:
    """The safetensors file that holds each tensor; ValueError for one that none holds."""
    found = stored_tensors(model_dir)
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{model_dir}: no safetensors file holds {missing[0]} ({len(missing)} tensors missing)")
    return found


def stored_tensors(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor in a directory."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def read_tensor(file: Path, name: str, shape: tuple[int, ...]) -> "np.ndarray":
    """One tensor in f32; ValueError when its shape is not the config's or a weight is NaN or infinite."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        tensor = tensors.get_tensor(name).to(torch.float32)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}")
    if not tensor.isfinite().all():
        raise ValueError(f"{file}: {name} holds {int((~tensor.isfinite()).sum())} NaN or infinite weights")
    return tensor.numpy()


def encode(weights: "np.ndarray", name: str, kind) -> "np.ndarray":
    import gguf
    import numpy as np

    # Every block carries a 16 bit scale, and rounding to 16 bit turns too large a weight into infinity.
    if kind != gguf.GGMLQuantizationType.F32 and np.abs(weights).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name}: holds weights beyond ±65504, the range of 16 bit floats")
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return gguf.quants.quantize(weights, kind)
    return ggml.quantize(weights, kind)


def pack(scales: "np.ndarray", codes: "np.ndarray", bits: int = 4) -> "np.ndarray":
    """Rows of `block_q4_0` or `block_iq4_nl`, or with 5 bits of `block_q5_0`, from scales [rows, width / 32] and
    codes 0…15, or 0…31, [rows, width]."""
    import numpy as np

    rows, width = codes.shape
    codes = codes.astype(np.uint8).reshape(rows, width // BLOCK, BLOCK)
    first, second = np.split(codes & 15, 2, axis=2)
    fifth = [np.packbits(codes >> 4, axis=2, bitorder="little")] if bits == 5 else []
    d = scales.astype("<f2")[..., None].view(np.uint8)
    return np.concatenate([d, *fifth, first | second << 4], axis=2).reshape(rows, -1)


def permute(rows, hf_name: str, config, undo: bool = False):
    """Rows of Q and K in llama.cpp's order, or back; other tensors, and other families', as they are.

    Hugging Face rotates row i of a head with row i + half (rotate_half), and so does llama.cpp where its
    llama_model_rope_type says NEOX; for "llama" it says NORM, row i with its neighbour: `LlamaModel.permute` in
    llama.cpp's converter. Blocks lie within rows, so this holds for weights and for packed blocks alike.
    """
    if FAMILIES[config.model_type] != "llama":
        return rows
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    head_count = next((n for part, n in heads.items() if f".{part}." in hf_name), None)
    if head_count is None:
        return rows
    half = rows.shape[0] // head_count // 2
    split = (head_count, half, 2) if undo else (head_count, 2, half)
    return rows.reshape(*split, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def file_type(quantisation: str):
    """The name that a file goes by after what most of its tensors are; K-quants all of one type are called small."""
    import gguf

    names = gguf.LlamaFileType.__members__
    return next(names[name] for end in ("", "_S") if (name := f"MOSTLY_{quantisation.upper()}{end}") in names)


def add_config(writer, config, name: str, file_type: int) -> None:
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(longest_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(int(head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "phi":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)


# --- read ------------------------------------------------------------------------------------------------


def dequantised(path: Path, config=None):
    """A GGUF's weights as an ordinary fp32 model of transformers, which can also be saved.

    transformers reads GGUF files too, but marks such models as quantised, and leaves blocks packed where
    the `kernels` package is installed; this depends on neither and holds one model, not two.
    `config` where transformers cannot read it from the file: it knows no "phi2".
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(path)
    config = config or read_config(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]  # which the file does not hold
    fill(model, path)
    return model.eval()


def read_config(path: Path):
    """The transformers config of a GGUF file; ValueError where transformers or this module does not know its family."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type not in FAMILIES:
        raise ValueError(f"{path}: cannot read a model of type {config.model_type!r}, only {', '.join(FAMILIES)}")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers 5.23 leaves these two at their defaults.
    stored = gguf.GGUFReader(path).fields
    if config.model_type == "qwen3":
        config.head_dim = stored["qwen3.attention.key_length"].contents()
    if config.model_type == "phi3":
        rotated = stored["phi3.rope.dimension_count"].contents()
        config.rope_parameters["partial_rotary_factor"] = rotated / head_dim(config)
    return config


def fill(model, path: Path) -> None:
    """Copy a GGUF's weights, dequantised, into a model of the same shape."""
    import gguf
    import torch

    parameters = dict(model.named_parameters())
    hf_names = {name: hf_name for hf_name, (name, *_) in plan_tensors(model.config, None).items()}
    with torch.no_grad():
        for tensor in gguf.GGUFReader(path).tensors:
            hf_name = hf_names.pop(tensor.name, None)
            if hf_name is None:
                raise ValueError(f"{path}: unexpected tensor {tensor.name}")
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            parameters[hf_name].copy_(torch.tensor(permute(weights, hf_name, model.config, undo=True)))
    if hf_names:
        raise ValueError(f"{path}: no tensor {min(hf_names)}")
