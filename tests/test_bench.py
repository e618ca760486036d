"""bench.py on tiny models, through each engine."""

import json

import pytest

from lib.core import artifact
from lib.gguf import writing
from tests.conftest import call, refused


@pytest.mark.slow
def test_models_are_timed_in_turns_and_compared_within_each(base, data, tmp_path):
    quantize = ("--model", base, "--data", data, "--method", "gguf-f16", "--samples", 1, "--output", tmp_path / "f16")
    assert call("quantize", *quantize).code == 0
    how = ("--data", data, "--turns", 2, "--tokens", 8, "--threads", 1, "--output", tmp_path / "out")
    done = call("bench", "--models", base, tmp_path / "f16", *how)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "speeds.json").read_text())
    names = [base.name, "f16"]
    assert found["reference"] == base.name and list(found["turns"]) == names
    one, other = (found["turns"][name] for name in names)
    assert len(one) == len(other) == 2 and min(one + other) > 0
    ratios = [b / a for a, b in zip(one, other)]
    assert found["ratio"]["f16"]["min"] == min(ratios) and found["ratio"]["f16"]["max"] == max(ratios)
    assert found["ratio"][base.name]["median"] == 1
    assert set(artifact.read(tmp_path / "out", "bench")["inputs"]) == {*names, "data"}
    assert f"{found['ratio']['f16']['median']:.2f}×" in done.out
    refused(call("bench", "--models", base, base, *how), "different names")
    refused(call("bench", "--models", base, "--output", tmp_path / "none"), "--benchmark decode: needs --data")


def test_magpie_is_timed_against_one_prompt_at_a_time(talker, tmp_path):
    (tmp_path / "f16").mkdir()
    writing.write_model(talker, tmp_path / "f16" / "model.gguf", "f16")
    argv = ("--turns", 1, "--rows", 6, "--rows-alone", 2, "--batch-size", 4, "--threads", 1, "--output",
            tmp_path / "out")  # fmt: skip
    done = call("bench", "--benchmark", "magpie", "--models", talker, tmp_path / "f16", *argv)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "speeds.json").read_text())
    assert list(found["turns"]) == ["one prompt at a time", "talker", "f16"]
    assert all(found["ratio"][name]["n"] == 1 and found["ratio"][name]["min"] > 0 for name in found["turns"])
    assert "6 instructions and their responses, 4 concurrently" in done.out
