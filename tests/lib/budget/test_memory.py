"""What a step is expected to take: counted on fake tensors as on real ones, and held against what there is."""

import contextlib
import json
import re
import shutil
from argparse import Namespace

import pytest
import torch

from lib.budget import memory, trace
from lib.core import hardware
from lib.model import directory, loading
from lib.model.directory import open_directory
from lib.train import loop
from tests.conftest import call

LORA = {"r": 4, "target_modules": "all-linear"}


def really_alive(model, rows, length):
    """What `passed` counts on fake tensors, counted on real ones."""
    counter = trace.LiveBytes([*model.parameters(), *model.buffers()])
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
    model = open_directory(base)
    config, real = directory.load_config(model), loading.load_model(model, "fp32", device="cpu")
    if learning:
        real = get_peft_model(real, LoraConfig(task_type="CAUSAL_LM", **LORA))
    with torch.set_grad_enabled(learning):
        for rows, length in ((1, 40), (3, 64)):
            fake = trace.trace_forward(trace.build_meta_model(config, "fp32", lora), rows, length)
            weights, *passing = really_alive(real, rows, length)
            assert fake[0] == weights
            assert fake[1:] == pytest.approx(passing, rel=0.15)  # another kernel of attention keeps a little more


def test_what_is_kept_grows_with_rows_and_length_and_not_with_checkpointing(base):
    config = directory.load_config(open_directory(base))

    def activations(rows, length, checkpointing=False):
        return memory.estimate_training(config, LORA, "fp32", rows, length, checkpointing)["activations"]

    assert activations(4, 64) == pytest.approx(4 * activations(1, 64), rel=0.2)
    assert activations(1, 256) == pytest.approx(4 * activations(1, 64), rel=0.2)
    assert activations(4, 256, checkpointing=True) < activations(4, 256) / 3


def test_the_cache_of_llamacpp_is_what_transformers_counts(base, tmp_path):
    from lib.gguf import writing

    writing.write_model(base, tmp_path / "model.gguf", "f16")
    config = directory.load_config(open_directory(base))
    assert memory.count_key_values_of_gguf(tmp_path / "model.gguf") == memory.count_key_values(config)
    parts = memory.estimate_llamacpp(0, memory.count_key_values_of_gguf(tmp_path / "model.gguf"), 3, 100)
    with torch.inference_mode():
        _, cache, _ = trace.trace_forward(trace.build_meta_model(config, "fp16"), 3, 100)
    ids, logits = 3 * 100 * 8, 3 * config.vocab_size * 2
    assert parts["KV cache"] == cache - ids - logits


def test_too_little_is_refused_before_anything_is_loaded(base, tmp_path, monkeypatch):
    """With the smallest changes that fit, each of another kind."""
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n} " + "north " * 1500, "completion": "south"}) + "\n" for n in range(64))
    )
    flags = ["--model", base, "--data", data, "--output", tmp_path / "lora", "--run-dir", tmp_path / "run"]
    flags += ["--precision", "fp32", "--threads", 1]
    monkeypatch.setattr(hardware, "free_memory", lambda *_, **__: (10**9, "main memory"))
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    done = call("sft", *flags, "--batch-size", 64, "--accumulation-steps", 1, "--max-length", 2048)
    assert done.code == 3 and not (tmp_path / "lora").exists(), done.err
    assert "but only 1.00 GB is free (main memory); no model was loaded" in done.err
    fits = re.search(
        r"Settings that fit: --batch-size (\d+) --accumulation-steps (\d+) \(0\.\d+ GB\); --gradient-check", done.err
    )
    assert int(fits[1]) * int(fits[2]) == 64, done.err
    smaller = ["--batch-size", fits[1], "--accumulation-steps", fits[2], "--max-length", 2048]
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        call("sft", *flags, *smaller)


def test_a_base_that_is_quantised_already_is_counted_as_it_is_stored(tmp_path, monkeypatch):
    """Eight billion parameters, in a few layers, fit into a GPU of 12 GB in NF4; in 16 bit they do not."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=131072, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=2048,
    )  # fmt: skip
    nf4 = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for name, form in (("nf4", nf4), ("16", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict() | form))
    monkeypatch.setattr(hardware, "free_memory", lambda **_: (12 * 10**9, "a GPU"))
    args = Namespace(
        precision="auto", gradient_checkpointing=True, batch_size=1, accumulation_steps=8, device_map="none",
        output=tmp_path / "lora",
    )  # fmt: skip
    with hardware.simulate(hardware.GPU("a GPU", (8, 6), 12 * 10**9)):
        assert 5e9 < loop.check_memory(open_directory(tmp_path / "nf4"), LORA, [256], 1, args) < 9e9
        with pytest.raises(memory.OutOfMemory, match="--precision nf4"):
            loop.check_memory(open_directory(tmp_path / "16"), LORA, [256], 1, args)


def test_evaluation_merge_and_quantisation_are_refused_too(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "free_memory", lambda *_, **__: (10**6, "main memory"))
    flags = ["--model", base, "--data", data, "--output", tmp_path / "made"]
    for script, more in (("evaluate", ["--run-dir", tmp_path / "run"]), ("quantize", [])):
        done = call(script, *flags, *more)
        assert done.code == 3 and "no model was loaded. No smaller setting" in done.err, script


@pytest.mark.slow
def test_what_draws_and_what_weighs_is_refused_too(talker, data, bundled, tmp_path, monkeypatch):
    """With fewer texts at once, and shorter ones."""
    monkeypatch.setattr(hardware, "free_memory", lambda *_, **__: (42 * 10**7, "main memory"))
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    end = ["--output", tmp_path / "made", "--run-dir", tmp_path / "run", "--batch-size", 4096]
    magpie = ["--source", "magpie", "--model", talker, "--samples", 4000]
    preferences = ["--models", talker, "--data", data, "--max-new-tokens", 384, "--responses", 200]
    for name, flags in (
        ("generate_data", magpie),
        ("generate_preferences", preferences),
        ("evaluate_general", ["--model", talker]),
    ):
        done = call(name, *flags, *end)
        assert done.code == 3 and "no model was loaded" in done.err, (name, done)
        fits = re.search(r"Settings that fit: --batch-size (\d+) \(0\.\d+ GB\)", done.err)
        assert 1 <= int(fits[1]) < 4096, done.err
        assert not (tmp_path / "made").exists()
        with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
            call(name, *flags, *end, "--batch-size", fits[1])
    long = ["--batch-size", 256, "--max-instruction-tokens", 8, "--max-response-tokens", 1536]
    done = call("generate_data", *magpie, *end, *long)
    assert re.search(r"; at most \d+ new tokens \(0\.\d+ GB\)", done.err), done.err


def test_drawing_counts_the_batch_that_there_will_be(base):
    config = directory.load_config(open_directory(base))
    parts = memory.estimate_sampling(config, None, "fp32", 12, 4, 100, 50)
    ids, columns = 8, 100 + 50 + memory.CACHE_BLOCK
    assert parts["KV cache"] == pytest.approx(12 * columns * (4 * memory.count_key_values(config) + ids), rel=0.1)
    assert parts["sampling"] == 12 * 4 * 4 * config.vocab_size
    more = memory.estimate_sampling(config, None, "fp32", 12, 12, 100, 50)
    assert more["activations"] == pytest.approx(3 * parts["activations"], rel=0.1)


def test_a_full_disk_is_said_before_anything_is_loaded(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
    flags = ["--model", base, "--data", data, "--output", tmp_path / "new" / "made"]
    for script, more in (("sft", ["--run-dir", tmp_path / "run"]), ("quantize", [])):
        done = call(script, *flags, *more)
        assert done.code == 3 and "but the disk has only 0.00 GB free; no model was loaded" in done.err, script


def test_what_may_fit_is_tried(capsys):
    need = lambda: {"weights": 1.2e9}  # noqa: E731
    assert memory.check_fits(need, [], (10**9, "main memory")) == 1_200_000_000
    assert "estimated memory: 1.20 GB (weights 1.20); free: 1.0 GB (main memory)" in capsys.readouterr().out
    with pytest.raises(memory.OutOfMemory, match="No smaller setting"):
        memory.check_fits(lambda: {"weights": 1.3e9}, [], (10**9, "main memory"))


SHAPE = dict(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
EXPERTS = {
    "mixtral": dict(num_local_experts=4),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
}


def checked(config) -> int | None:
    return memory.check_fits(
        lambda: memory.estimate_training(config, LORA, "fp32", 2, 16, False), [], (10**12, "main memory")
    )


@pytest.mark.parametrize("way", ["grouped_mm", "eager"])  # transformers' own choice first
@pytest.mark.parametrize("family", EXPERTS)
def test_a_router_of_experts_cannot_be_counted_and_is_trained_all_the_same(family, way, capsys):
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **SHAPE, num_key_value_heads=2, **EXPERTS[family])
    config._experts_implementation = way
    assert checked(config) is None
    assert "estimated memory: unknown for this model: " in capsys.readouterr().out


def test_what_breaks_fake_tensors_is_a_defect_and_no_model_that_cannot_be_counted(base, monkeypatch, capsys):
    """Else a release of torch that renames something would silently leave every model without a guard."""
    config = directory.load_config(open_directory(base))
    assert checked(config) > 5e8 and "estimated memory: " in capsys.readouterr().out
    for error in (AttributeError("renamed"), TypeError("renamed"), RuntimeError("renamed"), ImportError("renamed")):

        def broken(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patched, pytest.raises(type(error), match="renamed"):
            patched.setattr(trace.FakeTensorMode, "__torch_dispatch__", broken)
            checked(config)
        assert "memory" not in capsys.readouterr().out


# --- what torch does for the count -------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [True, False])
def test_every_tensor_is_counted_once_and_until_it_is_dropped(fake):
    """Of an operation that makes two, both; a view is nothing new."""
    with trace.FakeTensorMode() if fake else contextlib.nullcontext(), trace.LiveBytes([]) as counter:
        one = torch.zeros(1000)
        assert (counter.bytes, counter.most) == (4000, 4000)
        view = one[:10].view(2, 5)
        values, indices = one.topk(100)
        assert counter.bytes == 4000 + 100 * (4 + 8)
        del one, view
        assert (counter.bytes, counter.most) == (1200, 5200)
        del values, indices
        assert (counter.bytes, counter.most) == (0, 5200)


def test_all_weights_become_fake_and_tied_ones_stay_one(base):
    config = directory.load_config(open_directory(base))
    model = trace.build_meta_model(config, "fp32", LORA)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    with trace.FakeTensorMode(allow_non_fake_inputs=True):
        made = trace.make_fake(model)
    held = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in held} == {"cpu"} and {*map(id, held)} == {*map(id, made)}
    plain = model.get_base_model()
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    assert sum(one.nbytes for one in made if one.requires_grad) == 4 * memory.count_trained(config, LORA)
