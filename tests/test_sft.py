"""sft.py on a tiny model: what it trains, what it refuses, and that a kill changes nothing."""

import json
import re
import subprocess
import sys
import time

import pytest

from lib import artifact
from tests.conftest import SCRIPTS, beside, call, environment, refused

FLAGS = ["--samples", 16, "--batch", 2, "--accumulation", 2, "--lora-dropout", 0.1, "--load", "fp32", "--threads", 1]


def flags(base, data, folder, *more):
    return ["--model", base, "--data", data, "--output", folder / "lora", "--run", folder / "run", *FLAGS, *more]


def losses(folder):
    return [event["loss"] for event in artifact.read(folder / "lora", "adapter")["metrics"]["history"]]


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    before = artifact.read(base)["digest"]
    done = call("sft", *flags(base, data, folder, "--epochs", 6, "--checkpoint-steps", 2))
    assert done.code == 0, done.err
    assert artifact.read(base)["digest"] == before  # the base is as it was
    return folder, done


def test_the_loss_falls_and_the_audit_is_said(trained):
    folder, done = trained
    assert losses(folder)[-1] < losses(folder)[0]
    assert "EOS supervised in 100% of the rows" in done.out
    assert re.search(r"loss on: +'town \d<\|im_end\|>'", done.out), done.out
    assert "trainable parameters: " in done.out
    assert done.out.splitlines()[-1] == str(folder / "lora")


def test_metadata_tells_what_was_supervised(trained):
    meta = artifact.read(trained[0] / "lora", "adapter")
    labels = meta["metrics"]["labels"]
    assert 0 < labels["supervised_tokens"] < labels["tokens"]
    assert labels["eos_supervised_share"] == 1 and labels["rows_cut"] == labels["rows_left_out"] == 0
    assert meta["metrics"]["steps"] == 24 and len(meta["metrics"]["history"]) == 24
    assert meta["metrics"]["trainable_parameters"] < meta["metrics"]["total_parameters"]


def test_adapter_loads_from_any_directory(trained, tmp_path):
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]);"
        "print(max(p.abs().max().item() for n, p in m.named_parameters() if 'lora_B' in n))"
    )
    command = [sys.executable, "-c", code, str((trained[0] / "lora").resolve())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0  # B starts at zero: it was trained


def test_only_the_log_is_left_of_the_run(trained):
    assert [p.name for p in (trained[0] / "run").iterdir()] == ["log.jsonl"]


def test_killed_and_cut_short_it_continues_with_the_same_losses(trained, base, data, tmp_path):
    """kill -9 in the middle; the newest checkpoint is cut short as well; the same command then gives the losses
    of a run that nothing disturbed."""
    argv = flags(base, data, tmp_path, "--epochs", 6, "--checkpoint-steps", 2)
    command = [sys.executable, str(SCRIPTS / "sft.py"), *map(str, argv)]
    run = tmp_path / "run"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    until = time.time() + 90
    while not list(run.glob("checkpoint-[6-9]/whole.json")):
        assert time.time() < until and process.poll() is None, "it never reached step 6"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "lora").exists()
    newest = max(run.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    (newest / "whole.json").unlink(missing_ok=True)
    (newest / "trainer_state.json").unlink(missing_ok=True)

    done = call("sft", *argv)
    assert done.code == 0, done.err
    assert "was cut short; removed" in done.out and "continuing from" in done.out
    assert losses(tmp_path) == pytest.approx(losses(trained[0]), abs=1e-6)
    steps = [event["step"] for event in artifact.read(tmp_path / "lora")["metrics"]["history"]]
    assert steps == list(range(1, 25))


def test_the_same_rows_a_step_however_the_batch_is_cut(base, data, tmp_path):
    traces = []
    for name, batch, accumulation in (("a", 4, 1), ("b", 1, 4)):
        cut = ["--lora-dropout", 0, "--batch", batch, "--accumulation", accumulation, "--epochs", 2]
        done = call("sft", *flags(base, data, tmp_path / name, *cut))
        assert done.code == 0, done.err
        traces.append(losses(tmp_path / name))
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)


def test_an_unfinished_run_with_other_values_is_not_continued(base, data, tmp_path):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "whole.json").write_text("{}")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"samples": 99}))
    done = call("sft", *flags(base, data, tmp_path, "--epochs", 1))
    assert done.code == 0 and "starting anew" in done.out


def test_long_rows_are_left_out_and_said(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = ["short", "word " * 20_000, "also short"]
    rows.write_text("".join(json.dumps({"prompt": f"{t}?", "completion": "yes"}) + "\n" for t in texts))
    done = call("sft", *flags(base, rows, tmp_path, "--epochs", 1))
    assert done.code == 0, done.err
    assert "1 left out as longer than 1024 tokens" in done.out
    refused(
        call("sft", *flags(base, rows, tmp_path, "--max-length", 16)), "are longer than --max-length", "16", "shortest"
    )


def test_bad_rows_are_refused_before_a_model_is_loaded(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n')
    refused(call("sft", *flags(base, rows, tmp_path)), f"{rows}:2", "'completion'", "mend")
    assert not (tmp_path / "run").exists() and not (tmp_path / "lora").exists()


def test_an_adapter_is_no_base(trained, data, tmp_path):
    refused(call("sft", *flags(trained[0] / "lora", data, tmp_path)), "found an adapter", "make lora-merged")
    refused(call("sft", *flags(tmp_path / "none", data, tmp_path)), "does not exist")


@pytest.mark.parametrize("method", ["gguf-iq4_nl", "nf4"])
def test_an_adapter_learns_beside_a_quantised_base(base, data, tmp_path, method):
    """The base keeps its bytes, and base and adapter together answer better than the base alone."""
    small = tmp_path / "int4"
    argv = ("--model", base, "--data", data, "--method", method, "--samples", 2, "--threads", 1)
    assert call("quantize", *argv, "--output", small).code == 0
    before = artifact.read(small)["digest"]
    done = call("sft", *flags(small, data, tmp_path, "--epochs", 6))
    assert done.code == 0, done.err
    assert artifact.read(small)["digest"] == before
    both = tmp_path / "lora"
    if method != "nf4":  # llama.cpp's form alone: the tokenizer is in the base
        assert beside(both) == ["adapter.gguf", "adapter_config.json", "metadata.json"]

    found = {}
    for name, folder in (("base", small), ("both", both)):
        how = ("--samples", 4, "--max-new-tokens", 4, "--speed-tokens", 2, "--threads", 1, "--run", tmp_path / "r")
        evaluated = call("evaluate", "--model", folder, "--data", data, *how, "--output", tmp_path / name)
        assert evaluated.code == 0, evaluated.err
        found[name] = artifact.read(tmp_path / name)["metrics"]
    assert found["both"]["nll"]["mean"] < found["base"]["nll"]["mean"] - 0.1
    assert found["both"]["model_bytes"] == found["base"]["model_bytes"] + artifact.content_bytes(both)

    merged = call("merge_lora", "--adapter", both, "--output", tmp_path / "merged")
    refused(merged, "quantised")


def test_unknown_lora_targets_are_refused(base, data, tmp_path):
    refused(call("sft", *flags(base, data, tmp_path, "--lora-targets", "nowhere")), "--lora-targets", "nowhere")
