"""GGUF files: write one from a model directory or a LoRA adapter, read one back as a torch model, check its tokenizer.

Format and metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Blocks hold 32 weights of
a row (ggml/src/ggml-common.h): `block_q4_0` is an fp16 scale d and 32 codes of 4 bits, w = d·(code - 8), 18
bytes; `block_iq4_nl` the same with w = d·level[code]; `block_q5_0` has the codes' fifth bits before them, w = d·(code -
16), 22 bytes; what else there is, lib/ggml.py packs.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lib import ggml

if TYPE_CHECKING:
    import numpy as np

# transformers' model types and llama.cpp's names (src/llama-arch.cpp) of the architectures that can be written.
FAMILIES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi": "phi2", "phi3": "phi3",
}  # fmt: skip
QUANTISATIONS = ("iq4_nl", "q4_0", "q4_1", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0", "f16")
CALIBRATED = ("iq4_nl", "q4_0", "q5_0")  # lib/rounding.py knows how
BLOCK = 32

# llama.cpp knows pre-tokenizers only by name (src/llama-vocab.cpp). These are the same splits in the words of
# tokenizer.json. Another one is refused: the file would run and babble.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2_BYTES = BYTES | {"use_regex": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (  # Llama 3's, but for single digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": [GPT2_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2_BYTES],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}, BYTES,
    ],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}, BYTES,
    ],
}  # fmt: skip
# What tokenizer.json does to a text before the split. llama.cpp does nothing: a text that is not in NFC, which few
# are, gets other ids there.
NORMALISERS = {"qwen2": {"type": "NFC"}}

# SentencePiece's BPE with byte fallback, llama.cpp's tokenizer model "llama": (normaliser, pre-tokenizer), and whether
# a space goes before each text between special tokens. "always" spares a text that begins with one, and "first" puts
# one before the whole alone, which llama.cpp does not: there, the chat template decides whether ids agree.
SPACE = "▁"
PREPEND = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
SENTENCEPIECE = [
    ({"type": "Sequence", "normalizers": PREPEND}, None, True),
    (None, METASPACE | {"prepend_scheme": "always"}, True),
    (None, METASPACE | {"prepend_scheme": "first"}, False),
    (None, METASPACE | {"prepend_scheme": "never"}, False),
]

EMBEDDINGS = ("token_embd.weight", "output.weight")  # GGUF's names of the matrices with a row for each token

# What a PEFT adapter_config.json may say without changing what the adapter computes, or is taken into account.
PLAIN_LORA = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip

# transformers' names of special tokens and GGUF's.
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


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
    add_config(writer, config, display_name(model_dir, tokenizer), file_type(quantisation))
    add_tokenizer(writer, tokenizer, config, model_dir)
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


def add_tokenizer(writer, tokenizer, config, model_dir: Path) -> None:
    """Tokens, merges, special ids and chat template; ids stay as they are, gaps become unused tokens."""
    from gguf import TokenType

    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    model = raw["model"]
    if model["type"] != "BPE":
        raise ValueError(f"{model_dir}: GGUF needs a BPE tokenizer here, not {model['type']}")
    tokens = {index: (text, TokenType.NORMAL) for text, index in model["vocab"].items()}
    if model.get("byte_fallback"):
        tokens |= {model["vocab"][text]: (text, TokenType.BYTE) for text in byte_tokens(model, model_dir)}
    for added in raw["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    if max(tokens) >= config.vocab_size:
        raise ValueError(f"{model_dir}: token {max(tokens)} lies outside the vocabulary of {config.vocab_size}")
    rows = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(config.vocab_size)]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    if model.get("byte_fallback"):
        # SentencePiece joins the pair whose token scores highest; the merges made of it keep that order.
        ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([float(-ranks.get(text, len(merges))) for text, _ in rows])
        writer.add_add_space_prefix(space_prefix(raw, model_dir))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(raw, model_dir))
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_add_space_prefix(False)

    special = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_eot_token_id: end_of_turn(model_dir, tokenizer.eos_token_id),
    }
    for add, index in special.items():
        if index is not None:
            add(index)
    plain = tokenizer("a")["input_ids"]  # what the tokenizer puts around a text by itself
    writer.add_add_bos_token(plain[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(plain[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def end_of_turn(model_dir: Path, eos: int | None) -> int | None:
    """A stop token of the generation config that is not EOS: GGUF has a key of its own for it."""
    file = model_dir / "generation_config.json"
    stops = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    stops = stops if isinstance(stops, list) else [stops]
    return next((stop for stop in stops if stop not in (None, eos)), None)


def display_name(model_dir: Path, tokenizer) -> str:
    """The directory's name, and "phi3" where special tokens swallow the white space after them.

    llama.cpp lets them where the model's name says Phi-3, and nowhere else (llama_vocab::impl::load): all but three,
    which it wants to find. ValueError where a tokenizer differs from that.
    """
    name = re.sub("phi-?3", "phi 3", model_dir.resolve().name, flags=re.IGNORECASE)
    added = {token.content: token.rstrip for token in tokenizer.added_tokens_decoder.values()}
    if not any(added.values()):
        return name
    kept = {"<unk>", "<s>", "<|endoftext|>"}
    odd = {text for text, swallows in added.items() if swallows == (text in kept)} | (kept | {"</s>"}) - set(added)
    if odd:
        raise ValueError(f"{model_dir}: llama.cpp treats the white space after {min(odd)} differently")
    return f"phi3 {name}"


def byte_tokens(model: dict, model_dir: Path) -> list[str]:
    """The tokens that stand for single bytes, with which any text can be written."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if missing := [token for token in tokens if token not in model["vocab"]]:
        raise ValueError(f"{model_dir}: its tokenizer falls back to bytes, but has no token {missing[0]}")
    return tokens


def space_prefix(raw: dict, model_dir: Path) -> bool:
    """Whether a space goes before each text; ValueError where this is none of the ways that llama.cpp knows."""
    found = (raw["normalizer"], raw["pre_tokenizer"])
    for *known, prefix in SENTENCEPIECE:
        if list(found) == known:
            return prefix
    raise ValueError(f"{model_dir}: llama.cpp has no tokenizer with byte fallback that splits as {json.dumps(found)}")


def pre_tokenizer_name(raw: dict, model_dir: Path) -> str:
    """llama.cpp's name for the split in a tokenizer.json; ValueError when it has none among ours."""
    model, pre = raw["model"], raw["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    ours = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]  # moves no boundary
    for name, known in PRE_TOKENIZERS.items():
        # llama.cpp takes whole words from the vocabulary before merging for llama-bpe, and only there.
        same = ours == known and raw["normalizer"] == NORMALISERS.get(name)
        if same and bool(model.get("ignore_merges")) == (name == "llama-bpe"):
            return name
    found = json.dumps({"normalizer": raw["normalizer"], "pre_tokenizer": ours})
    raise ValueError(f"{model_dir}: llama.cpp's name for this pre-tokenizer is not known: {found}")


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


def ends(path: Path) -> set[int]:
    """The ids that end an answer."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    keys = (gguf.Keys.Tokenizer.EOS_ID, gguf.Keys.Tokenizer.EOT_ID)
    return {int(fields[key].contents()) for key in keys if key in fields}


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


def tokenizer(path: Path):
    """The byte-level BPE tokenizer inside a GGUF file, chat template included.

    transformers 5.23 can build one too, but takes the pre-tokenizer "smollm" for GPT-2's (two spaces before
    a digit get other ids than in llama.cpp and in training), and loses the template beside a config.json.
    """
    import gguf
    from gguf import TokenType
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(path).fields
    prefix = "tokenizer."
    stored = {k.removeprefix(prefix): f.contents() for k, f in fields.items() if k.startswith(prefix)}
    name, tokens = stored["ggml.pre"], stored["ggml.tokens"]
    if stored["ggml.model"] != "gpt2" or name not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: cannot read a tokenizer {stored['ggml.model']!r} with {name!r} splits")
    whole = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
    added = [
        whole | {"id": i, "content": tokens[i], "special": kind == TokenType.CONTROL}
        for i, kind in enumerate(stored["ggml.token_type"])
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    steps = [step | {"trim_offsets": True} for step in PRE_TOKENIZERS[name]]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in stored["ggml.merges"]],
        "ignore_merges": name == "llama-bpe",
    }
    parts = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": NORMALISERS.get(name),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": BYTES | {"trim_offsets": True},
        "model": model,
    }
    ids = {ours: stored.get(f"ggml.{theirs}_token_id") for ours, theirs in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        add_bos_token=bool(stored.get("ggml.add_bos_token")),
        chat_template=stored.get("chat_template"),
        **{ours: tokens[index] for ours, index in ids.items() if index is not None},
    )


# --- check -----------------------------------------------------------------------------------------------


def compare_token_ids(
    path: Path, hf_tokenizer, chats: list[list[dict]] | None = None, ends: Iterable[int] = ()
) -> list[str]:
    """Where llama.cpp and a Hugging Face tokenizer disagree on chats (default: the fixed ones); empty when nowhere.

    Once for the ids of the text that Hugging Face renders, once for what each puts around it by itself, and once for
    llama.cpp's own rendering of the chat template inside the file. That rendering leaves out a BOS which the tokenizer
    adds, and so hides one that it should not add: every program that renders the template itself would have two.
    An answer must also end at each of the ids `ends`.
    """
    from lib.chat import probes
    from lib.llamacpp import LlamaCpp

    differences = []
    engine = LlamaCpp(path, context=512, parallel=1)
    try:
        for number, chat in enumerate(probes(hf_tokenizer) if chats is None else chats):
            text = hf_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            plain = hf_tokenizer(text, add_special_tokens=False)["input_ids"]
            added = hf_tokenizer(text)["input_ids"]
            for what, ids, expected in (
                ("ids", engine.tokenize(text), plain),
                ("BOS or EOS", engine.tokenize(text, add_special=True), added),
                ("chat template", engine.prompt_ids(chat), plain),
            ):
                if ids != expected:
                    differences.append(f"chat {number}, {what}: {first_difference(ids, expected)}")
        differences += [f"an answer does not end at token {end}" for end in ends if not engine.stops_at(end)]
    finally:
        engine.close()
    return differences


def first_difference(ours: list[int], expected: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), None)
    at = min(len(ours), len(expected)) if at is None else at
    return f"from token {at}: llama.cpp {ours[at : at + 5]}, Hugging Face {expected[at : at + 5]}"
