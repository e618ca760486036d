"""Adapters whose weights do not fit the base: refused by whatever would load them, with what does not fit."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.core.cli import InputError
from lib.gguf import writing
from lib.model import loading
from lib.model.directory import load_config, open_directory
from tests.conftest import call, refused

WEIGHTS = "adapter_model.safetensors"


def make_adapter(folder, base, model=None, config=None):
    torch.manual_seed(0)
    model = model or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = config or LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def change_weights(adapter, folder, change):
    shutil.copytree(adapter, folder)
    save_file(change(load_file(adapter / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder


def rename(weights: dict) -> dict:
    return {key.replace("model.layers", "model.language_model.layers"): w for key, w in weights.items()}


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapters") / "lora", base)


@pytest.fixture(scope="module")
def renamed(lora, tmp_path_factory):
    return change_weights(lora, tmp_path_factory.mktemp("renamed") / "renamed", rename)


@pytest.mark.parametrize("name", ["evaluate", "ask", "export", "measure_divergence"])
def test_no_script_measures_the_base_in_the_name_of_an_adapter_that_does_not_fit(name, renamed, base, data, tmp_path):
    model, out = ("--model", renamed), ("--output", tmp_path / "out")
    argv = {
        "evaluate": (*model, "--data", data, "--samples", 2, *out, "--run-dir", tmp_path / "run"),
        "ask": (*model, "--question", "Which river?"),
        "export": (*model, "--format", "folder", "--to", tmp_path / "out", "--i-have-checked-the-licence"),
        "measure_divergence": ("--reference", base, *model, "--data", data, *out, "--samples", 2),
    }
    if name == "export":  # which takes artifacts only
        shutil.copytree(renamed, tmp_path / "renamed")
        metadata = json.loads((base / "metadata.json").read_text()) | {"kind": "adapter"}
        argv["export"] = ("--model", write_as_artifact(tmp_path / "renamed", metadata), *argv["export"][2:])
    refused(call(name, *argv[name]), "renamed does not fit the base", "language_model.layers.0.self_attn", "more")
    assert not (tmp_path / "out").exists()


def write_as_artifact(folder, metadata: dict):
    from lib.core import artifact

    files = artifact.file_digests(folder)
    metadata |= {"files": files, "digest": artifact.digest_of(files), "inputs": {}}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def test_missing_and_wrong_weights_are_named(lora, base, tmp_path):
    load = lambda folder: loading.load_model(open_directory(folder), "fp32")  # noqa: E731
    halved = change_weights(lora, tmp_path / "halved", lambda w: {key: w[key] for key in w if "layers.1" not in key})
    with pytest.raises(InputError, match=r"no weights for \S+layers\.1\.self_attn\.q_proj\.lora_A\S+ and 3 more"):
        load(halved)
    narrow = change_weights(lora, tmp_path / "narrow", lambda w: {key: w[key][:, :3].clone() for key in w})
    with pytest.raises(InputError, match="size mismatch"):
        load(narrow)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 2)
    with pytest.raises(InputError, match=r"size mismatch for \S*embed_tokens"):
        load(make_adapter(tmp_path / "resized", base, model))
    (narrow / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"has no {WEIGHTS}"):
        load(narrow)


def test_an_adapter_that_fits_is_loaded_as_peft_loads_it(lora, base, tmp_path):
    """With the embedding saved beside it, and in PyTorch's old format."""
    from peft import PeftModel

    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
    extended = change_weights(
        lora, tmp_path / "extended", lambda w: w | {"base_model.model.model.embed_tokens.weight": embedding}
    )
    old = shutil.copytree(lora, tmp_path / "old")
    torch.save(load_file(old / WEIGHTS), old / "adapter_model.bin")
    (old / WEIGHTS).unlink()
    ids = torch.tensor([[5, 60, 7]])
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        alone = plain(ids).logits
        expected = PeftModel.from_pretrained(plain, lora)(ids).logits
        for folder in (lora, extended, old):
            assert torch.equal(loading.load_model(open_directory(folder), "fp32")(ids).logits, expected)
    assert (alone - expected).abs().max() > 0.1


def test_a_soft_prompt_of_another_width_is_refused(base, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    prompt = make_adapter(tmp_path / "prompt", base, config=config)
    assert loading.load_model(open_directory(prompt), "fp32")
    wide = change_weights(prompt, tmp_path / "wide", lambda w: {key: torch.zeros(3, 96) for key in w})
    with pytest.raises(InputError, match="size mismatch"):
        loading.load_model(open_directory(wide), "fp32")
    settings = json.loads((wide / "adapter_config.json").read_text()) | {"token_dim": 96}
    (wide / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="its vectors have 96 values, the base's embedding 64"):
        loading.load_model(open_directory(wide), "fp32")
    other = change_weights(prompt, tmp_path / "other", lambda w: {"embeddings": w["prompt_embeddings"]})
    with pytest.raises(InputError, match="no weights for prompt_embeddings"):
        loading.load_model(open_directory(other), "fp32")


def test_a_gguf_adapter_that_does_not_fit_is_refused(lora, base, data, tmp_path):
    """Trained on a deeper model of the same width; also by the comparison of two models."""
    from lib.model import tiny

    (tmp_path / "int8").mkdir()
    writing.write_model(base, tmp_path / "int8" / "model.gguf", "q8_0")
    words = AutoTokenizer.from_pretrained(base)
    deep = tiny.model(len(words), num_hidden_layers=3)
    folder = make_adapter(tmp_path / "deep", base, deep)
    deep.config.architectures = ["LlamaForCausalLM"]
    writing.write_adapter(folder, folder / "adapter.gguf", deep.config)
    (folder / WEIGHTS).unlink()
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "../int8"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert load_config(open_directory(folder)).num_hidden_layers == 2
    argv = ("--reference", base, "--model", folder, "--data", data, "--output", tmp_path / "out", "--samples", 2)
    refused(call("measure_divergence", *argv), "llama.cpp cannot load it together with", str(folder))


def test_an_adapter_that_trains_tokens_of_a_tied_head_fits(base, tmp_path):
    """PEFT stores them once, for the embedding."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[1, 2, 3])
    adapter = make_adapter(tmp_path / "lora", base, config=config)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert plain.config.tie_word_embeddings
    loading.attach_adapter(plain, adapter, base)
