"""The tensors of a model: their names in GGUF and their shapes, and where a model directory stores them."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lib.gguf import families, packing

if TYPE_CHECKING:
    import numpy as np

EMBEDDINGS = ("token_embd.weight", "output.weight")  # GGUF's names of the matrices with a row for each token


def plan_tensors(config, matrix_type, embedding_type=None) -> dict[str, tuple[str, tuple[int, ...], object]]:
    """{Hugging Face name: (GGUF name, shape, ggml type)} in the model's order, without a tied output matrix.

    Tensors with two dimensions get `matrix_type`; those with a row for each token get `embedding_type`, if it is given.
    All others are f32. Raises ValueError for a matrix whose width is not a multiple of the block.
    """
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[
        families.FAMILIES[config.model_type].gguf_name
    ]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    plan = {}
    for hf_name, parameter in model.named_parameters():
        name, shape = names.get_name(hf_name, (".weight", ".bias")), tuple(parameter.shape)
        kind = gguf.GGMLQuantizationType.F32
        if len(shape) == 2:
            kind = embedding_type if embedding_type is not None and name in EMBEDDINGS else matrix_type
            block = packing.BLOCK if kind is None else max(packing.BLOCK, gguf.GGML_QUANT_SIZES[kind][0])
            if shape[-1] % block:
                raise ValueError(f"{hf_name}: width {shape[-1]} is not a multiple of {block}")
        plan[hf_name] = (name, shape, kind)
    return plan


def locate_tensors(model_dir: Path, names: Iterable[str]) -> dict[str, Path]:
    """The safetensors file of each tensor; ValueError if one of `names` is in none."""
    files = list_tensors(model_dir)
    if missing := [name for name in names if name not in files]:
        raise ValueError(f"{model_dir}: no safetensors file contains {missing[0]} ({len(missing)} tensors missing)")
    return files


def list_tensors(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor in a directory."""
    from safetensors import safe_open

    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    return files


def read_tensor(file: Path, name: str, shape: tuple[int, ...]) -> "np.ndarray":
    """One tensor in f32; ValueError if its shape is not the config's, or if a weight is NaN or infinite."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        tensor = tensors.get_tensor(name).to(torch.float32)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, but config.json requires {shape}")
    if not tensor.isfinite().all():
        raise ValueError(f"{file}: {name} contains {int((~tensor.isfinite()).sum())} NaN or infinite weights")
    return tensor.numpy()
