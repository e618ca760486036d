"""The tokenizer inside a GGUF file: written from a Hugging Face one, read back, and the two compared.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Ids that the model was not trained on run, and babble:
whatever has no exact counterpart in llama.cpp is refused.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """What llama.cpp does under the name of a pre-tokenizer, in the words of tokenizer.json."""

    steps: list[dict]
    # Before the steps. llama.cpp does nothing there: a text that is not in NFC, which few are, gets other ids.
    normaliser: dict | None = None
    ignore_merges: bool = False  # words that stand in the vocabulary are taken whole, whatever the merges make of them


# llama.cpp knows pre-tokenizers only by name (src/llama-vocab.cpp). Another one is refused: the file would run and
# babble.
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
    for added in raw["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    if max(tokens) >= config.vocab_size:
        raise ValueError(f"{model_dir}: token {max(tokens)} is outside the vocabulary of {config.vocab_size}")
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
        writer.add_eot_token_id: find_end_of_turn(model_dir, tokenizer.eos_token_id),
    }
    for add, index in special.items():
        if index is not None:
            add(index)
    plain = tokenizer("a")["input_ids"]  # what the tokenizer puts around a text by itself
    writer.add_add_bos_token(plain[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(plain[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def find_end_of_turn(model_dir: Path, eos: int | None) -> int | None:
    """A stop token of the generation config that is not EOS: GGUF has a key of its own for it."""
    file = model_dir / "generation_config.json"
    stops = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    stops = stops if isinstance(stops, list) else [stops]
    return next((stop for stop in stops if stop not in (None, eos)), None)


def find_name(model_dir: Path, tokenizer) -> str:
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
    raise ValueError(
        f"{model_dir}: llama.cpp has no tokenizer with byte fallback that splits text as {json.dumps(found)}"
    )


def pre_tokenizer_name(raw: dict, model_dir: Path) -> str:
    """llama.cpp's name for the split in a tokenizer.json; ValueError when it has none among ours."""
    model, pre = raw["model"], raw["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    ours = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]  # moves no boundary
    for name, known in PRE_TOKENIZERS.items():
        if known == (ours, raw["normalizer"], bool(model.get("ignore_merges"))):
            return name
    found = json.dumps({"normalizer": raw["normalizer"], "pre_tokenizer": ours})
    raise ValueError(f"{model_dir}: llama.cpp's name for this pre-tokenizer is not known: {found}")


# --- read ------------------------------------------------------------------------------------------------


def read_tokenizer(path: Path):
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
    splits = PRE_TOKENIZERS[name]
    steps = [step | {"trim_offsets": True} for step in splits.steps]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in stored["ggml.merges"]],
        "ignore_merges": splits.ignore_merges,
    }
    parts = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": splits.normaliser,
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


def read_eos_token_ids(path: Path) -> set[int]:
    """The ids that end an answer."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    keys = (gguf.Keys.Tokenizer.EOS_ID, gguf.Keys.Tokenizer.EOT_ID)
    return {int(fields[key].contents()) for key in keys if key in fields}
