"""The tokenizer inside a GGUF file: written from a Hugging Face one, read back, and the two compared.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A model that gets ids which it was not trained on runs,
but babbles. So a tokenizer is refused unless it has an exact counterpart in llama.cpp.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """What llama.cpp does for the name of a pre-tokenizer, in the terms of tokenizer.json."""

    steps: list[dict]
    # Runs before the steps. llama.cpp does not normalise: the few texts that are not in NFC get other ids.
    normaliser: dict | None = None
    ignore_merges: bool = False  # a word in the vocabulary is one token, even if the merges split it


# llama.cpp knows pre-tokenizers only by name (src/llama-vocab.cpp). Any other is refused, since the model would babble.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2_BYTES = BYTES | {"use_regex": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (  # Llama 3's, but for single digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer([GPT2_BYTES]),
    "smollm": PreTokenizer([{"type": "Digits", "individual_digits": True}, GPT2_BYTES]),
    "llama-bpe": PreTokenizer([SPLIT | {"pattern": {"Regex": LLAMA3}}, BYTES], ignore_merges=True),
    "qwen2": PreTokenizer([SPLIT | {"pattern": {"Regex": QWEN2}}, BYTES], normaliser={"type": "NFC"}),
}

# SentencePiece's BPE with byte fallback is llama.cpp's tokenizer model "llama": (normaliser, pre-tokenizer, whether a
# space goes before each text between special tokens). "always" adds none before a text that begins with one, and
# "first" adds one only at the very start. llama.cpp does neither, so there the chat template decides whether ids agree.
SPACE = "▁"
PREPEND = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
SENTENCEPIECE = [
    ({"type": "Sequence", "normalizers": PREPEND}, None, True),
    (None, METASPACE | {"prepend_scheme": "always"}, True),
    (None, METASPACE | {"prepend_scheme": "first"}, False),
    (None, METASPACE | {"prepend_scheme": "never"}, False),
]

# transformers' names of special tokens and GGUF's.
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


# --- write -----------------------------------------------------------------------------------------------


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
    for token in raw["added_tokens"]:
        if token["special"] and token["id"] >= config.vocab_size:
            continue  # the model has no row for it, so that no text may hold it
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        tokens[token["id"]] = (token["content"], kind)
    if max(tokens) >= config.vocab_size:
        raise ValueError(f"{model_dir}: token {max(tokens)} is outside the vocabulary of {config.vocab_size}")
    entries = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(config.vocab_size)]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    writer.add_token_list([text for text, _ in entries])
    writer.add_token_types([kind for _, kind in entries])
    if model.get("byte_fallback"):
        # SentencePiece joins the pair whose token has the highest score. The merges are in that order.
        ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([float(-ranks.get(text, len(merges))) for text, _ in entries])
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
        writer.add_eot_token_id: find_end_of_turn(model_dir, tokenizer.eos_token_id),
    }
    for add, index in special.items():
        if index is not None:
            add(index)
    ids = tokenizer("a")["input_ids"]  # with the tokens that the tokenizer itself adds around a text
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())  # of several, the default


def find_end_of_turn(model_dir: Path, eos: int | None) -> int | None:
    """A stop token of the generation config other than EOS, for which GGUF has a separate key."""
    file = model_dir / "generation_config.json"
    stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    stops = stops if isinstance(stops, list) else [stops]
    return next((stop for stop in stops if stop not in (None, eos)), None)


def find_name(model_dir: Path, tokenizer) -> str:
    """The directory's name, with "phi3" in front if special tokens strip the white space after them.

    In llama.cpp they do so only if the model's name contains Phi-3 (llama_vocab::impl::load), and then all but three,
    which must exist. ValueError if a tokenizer differs from that.
    """
    name = re.sub("phi-?3", "phi 3", model_dir.resolve().name, flags=re.IGNORECASE)
    added = {token.content: token.rstrip for token in tokenizer.added_tokens_decoder.values()}
    if not any(added.values()):
        return name
    exempt = {"<unk>", "<s>", "<|endoftext|>"}
    wrong = {text for text, strips in added.items() if strips == (text in exempt)} | (exempt | {"</s>"}) - set(added)
    if wrong:
        raise ValueError(f"{model_dir}: llama.cpp treats the white space after {min(wrong)} differently")
    return f"phi3 {name}"


def byte_tokens(model: dict, model_dir: Path) -> list[str]:
    """The tokens for single bytes, with which any text can be encoded."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    if missing := [token for token in tokens if token not in model["vocab"]]:
        raise ValueError(f"{model_dir}: its tokenizer falls back to bytes, but has no token {missing[0]}")
    return tokens


def space_prefix(raw: dict, model_dir: Path) -> bool:
    """Whether a space goes before each text; ValueError if llama.cpp cannot split text in this way."""
    split = (raw["normalizer"], raw["pre_tokenizer"])
    for *steps, puts_space in SENTENCEPIECE:
        if list(split) == steps:
            return puts_space
    raise ValueError(
        f"{model_dir}: llama.cpp has no tokenizer with byte fallback that splits text as {json.dumps(split)}"
    )


def pre_tokenizer_name(raw: dict, model_dir: Path) -> str:
    """llama.cpp's name for the pre-tokenizer in a tokenizer.json; ValueError if PRE_TOKENIZERS has none."""
    model, pre_tokenizer = raw["model"], raw["pre_tokenizer"] or {}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    own_steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]  # changes no boundary
    for name, supported in PRE_TOKENIZERS.items():
        if supported == (own_steps, raw["normalizer"], bool(model.get("ignore_merges"))):
            return name
    split = json.dumps({"normalizer": raw["normalizer"], "pre_tokenizer": own_steps})
    raise ValueError(f"{model_dir}: llama.cpp's name for this pre-tokenizer is not known: {split}")


# --- read ------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path):
    """The byte-level BPE tokenizer inside a GGUF file, chat template included.

    transformers 5.23 can build one too, but it takes the pre-tokenizer "smollm" for GPT-2's, so two spaces before a
    digit get other ids than in llama.cpp and in training. It also loses the template if there is a config.json.
    """
    import gguf
    from gguf import TokenType
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(path).fields
    prefix = "tokenizer."
    entries = {k.removeprefix(prefix): f.contents() for k, f in fields.items() if k.startswith(prefix)}
    name, tokens = entries["ggml.pre"], entries["ggml.tokens"]
    if entries["ggml.model"] != "gpt2" or name not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: cannot read a tokenizer {entries['ggml.model']!r} with {name!r} splits")
    flags = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
    added_tokens = [
        flags | {"id": i, "content": tokens[i], "special": kind == TokenType.CONTROL}
        for i, kind in enumerate(entries["ggml.token_type"])
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    pre_tokenizer = PRE_TOKENIZERS[name]
    steps = [step | {"trim_offsets": True} for step in pre_tokenizer.steps]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in entries["ggml.merges"]],
        "ignore_merges": pre_tokenizer.ignore_merges,
    }
    definition = {
        "version": "1.0",
        "added_tokens": added_tokens,
        "normalizer": pre_tokenizer.normaliser,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": BYTES | {"trim_offsets": True},
        "model": model,
    }
    ids = {hf_name: entries.get(f"ggml.{gguf_name}_token_id") for hf_name, gguf_name in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)),
        add_bos_token=bool(entries.get("ggml.add_bos_token")),
        chat_template=entries.get("chat_template"),
        **{hf_name: tokens[index] for hf_name, index in ids.items() if index is not None},
    )


def read_eos_token_ids(path: Path) -> set[int]:
    """The ids that end an answer."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    keys = (gguf.Keys.Tokenizer.EOS_ID, gguf.Keys.Tokenizer.EOT_ID)
    return {int(fields[key].contents()) for key in keys if key in fields}
