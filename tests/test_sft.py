"""sft.py on a tiny model: what it trains, what it refuses, and that a kill changes nothing."""

import argparse
import json
import re
import subprocess
import sys
import time

import pytest

from lib.core import artifact, runlog
from tests.conftest import SCRIPTS, beside, call, environment, killed_at_checkpoint, refused

FLAGS = ["--samples", 16, "--batch-size", 2, "--accumulation-steps", 2, "--lora-dropout", 0.1, "--precision", "fp32",
         "--threads", 1]  # fmt: skip


def flags(base, data, folder, *more):
    return ["--model", base, "--data", data, "--output", folder / "lora", "--run-dir", folder / "run", *FLAGS, *more]


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
    assert "every answer ends in EOS" in done.out
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


@pytest.mark.slow
def test_adapter_loads_from_any_directory_and_is_saved_alike_by_each_process(trained, tmp_path):
    """PEFT holds the names of the layers in a set, whose order differs from process to process."""
    code = (
        "import sys; from pathlib import Path; from peft import AutoPeftModelForCausalLM as A;"
        f"sys.path.append({str(SCRIPTS)!r}); from lib.model import loading; m = A.from_pretrained(sys.argv[1]);"
        "loading.save_adapter(m, Path(m.peft_config['default'].base_model_name_or_path), Path('again'));"
        "print(max(p.abs().max().item() for n, p in m.named_parameters() if 'lora_B' in n))"
    )
    adapter = (trained[0] / "lora").resolve()
    command = [sys.executable, "-c", code, str(adapter)]
    fresh = environment(PYTHONHASHSEED="1")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=fresh, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0  # B starts at zero: it was trained
    config = (adapter / "adapter_config.json").read_text()
    assert len(json.loads(config)["target_modules"]) > 1
    for name in ("target_modules", "base_model_name_or_path", "peft_type"):
        assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())[name] == json.loads(config)[name]


@pytest.mark.slow
def test_rows_that_change_while_it_trains_leave_no_artifact(base, tiny_artifacts, tmp_path, monkeypatch):
    from lib.train import loop

    rows, fit = tmp_path / "rows.jsonl", loop.fit
    text = tiny_artifacts["rows"].read_text()
    argv = flags(base, rows, tmp_path, "--checkpoint-steps", 2)
    for edit in (lambda: rows.write_text(text.replace("town 1", "town 9")), rows.unlink):
        rows.write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "fit", lambda *given, edit=edit: [fit(*given), edit()][0])
            refused(call("sft", *argv), "rows.jsonl: changed while this command was running", "the saved progress")
        assert not (tmp_path / "lora").exists()
    rows.write_text(text)
    done = call("sft", *argv)
    assert done.code == 0 and "resuming" in done.out + done.err, done
    assert artifact.read(tmp_path / "lora")["inputs"]["data"] == artifact.identify(rows)


def test_only_the_log_is_left_of_the_run(trained):
    assert [p.name for p in (trained[0] / "run").iterdir()] == ["log.jsonl"]


def test_killed_and_cut_short_it_continues_with_the_same_losses(trained, base, data, tmp_path):
    """kill -9 in the middle; the newest checkpoint is cut short as well; the same command then gives the losses
    of a run that nothing disturbed."""
    argv = flags(base, data, tmp_path, "--epochs", 6, "--checkpoint-steps", 2)
    newest = killed_at_checkpoint("sft", argv, tmp_path / "run", "[6-9]")
    assert not (tmp_path / "lora").exists()
    (newest / "whole.json").unlink(missing_ok=True)
    (newest / "trainer_state.json").unlink(missing_ok=True)

    done = call("sft", *argv)
    assert done.code == 0, done.err
    assert "deleted, because it is incomplete" in done.out and "resuming from" in done.out
    assert losses(tmp_path) == pytest.approx(losses(trained[0]), abs=1e-6)
    steps = [event["step"] for event in artifact.read(tmp_path / "lora")["metrics"]["history"]]
    assert steps == list(range(1, 25))


def test_the_same_rows_a_step_however_the_batch_is_cut(base, data, tmp_path):
    traces = []
    for name, batch, accumulation in (("a", 4, 1), ("b", 1, 4)):
        cut = ["--lora-dropout", 0, "--batch-size", batch, "--accumulation-steps", accumulation, "--epochs", 2]
        done = call("sft", *flags(base, data, tmp_path / name, *cut))
        assert done.code == 0, done.err
        traces.append(losses(tmp_path / name))
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)


def test_the_loss_is_that_of_the_answers_tokens_alone(base, data, tmp_path):
    """The first step's, before anything is learnt, against the model's own loss on the same rows."""
    import torch

    from lib.data import records
    from lib.model import chat, directory, loading

    done = call("sft", *flags(base, data, tmp_path, "--samples", 6, "--batch-size", 3))
    assert done.code == 0, done.err
    opened = directory.open_directory(base)
    model, tokenizer = loading.load_model(opened, "fp32", device="cpu"), directory.load_tokenizer(opened)
    rows = records.sample_rows(records.load_split(data, "train"), 6, 42)
    expected = []
    for row in rows:
        encoded = chat.encode_row(tokenizer, row, directory.eos_token_ids(opened))
        ids, labels = (torch.tensor([encoded[key]]) for key in ("input_ids", "labels"))
        with torch.inference_mode():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        answer = labels[0, 1:] != -100
        expected += (-logprobs[answer, labels[0, 1:][answer]]).tolist()
    assert losses(tmp_path)[0] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_an_unfinished_run_with_other_values_is_not_continued(base, data, tmp_path):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "whole.json").write_text("{}")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"samples": 99}))
    done = call("sft", *flags(base, data, tmp_path, "--epochs", 1))
    assert done.code == 0 and "starting over" in done.out


# --- numbers that are no longer finite -------------------------------------------------------------------------


def checkpoints(run):
    """{name of a whole checkpoint: the digest of its weights, which are finite}."""
    from safetensors.torch import load_file

    found = {}
    for folder in run.glob("checkpoint-*"):
        weights = load_file(folder / "adapter_model.safetensors")
        assert (folder / "whole.json").is_file() and all(one.isfinite().all() for one in weights.values()), folder
        found[folder.name] = artifact.file_digests(folder)["adapter_model.safetensors"]
    return found


@pytest.mark.parametrize(
    ("precision", "rate", "words"),
    [("bf16", 1e30, ["loss is nan", "--precision fp32 (it is bf16)"]), ("fp32", 1e30, ["loss is nan"]),
     ("fp32", 1e39, ["a trained weight became NaN or infinite"])],
)  # fmt: skip
def test_a_training_that_diverges_ends_before_it_saves_anything(base, data, tmp_path, precision, rate, words):
    """The first two have ruined weights that are still numbers; the last has not, and would be a checkpoint."""
    argv = flags(base, data, tmp_path, "--epochs", 3, "--checkpoint-steps", 1, "--precision", precision,
                 "--learning-rate", rate)  # fmt: skip
    done = call("sft", *argv)
    rate_said = f"Lower --learning-rate (it is {rate:g})"
    refused(done, *words, rate_said, "so training ends", "is kept", "would end in the same step")
    assert "\nsft: error: step " in done.err  # on a line of its own
    assert beside(tmp_path) == ["run"]
    log, kept = runlog.read_events(tmp_path / "run" / "log.jsonl"), checkpoints(tmp_path / "run")
    assert 1 <= len(log) <= 4 and all(0 < event["loss"] < 1e9 and event["grad_norm"] < 1e9 for event in log)
    assert f"checkpoint-{len(log)}" in kept and f"step {len(log) + 1}: " in done.err
    again = call("sft", *argv)
    refused(again, *words)
    assert "resuming from" in again.out and checkpoints(tmp_path / "run") == kept
    assert beside(tmp_path) == ["run"]


def test_a_model_that_is_broken_before_it_learns_is_said_to_be(plain, data, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(plain / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    done = call("sft", *flags(plain, data, tmp_path))
    refused(done, "step 1: loss is nan", "Nothing was learnt before", "`make base` does")
    assert "--learning-rate" not in done.err.rpartition("error:")[2] and not (tmp_path / "lora").exists()


@pytest.fixture
def scaler(monkeypatch):
    """A function: train with a GradScaler of these settings, as fp16 does on a GPU."""
    import torch
    from accelerate import Accelerator

    real, scale = Accelerator.__init__, {}

    def init(self, *given, **how):
        real(self, *given, **how)
        self.scaler = torch.amp.GradScaler("cpu", **scale)

    def unscale(self, *_):  # accelerate's own does it for fp16 on a GPU alone
        for optimizer in self._optimizers:
            self.scaler.unscale_(optimizer.optimizer)

    monkeypatch.setattr(Accelerator, "__init__", init)
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
    return scale.update


def test_steps_that_the_scaler_skips_are_counted_and_are_no_end(base, data, tmp_path, scaler):
    """The scale is one that overflows fp32 until it is halved a few times."""
    scaler(init_scale=2.0**127)
    done = call("sft", *flags(base, data, tmp_path, "--epochs", 3, "--lora-dropout", 0))
    assert done.code == 0, done.err
    metrics = artifact.read(tmp_path / "lora")["metrics"]
    skipped = [event["skipped"] for event in metrics["history"]]
    assert 1 <= metrics["skipped_steps"] == sum(skipped) <= 6 and skipped == sorted(skipped, reverse=True)
    assert all((event["grad_norm"] is None) == event["skipped"] for event in metrics["history"])
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]


@pytest.mark.parametrize(("epochs", "count"), [(10, 20), (2, 8)])
def test_a_scaler_that_skips_every_step_is_the_end(base, data, tmp_path, scaler, monkeypatch, epochs, count):
    """After twenty steps, or after all there are: a gradient that is NaN at every scale."""
    import torch
    from trl import SFTTrainer

    real = SFTTrainer.training_step

    def training_step(self, model, *given):
        loss = real(self, model, *given)
        next(p for p in model.parameters() if p.requires_grad).grad.fill_(torch.nan)
        return loss

    scaler(init_scale=2.0**16)
    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    done = call("sft", *flags(base, data, tmp_path, "--epochs", epochs))
    refused(done, f"the last {count} steps were skipped", "nothing is learnt", "--learning-rate")
    assert beside(tmp_path) == ["run"]


# --- how many steps, and how large -----------------------------------------------------------------------------


def test_stopped_after_the_last_step_it_takes_none_more(base, data, tmp_path, monkeypatch):
    """The last step is in the middle of an epoch, where transformers would go on."""
    from lib.model import loading

    def stop(*_):
        raise KeyboardInterrupt

    half = ["--epochs", 1.5]
    whole = call("sft", *flags(base, data, tmp_path / "whole", *half))
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patched:
        patched.setattr(loading, "save_adapter", stop)
        assert call("sft", *flags(base, data, tmp_path / "cut", *half)).code == 4
    done = call("sft", *flags(base, data, tmp_path / "cut", *half))
    assert done.code == 0 and "resuming from" in done.out, done.err
    one, other = (artifact.read(tmp_path / name / "lora") for name in ("cut", "whole"))
    assert one["metrics"]["steps"] == other["metrics"]["steps"] == 6
    assert one["digest"] == other["digest"] and losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_warm_up_of_all_steps_lasts_for_all_of_them(base, data, tmp_path):
    done = call("sft", *flags(base, data, tmp_path, "--warmup-ratio", 1, "--learning-rate", 1e-3))
    assert done.code == 0, done.err
    rates = [event["lr"] for event in artifact.read(tmp_path / "lora")["metrics"]["history"]]
    assert rates == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4])


def test_a_single_step_is_taken_without_warm_up(base, data, tmp_path):
    """Its learning rate would be 0."""
    from safetensors.torch import load_file

    done = call("sft", *flags(base, data, tmp_path, "--samples", 3, "--warmup-ratio", 0.1))
    assert done.code == 0 and "training has a single step: it has the full learning rate" in done.out, done.err
    assert [event["lr"] for event in artifact.read(tmp_path / "lora")["metrics"]["history"]] == [5e-4]
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(one.abs().max() > 0 for one in weights.values())  # B starts at 0


# --- memory that runs out ------------------------------------------------------------------------------------

# rows a step; four steps
EIGHT = ["--batch-size", 4, "--accumulation-steps", 2, "--epochs", 2, "--checkpoint-steps", 100]


@pytest.fixture
def memory(monkeypatch):
    """A function: from its so many-th forward pass on, passes of more than so many rows run out of memory. The rows of
    all passes are noted."""
    import torch
    from accelerate import Accelerator
    from trl import SFTTrainer

    step, backward, passes, limit = SFTTrainer.training_step, Accelerator.backward, [], {}

    def training_step(self, model, inputs, *given):
        passes.append(len(inputs["input_ids"]))
        return step(self, model, inputs, *given)

    def backward_of(self, loss, **how):
        if len(passes) >= limit["since"] and passes[-1] > limit["rows"]:
            loss.register_hook(out_of_memory)
        backward(self, loss, **how)

    def out_of_memory(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def set_limit(rows=99, since=1):
        passes.clear()
        limit.update(rows=rows, since=since)
        return passes

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    monkeypatch.setattr(Accelerator, "backward", backward_of)
    set_limit()
    return set_limit


def trained_alike(one, other, within=1e-5):
    from safetensors.torch import load_file

    log, expected = (runlog.read_events(folder / "run" / "log.jsonl") for folder in (one, other))
    assert [event["step"] for event in log] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", "lr"):
        assert [e[name] for e in log] == pytest.approx([e[name] for e in expected], abs=within), name
    weights, others = (load_file(folder / "lora" / "adapter_model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    assert max((weights[name] - others[name]).abs().max().item() for name in weights) <= within


@pytest.mark.slow
def test_memory_that_runs_out_changes_neither_losses_nor_adapter(base, data, tmp_path, memory):
    """From the first pass on, with dropout: the trace is that of a run with half the batch. The next starts there."""
    small = call("sft", *flags(base, data, tmp_path / "small", *EIGHT, "--batch-size", 2, "--accumulation-steps", 4))
    assert small.code == 0 and "out of memory" not in small.err
    passes = memory(2)
    done = call("sft", *flags(base, data, tmp_path / "first", *EIGHT))
    assert done.code == 0, done.err
    said = (
        "out of memory at micro-batch 4 with 2 accumulation steps; continuing with 2 and 4. The effective batch size "
    )
    assert done.err.count("out of memory") == 1 and f"{said}remains 8" in done.err
    assert passes == [4] + 16 * [2]
    trained_alike(tmp_path / "first", tmp_path / "small")
    metrics = artifact.read(tmp_path / "first" / "lora")["metrics"]
    assert metrics["micro_batch"] == [{"from_step": 1, "rows": 2}]

    passes = memory(2)
    known = tmp_path / "first" / "micro_batch.json"
    again = call("sft", *flags(base, data, tmp_path / "first", *EIGHT))
    assert again.code == 0 and passes == 16 * [2]
    assert "using micro-batch 2 with 4 accumulation steps" in again.err and f"delete {known}" in again.err
    trained_alike(tmp_path / "first", tmp_path / "small")
    known.unlink()
    passes = memory()
    assert call("sft", *flags(base, data, tmp_path / "first", *EIGHT)).code == 0
    assert passes == 8 * [4]


@pytest.mark.slow
def test_memory_that_runs_out_in_the_middle_of_a_step_changes_nothing_either(base, data, tmp_path, memory):
    """In the second micro batch of the second step, twice, so that gradients are there to be kept."""
    still = ["--lora-dropout", 0]  # else the steps before draw other random numbers than those of a smaller batch
    small = flags(base, data, tmp_path / "small", *EIGHT, *still, "--batch-size", 1, "--accumulation-steps", 8)
    assert call("sft", *small).code == 0
    passes = memory(1, since=4)
    done = call("sft", *flags(base, data, tmp_path / "back", *EIGHT, *still))
    assert done.code == 0, done.err
    assert passes == [4, 4, 4, 4, 2] + 20 * [1]
    trained_alike(tmp_path / "back", tmp_path / "small")
    changes = artifact.read(tmp_path / "back" / "lora")["metrics"]["micro_batch"]
    assert changes == [{"from_step": 1, "rows": 4}, {"from_step": 2, "rows": 1}]


@pytest.mark.slow
def test_where_not_even_one_row_fits_the_finished_steps_are_kept(base, data, tmp_path, memory):
    """In the middle of the third step, the first of an epoch. The checkpoint is what is saved after the second, to the
    byte; the same command continues, also with gradient checkpointing."""
    one = [*EIGHT, "--batch-size", 1, "--accumulation-steps", 8]
    whole = call("sft", *flags(base, data, tmp_path / "whole", *one))
    assert whole.code == 0, whole.err
    saved = []
    for name, steps in (("cut", 100), ("regular", 2)):
        memory(0, since=20)
        done = call("sft", *flags(base, data, tmp_path / name, *one, "--checkpoint-steps", steps))
        assert done.code == 3 and "Traceback" not in done.err, done.err
        assert "\nsft: error: out of memory in step 3 with a single example" in done.err  # on a line of its own
        for word in ("checkpoint-2", "--max-length", "--gradient-checkpointing", "--model"):
            assert word in done.err
        assert beside(tmp_path / name) == ["run"]
        run = tmp_path / name / "run"
        assert beside(run) == ["README.md", "checkpoint-2", "log.jsonl", "run.json"]
        assert [event["step"] for event in runlog.read_events(run / "log.jsonl")] == [1, 2]
        state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_bytes())
        settled = {key: state[key] for key in ("global_step", "epoch", "total_flos", "log_history")}
        files = artifact.file_digests(run / "checkpoint-2")
        other = ("trainer_state.json", "training_args.bin")  # they name the interval and the folder
        saved.append((settled, {name: digest for name, digest in files.items() if name not in other}))
    assert saved[0] == saved[1] and len(saved[0][1]) > 5

    memory(0, since=4)
    again = call("sft", *flags(base, data, tmp_path / "cut", *one))
    assert again.code == 3 and "resuming from" in again.out and "checkpoint-2" in again.err, again.err
    memory()
    more = call("sft", *flags(base, data, tmp_path / "cut", *one, "--gradient-checkpointing"))
    assert more.code == 0 and "resuming from" in more.out, more.err
    trained_alike(tmp_path / "cut", tmp_path / "whole")


LIMITED = f"""
import resource, sys
sys.path.insert(0, {str(SCRIPTS)!r})
if limit := int(sys.argv.pop(1)):
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
import sft
from lib.core import cli
try:
    cli.run(sft.main, sft.make_parser)
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmPeak")), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_process_with_less_memory_than_its_batch_wants_trains_all_the_same(tmp_path):
    """Memory is really refused: the address space is limited to what lies between the peaks of one row and of eight."""
    from lib.model import tiny

    tokenizer, folder = tiny.tokenizer(), tmp_path / "model"
    large = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    tiny.model(len(tokenizer), **large).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    texts = ["the capital of the country is " * 60 + str(n) for n in range(8)]
    rows.write_text("".join(json.dumps({"prompt": text, "completion": "yes"}) + "\n" for text in texts))

    def train(name, batch, limit=0):
        argv = flags(folder, rows, tmp_path / name, "--samples", 8, "--epochs", 2, "--batch-size", batch)
        argv += ["--accumulation-steps", 8 // batch, "--lora-dropout", 0, "--warmup-ratio", 0]
        command = [sys.executable, "-c", LIMITED, str(limit), *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)
        return done, 1024 * int(re.search(r"VmPeak:\s+(\d+) kB", done.stderr)[1])

    one, least = train("one", 1)
    eight, most = train("eight", 8)
    assert one.returncode == eight.returncode == 0, one.stderr + eight.stderr
    assert most - least > 300e6, (least, most)
    limited, peak = train("limited", 8, (least + most) // 2)
    assert limited.returncode == 0, limited.stderr
    assert "out of memory at micro-batch 8 with 1 accumulation steps; continuing with 4 and 2" in limited.stderr
    assert peak <= (least + most) // 2
    assert losses(tmp_path / "limited") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_long_rows_are_left_out_and_said(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = ["short", "word " * 20_000, "also short"]
    rows.write_text("".join(json.dumps({"prompt": f"{t}?", "completion": "yes"}) + "\n" for t in texts))
    done = call("sft", *flags(base, rows, tmp_path, "--epochs", 1))
    assert done.code == 0, done.err
    assert "1 dropped (longer than 1024 tokens)" in done.out
    refused(
        call("sft", *flags(base, rows, tmp_path, "--max-length", 16)), "are longer than --max-length", "16", "shortest"
    )


def test_bad_rows_are_refused_before_a_model_is_loaded(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n')
    refused(call("sft", *flags(base, rows, tmp_path)), f"{rows}:2", "'completion'", "fix or")
    assert not (tmp_path / "run").exists() and not (tmp_path / "lora").exists()


def test_an_adapter_is_no_base(trained, data, tmp_path):
    refused(call("sft", *flags(trained[0] / "lora", data, tmp_path)), "found an adapter", "make lora-merged")
    refused(call("sft", *flags(tmp_path / "none", data, tmp_path)), "does not exist")


@pytest.mark.slow
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
        how = ("--samples", 4, "--max-new-tokens", 4, "--speed-tokens", 2, "--threads", 1, "--run-dir", tmp_path / "r")
        evaluated = call("evaluate", "--model", folder, "--data", data, *how, "--output", tmp_path / name)
        assert evaluated.code == 0, evaluated.err
        found[name] = artifact.read(tmp_path / name)["metrics"]
    assert found["both"]["nll"]["mean"] < found["base"]["nll"]["mean"] - 0.1
    assert found["both"]["model_bytes"] == found["base"]["model_bytes"] + artifact.content_bytes(both)

    merged = call("merge_lora", "--adapter", both, "--output", tmp_path / "merged")
    refused(merged, "quantised")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Which town?", "chosen": "town 1", "rejected": "no town"}\n')
    where = ("--output", tmp_path / "dpo", "--run-dir", tmp_path / "dpo-run", "--threads", 1)
    preferring = call("dpo", "--model", small, "--adapter", both, "--data", pairs, *where)
    if method == "nf4":
        assert preferring.code == 0, preferring.err
    else:
        refused(preferring, "contains only a GGUF")


@pytest.mark.slow
def test_an_adapter_on_a_quantised_base_trains_in_fp32_also_when_resumed(base, data, tmp_path, monkeypatch):
    """TRL casts it to bf16 when training begins, and PEFT to fp32 when it is resumed."""
    import torch
    from trl import SFTTrainer

    small = tmp_path / "nf4"
    argv = ("--model", base, "--data", data, "--method", "nf4", "--samples", 2, "--threads", 1)
    assert call("quantize", *argv, "--output", small).code == 0
    step, dtypes, stop = SFTTrainer.training_step, [], []

    def training_step(self, *given):
        dtypes.append({p.dtype for p in self.model.parameters() if p.requires_grad})
        if len(dtypes) == stop[0]:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    for name, at in (("whole", [99]), ("cut", [6, 99])):
        for passes in at:
            dtypes.clear()
            stop[:] = [passes]
            more = ["--precision", "auto", "--checkpoint-steps", 2]
            done = call("sft", *flags(small, data, tmp_path / name, *more))
            assert done.code == (0 if passes == 99 else 4), done.err
            assert dtypes and all(found == {torch.float32} for found in dtypes), dtypes
    assert "resuming from" in done.out and len(dtypes) == 4
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_unknown_lora_targets_are_refused(base, data, tmp_path):
    refused(call("sft", *flags(base, data, tmp_path, "--lora-targets", "nowhere")), "--lora-targets", "nowhere")


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        ("q_proj,lm_head", "LM head cannot have an adapter"),
        ("lm_head", "LM head cannot have an adapter"),
        ("q_proj,embed_tokens", "LM head as well"),
    ],
)
def test_an_adapter_that_could_not_be_trained_or_merged_is_refused(base, data, tmp_path, targets, why):
    done = call("sft", *flags(base, data, tmp_path, "--lora-targets", targets))
    refused(done, f"--lora-targets {targets}", why, "leave")
    assert beside(tmp_path) == []


def test_embeddings_of_their_own_may_have_an_adapter_and_the_head_none(talker, data, tmp_path):
    done = call("sft", *flags(talker, data, tmp_path, "--lora-targets", "q_proj,embed_tokens"))
    assert done.code == 0, done.err
    refused(
        call("sft", *flags(talker, data, tmp_path / "x", "--lora-targets", "q_proj,lm_head")),
        "LM head cannot have an adapter",
    )


def test_an_error_of_the_model_is_none_of_the_targets(base, tmp_path, monkeypatch):
    """As where the installed transformers does not know the architecture, or not this attention."""
    from lib.model import directory
    from lib.train import loop

    model = directory.open_directory(base)
    config = directory.load_config(model)
    config._attn_implementation = "no such attention"
    monkeypatch.setattr(directory, "load_config", lambda model: config)
    args = argparse.Namespace(
        precision="fp32", batch_size=1, accumulation_steps=1, gradient_checkpointing=False, output=tmp_path
    )
    with pytest.raises(ValueError, match="no such attention"):
        loop.check_memory(model, {"r": 4, "target_modules": "all-linear"}, [8], 1, args)


def test_fp16_is_refused_on_a_cpu(base, data, tmp_path):
    refused(
        call("sft", *flags(base, data, tmp_path, "--precision", "fp16")),
        "--precision fp16",
        "only a GPU can train in fp16",
        "fp32",
    )
    assert beside(tmp_path) == []


# --- prompt tuning -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompt(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompt")
    how = ["--method", "prompt-tuning", "--epochs", 8, "--checkpoint-steps", 4]
    done = call("sft", *flags(base, data, folder, *how))
    assert done.code == 0, done.err
    return folder, done


def test_a_tuned_prompt_learns_and_is_small(prompt, base, data, tmp_path):
    folder, done = prompt
    assert losses(folder)[-1] < losses(folder)[0] - 0.1
    meta = artifact.read(folder / "lora", "adapter")
    assert meta["metrics"]["trainable_parameters"] == 20 * 64 and "trainable parameters: 1,280 of" in done.out
    assert meta["arguments"]["learning_rate"] == 3e-2  # the method's own
    how = ("--samples", 4, "--max-new-tokens", 4, "--speed-tokens", 2, "--threads", 1, "--batch-size", 4)
    found = {}
    for name, model in (("base", base), ("both", folder / "lora")):
        evaluated = call("evaluate", "--model", model, "--data", data, *how, "--output", tmp_path / name, "--run-dir",
                         tmp_path / "run")  # fmt: skip
        assert evaluated.code == 0, evaluated.err
        found[name] = artifact.read(tmp_path / name)["metrics"]
    assert found["both"]["nll"]["mean"] < found["base"]["nll"]["mean"] - 0.05


@pytest.mark.slow
def test_a_tuned_prompt_continues_after_memory_ran_out(prompt, base, data, tmp_path, memory):
    """At a single row, in the middle: what was kept and what comes after are those of an undisturbed run."""
    how = ["--method", "prompt-tuning", "--epochs", 8, "--checkpoint-steps", 4]
    memory(0, since=50)
    assert call("sft", *flags(base, data, tmp_path, *how)).code == 3
    memory()
    done = call("sft", *flags(base, data, tmp_path, *how))
    assert done.code == 0 and "resuming from" in done.out, done.err
    assert losses(tmp_path) == pytest.approx(losses(prompt[0]), abs=1e-5)


def test_a_tuned_prompt_answers_the_same_in_a_batch_as_alone(prompt, base):
    """Texts of other lengths are padded on the left, and the prompt has to stand right before each; likelihoods are
    those of the formula."""
    import torch

    from lib.engines.opening import open_engine
    from lib.model.directory import open_directory

    engine = open_engine(open_directory(prompt[0] / "lora"), load="fp32", threads=1, batch=3)
    texts = ["Who?", "What is the capital of country 7, which lies in the north?", "Which country is it " * 8]
    prompts = [engine.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    model = engine.model.get_base_model()
    embedding, virtual = model.get_input_embeddings(), engine.model.get_prompt(1)

    def logits(ids):
        with torch.inference_mode():
            return model(inputs_embeds=torch.cat([virtual, embedding(torch.tensor([ids]))], 1)).logits[0]

    together = engine.generate(prompts, 6, exact=True)
    for ids, found in zip(prompts, together, strict=True):
        greedy = list(ids)
        for _ in range(6):
            greedy.append(int(logits(greedy)[-1].argmax()))
        assert found.ids == greedy[len(ids) :] and found.prompt_tokens == len(ids)
        answer = [9, 8, 7]
        expected = logits(ids + answer)[-4:-1].log_softmax(-1).numpy()
        assert engine.answer_distributions(ids, answer) == pytest.approx(expected, abs=1e-5)
        assert engine.answer_logprobs(ids, answer) == pytest.approx(expected[[0, 1, 2], answer], abs=1e-5)


def test_a_tuned_prompt_is_neither_merged_nor_quantised(prompt, base, data, tmp_path):
    lora = prompt[0] / "lora"
    refused(call("merge_lora", "--adapter", lora, "--output", tmp_path / "m"), "is a tuned prompt", "make lora")
    given = ("--model", lora, "--data", data, "--output", tmp_path / "q")
    refused(call("quantize", *given), "is a tuned prompt", "cannot be merged")
    given = ("--model", base, "--adapter", lora, "--data", data, "--output", tmp_path / "d")
    refused(call("dpo", *given), "is a tuned prompt")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    done = call("sft", *flags(tmp_path / "gguf", data, tmp_path, "--method", "prompt-tuning"))
    refused(done, "llama.cpp does not support soft prompts")
    assert beside(tmp_path) == ["gguf"]


def test_only_what_has_a_label_is_projected_onto_the_vocabulary(base, data, tmp_path, monkeypatch):
    """The loss is the same where TRL scores every position, as it does by itself on a CPU, and the work is not."""
    from trl.trainer import utils

    from lib.train import loop

    counted = []
    real = utils._ChunkedLogProbFunction.forward
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "forward",
        staticmethod(lambda ctx, hidden, *given: counted.append(len(hidden)) or real(ctx, hidden, *given)),
    )  # fmt: skip
    positions = {}
    for name in ("answers", "everything"):
        counted.clear()
        if name == "everything":
            monkeypatch.setattr(utils, "_use_triton", lambda device: False)
            monkeypatch.setattr(loop, "project_labels_only", lambda: None)
        assert call("sft", *flags(base, data, tmp_path / name, "--epochs", 1, "--lora-dropout", 0)).code == 0
        positions[name] = sum(counted)
    labels = artifact.read(tmp_path / "answers" / "lora")["metrics"]["labels"]
    assert positions["answers"] == labels["supervised_tokens"] < labels["tokens"] / 4 < positions["everything"]
    assert losses(tmp_path / "answers") == pytest.approx(losses(tmp_path / "everything"), abs=1e-5)


@pytest.mark.slow
def test_two_processes_leave_one_artifact_and_one_line_a_step(base, data, tmp_path):
    """Each takes every other batch. Stopped and launched again, they continue together with the same losses."""
    # Behind `--`, so that torchrun reads none of our flags as its own.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]

    def start(folder):
        given = [*flags(base, data, folder, "--epochs", 6, "--checkpoint-steps", 2), "--accumulation-steps", 1]
        command, piped = [*launch, SCRIPTS / "sft.py", *given], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.Popen([*map(str, command)], **piped, text=True, env=environment())

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(whole)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    history = artifact.read(whole / "lora", "adapter")["metrics"]["history"]
    assert [event["step"] for event in history] == list(range(1, 25))
    assert runlog.read_events(whole / "run" / "log.jsonl") == history
    assert beside(whole) == ["lora", "run"] and beside(whole / "run") == ["log.jsonl"]
    assert out.count("trainable parameters") == 1 == out.count(f"{whole / 'lora'}\n")
    assert err.count("accumulation_steps=1") == 1

    process, until = start(cut), time.time() + 120
    while not list((cut / "run").glob("checkpoint-[4-9]/whole.json")):
        assert time.time() < until and process.poll() is None
        time.sleep(0.01)
    process.terminate()  # torchrun stops its processes
    process.communicate(timeout=60)
    assert not (cut / "lora").exists()
    process = start(cut)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.count("resuming from") == 1, err
    assert losses(cut) == losses(whole)


def test_no_row_is_longer_than_the_model(plain, data, tmp_path):
    """A model of learnt positions would end in an IndexError; one that rotates them was never trained beyond."""
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 60}))
    argv = ("--model", plain, "--data", data, "--samples", 8, "--threads", 1, "--run-dir", tmp_path / "run")
    done = call("sft", *argv, "--output", tmp_path / "lora")
    refused(done, "longer than --max-length 60")
    assert "has 60 tokens; that is the limit used" in done.out
