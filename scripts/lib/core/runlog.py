"""Work in progress that survives a kill: `runs/<stage>-<name>/` with its log, rows so far and checkpoints.

Of processes that train together, only the first writes here; the others read.
"""

import json
import os
import shutil
from pathlib import Path

from lib.core import artifact
from lib.core.cli import InputError
from lib.core.ranks import is_main_process

WHOLE = "whole.json"  # written last into a checkpoint: a checkpoint without it is incomplete
LOG = "log.jsonl"
MARK, UNMARKED = "run.json", "run.json.tmp"  # the run's identity; the second name while it is written


def read_events(path: Path) -> list[dict]:
    """The objects of a JSONL file, without an incomplete last line."""
    events = []
    # As bytes: the file may end within a character, and str.splitlines also splits at U+2028 inside a text.
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def write_events(path: Path, events: list[dict]) -> None:
    """Replace a JSONL file as a whole."""
    if not is_main_process():
        return
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events), encoding="utf-8")
    scratch.replace(path)


def append_event(path: Path, event: dict) -> None:
    """Append one object, on the disk when this returns."""
    append_events(path, [event])


def append_events(path: Path, events: list[dict]) -> None:
    if not is_main_process():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events))
        file.flush()
        os.fsync(file.fileno())


class Run:
    """A run's directory. It continues a run with the same identity (arguments that change the result, the inputs'
    digests) and starts over otherwise."""

    def __init__(self, path: Path, identity: dict):
        self.path, self.log = Path(path), Path(path) / LOG
        self.mark = self.path / MARK
        if is_main_process() and self.identity() != json.loads(json.dumps(identity)):
            self.clear()
            self.path.mkdir(parents=True, exist_ok=True)
            scratch = self.path / UNMARKED
            artifact.write_json(scratch, identity)
            scratch.replace(self.mark)

    def identity(self) -> dict | None:
        try:
            return json.loads(self.mark.read_bytes())
        except (OSError, ValueError):
            return None

    def clear(self) -> None:
        """Remove another run's work. Files that no run wrote are the user's: InputError."""
        if self.mark.is_file():
            print(f"{self.path}: deleting an unfinished run with other inputs, settings or code; starting over")
            aside = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
            artifact.remove_leftovers(self.path)
            self.path.rename(aside)  # in one step, since half a directory could be taken for a run
            shutil.rmtree(aside)
        elif self.path.is_dir():
            for entry in self.path.iterdir():
                if entry.name not in (LOG, UNMARKED):
                    raise InputError(
                        f"{self.path}: contains {entry.name!r}, which no run wrote; choose another --run-dir"
                    )

    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint. Incomplete ones, which a kill leaves, are removed."""
        checkpoints = sorted(self.path.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        complete = [p for p in checkpoints if (p / WHOLE).is_file()]
        for checkpoint in set(checkpoints) - set(complete) if is_main_process() else ():
            print(f"{checkpoint}: deleted, because it is incomplete")
            shutil.rmtree(checkpoint)
        return complete[-1] if complete else None

    def rewind(self, step: int) -> None:
        """Drop the log's events after `step`: those steps will be repeated."""
        write_events(self.log, [event for event in self.history() if event["step"] <= step])

    def history(self) -> list[dict]:
        return read_events(self.log)

    def finish(self) -> None:
        """Remove everything but the log, once the artifact is written."""
        if not is_main_process():
            return
        for entry in self.path.iterdir():
            if entry.is_dir():
                (entry / WHOLE).unlink(missing_ok=True)  # half a checkpoint must not look complete
                shutil.rmtree(entry)
            elif entry not in (self.log, self.mark):
                entry.unlink()
        self.mark.unlink()
