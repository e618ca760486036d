"""Load models and tokenizers from local directories: dtype, device, adapter or not."""

import sys
import textwrap
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lib.core import compute, hardware
from lib.core.cli import InputError, is_out_of_memory
from lib.model.directory import ModelDirectory


def torch_dtype(name: str):
    """The torch dtype to compute in for `--precision`: fp32, fp16 or bf16; for any other value, the hardware's own."""
    import torch

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    return dtypes.get(name) or hardware.compute_dtype()


def add_load_flags(group) -> None:
    group.add_argument(
        "--precision", choices=["auto", "fp32", "fp16", "bf16", "int8", "nf4"], default="auto",
        help="precision of weights and compute; int8, nf4: quantise 16-bit weights while loading; auto: bf16 where the "
             "hardware supports it, else fp16 on a GPU and fp32 on a CPU",
    )  # fmt: skip
    group.add_argument(
        "--device-map", choices=["none", "auto", "balanced", "sequential", "cpu"], default="none",
        help="placement of the layers; none: all on one device; auto, balanced: evenly over all GPUs, the rest in RAM; "
             "sequential: fill one GPU after another; cpu: all in RAM",
    )  # fmt: skip
    group.add_argument(
        "--attention", choices=["auto", "sdpa", "flash_attention_2", "eager"], default="auto",
        help="attention implementation; auto: chosen by transformers, sdpa if the model supports it; sdpa: "
             "PyTorch's; flash_attention_2: the package flash-attn, for GPUs; eager: plain matrix products, slowest",
    )  # fmt: skip


def placement_arguments(args) -> dict:
    """The arguments for `load_model` from the flags above, without --precision."""
    return {
        "device_map": None if args.device_map == "none" else args.device_map,
        "attention": choose_attention(args.attention),
    }


@cache
def choose_attention(attention: str) -> str | None:
    """transformers' name of an attention; None, which lets transformers choose, also if flash attention cannot run."""
    if attention != "flash_attention_2":
        return None if attention == "auto" else attention
    gpu = hardware.gpu()
    missing = (
        "no GPU" if gpu is None
        else "it needs compute capability 8.0 or newer" if gpu.capability < (8, 0)
        else "the package flash-attn is not installed" if not find_spec("flash_attn") else ""
    )  # fmt: skip
    if missing:
        print(f"--attention flash_attention_2: {missing}; using sdpa instead", file=sys.stderr)
    return None if missing else attention


def bitsandbytes_config(method: str):
    """NF4 with double quantisation (arXiv 2305.14314) or LLM.int8() (arXiv 2208.07339); linear layers only."""
    from transformers import BitsAndBytesConfig

    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.compute_dtype(),
    )  # fmt: skip


def load_model(
    model: ModelDirectory,
    precision: str = "auto",
    *,
    device: str | None = None,
    device_map: str | None = None,
    attention: str | None = None,
):
    """A causal model in eval mode from a directory of weights, of quantised weights, or of an adapter on its base. A
    GGUF's weights come dequantised: the same values, in the memory of a plain model.

    `precision` is a value of --precision. With `device_map` accelerate places the weights, else all go to `device`.
    """
    device = device or hardware.device()
    if model.kind == "adapter":
        base = load_model(model.base, precision, device=device, device_map=device_map, attention=attention)
        return attach_adapter(base, model.path, model.base.path)
    if precision in ("int8", "nf4") and model.kind != "plain":
        raise InputError(
            f"{model.path}: is already quantised; omit --precision {precision}, which is for 16-bit weights"
        )
    if model.kind == "gguf":
        from lib.gguf import reading

        try:
            return reading.load_dequantised(model.gguf).to(device, torch_dtype(precision))
        except ValueError as error:
            raise InputError(str(error)) from None
    options = {"attn_implementation": attention} if attention else {}
    if model.kind == "quantised":  # bitsandbytes places its weights itself
        return read_weights(model.path, device_map=device_map or device, **options).eval()
    options |= {"dtype": torch_dtype(precision)}
    if precision in ("int8", "nf4"):
        options |= {"quantization_config": bitsandbytes_config(precision), "device_map": device_map or device}
    elif device_map:
        options |= {"device_map": device_map}
    loaded = read_weights(model.path, **options)
    return (loaded if "device_map" in options else loaded.to(device)).eval()


def read_weights(path: Path, **options):
    """AutoModelForCausalLM.from_pretrained, with InputError for a directory that cannot be read. Tensors that are
    missing or of another shape are refused: transformers would put random weights in their place."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: transformers cannot load it: {compute.first_line(error)}") from None
    if bad_keys := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise InputError(f"{path}: weights are missing, or their shape differs from config.json: {bad_keys[0]}")
    return model


def cast_frozen_linears(model, dtype) -> None:
    """Cast frozen linear layers' weights to the dtype to which autocast would cast them at each use: the same products,
    half the memory. The output matrix, embeddings and norms keep their dtype, and so do the hidden states."""
    import torch

    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head and not module.weight.requires_grad:
            module.to(dtype)
    hardware.return_freed_memory()  # else the wider weights' memory would lie idle: a sixth of the peak of training


def forget_generation_settings(model):
    """Decode greedily, whatever the model's own settings ask for (repetition_penalty, num_beams, min_length, …): only
    its ids stay. Otherwise transformers and llama.cpp, which reads no such file, would answer differently."""
    from transformers import GenerationConfig

    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # which PEFT's generate looks at
    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model.generation_config


def is_soft_prompt(model) -> bool:
    config = getattr(model, "active_peft_config", None)  # CLaRa's adapters stand in a model of transformers' own
    return bool(config and config.is_prompt_learning)


def attach_adapter(plain, adapter: Path, base: Path, *, trainable: bool = False):
    """The adapter on its base, in eval mode. InputError when it does not fit: PEFT leaves out weights that the base has
    no place for, and keeps its own where weights are missing, so that the base would answer in the adapter's name."""
    from peft import PeftModel
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    if not any((adapter / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise InputError(f"{adapter}: has no adapter_model.safetensors, the adapter's weights; copy it again")
    try:
        adapted = PeftModel.from_pretrained(plain, adapter, is_trainable=trainable).eval()
        misfit = find_misfit(adapted, load_peft_weights(str(adapter), device="cpu"))
    except KeyError as error:
        misfit = f"it has no weights for {error.args[0]}"
    except (RuntimeError, ValueError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        misfit = textwrap.shorten(str(error), 300, placeholder=" …")
    if misfit:
        raise InputError(
            f"{adapter} does not fit the base {base} (another model's adapter?): {misfit}. Give the base that it was "
            "trained on, or train it on this one"
        )
    return adapted


def find_misfit(adapted, weights: dict) -> str:
    """What of an adapter's weights the model has no place for, or misses; "" where they fit."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    if is_soft_prompt(adapted):
        width, expected = weights["prompt_embeddings"].shape[-1], adapted.get_input_embeddings().weight.shape[-1]
        return "" if width == expected else f"its vectors have {width} values, the base's embedding {expected}"
    loaded = set_peft_model_state_dict(adapted, weights)  # once more, since from_pretrained does not say what it did
    # Trained tokens of a tied LM head are those of the embedding, which alone are stored.
    stored = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    missing = [key for key in stored - weights.keys() if ".token_adapter." not in key]
    misfits = {"the base has no module for": loaded.unexpected_keys, "it has no weights for": missing}
    return "; ".join(
        f"{text} {min(keys)}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for text, keys in misfits.items()
        if keys
    )


def save_adapter(model, base: Path, folder: Path) -> None:
    """Save an adapter. PEFT looks for the base from the working directory, so only an absolute path loads anywhere."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(base.resolve())
    if isinstance(getattr(config, "target_modules", None), set):  # its order in a file differs from run to run
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def count_parameters(model) -> dict[str, int]:
    """Print and return how many of the model's parameters are trained."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    return {"trainable_parameters": trainable, "total_parameters": total}
