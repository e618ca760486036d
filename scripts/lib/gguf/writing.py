"""Write a GGUF file from a model directory, or from a LoRA adapter.

Format and metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lib.gguf import families, packing, tensors, vocabulary

if TYPE_CHECKING:
    import numpy as np

# Keys of a PEFT adapter_config.json that do not change what the adapter computes, or that the code below handles.
PLAIN_LORA = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def write_model(
    model_dir: Path,
    out: Path,
    quantisation: str,
    blocks: Mapping[str, "np.ndarray"] | None = None,
    embedding: str | None = None,
) -> None:
    """Write one GGUF file from a directory of plain weights: matrices quantised, norms and biases f32, tokenizer
    inside.

    Holds one tensor in memory at a time. `blocks` are packed rows that replace rounding for the named matrices
    (Hugging Face names; uint8 rows of packed bytes, see packing.pack_codes). `embedding` is the quantisation of the
    token embedding and the output matrix, if it differs from that of the others. Raises ValueError, and leaves no file,
    for an architecture, tokenizer, shape or weight that such a file cannot hold.
    """
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    model_dir, out, blocks = Path(model_dir), Path(out), blocks or {}
    config = AutoConfig.from_pretrained(model_dir)
    plan = plan_file(config, model_dir, quantisation, embedding)
    files = tensors.locate_tensors(model_dir, plan)
    for hf_name, packed in blocks.items():
        if hf_name not in plan:
            raise ValueError(f"{model_dir}: blocks for {hf_name}, which is not in the model")
        _, shape, kind = plan[hf_name]
        if packed.shape != gguf.quant_shape_to_byte_shape(shape, kind):
            raise ValueError(f"blocks for {hf_name}: {packed.shape} bytes are not {kind.name} of {shape} weights")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def packed_tensors():
        for hf_name, (_, shape, kind) in plan.items():
            packed = blocks.get(hf_name)
            if packed is None:
                packed = packing.pack_weights(tensors.read_tensor(files[hf_name], hf_name, shape), hf_name, kind)
            yield families.permute(packed, hf_name, config)

    writer = gguf.GGUFWriter(path=None, arch=families.FAMILIES[config.model_type].gguf_name)
    add_config(writer, config, vocabulary.find_name(model_dir, tokenizer), find_file_type(quantisation))
    vocabulary.add_tokenizer(writer, tokenizer, config, model_dir)
    write_file(writer, out, plan.values(), packed_tensors())


def plan_file(config, model_dir: Path, quantisation: str, embedding: str | None) -> dict:
    """The tensors of the file that `write_model` would write (see plan_tensors); ValueError if it would refuse to."""
    import gguf

    families.check_config(config, model_dir)
    if unknown := {quantisation, embedding or quantisation} - set(packing.QUANTISATIONS):
        raise ValueError(f"quantisation {unknown.pop()!r}: expected one of {', '.join(packing.QUANTISATIONS)}")
    return tensors.plan_tensors(
        config, *(gguf.GGMLQuantizationType[q.upper()] for q in (quantisation, embedding or quantisation))
    )


def write_adapter(adapter_dir: Path, out: Path, config) -> None:
    """Write a PEFT LoRA adapter as a GGUF file in f16, which llama.cpp adds to the GGUF of its base. `config` is the
    base's.

    Keys and names are those that src/llama-adapter.cpp reads: A [r, in] and B [out, r] under the base tensor's name.
    The update is alpha / r · B·A. Raises ValueError, and leaves no file, for anything but plain LoRA on linear layers.
    """
    import gguf

    adapter_dir, out = Path(adapter_dir), Path(out)
    families.check_config(config, adapter_dir)
    settings = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    check_adapter(settings, adapter_dir)
    files = tensors.list_tensors(adapter_dir)
    r, f16 = settings["r"], gguf.GGMLQuantizationType.F16
    plan = {}
    for hf_name, (name, shape, _) in tensors.plan_tensors(config, f16).items():
        stem = f"base_model.model.{hf_name.removesuffix('.weight')}"
        a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        if len(shape) == 2 and name not in tensors.EMBEDDINGS and (a in files or b in files):
            plan |= {a: (f"{name}.lora_a", (r, shape[1]), f16), b: (f"{name}.lora_b", (shape[0], r), f16)}
    if not files or set(files) != set(plan):
        unexpected = min(set(files) ^ set(plan), default="adapter_model.safetensors")
        raise ValueError(f"{adapter_dir}: {unexpected}: expected only the A and B matrices of LoRA on the layers")

    def packed_tensors():
        for name, (_, shape, kind) in plan.items():
            packed = packing.pack_weights(tensors.read_tensor(files[name], name, shape), name, kind)
            yield families.permute(packed, name, config) if ".lora_B." in name else packed

    writer = gguf.GGUFWriter(path=None, arch=families.FAMILIES[config.model_type].gguf_name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp divides by r; rsLoRA (arXiv 2312.03732) by its root.
    writer.add_float32(
        gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"] * (r**0.5 if settings.get("use_rslora") else 1)
    )
    write_file(writer, out, plan.values(), packed_tensors())


def check_adapter(settings: dict, adapter_dir: Path) -> None:
    """ValueError for an adapter with more than plain LoRA, which would silently be left out of the file."""
    method, task = settings.get("peft_type"), settings.get("task_type")
    if method != "LORA" or task != "CAUSAL_LM":
        raise ValueError(f"{adapter_dir}: expected a LORA adapter for CAUSAL_LM, not {method} for {task}")
    unsupported = {key: value for key, value in settings.items() if value and key not in PLAIN_LORA}
    if unsupported.get("bias") == "none":
        del unsupported["bias"]
    # PiSSA, OLoRA and similar methods begin by subtracting a part from the base's weights.
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        unsupported["init_lora_weights"] = settings["init_lora_weights"]
    if not settings["lora_alpha"]:
        unsupported["lora_alpha"] = 0  # llama.cpp takes 0 for "not scaled"
    for key, value in unsupported.items():
        raise ValueError(f"{adapter_dir}: cannot write an adapter with {key} {value!r} as GGUF")


def write_file(writer, out: Path, plan, packed_tensors: Iterable["np.ndarray"]) -> None:
    """Write the file: the (name, shape, ggml type) of each tensor, then the packed rows of each, as they arrive."""
    import gguf

    plan = list(plan)
    for name, shape, kind in plan:
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(name, shape, None, size, raw_dtype=kind)
    try:
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for rows in packed_tensors:
            writer.write_tensor_data(rows)
        writer.close()
    except BaseException:
        writer.close()
        out.unlink(missing_ok=True)
        raise


def find_file_type(quantisation: str):
    """The file type, which names the type of most tensors. If all tensors of K-quants have one type, it ends in _S."""
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
    writer.add_context_length(families.longest_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(families.head_dim(config))
    writer.add_value_length(families.head_dim(config))
    writer.add_rope_dimension_count(
        int(families.head_dim(config) * config.rope_parameters.get("partial_rotary_factor", 1))
    )
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if families.FAMILIES[config.model_type].layer_norm:
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
