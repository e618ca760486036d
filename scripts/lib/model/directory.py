"""What a model directory is: its kind, its base, its config and its tokenizer."""

import contextlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lib.core import artifact, cli, compute
from lib.core.cli import InputError


class ModelDirectory(NamedTuple):
    """A model directory. A script's `main` calls `open_directory` once and passes the result on."""

    path: Path
    kind: str  # "plain": 16-bit weights; "quantised": NF4 or INT8; "gguf"; "adapter": on another model directory
    config: dict  # config.json, or an adapter's adapter_config.json; {} where there is none, and of a GGUF
    gguf_files: list[Path]
    own_tokenizer: bool  # else its base's
    known_base: "ModelDirectory | None"
    base_problem: str = ""  # why the base cannot be used

    @property
    def base(self) -> "ModelDirectory | None":
        """The base of an adapter, None for any other model; InputError if it is missing or is another model."""
        if self.base_problem:
            raise InputError(self.base_problem)
        return self.known_base

    @property
    def gguf(self) -> Path:
        """Its only GGUF file; InputError unless it has exactly one."""
        if len(self.gguf_files) != 1:
            raise InputError(f"{self.path}: holds {len(self.gguf_files)} GGUF files, expected one")
        return self.gguf_files[0]


def open_directory(path: Path | str, base: Path | None = None) -> ModelDirectory:
    """Find out what a directory is. If `base` is given, an adapter goes on it and takes its tokenizer; otherwise the
    adapter goes on the base that it names. InputError if a config is not JSON."""
    path = Path(path)
    gguf_files = sorted(path.glob("*.gguf"))
    if (path / "adapter_config.json").is_file():
        config = cli.read_json(path / "adapter_config.json")
        own_tokenizer = base is None and (path / "tokenizer_config.json").is_file()  # it is in the GGUF of some bases
        base, problem = find_base(path, config.get("base_model_name_or_path"), base)
        return ModelDirectory(
            path, "adapter", config, gguf_files, own_tokenizer, base and open_directory(base), problem
        )
    has_config = not gguf_files and (path / "config.json").is_file()
    config = cli.read_json(path / "config.json") if has_config else {}
    kind = "gguf" if gguf_files else "quantised" if "quantization_config" in config else "plain"
    return ModelDirectory(path, kind, config, gguf_files, True, None)


def find_base(adapter: Path, named: str | None, given: Path | None) -> tuple[Path | None, str]:
    """(the directory of an adapter's base, ""), or (a directory that cannot be it or None, the reason).

    It is `given`, or what the adapter names: an absolute path, or one relative to the adapter; where both came from
    another machine, the directory of that name beside the adapter; last, as PEFT has it, one relative to the working
    directory. Where the adapter's metadata.json records the base's digest, only a base with that digest will do.
    """
    places = [adapter / named, adapter.parent / Path(named).name, Path(named)] if named else []
    has_metadata = (adapter / artifact.METADATA).is_file()
    recorded = artifact.read_metadata(adapter)["inputs"].get("base") if has_metadata else None
    problems = []
    for base in [given] if given else places:
        if not base.is_dir() or (not given and base.samefile(adapter)):
            continue
        if (base / "adapter_config.json").is_file():
            problem = f"{base}: is itself an adapter, so {adapter} cannot go on it; merge it into its own base"
            problems.append((None, problem))
        elif recorded and (digest := read_digest(base)) != recorded["digest"]:
            problem = (
                f"{base}: is not the base that {adapter} was trained on: its digest differs ({digest[:12]}; that of "
                f"{recorded['path']} was {recorded['digest'][:12]}); together they would run and answer wrongly. Give "
                "that base, or train the adapter on this one"
            )
            problems.append((base, problem))
        else:
            return base, ""
    missing = f"{adapter}: its base model {str(given or named)!r} is not there; `make base` makes it"
    return problems[0] if problems else (None, missing)


def read_digest(base: Path) -> str:
    """The digest of a base. That of an artifact is read: to compute it, 16 GB would be read for 8 billion parameters
    each time an adapter is opened."""
    is_artifact = (base / artifact.METADATA).is_file() and not artifact.is_foreign(base)
    return (artifact.read_metadata(base) if is_artifact else artifact.identify(base))["digest"]


def load_tokenizer(model: ModelDirectory):
    """The tokenizer of a model directory; InputError when the directory has none or no chat template. It pads with EOS
    where its own pad token is missing or has no row in the embedding."""
    from transformers import AutoTokenizer

    from lib.gguf import vocabulary
    from lib.model import chat

    adapted, model = model, model if model.own_tokenizer else model.base
    try:
        tokenizer = (
            vocabulary.read_tokenizer(model.gguf) if model.kind == "gguf" else AutoTokenizer.from_pretrained(model.path)
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]  # its first line may end in a colon
        raise InputError(f"{model.path}: transformers cannot load its tokenizer: {reason}") from None
    chat.use_default_template(tokenizer, model.path)
    if not tokenizer.chat_template:
        raise InputError(
            f"{model.path}: the tokenizer has no chat template; `make base` gives such a model a plain one"
        )
    if model.kind != "gguf":  # in which each token has a row
        mend_padding(tokenizer, count_embedding_rows(adapted))
    return tokenizer


def mend_padding(tokenizer, rows: int) -> None:
    """Pad with EOS if the pad token is missing or has no row in the embedding. Any token would do: padding is masked,
    and labels are masked by position."""
    pad = tokenizer.pad_token_id
    if pad is None or pad >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def count_embedding_rows(model: ModelDirectory) -> int:
    """How many token ids the model has a vector for."""
    return load_config(model).get_text_config().vocab_size


def check_ids(path: Path, rows: int, tokenizer, texts: Iterable[list[int]]) -> None:
    """InputError if a text has an id without a row in the embedding: that of a token which was added to the tokenizer
    alone. Rows without a token are harmless."""
    for ids in texts:
        if (highest := max(ids, default=0)) >= rows:
            raise InputError(
                f"{path}: its tokenizer gives {tokenizer.convert_ids_to_tokens(highest)!r} the id {highest}, but the "
                f"embedding has only {rows:,} rows. Remove the token from the tokenizer, or from this text: "
                f"{tokenizer.decode(ids)[:160]!r}"
            )


def eos_token_ids(model: ModelDirectory) -> set[int]:
    """The ids that end an answer; for an adapter, those of its base. InputError if the model does not name them."""
    from transformers import GenerationConfig

    from lib.gguf import vocabulary
    from lib.model import chat

    if model.kind == "adapter":
        return eos_token_ids(model.base)
    if model.kind == "gguf":
        return vocabulary.read_eos_token_ids(model.gguf)
    try:
        return chat.eos_token_ids(GenerationConfig.from_pretrained(model.path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{model.path}: no ids that end an answer: {compute.first_line(error)}; `make base MODEL={model.path}` "
            "copies the model and adds them"
        ) from None


def read_generation_settings(model: ModelDirectory) -> dict:
    """What a model's own generation config asks for besides its ids: sampling, penalties, lengths. For an adapter, that
    of its base; {} for a GGUF or where there is none."""
    if model.kind == "adapter":
        return read_generation_settings(model.base)
    file = model.path / "generation_config.json"
    settings = cli.read_json(file) if model.kind != "gguf" and file.is_file() else {}
    others = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache", "_from_model_config")
    return {name: value for name, value in settings.items() if name not in others and value}


def load_config(model: ModelDirectory):
    """transformers' config of a model directory of any kind; for an adapter, that of its base. InputError if
    transformers cannot read one."""
    from transformers import AutoConfig

    if model.kind == "adapter":
        return load_config(model.base)
    try:
        if model.kind == "gguf":
            from lib.gguf import reading

            return reading.read_config(model.gguf)
        return AutoConfig.from_pretrained(model.path)
    except (OSError, ValueError) as error:
        raise InputError(f"{model.path}: transformers cannot read its config: {compute.first_line(error)}") from None


def stored_precision(model: ModelDirectory, precision: str) -> str:
    """The precision of a directory's weights after `load_model(model, precision)`: quantised weights keep theirs."""
    if model.kind == "adapter":
        return stored_precision(model.base, precision)
    quantization = model.config.get("quantization_config")
    if not quantization:
        return precision
    return "nf4" if quantization.get("load_in_4bit") else "int8"


def read_adapter_shape(model: ModelDirectory) -> dict | None:
    """An adapter's shape for PEFT: LoRA's rank and targets, or a tuned prompt's length; None for other models."""
    config = model.config if model.kind == "adapter" else {}
    return {key: config[key] for key in ("r", "target_modules", "num_virtual_tokens") if config.get(key)} or None


def context_length(model: ModelDirectory) -> float:
    """How many tokens of text the model was made for, prompt and answer together; infinity where its config sets no
    limit. A tuned prompt takes some of them."""
    limit = getattr(load_config(model).get_text_config(), "max_position_embeddings", None) or math.inf
    return limit - (model.config.get("num_virtual_tokens") or 0) if model.kind == "adapter" else limit


def limit_length(model: ModelDirectory, max_length: int, soft_prompt: int = 0) -> int:
    """--max-length, or how many tokens the model takes after a tuned prompt, if they are fewer, which is printed."""
    longest = context_length(model) - soft_prompt
    if max_length > longest:
        print(f"--max-length {max_length}: the context of {model.path} has {longest:,} tokens; that is the limit used")
    return min(max_length, longest)


def check_lora(adapter: ModelDirectory) -> None:
    """InputError unless the adapter is a LoRA."""
    if adapter.config.get("peft_type", "LORA") != "LORA":
        raise InputError(
            f"{adapter.path}: is a tuned prompt, not LoRA: it goes before every text and cannot be merged into "
            "weights, nor quantised. evaluate.py takes it as it is; `make lora` makes an adapter that can be"
        )


def guess_parameter_count(model: str, base: Path) -> tuple[int | None, str]:
    """How many parameters a model has, before anything is loaded, and the source of that number: the base artifact that
    was made of it, its config.json, or its name (SmolLM2-360M); None if none of them tells."""
    config = Path(model).expanduser() / "config.json"
    with contextlib.suppress(InputError, OSError, LookupError, TypeError, ValueError):
        return int(artifact.read_metadata(base)["metrics"]["parameters"]), f"{base} says"
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError, ArithmeticError):
        return count_llama_parameters(json.loads(config.read_text(encoding="utf-8"))), f"by {config}"
    match = re.search(r"(\d+(?:\.\d+)?)([mb])(?![a-z])", Path(model).name.lower())
    return (int(float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]]), "by its name") if match else (None, "")


def count_llama_parameters(config: dict) -> int:
    """The embeddings and matrices of a model that is built like a Llama; others differ by some per cent."""
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    inner, kv_heads = config.get("intermediate_size") or 4 * width, config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or width // heads
    layer = 2 * width * head * (heads + kv_heads) + 3 * width * inner
    return layers * layer + config["vocab_size"] * width * (1 if config.get("tie_word_embeddings") else 2)
