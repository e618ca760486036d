"""measure_divergence.py: any two models against each other."""

import pytest

from lib.core import artifact
from lib.model import directory, tiny
from lib.model.directory import open_directory
from tests.conftest import beside, call, refused

READ = "cannot be compared: they tokenise"


def flags(reference, model, data, output, *more):
    return "measure_divergence", "--reference", reference, "--model", model, "--data", data, "--output", output, *more


@pytest.fixture(scope="module")
def rounded(base, data, tmp_path_factory):
    """The tiny base as a GGUF, and an adapter that was trained beside it."""
    folder = tmp_path_factory.mktemp("rounded")
    how = ("--method", "gguf-iq4_nl", "--samples", 2, "--calibration-samples", 4)
    assert call("quantize", "--model", base, "--data", data, *how, "--output", folder / "int4").code == 0
    for name, model in (("lora", base), ("int4-lora", folder / "int4")):
        argv = ("--model", model, "--data", data, "--samples", 8, "--run-dir", folder / f"run-{name}", "--threads", 1)
        done = call("sft", *argv, "--output", folder / name)
        assert done.code == 0, done.err
    return folder


def test_a_model_is_no_distance_from_itself(base, data, tmp_path):
    done = call(*flags(base, base, data, tmp_path / "out", "--samples", 2))
    assert done.code == 0, done.err
    meta = artifact.read(tmp_path / "out", "divergence")
    assert abs(meta["metrics"]["divergence"]["kl_mean"]) < 1e-9 and meta["metrics"]["divergence"]["rows"] == 2
    assert set(meta["inputs"]) == {"reference", "model", "data"}
    assert done.out.splitlines()[-1] == str(tmp_path / "out") and "mean KL 0.000" in done.out


def test_an_adapter_beside_a_rounded_base_against_its_16_bit_sibling(rounded, base, data, tmp_path):
    argv = flags(rounded / "lora", rounded / "int4-lora", data, tmp_path / "out", "--samples", 2, "--base", base)
    assert call(*argv).code == 0
    meta = artifact.read(tmp_path / "out", "divergence")
    found = meta["metrics"]["divergence"]
    assert found["kl_mean"] > 0 and found["nll_base"] > 0 and "gain_kept" in found
    assert meta["inputs"]["model"]["digest"] == artifact.read(rounded / "int4-lora")["digest"]


def test_models_that_read_text_as_other_tokens_are_refused(base, data, plain, tmp_path):
    words = directory.load_tokenizer(open_directory(plain))
    words.chat_template = words.chat_template.replace("assistant", "answer")
    words.save_pretrained(plain)
    refused(call(*flags(base, plain, data, tmp_path / "out", "--samples", 2)), str(plain), str(base), READ)
    words = tiny.tokenizer()
    words.add_tokens(["capital"])
    words.save_pretrained(plain)
    tiny.model(len(words)).save_pretrained(plain)
    refused(call(*flags(base, plain, data, tmp_path / "out", "--samples", 2)), READ)
    refused(call(*flags(base, tmp_path / "none", data, tmp_path / "out")), "none", "does not exist")
    assert beside(tmp_path) == [plain.name]
