"""Work in progress that survives a kill: `runs/<stage>-<name>/` with its log, rows so far and checkpoints.

Of processes that train together, the first alone writes here; the others read.
"""

import json
import os
import shutil
from pathlib import Path

from lib.core import artifact
from lib.core.cli import InputError
from lib.core.ranks import is_main_process

WHOLE = "whole.json"  # written last into a checkpoint: without it, the checkpoint was cut short
LOG = "log.jsonl"
MARK, UNMARKED = "run.json", "run.json.tmp"  # whose run it is; the second while it is written


def read_events(path: Path) -> list[dict]:
    """The objects of a JSONL file that may have been cut short: the last, broken line is left out."""
    events = []
    # By bytes: a cut may go through a character, and str.splitlines also splits at U+2028 inside a text.
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
    """A run's directory. It continues a run with the same identity (arguments that change the result, the
    inputs' digests) and starts anew otherwise."""

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
        """Remove another run's work; what no run wrote is the user's, and refused."""
        if self.mark.is_file():
            print(f"{self.path}: deleting an unfinished run with different inputs or settings; starting over")
            aside = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
            artifact.remove_leftovers(self.path)
            self.path.rename(aside)  # in one step: half a directory could pass for a run
            shutil.rmtree(aside)
        elif self.path.is_dir():
            for other in self.path.iterdir():
                if other.name not in (LOG, UNMARKED):
                    raise InputError(
                        f"{self.path}: contains {other.name!r}, which no run wrote; choose another --run-dir"
                    )

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint; those that a kill cut short are removed."""
        found = sorted(self.path.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        whole = [p for p in found if (p / WHOLE).is_file()]
        for cut in set(found) - set(whole) if is_main_process() else ():
            print(f"{cut}: deleted, because it is incomplete")
            shutil.rmtree(cut)
        return whole[-1] if whole else None

    def rewind(self, step: int) -> None:
        """Drop the log's events after `step`: the steps that will be done again."""
        write_events(self.log, [event for event in self.history() if event["step"] <= step])

    def history(self) -> list[dict]:
        return read_events(self.log)

    def finish(self) -> None:
        """The artifact stands: only the log is kept."""
        if not is_main_process():
            return
        for left in self.path.iterdir():
            if left.is_dir():
                (left / WHOLE).unlink(missing_ok=True)  # half a checkpoint must not look whole
                shutil.rmtree(left)
            elif left not in (self.log, self.mark):
                left.unlink()
        self.mark.unlink()
