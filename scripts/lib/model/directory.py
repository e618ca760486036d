"""What a model directory is: its kind, its base, its config and its tokenizer."""

import contextlib
import json
import re
from pathlib import Path

from lib.core import artifact, cli, compute
from lib.core.cli import InputError


def load_tokenizer(path: Path | str):
    """The tokenizer of a model directory; InputError when the directory has none or no chat template."""
    from transformers import AutoTokenizer

    from lib.gguf import vocabulary

    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():  # beside a GGUF, which holds it
        path = find_base(path)
    try:
        made = vocabulary.read_tokenizer(find_gguf(path)) if is_gguf(path) else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: transformers cannot load its tokenizer: {compute.first_line(error)}") from None
    if not made.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template; `make base` gives such a model a plain one")
    return made


def eos_token_ids(path: Path | str) -> set[int]:
    """The ids that end an answer."""
    from transformers import GenerationConfig

    from lib.gguf import vocabulary
    from lib.model import chat

    return (
        vocabulary.read_eos_token_ids(find_gguf(path))
        if is_gguf(path)
        else chat.eos_token_ids(GenerationConfig.from_pretrained(path))
    )


def load_config(path: Path | str):
    """transformers' config of a model directory of any kind: of an adapter, its base's. InputError where there is none
    that transformers can read."""
    from transformers import AutoConfig

    if is_adapter(path):
        return load_config(find_base(path))
    try:
        if is_gguf(path):
            from lib.gguf import reading

            return reading.read_config(find_gguf(path))
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: transformers cannot read its config: {compute.first_line(error)}") from None


def stored_precision(path: Path | str, how: str) -> str:
    """How a directory's weights are held after `load(path, how)`: as they were quantised, where they were."""
    asked = getattr(load_config(path), "quantization_config", None) if not is_gguf(path) else None
    if not asked:
        return how
    return "nf4" if asked.get("load_in_4bit") else "int8"


def read_adapter_shape(path: Path | str) -> dict | None:
    """What PEFT is told of an adapter: LoRA's rank and targets, or a tuned prompt's length; None for other models."""
    said = cli.read_json(Path(path) / "adapter_config.json") if is_adapter(path) else {}
    return {key: said[key] for key in ("r", "target_modules", "num_virtual_tokens") if said.get(key)} or None


def context_length(path: Path | str) -> int:
    """How many tokens the model was made to read, answer included."""
    return load_config(path).get_text_config().max_position_embeddings


def is_adapter(path: Path | str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def is_gguf(path: Path | str) -> bool:
    return not is_adapter(path) and any(Path(path).glob("*.gguf"))


def find_gguf(path: Path | str) -> Path:
    """The one GGUF file of a directory."""
    files = sorted(Path(path).glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{path}: holds {len(files)} GGUF files, expected one")
    return files[0]


def is_quantised(path: Path | str) -> bool:
    """True for a directory that transformers would load quantised (NF4, INT8), and for a GGUF."""
    config = Path(path) / "config.json"
    return is_gguf(path) or (config.is_file() and "quantization_config" in cli.read_json(config))


def find_base(adapter: Path | str) -> Path:
    """The base model's directory that an adapter names: an absolute path, or one relative to the adapter; where both
    came from another machine, the directory of that name beside the adapter."""
    adapter = Path(adapter)
    named = cli.read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    for candidate in (Path(named), adapter / named, adapter.parent / Path(named).name):
        if candidate.is_dir():
            return candidate
    raise InputError(f"{adapter}: its base model {named!r} is not there; `make base` makes it")


def check_lora(adapter: Path | str) -> None:
    """InputError for an adapter of another kind."""
    if cli.read_json(Path(adapter) / "adapter_config.json").get("peft_type", "LORA") != "LORA":
        raise InputError(
            f"{adapter}: is a tuned prompt, not LoRA: it goes before every text and cannot be merged into weights, nor "
            "quantised. evaluate.py takes it as it is; `make lora` makes an adapter that can be"
        )


def check_trained_on(adapter: Path | str, base: Path | str) -> None:
    """InputError unless `base` is what the adapter was trained on."""
    trained_on = artifact.read_metadata(adapter)["inputs"].get("base", {}).get("digest")
    if trained_on not in (None, artifact.identify(base)["digest"]):
        raise InputError(
            f"{base}: is not the base that {adapter} was trained on (its digest differs); together they would run and "
            "answer wrongly. Give that base, or train the adapter on this one"
        )


def guess_parameter_count(model: str, base: Path) -> tuple[int | None, str]:
    """How many parameters a model has before anything is loaded, and how that is known: from the base artifact that
    was made of it, from its config.json, or from its name (SmolLM2-360M); None where none of them says."""
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
    inner, shared = config.get("intermediate_size") or 4 * width, config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or width // heads
    layer = 2 * width * head * (heads + shared) + 3 * width * inner
    return layers * layer + config["vocab_size"] * width * (1 if config.get("tie_word_embeddings") else 2)
