"""bench_memory.py on the tiny model: what steps expected is held against what they took."""

import json
import sys

import bench_memory
import pytest

from lib.core import artifact
from tests.conftest import WARM_PYTHON, call, refused, warm


@pytest.mark.slow  # it measures each stage in a process of its own
def test_expectations_are_held_against_peaks(base, data, tmp_path, monkeypatch):
    lora = ["--model", base, "--data", data, "--output", tmp_path / "lora", "--run-dir", tmp_path / "run", "--samples",
            4]  # fmt: skip
    assert call("sft", *lora, "--threads", 1).code == 0
    monkeypatch.setattr(sys, "executable", str(WARM_PYTHON))
    for name, value in warm().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        bench_memory, "SETTINGS", {"sft": ("--batch-size 1", "--batch-size 4"), "merge_lora": ("--samples 2",)}
    )
    flags = ["--base", base, "--adapter", tmp_path / "lora", "--data", data, "--threads", 1]
    done = call("bench_memory", *flags, "--models", base, tmp_path / "lora", "--output", tmp_path / "made")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "made" / "memory.json").read_text())
    assert [(step["step"], step["setting"]) for step in found["steps"]] == [
        ("sft", "--batch-size 1"), ("sft", "--batch-size 4"), ("merge_lora", "--samples 2"),
    ]  # fmt: skip
    for step in found["steps"]:
        assert 0.5 < step["expected_bytes"] / step["peak_bytes"] < 2  # libraries, mostly: the model is tiny
        assert f"| {step['expected_bytes'] / 1e9:.2f} | {step['peak_bytes'] / 1e9:.2f} |" in done.out
    assert set(found["alone"]) == {base.name, "lora"}
    assert found["one_after_another"] >= 0.9 * max(found["alone"].values())
    assert artifact.read(tmp_path / "made", "bench")["metrics"]["steps"] == found["steps"]
    missing = call("bench_memory", *flags, "--models", tmp_path / "none", "--output", tmp_path / "other")
    refused(missing, "none")


def test_a_step_that_fails_is_named_with_what_it_said(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_memory, "SETTINGS", {"quantize": ("--method gguf-f16 --samples 0",)})
    flags = ["--base", base, "--adapter", base, "--data", data, "--models", base]
    refused(
        call("bench_memory", *flags, "--output", tmp_path / "made"), "quantize.py --method gguf-f16 --samples 0: exit"
    )
