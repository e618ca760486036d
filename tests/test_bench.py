"""bench.py on two tiny models, one through each engine."""

import json

from lib import artifact
from tests.conftest import call, refused


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
