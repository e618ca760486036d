"""What a step is expected to take: counted on fake tensors as on real ones, and held against what there is."""

import json
import re
import shutil

import pytest
import torch

from lib import alive, batching, budget, hardware, models
from tests.conftest import call

LORA = {"r": 4, "target_modules": "all-linear"}


def really_alive(model, rows, length):
    """What `passed` counts on fake tensors, counted on real ones."""
    counter = alive.Alive([*model.parameters(), *model.buffers()])
    weights = counter.bytes
    with counter:
        left = model(
            input_ids=torch.zeros(rows, length, dtype=torch.long),
            use_cache=not torch.is_grad_enabled(),
            logits_to_keep=1,
        )
        kept = counter.bytes - weights
    del left
    return weights, kept, counter.most - weights


@pytest.mark.parametrize("learning", [True, False])
def test_fake_tensors_are_counted_as_real_ones_are(base, learning):
    from peft import LoraConfig, get_peft_model

    lora = LORA if learning else None
    real = models.load(base, "fp32", device="cpu")
    if learning:
        real = get_peft_model(real, LoraConfig(task_type="CAUSAL_LM", **LORA))
    with torch.set_grad_enabled(learning):
        for rows, length in ((1, 40), (3, 64)):
            fake = alive.passed(alive.shape_of(models.config(base), "fp32", lora), rows, length)
            weights, *passing = really_alive(real, rows, length)
            assert fake[0] == weights
            assert fake[1:] == pytest.approx(passing, rel=0.15)  # another kernel of attention keeps a little more


def test_what_is_kept_grows_with_rows_and_length_and_not_with_checkpointing(base):
    config = models.config(base)

    def activations(rows, length, checkpointing=False):
        return budget.training(config, LORA, "fp32", rows, length, checkpointing)["activations"]

    assert activations(4, 64) == pytest.approx(4 * activations(1, 64), rel=0.2)
    assert activations(1, 256) == pytest.approx(4 * activations(1, 64), rel=0.2)
    assert activations(4, 256, checkpointing=True) < activations(4, 256) / 3


def test_the_cache_of_llamacpp_is_what_transformers_counts(base, tmp_path):
    from lib import gguf

    gguf.write(base, tmp_path / "model.gguf", "f16")
    assert budget.key_values_in(tmp_path / "model.gguf") == budget.key_values(models.config(base))
    parts = budget.answering_in_llamacpp(0, budget.key_values_in(tmp_path / "model.gguf"), 3, 100)
    with torch.inference_mode():
        _, cache, _ = alive.passed(alive.shape_of(models.config(base), "fp16"), 3, 100)
    ids, logits = 3 * 100 * 8, 3 * models.config(base).vocab_size * 2
    assert parts["KV cache"] == cache - ids - logits


def test_too_little_is_refused_before_anything_is_loaded(base, tmp_path, monkeypatch):
    """With the smallest changes that fit, each of another kind."""
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n} " + "north " * 1500, "completion": "south"}) + "\n" for n in range(64))
    )
    flags = ["--model", base, "--data", data, "--output", tmp_path / "lora", "--run", tmp_path / "run"]
    flags += ["--load", "fp32", "--threads", 1]
    monkeypatch.setattr(hardware, "free_memory", lambda *_, **__: (10**9, "main memory"))
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    done = call("sft", *flags, "--batch", 64, "--accumulation", 1, "--max-length", 2048)
    assert done.code == 3 and not (tmp_path / "lora").exists(), done.err
    assert "main memory has 1.00 GB; nothing was loaded" in done.err
    fits = re.search(r"What would fit: --batch (\d+) --accumulation (\d+) \(0\.\d+ GB\); --gradient-check", done.err)
    assert int(fits[1]) * int(fits[2]) == 64, done.err
    smaller = ["--batch", fits[1], "--accumulation", fits[2], "--max-length", 2048]
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        call("sft", *flags, *smaller)


def test_evaluation_merge_and_quantisation_are_refused_too(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "free_memory", lambda *_, **__: (10**6, "main memory"))
    flags = ["--model", base, "--data", data, "--output", tmp_path / "made"]
    for script, more in (("evaluate", ["--run", tmp_path / "run"]), ("quantize", [])):
        done = call(script, *flags, *more)
        assert done.code == 3 and "nothing was loaded. No smaller setting" in done.err, script


def test_what_draws_and_what_weighs_is_refused_too(talker, data, bundled, tmp_path, monkeypatch):
    """With fewer texts at once, and shorter ones."""
    monkeypatch.setattr(hardware, "free_memory", lambda *_, **__: (4 * 10**8, "main memory"))
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    end = ["--output", tmp_path / "made", "--run", tmp_path / "run", "--batch", 4096]
    magpie = ["--source", "magpie", "--model", talker, "--samples", 4000]
    preferences = ["--models", talker, "--data", data, "--max-new-tokens", 384, "--responses", 200]
    for name, flags in (
        ("generate_data", magpie),
        ("generate_preferences", preferences),
        ("forgetting", ["--model", talker]),
    ):
        done = call(name, *flags, *end)
        assert done.code == 3 and "nothing was loaded" in done.err, (name, done)
        fits = re.search(r"What would fit: --batch (\d+) \(0\.\d+ GB\)", done.err)
        assert 1 <= int(fits[1]) < 4096, done.err
        assert not (tmp_path / "made").exists()
        with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
            call(name, *flags, *end, "--batch", fits[1])
    long = ["--batch", 256, "--max-instruction-tokens", 8, "--max-response-tokens", 1536]
    done = call("generate_data", *magpie, *end, *long)
    assert re.search(r"; at most \d+ new tokens \(0\.\d+ GB\)", done.err), done.err


def test_drawing_counts_the_batch_that_there_will_be(base):
    config = models.config(base)
    parts = budget.sampling(config, None, "fp32", 12, 4, 100, 50)
    ids, columns = 8, 100 + 50 + batching.BLOCK
    assert parts["KV cache"] == pytest.approx(12 * columns * (4 * budget.key_values(config) + ids), rel=0.1)
    assert parts["drawing"] == 12 * 4 * 4 * config.vocab_size
    more = budget.sampling(config, None, "fp32", 12, 12, 100, 50)
    assert more["activations"] == pytest.approx(3 * parts["activations"], rel=0.1)


def test_a_full_disk_is_said_before_anything_is_loaded(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
    flags = ["--model", base, "--data", data, "--output", tmp_path / "new" / "made"]
    for script, more in (("sft", ["--run", tmp_path / "run"]), ("quantize", [])):
        done = call(script, *flags, *more)
        assert done.code == 3 and "and the disk has 0.00 GB free; nothing was loaded" in done.err, script


def test_what_may_fit_is_tried(capsys):
    need = lambda: {"weights": 1.2e9}  # noqa: E731
    assert budget.check(need, [], (10**9, "main memory")) == 1_200_000_000
    assert "about 1.20 GB (weights 1.20) of 1.0 GB in main memory" in capsys.readouterr().out
    with pytest.raises(budget.OutOfMemory, match="No smaller setting"):
        budget.check(lambda: {"weights": 1.3e9}, [], (10**9, "main memory"))


def test_a_model_that_fake_tensors_cannot_run_is_trained_all_the_same(capsys):
    def need():
        raise RuntimeError("data-dependent")

    assert budget.check(need, [], (1, "main memory")) is None
    assert "not known beforehand" in capsys.readouterr().out
