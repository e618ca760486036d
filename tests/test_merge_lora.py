"""Merging: the algebra, the proof that is stored with it, and what must not be merged."""

import argparse
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.core import artifact
from lib.model import chat, tiny
from lib.model.directory import open_directory
from lib.quant import divergence
from tests.conftest import beside, call, refused, script

R, ALPHA = 4, 8


def make_adapter(folder, base, strength: float = 0.05, **config):
    """An adapter artifact as sft.py leaves it, with B so large that a lost adapter would show."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    how = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM", **config)
    adapted = get_peft_model(model, how)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight.data, std=strength)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    with artifact.write_artifact(folder, "adapter", argparse.Namespace(), {"base": base}) as build:
        adapted.save_pretrained(build.path, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("adapters") / "tiny-lora", base)


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    """By a real process that stands somewhere else."""
    out = tmp_path_factory.mktemp("merged") / "tiny-lora-merged"
    done = script("merge_lora", "--adapter", adapter, "--output", out, "--threads", 1, cwd="/")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(out)
    return out


def expected_weights(base, adapter, scale: float) -> dict:
    """base + scale·B·A in float64, by name."""
    weights = {name: w.double() for name, w in load_file(base / "model.safetensors").items()}
    lora = load_file(adapter / "adapter_model.safetensors")
    changed = [name for name in lora if ".lora_A." in name]
    assert len(changed) == 14  # 7 linear layers in each of 2 blocks
    for name in changed:
        a, b = lora[name].double(), lora[name.replace("lora_A", "lora_B")].double()
        weights[name.removeprefix("base_model.model.").replace(".lora_A", "")] += scale * b @ a
    return weights


def largest_error(folder, expected) -> float:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    return max((found[name].double() - expected[name]).abs().max().item() for name in expected)


def test_merged_weights_are_base_plus_scale_b_a(base, adapter, merged):
    expected = expected_weights(base, adapter, ALPHA / R)
    # half a unit in the last place of fp16 at the largest weight, and a little for fp32 before it
    largest = max(w.abs().max().item() for w in expected.values())
    assert largest_error(merged, expected) <= 2.0**-11 * largest * 1.01
    untouched = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load_file(merged / "model.safetensors")["model.embed_tokens.weight"], untouched)


@pytest.mark.parametrize(
    ("config", "scale"), [({}, ALPHA / R), ({"use_rslora": True}, ALPHA / R**0.5)]
)  # fmt: skip
def test_in_fp32_it_is_exact_to_the_rounding_of_fp32(tmp_path, config, scale):
    words = tiny.tokenizer()
    tiny.model(len(words)).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "lora", tmp_path / "base", **config)
    done = call("merge_lora", "--adapter", adapter, "--output", tmp_path / "out", "--threads", 1)
    assert done.code == 0, done.err
    assert largest_error(tmp_path / "out", expected_weights(tmp_path / "base", adapter, scale)) < 1e-6
    metrics = artifact.read(tmp_path / "out", "model")["metrics"]
    assert metrics["written"]["dtype"] == "float32" and "16 bit" not in done.out
    assert metrics["written"]["kl_mean"] < 1e-9


def test_the_merged_model_answers_as_base_and_adapter_do_and_not_as_the_base(base, adapter, merged):
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = torch.tensor([chat.prompt_ids(tokenizer, chat.PROBES[0])])

    def logits(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if path == base:
            before = model(ids).logits
            return before, PeftModel.from_pretrained(model, adapter)(ids).logits
        return model(ids).logits

    with torch.inference_mode():
        (plain, wanted), got = logits(base), logits(merged)
    lost, error = (plain - wanted).abs().max(), (got - wanted).abs().max()
    assert error < 0.01 * lost
    stored = artifact.read(merged, "model")["metrics"]
    for stage in ("merged_fp32", "written"):
        assert {"kl_mean", "kl_max", "max_abs_logit", "positions"} <= stored[stage].keys()
        assert stored[stage]["positions"] == sum(len(chat.prompt_ids(tokenizer, one)) for one in chat.PROBES)
    assert error <= stored["written"]["max_abs_logit"] * 1.01
    assert stored["merged_fp32"]["max_abs_logit"] < stored["written"]["max_abs_logit"] < 0.1
    assert 0 <= stored["written"]["kl_mean"] <= stored["written"]["kl_max"] < 1e-3


def test_the_merged_directory_is_a_plain_model_of_the_bases_dtype(base, merged):
    assert {w.dtype for w in load_file(merged / "model.safetensors").values()} == {torch.float16}
    assert not (merged / "adapter_config.json").exists()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    inputs = artifact.read(merged)["inputs"]
    assert inputs["base"]["digest"] == artifact.read(base)["digest"] and set(inputs) == {"adapter", "base"}


def test_a_merge_that_answers_otherwise_is_refused(adapter, tmp_path):
    """Rounding to 16 bit always moves something, so a bound of 0 stands for a broken merge."""
    argv = ("--adapter", adapter, "--output", tmp_path / "out", "--threads", 1)
    refused(call("merge_lora", *argv, "--max-kl", "0"), "--max-kl", "nothing was written")
    assert beside(tmp_path) == []


@pytest.mark.slow
def test_the_divergence_is_stored_on_general_questions_and_on_the_rows_that_are_given(adapter, merged, data, tmp_path):
    general = artifact.read(merged)["metrics"]["divergence"]
    assert general.keys() == {"general"} and general["general"]["rows"] == len(divergence.GENERAL)
    argv = ("--adapter", adapter, "--output", tmp_path / "out", "--threads", 1, "--data", data)
    done = call("merge_lora", *argv, "--samples", 3)
    assert done.code == 0 and "on 3 validation examples: mean KL" in done.out
    stored = artifact.read(tmp_path / "out", "model")
    assert stored["inputs"]["data"]["digest"] == artifact.read(data)["digest"]
    assert stored["files"] == artifact.read(merged)["files"]
    found = stored["metrics"]["divergence"]
    assert found["general"] == general["general"] and found["rows"] == 3
    assert 0 < found["kl_mean"] < 1e-4 and abs(found["nll"] - found["nll_reference"]) < 0.01
    assert abs(found["nll_base"] - found["nll_reference"]) > 0.01  # it is not the base that was compared
    whole = shutil.copytree(adapter, tmp_path / "lora")  # the directories, as they lie there
    AutoTokenizer.from_pretrained(merged).save_pretrained(whole)
    again = divergence.compare(open_directory(whole), open_directory(tmp_path / "out"), [], threads=1)
    assert again["general"]["kl_mean"] == pytest.approx(found["general"]["kl_mean"], rel=1e-3)


@pytest.mark.parametrize(
    ("broken", "why"),
    [({"general": {"kl_mean": 0.1}}, "general questions"), ({"gain_kept": 0.2, "general": {"kl_mean": 0}}, "20%")],
)
def test_a_merge_that_only_the_divergence_check_objects_to_is_refused(adapter, tmp_path, monkeypatch, broken, why):
    right = divergence.compare

    def wrong(*given, **how):
        found = right(*given, **how)
        return found | broken | {"general": found["general"] | broken["general"]}

    monkeypatch.setattr(divergence, "compare", wrong)
    argv = ("--adapter", adapter, "--output", tmp_path / "out", "--threads", 1)
    refused(call("merge_lora", *argv), why, "nothing was written")
    assert beside(tmp_path) == []


def test_an_adapter_of_infinite_weights_is_refused(adapter, base, tmp_path):
    broken = tmp_path / "broken"
    with artifact.write_artifact(broken, "adapter", argparse.Namespace()) as build:
        shutil.copytree(adapter, build.path, dirs_exist_ok=True)
        (build.path / "metadata.json").unlink()
        weights = load_file(build.path / "adapter_model.safetensors")
        weights[min(weights)][0] = float("nan")
        save_file(weights, build.path / "adapter_model.safetensors")
    refused(call("merge_lora", "--adapter", broken, "--output", tmp_path / "out", "--threads", 1))
    assert beside(tmp_path) == ["broken"]


def test_a_quantised_base_is_refused(adapter, plain, tmp_path):
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    done = call("merge_lora", "--adapter", adapter, "--base", plain, "--output", tmp_path / "out")
    refused(done, str(plain), "16-bit base", "then quantise")
    done = call("merge_lora", "--adapter", adapter, "--base", adapter, "--output", tmp_path / "out")
    refused(done, "itself an adapter")
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_shape_is_refused(adapter, tmp_path):
    words = tiny.tokenizer()
    for name, shape in {"narrow": {"hidden_size": 32}, "deep": {"num_hidden_layers": 1}}.items():
        tiny.model(len(words), **shape).save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
        done = call(
            "merge_lora", "--adapter", adapter, "--base", tmp_path / name, "--output", tmp_path / "out", "--threads", 1
        )  # fmt: skip
        refused(done, str(adapter), str(tmp_path / name), "its digest differs")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_that_names_a_base_that_is_gone(adapter, base, tmp_path):
    """As it was typed in another directory: refused with the way out, and --base is one."""
    moved = tmp_path / "moved"
    with artifact.write_artifact(moved, "adapter", argparse.Namespace()) as build:
        shutil.copytree(adapter, build.path, dirs_exist_ok=True)
        (build.path / "metadata.json").unlink()
        config = json.loads((build.path / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "models/elsewhere-base"
        (build.path / "adapter_config.json").write_text(json.dumps(config))
    argv = ("--adapter", moved, "--output", tmp_path / "out", "--threads", 1)
    refused(call("merge_lora", *argv), "models/elsewhere-base", "make base")
    assert call("merge_lora", *argv, "--base", base).code == 0
    found = artifact.read(tmp_path / "out")["metrics"]["divergence"]["general"]

    # Another model lies where the adapter says: the reference is still the base that was given.
    words = tiny.tokenizer()
    tiny.model(len(words), seed=1).half().save_pretrained(moved / "models" / "elsewhere-base")
    words.save_pretrained(moved / "models" / "elsewhere-base")
    again = tmp_path / "again"
    with artifact.write_artifact(again, "adapter", argparse.Namespace()) as build:
        shutil.copytree(moved, build.path, dirs_exist_ok=True)
        (build.path / "metadata.json").unlink()
    argv = ("--adapter", again, "--base", base, "--output", tmp_path / "out", "--threads", 1)
    assert call("merge_lora", *argv).code == 0
    assert artifact.read(tmp_path / "out")["metrics"]["divergence"]["general"] == found


def test_what_is_no_adapter_is_refused(base, merged, tmp_path):
    for folder in (base, merged):
        refused(call("merge_lora", "--adapter", folder, "--output", tmp_path / "out"), "expected kind 'adapter'")
    assert beside(tmp_path) == []
