"""What the trainers override of their libraries is still there, and still asked for.

A method that a library has renamed is no error: the library goes on with its own, and training with rows in another
order, a loss divided twice or the whole model in each checkpoint. So the real scripts train a tiny model here; what
transformers' Trainer does meanwhile is noted, and held against what the overrides are for.
"""

import itertools
import json
import logging
from types import SimpleNamespace

import dpo
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTTrainer
from trl.trainer import sft_trainer

from lib.clara import learning, network
from lib.core import runlog
from lib.export import hub
from lib.model import loading
from lib.model.directory import open_directory
from lib.train import back_off, length_groups, progress
from tests.conftest import call, row

STEP, STEPS_AN_EPOCH, EPOCHS, SEED = 4, 4, 2, 42
FLAGS = ["--batch-size", 2, "--accumulation-steps", STEP // 2, "--samples", STEP * STEPS_AN_EPOCH, "--epochs", EPOCHS]
FLAGS += ["--checkpoint-steps", 4, "--gradient-checkpointing", "--seed", SEED, "--precision", "fp32", "--threads", 1]
SHARED = {"training_step", "_get_train_sampler", "get_batch_samples", "create_scheduler"}
OVERRIDDEN = {
    "sft": SHARED,
    "dpo": SHARED | {"loss_is_scaled_for_ga", "compute_loss", "log"},
    "train_stage1": SHARED | {"loss_is_scaled_for_ga", "compute_loss", "log", "_save", "_load_from_checkpoint"},
}  # fmt: skip
CALLBACKS = {progress.RunLog: 7, back_off.AfterStep: 1}  # and how many events each asks for


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> dict:
    """Of each script: its trainer, after it has trained, and what was noted on the way."""
    folder, noted = tmp_path_factory.mktemp("overrides"), {}
    rows = {"sft": [], "dpo": [], "train_stage1": []}
    for n in range(20):  # of different lengths, and with answers of different lengths
        asked, town = row(n), "town " * (n * 3 % 11 + 1)
        asked["question"] = "north " * (n * 7 % 20) + asked["question"]
        rows["sft"].append({"prompt": asked["question"], "completion": town})
        rows["dpo"].append({"prompt": asked["question"], "chosen": town, "rejected": "no such town"})
        told = {"question": [asked["question"]], "answers": [town], "docs": asked["documents"]}
        rows["train_stage1"].append({"data_type": "qa"} | told)
    more = {
        "sft": [], "dpo": ["--adapter", folder / "sft"],
        "train_stage1": ["--eval-samples", 2, "--compress-rate", 4, "--doc-max-tokens", 32, "--lora-r", 4],
    }  # fmt: skip
    for name, some in rows.items():
        data, run = folder / f"{name}.jsonl", folder / f"run-{name}"
        data.write_text("".join(json.dumps(one) + "\n" for one in some))
        with pytest.MonkeyPatch.context() as patched:
            noted[name] = noting(patched)
            argv = ["--model", base, "--data", data, "--output", folder / name, "--run-dir", run]
            done = call(name, *argv, *FLAGS, *more[name])
        assert done.code == 0, done.err
        noted[name].log = runlog.read_events(run / "log.jsonl")
    return noted


def noting(patched) -> SimpleNamespace:
    noted = SimpleNamespace(passes=[], losses=[], events=set(), saved=[], heads=[], trainer=None)
    train, step, with_head = Trainer.train, Trainer.training_step, sft_trainer.add_fused_lm_head

    def train_noting(trainer, **how):
        noted.trainer, compute_loss = trainer, trainer.compute_loss

        def noting_loss(*given, **named):
            loss = compute_loss(*given, **named)
            noted.losses.append((trainer.state.global_step, loss.item()))
            return loss

        patched.setattr(trainer, "compute_loss", noting_loss)
        if not isinstance(trainer, SFTTrainer):  # as with a model whose loss Trainer would divide by itself
            trainer.model_accepts_loss_kwargs = False
        return train(trainer, **how)

    def step_noting(trainer, model, inputs, *given):
        noted.passes.append((trainer.state.global_step, inputs))
        return step(trainer, model, inputs, *given)

    def head_noting(model, **how):
        noted.heads.append(how)
        return with_head(model, **how)

    patched.setattr(Trainer, "train", train_noting)
    patched.setattr(Trainer, "training_step", step_noting)
    patched.setattr(sft_trainer, "add_fused_lm_head", head_noting)
    # A step lasts a second from its beginning to its log, so that tokens a second are the tokens of the step.
    patched.setattr(progress, "time", SimpleNamespace(perf_counter=itertools.count().__next__, time=lambda: 0.0))
    for kind in CALLBACKS:
        for name in events_of(kind):
            patched.setattr(kind, name, noting_event(kind, name, noted))
    return noted


def events_of(kind) -> list[str]:
    return [name for name in vars(kind) if name.startswith("on_")]


def noting_event(kind, name: str, noted):
    method = getattr(kind, name)

    def event(self, args, state, control, **how):
        noted.events.add((kind, name))
        if name == "on_save":
            noted.saved.append({file.name for file in self.run.path.glob(f"checkpoint-{state.global_step}/*")})
        return method(self, args, state, control, **how)

    return event


def lengths_of(name: str, trainer) -> list[int]:
    measure = {
        "sft": lambda one: len(one["input_ids"]),
        "dpo": dpo.longest_tokens,
        "train_stage1": learning.example_length,
    }
    return [measure[name](one) for one in trainer.train_dataset]


def rows_of(name: str, trainer, inputs) -> list:
    """Which rows of the trainer's a pass holds."""
    if name == "train_stage1":
        return [trainer.examples.index(one) for one in inputs["examples"]]
    known = [trainer.data_collator([one])["input_ids"][0].tolist() for one in trainer.train_dataset]
    found = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    return [known.index(ids) for ids in found]


def tokens_of(name: str, inputs) -> int:
    if name == "train_stage1":
        return sum(map(learning.example_length, inputs["examples"]))
    return int(inputs["attention_mask"].sum())


def of_steps(found: list[tuple]) -> list[list]:
    return [[one for _, one in some] for _, some in itertools.groupby(found, key=lambda pair: pair[0])]


every = pytest.mark.parametrize("name", OVERRIDDEN)


@every
def test_names_that_the_library_knows_too_are_those_that_are_overridden(runs, name):
    """All of them; and none of our own is one that a release of the library has come to use."""
    kind = type(runs[name].trainer)
    parent = SFTTrainer if name == "sft" else Trainer
    own = [one for one in kind.__mro__ if one not in parent.__mro__]
    names = {key for one in own for key in vars(one) if not key.startswith("__")}
    assert {key for key in names if hasattr(parent, key)} == OVERRIDDEN[name]


@every
def test_each_step_has_the_rows_that_its_sampler_deals_out_anew_each_epoch(runs, name):
    trainer = runs[name].trainer
    passes = of_steps([(step, rows_of(name, trainer, inputs)) for step, inputs in runs[name].passes])
    found = [[n for rows in some for n in rows] for some in passes]
    sampler = length_groups.LengthGroupedBatches(lengths_of(name, trainer), STEP, SEED, getattr(trainer, "before", 0))
    expected = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        order = [*sampler]
        expected += [order[n : n + STEP] for n in range(0, len(order), STEP)]
    assert found == expected and len(found) == EPOCHS * STEPS_AN_EPOCH
    assert found[:STEPS_AN_EPOCH] != found[STEPS_AN_EPOCH:]


@every
def test_the_tokens_a_second_are_those_of_the_whole_step(runs, name):
    expected = [sum(tokens_of(name, inputs) for inputs in some) for some in of_steps(runs[name].passes)]
    assert [event["tokens_per_second"] for event in runs[name].log] == expected


@every
def test_the_loss_of_a_step_is_the_sum_of_what_its_passes_computed(runs, name):
    """It is divided by the labels or the pairs of the whole step already: not by the number of passes as well."""
    expected = [sum(losses) for losses in of_steps(runs[name].losses)]
    assert len(runs[name].losses) == len(runs[name].passes) == 2 * len(expected)
    assert [event["loss"] for event in runs[name].log] == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_sft_is_divided_by_the_labels_of_the_whole_step(runs, base):
    """Its passes have different numbers of them; nothing is learnt before the first step."""
    model, summed, labels = loading.load_model(open_directory(base), "fp32", device="cpu"), [], []
    for inputs in of_steps(runs["sft"].passes)[0]:
        with torch.inference_mode():
            logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT, inputs["labels"][:, 1:], reduction="sum")
        summed.append(loss.item())
        labels.append(int((inputs["labels"] != -100).sum()))
    assert labels[0] != labels[1]
    assert runs["sft"].log[0]["loss"] == pytest.approx(sum(summed) / sum(labels), rel=1e-4)


def test_what_trl_counts_is_what_a_repeated_pass_takes_back(runs):
    """training.METRICS; the metrics of a step are cleared once it is logged."""
    trainer, found = runs["sft"].trainer, runs["sft"].passes
    assert {*back_off.METRICS} <= vars(trainer).keys()
    assert trainer._total_train_tokens == sum(int(inputs["attention_mask"].sum()) for _, inputs in found)
    logged = trainer.state.log_history[-2]  # the last one sums up
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= logged.keys()
    trainer._metrics["train"]["entropy"].append(1e3)
    before = trainer.snapshot()
    trainer._metrics["train"]["entropy"].append(1e6)
    trainer._total_train_tokens += 1
    trainer.restore(before)
    logs = {}
    trainer.model.train()
    trainer.log(logs)
    assert logs["entropy"] == 1e3 and trainer._total_train_tokens == logged["num_tokens"]


@every
def test_every_event_that_is_waited_for_comes(runs, name):
    assert {kind: len(events_of(kind)) for kind in CALLBACKS} == CALLBACKS
    expected = {(kind, event) for kind in CALLBACKS for event in events_of(kind)}
    assert all(hasattr(TrainerCallback, event) for _, event in expected)
    assert runs[name].events == expected


def test_two_visible_gpus_are_not_both_used_by_one_process(base, data, tmp_path):
    """TRL refuses what transformers would do then. `_n_gpu` is where transformers keeps their number."""
    post_init = TrainingArguments.__post_init__

    def see_two(settings):
        post_init(settings)
        settings._n_gpu = 2

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingArguments, "__post_init__", see_two)
        assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).n_gpu == 2
        argv = ["--model", base, "--data", data, "--output", tmp_path / "lora", "--run-dir", tmp_path / "run", *FLAGS]
        done = call("sft", *argv, "--samples", 4, "--epochs", 1)
    assert done.code == 0, done.err
    assert "2 GPUs are visible; this one process does not split batches among them" in done.err


def test_a_checkpoint_of_clara_holds_what_is_trained_and_no_model(runs):
    saved = runs["train_stage1"].saved
    assert len(saved) == EPOCHS * STEPS_AN_EPOCH // 4
    for files in saved:
        weights = {file for file in files if file.endswith((".safetensors", ".bin"))}
        assert weights == {learning.TRAINED} and {"optimizer.pt", "trainer_state.json"} <= files


def test_gradient_checkpointing_reaches_the_model_in_clara(runs):
    """Trainer asks a model that has the method, by the name that it knows."""
    trainer = runs["train_stage1"].trainer
    assert isinstance(trainer.model, network.Clara) and trainer.model.lm.is_activation_checkpointing


def test_what_is_timed_has_the_head_that_sft_trains_with(runs):
    assert runs["sft"].heads == [{"outputs": ("log_probs", "entropy", "is_top1")}]  # as in probe.time_training


def test_loggers_that_are_silenced_are_those_that_the_libraries_use():
    """bitsandbytes says on some CPUs that it could not fetch a kernel; huggingface_hub, addresses that are signed."""
    from bitsandbytes.backends.cpu import ops
    from huggingface_hub.utils import _http

    for logger, silence in ((ops.logger, lambda: call("sft", "--help")), (_http.logger, hub_asked)):
        logging.getLogger(logger.name.partition(".")[0]).setLevel(logging.WARNING)
        assert logger.isEnabledFor(logging.WARNING)
        silence()
        assert logger.isEnabledFor(logging.ERROR) and not logger.isEnabledFor(logging.WARNING)


def hub_asked() -> None:
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(huggingface_hub, "is_offline_mode", lambda: False)
        patched.setattr(huggingface_hub, "set_client_factory", lambda factory: None)
        patched.setattr(hub.cli, "go_online", lambda: None)
        patched.setattr(hub, "find_token", lambda: "none")
        with hub.connect("user/model", 1):
            pass
