"""Load models and tokenizers from local directories: dtype, device, adapter or not."""

import contextlib
import json
import os
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lib import artifact, cli, hardware
from lib.cli import InputError


def dtype(name: str):
    """The torch dtype to compute in for `--load`: that of fp32, fp16 or bf16; the hardware's own for all else."""
    import torch

    known = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return known.get(name) or hardware.compute_dtype()


def add_load_flags(group) -> None:
    group.add_argument(
        "--load", choices=["auto", "fp32", "fp16", "bf16", "int8", "nf4"], default="auto",
        help="how weights are held, and what is computed in; int8, nf4: rounded while they are loaded; auto: bf16 "
             "where the hardware has it, else fp16 on a GPU and fp32 on a CPU (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--device-map", choices=["none", "auto", "balanced", "sequential", "cpu"], default="none",
        help="spread a model over the GPUs and, where they are full, main memory; none: all on one device "
             "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--attention", choices=["auto", "sdpa", "flash_attention_2", "eager"], default="auto",
        help="auto: transformers' own choice, sdpa where the model has it (default: %(default)s)",
    )  # fmt: skip


def placement(args) -> dict:
    """What `load` takes of the flags above, but for --load itself."""
    return {
        "device_map": None if args.device_map == "none" else args.device_map,
        "attention": attention(args.attention),
    }


@cache
def attention(asked: str) -> str | None:
    """transformers' name of an attention; None where it is to choose, as it is where flash attention cannot run."""
    if asked != "flash_attention_2":
        return None if asked == "auto" else asked
    found = hardware.gpu()
    missing = (
        "no GPU" if found is None
        else "it wants compute capability 8.0 or newer" if found.capability < (8, 0)
        else "the package flash-attn is not installed" if not find_spec("flash_attn") else ""
    )  # fmt: skip
    if missing:
        print(f"--attention flash_attention_2: {missing}; sdpa instead", file=sys.stderr)
    return None if missing else asked


def bitsandbytes(method: str):
    """NF4 with double quantisation (arXiv 2305.14314) or LLM.int8() (arXiv 2208.07339); linear layers only."""
    from transformers import BitsAndBytesConfig

    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.compute_dtype(),
    )  # fmt: skip


def tokenizer(path: Path | str):
    """The tokenizer of a model directory; InputError when the directory has none or no chat template."""
    from transformers import AutoTokenizer

    from lib import vocabulary

    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():  # beside a GGUF, which holds it
        path = base_of(path)
    try:
        made = vocabulary.tokenizer(gguf_file(path)) if is_gguf(path) else AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: transformers cannot load its tokenizer: {first_line(error)}") from None
    if not made.chat_template:
        raise InputError(f"{path}: the tokenizer has no chat template; `make base` gives such a model a plain one")
    return made


def ends(path: Path | str) -> set[int]:
    """The ids that end an answer."""
    from transformers import GenerationConfig

    from lib import chat, vocabulary

    return vocabulary.ends(gguf_file(path)) if is_gguf(path) else chat.eos_ids(GenerationConfig.from_pretrained(path))


def config(path: Path | str):
    """transformers' config of a model directory of any kind: of an adapter, its base's. InputError where there is none
    that transformers can read."""
    from transformers import AutoConfig

    if is_adapter(path):
        return config(base_of(path))
    try:
        if is_gguf(path):
            from lib import gguf

            return gguf.read_config(gguf_file(path))
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: transformers cannot read its config: {first_line(error)}") from None


def held_as(path: Path | str, how: str) -> str:
    """How a directory's weights are held after `load(path, how)`: as they were quantised, where they were."""
    asked = getattr(config(path), "quantization_config", None) if not is_gguf(path) else None
    if not asked:
        return how
    return "nf4" if asked.get("load_in_4bit") else "int8"


def adapter_of(path: Path | str) -> dict | None:
    """What PEFT is told of an adapter: LoRA's rank and targets, or a tuned prompt's length; None for other models."""
    said = read_json(Path(path) / "adapter_config.json") if is_adapter(path) else {}
    return {key: said[key] for key in ("r", "target_modules", "num_virtual_tokens") if said.get(key)} or None


def context(path: Path | str) -> int:
    """How many tokens the model was made to read, answer included."""
    return config(path).get_text_config().max_position_embeddings


def is_adapter(path: Path | str) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def is_gguf(path: Path | str) -> bool:
    return not is_adapter(path) and any(Path(path).glob("*.gguf"))


def gguf_file(path: Path | str) -> Path:
    """The one GGUF file of a directory."""
    files = sorted(Path(path).glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{path}: holds {len(files)} GGUF files, expected one")
    return files[0]


def is_quantized(path: Path | str) -> bool:
    """True for a directory that transformers would load quantised (NF4, INT8), and for a GGUF."""
    config = Path(path) / "config.json"
    return is_gguf(path) or (config.is_file() and "quantization_config" in read_json(config))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def load(
    path: Path | str,
    how: str = "auto",
    *,
    device: str | None = None,
    adapter_base: Path | str | None = None,
    device_map: str | None = None,
    attention: str | None = None,
):
    """A causal model in eval mode from a directory of weights, of quantised weights, or of an adapter: on the base that
    it names, or on `adapter_base`. A GGUF's weights come dequantised: the same values, in the memory of a plain model.

    `how` is a value of --load; with `device_map` accelerate places the weights, else all go to `device`.
    """
    path = Path(path)
    device = device or hardware.device()
    if is_adapter(path):
        from peft import PeftModel

        placed = dict(device=device, device_map=device_map, attention=attention)
        base = load(adapter_base or base_of(path), how, **placed)
        return PeftModel.from_pretrained(base, path).eval()
    if how in ("int8", "nf4") and is_quantized(path):
        raise InputError(f"{path}: is quantised already: --load {how} is for 16-bit weights; leave it out")
    if is_gguf(path):
        from lib import gguf

        try:
            return gguf.dequantised(gguf_file(path)).to(device, dtype(how))
        except ValueError as error:
            raise InputError(str(error)) from None
    given = {"attn_implementation": attention} if attention else {}
    if is_quantized(path):  # bitsandbytes places its weights itself
        return read_weights(path, device_map=device_map or device, **given).eval()
    given |= {"dtype": dtype(how)}
    if how in ("int8", "nf4"):
        given |= {"quantization_config": bitsandbytes(how), "device_map": device_map or device}
    elif device_map:
        given |= {"device_map": device_map}
    model = read_weights(path, **given)
    return (model if "device_map" in given else model.to(device)).eval()


def read_weights(path: Path, **how):
    """AutoModelForCausalLM.from_pretrained, with InputError for what cannot be read. Tensors that are missing or of
    another shape are refused: transformers would put random weights in their place."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: transformers cannot load it: {first_line(error)}") from None
    if lost := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise InputError(f"{path}: weights are missing or of another shape than config.json says: {lost[0]}")
    return model


def hold_products_in(model, dtype) -> None:
    """Frozen linear layers' weights in the dtype that autocast would make of them at each use: the same products, half
    the memory. The output matrix, embeddings and norms stay, and what runs from layer to layer with them."""
    import torch

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head and not module.weight.requires_grad:
            module.to(dtype)
    hardware.return_freed_memory()  # else what the wider weights took would lie idle: a sixth of the peak of training


def base_of(adapter: Path | str) -> Path:
    """The base model's directory that an adapter names: an absolute path, or one relative to the adapter; where both
    came from another machine, the directory of that name beside the adapter."""
    adapter = Path(adapter)
    named = read_json(adapter / "adapter_config.json")["base_model_name_or_path"]
    for candidate in (Path(named), adapter / named, adapter.parent / Path(named).name):
        if candidate.is_dir():
            return candidate
    raise InputError(f"{adapter}: its base model {named!r} is not there; `make base` makes it")


def check_lora(adapter: Path | str) -> None:
    """InputError for an adapter of another kind."""
    if read_json(Path(adapter) / "adapter_config.json").get("peft_type", "LORA") != "LORA":
        raise InputError(
            f"{adapter}: is a tuned prompt, not LoRA: it goes before every text and cannot be merged into weights, nor "
            "quantised. evaluate.py takes it as it is; `make lora` makes an adapter that can be"
        )


def is_tuned_prompt(model) -> bool:
    active = getattr(model, "active_peft_config", None)  # CLaRa's adapters stand in a model of transformers' own
    return bool(active and active.is_prompt_learning)


def check_base(adapter: Path | str, base: Path | str) -> None:
    """InputError unless `base` is what the adapter was trained on."""
    trained_on = artifact.read_metadata(adapter)["inputs"].get("base", {}).get("digest")
    if trained_on not in (None, artifact.identify(base)["digest"]):
        raise InputError(
            f"{base}: is not the base that {adapter} was trained on (its digest differs); together they would run and "
            "answer wrongly. Give that base, or train the adapter on this one"
        )


def with_lora(plain, adapter: Path, base: Path, *, trainable: bool = False):
    """The adapter on its base. InputError when it does not fit: PEFT drops layers that the base lacks in silence."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        adapted = PeftModel.from_pretrained(plain, adapter, is_trainable=trainable).eval()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{adapter} does not fit the base {base} (another model's adapter?): {reason}") from None
    with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
        lost = set(stored.keys()) - get_peft_model_state_dict(adapted).keys()
    if lost:
        raise InputError(f"{adapter} does not fit the base {base}, which has no place for {min(lost)}")
    return adapted


def save_adapter(model, base: Path, folder: Path) -> None:
    """PEFT looks for the base from the working directory, so only an absolute path loads from anywhere."""
    model.peft_config["default"].base_model_name_or_path = str(base.resolve())
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def count_parameters(model) -> dict[str, int]:
    """What of the model is trained, said and returned."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})")
    return {"trainable_parameters": trained, "total_parameters": total}


def parameters(model: str, base: Path) -> tuple[int | None, str]:
    """How many parameters a model has before anything is loaded, and how that is known: from the base artifact that
    was made of it, from its config.json, or from its name (SmolLM2-360M); None where none of them says."""
    config = Path(model).expanduser() / "config.json"
    with contextlib.suppress(InputError, OSError, LookupError, TypeError, ValueError):
        return int(artifact.read_metadata(base)["metrics"]["parameters"]), f"{base} says"
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError, ArithmeticError):
        return parameters_of_llama(json.loads(config.read_text(encoding="utf-8"))), f"by {config}"
    match = re.search(r"(\d+(?:\.\d+)?)([mb])(?![a-z])", Path(model).name.lower())
    return (int(float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]]), "by its name") if match else (None, "")


def parameters_of_llama(config: dict) -> int:
    """The embeddings and matrices of a model that is built like a Llama; others differ by some per cent."""
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    inner, shared = config.get("intermediate_size") or 4 * width, config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or width // heads
    layer = 2 * width * head * (heads + shared) + 3 * width * inner
    return layers * layer + config["vocab_size"] * width * (1 if config.get("tie_word_embeddings") else 2)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def free_memory() -> None:
    """Give memory of dropped models back before the next one is loaded."""
    import gc

    import torch

    gc.collect()
    hardware.return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tried(work, *given) -> tuple:
    """(work(*given), None), or (None, the reason) when it ran out of memory; what it held is then free again."""
    try:
        return work(*given), None
    except Exception as error:
        if not cli.is_out_of_memory(error):
            raise
        reason = first_line(error)
    free_memory()  # out here: inside, the exception's traceback would still hold the tensors
    return None, reason


def use_threads(count: int) -> None:
    """Let torch compute on `count` CPU threads; 0: all cores that this process may use."""
    import torch

    # oneDNN keeps what it has compiled for 1,024 shapes, and rows of many lengths have many: 0.3 GB more after 64 rows.
    # 64 hold the shapes of a row, and no layer waits for them (docs/log.md).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))
