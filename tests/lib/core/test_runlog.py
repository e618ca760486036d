"""Runs that are cut short at every kind of moment, and continued."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from lib.core import runlog
from lib.core.cli import InputError
from lib.core.runlog import Run
from lib.model import loading
from tests.conftest import SCRIPTS, beside, call, refused

EVENTS = [
    {"id": "1", "text": "plain"},
    {"id": "2", "text": "line\u2028separator, next\x85line, form\x0cfeed"},
    {"id": "3", "text": "größer 🇫🇷"},
]


def checkpoint(run: Run, step: int, whole: bool = True) -> None:
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights").write_text("x")
    if whole:
        (folder / runlog.WHOLE).write_text("{}")


def test_events_come_back_as_they_went_whatever_their_text_holds(tmp_path):
    for event in EVENTS:
        runlog.append_event(tmp_path / "log.jsonl", event)
    assert runlog.read_events(tmp_path / "log.jsonl") == EVENTS
    runlog.write_events(tmp_path / "log.jsonl", EVENTS[1:])
    assert runlog.read_events(tmp_path / "log.jsonl") == EVENTS[1:]
    assert runlog.read_events(tmp_path / "missing.jsonl") == []


def test_a_log_cut_at_any_byte_keeps_every_whole_line(tmp_path):
    log = tmp_path / "log.jsonl"
    runlog.write_events(log, EVENTS)
    whole = log.read_bytes()
    for size in range(len(whole) + 1):
        log.write_bytes(whole[:size])
        assert runlog.read_events(log) == EVENTS[: whole[:size].count(b"\n")], size


def test_the_newest_whole_checkpoint_counts_by_number(tmp_path):
    run = Run(tmp_path / "run", {"a": 1})
    assert run.checkpoint() is None
    for step in (9, 10, 100):
        checkpoint(run, step)
    checkpoint(run, 200, whole=False)
    assert Run(tmp_path / "run", {"a": 1}).checkpoint().name == "checkpoint-100"
    assert not (tmp_path / "run" / "checkpoint-200").exists()


def test_another_identity_starts_anew_and_the_same_one_does_not(tmp_path, capsys):
    first = {"digest": "d", "targets": ("q", "v"), "lr": 5e-4, "name": "größe"}
    checkpoint(Run(tmp_path / "run", first), 10)
    assert Run(tmp_path / "run", dict(reversed(first.items()))).checkpoint().name == "checkpoint-10"
    assert capsys.readouterr().out == ""
    assert Run(tmp_path / "run", first | {"lr": 4e-4}).checkpoint() is None
    assert "starting over" in capsys.readouterr().out
    assert beside(tmp_path) == ["run"]


@pytest.mark.parametrize("content", [b"", b'{"digest": ', b"\x00" * 40, b"[" * 99999])
def test_a_mark_that_was_cut_short_starts_anew(tmp_path, content, capsys):
    checkpoint(Run(tmp_path / "run", {"a": 1}), 10)
    (tmp_path / "run" / "run.json").write_bytes(content)
    assert Run(tmp_path / "run", {"a": 1}).checkpoint() is None
    assert "run.json is damaged; starting over" in capsys.readouterr().out


def test_continuing_does_not_rewrite_the_mark(tmp_path):
    """A kill while it is rewritten would cost the checkpoints."""
    Run(tmp_path / "run", {"a": 1})
    before = (tmp_path / "run" / "run.json").stat()
    Run(tmp_path / "run", {"a": 1})
    after = (tmp_path / "run" / "run.json").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_files_of_the_users_own_are_not_taken_for_a_run(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "notes").mkdir()
    with pytest.raises(InputError, match="choose another --run-dir"):
        Run(tmp_path, {"a": 1})
    assert beside(tmp_path) == ["notes", "rows.jsonl"]


def test_rewind_drops_the_steps_that_will_be_done_again(tmp_path):
    run = Run(tmp_path / "run", {})
    for step in (1, 2, 3):
        runlog.append_event(run.log, {"step": step, "loss": 1.0})
    run.rewind(2)
    assert [event["step"] for event in run.history()] == [1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"",
        lambda line: line[:-4],
        lambda line: line.replace(b'"step": 2', b'"step": "2"'),
        lambda line: line.replace(b'"step": 2', b'"step": 7'),
        lambda line: line.replace(b'"loss": 1.0, ', b""),
        lambda line: line.replace(b'"loss": 1.0', b'"loss": null'),
        lambda line: line.replace(b"loss", b"l\xffss"),
        lambda line: b"[2]",
        lambda line: b"2",
    ],
)
def test_a_damaged_log_is_left_out_and_a_run_that_needs_it_refused(tmp_path, capsys, damage):
    run = Run(tmp_path / "run", {"a": 1})
    for step in (1, 2, 3):
        runlog.append_event(run.log, {"step": step, "loss": 1.0})
    lines = run.log.read_bytes().splitlines()
    run.log.write_bytes(b"".join(line + b"\n" for line in [lines[0], damage(lines[1]), lines[2]]))
    again = Run(tmp_path / "run", {"a": 1})
    assert "log.jsonl:2: this line is damaged and left out" in capsys.readouterr().err
    for _ in range(2):
        with pytest.raises(InputError, match=r"of the 2 steps that are finished it holds 1.*delete .*run, then repeat"):
            again.rewind(2)
    again.rewind(1)  # the damaged step is trained again
    assert [event["step"] for event in again.history()] == [1] and capsys.readouterr().err == ""


def test_a_log_that_is_gone_is_said(tmp_path):
    run = Run(tmp_path / "run", {"a": 1})
    checkpoint(run, 1)
    with pytest.raises(InputError, match="delete"):
        run.rewind(1)


def test_what_follows_half_a_line_of_the_log_is_not_lost(tmp_path, capsys):
    run = Run(tmp_path / "run", {"a": 1})
    runlog.append_event(run.log, {"step": 1})
    run.log.write_bytes(run.log.read_bytes() + b'{"step": 2, "lo')
    runlog.append_event(Run(tmp_path / "run", {"a": 1}).log, {"step": 2})
    assert [event["step"] for event in run.history()] == [1, 2] and capsys.readouterr().err == ""


def test_what_only_looks_like_a_checkpoint_is_none(tmp_path):
    run = Run(tmp_path / "run", {"a": 1})
    checkpoint(run, 2)
    (run.path / "checkpoint-best").mkdir()
    assert Run(tmp_path / "run", {"a": 1}).checkpoint().name == "checkpoint-2"


def test_a_finished_run_keeps_its_log_alone_and_can_be_run_again(tmp_path):
    run = Run(tmp_path / "run", {"a": 1})
    runlog.append_event(run.log, {"step": 1})
    checkpoint(run, 1)
    (run.path / "predictions.jsonl").write_text("{}\n")
    run.finish()
    assert beside(run.path) == ["log.jsonl"]
    assert Run(tmp_path / "run", {"b": 2}).checkpoint() is None


@pytest.mark.parametrize("point", range(6))
def test_killed_while_it_tidies_up_nothing_stale_is_taken_over(tmp_path, point):
    """kill -9 after so many deletions of finish(): another run there must not find the old one's work."""
    run = Run(tmp_path / "run", {"a": 1})
    checkpoint(run, 1)
    runlog.append_event(run.path / "predictions.jsonl", {"id": "1"})
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from lib.core import runlog
run, left = runlog.Run({str(run.path)!r}, {{"a": 1}}), [{point}]

def audit(event, _):
    if event in ("os.remove", "os.rmdir"):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(audit)
run.finish()
"""
    ended = subprocess.run([sys.executable, "-c", code]).returncode
    assert ended in (0, -signal.SIGKILL)
    again = Run(run.path, {"a": 1}).checkpoint()
    assert again is None or beside(again) == ["weights", runlog.WHOLE]
    other = Run(run.path, {"b": 2})
    assert other.checkpoint() is None and not (run.path / "predictions.jsonl").exists()


def test_an_appended_event_survives_kill_9(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
from lib.core import runlog
for n in range(5):
    runlog.append_event(Path({str(tmp_path / "log.jsonl")!r}), {{"step": n}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code])
    assert [event["step"] for event in runlog.read_events(tmp_path / "log.jsonl")] == list(range(5))
    assert os.listdir(tmp_path) == ["log.jsonl"]


# --- a run that somebody deletes -----------------------------------------------------------------------------

SAID = r"run: was deleted or moved while this command was working in it"


@pytest.mark.parametrize("again", [False, True])
def test_a_run_whose_directory_is_deleted_ends_at_the_next_event(again, tmp_path):
    """A trainer's next checkpoint would make the directory again; it would then hold half a log and no identity."""
    run = Run(tmp_path / "run", {})
    runlog.append_event(run.log, {"step": 1})
    shutil.rmtree(run.path)
    if again:
        (run.path / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{SAID}; repeat the command"):
        runlog.append_event(run.log, {"step": 2})


def test_a_finished_run_whose_directory_is_gone_says_that_nothing_is_lost(tmp_path):
    run = Run(tmp_path / "run", {})
    shutil.rmtree(run.path)
    with pytest.raises(InputError, match=f"{SAID}.*The result is complete, and nothing needs to be repeated"):
        run.finish()


@pytest.mark.parametrize("place", ["run", "out.tmp-*"])
def test_a_directory_that_is_deleted_under_a_training_is_said(place, base, data, tmp_path, monkeypatch):
    """Whoever fails first: torch and safetensors say it in their own words."""
    from lib.train.progress import RunLog

    real, run, out = RunLog.on_save, tmp_path / "run", tmp_path / "out"

    def on_save(self, *given, **more):
        shutil.rmtree(run)
        return real(self, *given, **more)

    def save_adapter(model, base, folder):
        shutil.rmtree(folder)
        save(model, base, folder)

    save = loading.save_adapter
    if place == "run":
        monkeypatch.setattr(RunLog, "on_save", on_save)
    else:
        monkeypatch.setattr(loading, "save_adapter", save_adapter)
    flags = ["--samples", 8, "--checkpoint-steps", 1, "--threads", 1, "--run-dir", run, "--output", out]
    refused(call("sft", "--model", base, "--data", data, *flags), "was deleted or moved", str(tmp_path / place[:4]))
    assert not out.exists()


def test_checkpoints_that_grow_too_large_are_said(base, data, tmp_path):
    """safetensors and torch write them, each with an error of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (8_000, 40_000, 90_000):
        run = tmp_path / f"run {limit}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        flags = ["--samples", 8, "--checkpoint-steps", 1, "--threads", 1, "--run-dir", run, "--output", tmp_path / "o"]
        try:
            done = call("sft", "--model", base, "--data", data, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        refused(done, "a file became too large", str(run), "ulimit -f")
