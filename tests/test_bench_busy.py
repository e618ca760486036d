"""bench_busy.py: stages on a quiet machine and beside busy programs."""

import json

import pytest

from tests.conftest import call


@pytest.mark.slow
def test_each_stage_is_timed_quiet_and_busy(base, data, tmp_path):
    argv = ("--model", base, "--data", data, "--method", "gguf-q8_0", "--samples", 2, "--threads", 1)
    assert call("quantize", *argv, "--output", tmp_path / "int4").code == 0
    argv = ("--model", base, "--int4", tmp_path / "int4", "--data", data, "--spins", 1000, 0, "--turns", 1)
    done = call("bench_busy", *argv, "--samples", 4, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert len(metrics["runs"]) == 12 and len(metrics["cells"]) == 6
    for cell in metrics["cells"]:
        assert cell["speed_kept"]["median"] == pytest.approx(cell["quiet"]["median"] / cell["busy"]["median"])
    assert "| evaluate INT4 | 1000 |" in done.out
