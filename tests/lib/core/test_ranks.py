"""Of processes that train together, the first alone writes, clears and prints."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from lib.core import artifact, ranks, runlog
from lib.core.runlog import Run
from tests.conftest import beside, call, refused


@pytest.fixture
def second(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_a_process_without_a_launcher_is_the_main_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.rank() == 0 and ranks.is_main_process()
    monkeypatch.setenv("RANK", "3")  # left over in a shell
    assert ranks.is_main_process()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.rank() == 3 and not ranks.is_main_process()


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "RANK, LOCAL_RANK, MASTER_ADDR are"), ({"RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "LOCAL_RANK is"),
        ({"RANK": "one", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "RANK is"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, "MASTER_ADDR is"),
    ],
)  # fmt: skip
def test_several_processes_without_a_launcher_are_refused_at_once(monkeypatch, tmp_path, given, missing):
    launcher = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name in launcher:
        monkeypatch.delenv(name, raising=False)
    asked = ("sft", "--model", tmp_path / "none", "--data", tmp_path / "none", "--output", tmp_path / "out")
    for name, value in ({"WORLD_SIZE": "2"} | given).items():
        monkeypatch.setenv(name, value)
    refused(call(*asked), "WORLD_SIZE=2 announces several processes that train together", f"but {missing} missing")
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    refused(call(*asked), "does not exist")  # a launcher's variables are complete
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refused(call(*asked), "does not exist")


def test_another_rank_leaves_no_artifact_and_keeps_the_old_one(tmp_path, monkeypatch, second):
    place = tmp_path / "out"
    with artifact.write_artifact(place, "model", Namespace()) as build:
        (build.path / "weights").write_text("x")
    assert beside(tmp_path) == [] and not build.path.exists()
    monkeypatch.setenv("RANK", "0")
    with artifact.write_artifact(place, "model", Namespace()) as build:
        (build.path / "weights").write_text("x")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError), artifact.write_artifact(place, "model", Namespace()) as build:
        raise ValueError
    assert artifact.read(place, "model")["files"].keys() == {"weights"} and beside(tmp_path) == ["out"]


def test_another_rank_neither_begins_nor_clears_nor_finishes_a_run(tmp_path, monkeypatch, second):
    assert Run(tmp_path / "run", {"a": 1}).checkpoint() is None
    assert beside(tmp_path) == []
    monkeypatch.setenv("RANK", "0")
    run = Run(tmp_path / "run", {"a": 1})
    runlog.append_event(run.log, {"step": 1})
    (run.path / "checkpoint-1").mkdir()
    monkeypatch.setenv("RANK", "1")
    other = Run(tmp_path / "run", {"a": 2})
    runlog.append_event(other.log, {"step": 2})
    other.rewind(0)
    assert other.checkpoint() is None
    other.finish()
    assert beside(run.path) == ["checkpoint-1", "log.jsonl", "run.json"] and other.history() == [{"step": 1}]


def test_another_rank_shows_no_progress_and_marks_no_checkpoint(tmp_path, second, capsys):
    import torch

    from lib.train.progress import RunLog

    trainer = SimpleNamespace(
        tokens=8, micro_batch=SimpleNamespace(rows=1, return_freed_memory=lambda: None),
        accelerator=SimpleNamespace(scaler=None), model=torch.nn.Linear(1, 1),
    )  # fmt: skip
    log = RunLog(Run(tmp_path / "run", {}), trainer)
    state, args = SimpleNamespace(max_steps=2, global_step=1), SimpleNamespace(output_dir=tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    log.on_train_begin(args, state, None)
    log.on_step_begin(args, state, None)
    log.on_step_end(args, state, None)
    log.on_log(args, state, None, logs={"loss": 1.0, "learning_rate": 1e-3})
    log.on_save(args, state, None)
    log.on_train_end(args, state, None)
    said = capsys.readouterr()
    assert said.out + said.err == "" and beside(tmp_path) == ["checkpoint-1"]
    assert beside(tmp_path / "checkpoint-1") == []


def test_another_rank_prints_its_errors_alone(tmp_path, second):
    done = call("verify", tmp_path / "none")
    assert done.code == 2 and done.out == ""
