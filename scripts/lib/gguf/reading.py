"""Read a GGUF file back as a torch model."""

from pathlib import Path

from lib.gguf import families, tensors


def load_dequantised(path: Path, config=None):
    """A GGUF's weights as an ordinary fp32 model of transformers, which can also be saved.

    transformers reads GGUF files too, but marks such models as quantised, and leaves blocks packed if the `kernels`
    package is installed. This function does neither, and holds one model in memory, not two. `config` is needed if
    transformers cannot read it from the file: it does not know "phi2".
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(path)
    config = config or read_config(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]  # not in the file
    fill_weights(model, path)
    return model.eval()


def read_config(path: Path):
    """The transformers config of a GGUF file; ValueError if transformers or this module does not know its family."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type not in families.FAMILIES:
        raise ValueError(
            f"{path}: cannot read a model of type {config.model_type!r}, only {', '.join(families.FAMILIES)}"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers 5.23 leaves these two settings at their defaults in some families. Files of other programs may lack
    # the first.
    family, fields = families.FAMILIES[config.model_type], gguf.GGUFReader(path).fields
    if family.any_head_dim and (field := fields.get(f"{family.gguf_name}.attention.key_length")):
        config.head_dim = field.contents()
    if family.rotates_part:
        rotated_rows = fields[f"{family.gguf_name}.rope.dimension_count"].contents()
        config.rope_parameters["partial_rotary_factor"] = rotated_rows / families.head_dim(config)
    return config


def fill_weights(model, path: Path) -> None:
    """Copy a GGUF's weights, dequantised, into a model of the same shape."""
    import gguf
    import torch

    parameters = dict(model.named_parameters())
    hf_names = {name: hf_name for hf_name, (name, *_) in tensors.plan_tensors(model.config, None).items()}
    with torch.no_grad():
        for tensor in gguf.GGUFReader(path).tensors:
            hf_name = hf_names.pop(tensor.name, None)
            if hf_name is None:
                raise ValueError(f"{path}: unexpected tensor {tensor.name}")
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            parameters[hf_name].copy_(torch.tensor(families.permute(weights, hf_name, model.config, undo=True)))
    if hf_names:
        raise ValueError(f"{path}: no tensor {min(hf_names)}")
