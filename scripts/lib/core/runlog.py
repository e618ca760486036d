"""Work in progress that survives a kill: `runs/<stage>-<name>/` with its log, rows so far and checkpoints.

Of processes that train together, only the first writes here; the others read.
"""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path

from lib.core import artifact, file_errors
from lib.core.cli import InputError, check_directory, hide_secrets
from lib.core.ranks import is_main_process

WHOLE = "whole.json"  # written last into a checkpoint: a checkpoint without it is incomplete
LOG = "log.jsonl"
CHECKSUM = "crc32"  # the last field of each line that a run writes; that of the object without it
MARK, UNMARKED = "run.json", "run.json.tmp"  # the run's identity; the second name while it is written


def read_events(path: Path) -> list[dict]:
    """The objects of a JSONL file, without an incomplete last line. A line that is not as it was written is left out
    and counted: what it held must not count as done, nor end in a traceback."""
    # As bytes: the file may end within a character, and str.splitlines also splits at U+2028 inside a text.
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    events = [parse_line(line) for line in lines]
    if damaged := [n for n, event in enumerate(events, 1) if event is None]:
        others = f" and {len(damaged) - 1:,} more" * (len(damaged) > 1)
        print(f"note: {path}:{damaged[0]}: this line{others} is damaged and left out", file=sys.stderr)
    return [event for event in events if event is not None]


def parse_line(line: bytes) -> dict | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    intact = isinstance(event, dict) and event.pop(CHECKSUM, None) == compute_checksum(event)
    return event if intact else None


def format_line(event: dict) -> str:
    return json.dumps(event | {CHECKSUM: compute_checksum(event)}, ensure_ascii=False) + "\n"


def compute_checksum(event: dict) -> int:
    return zlib.crc32(json.dumps(event).encode())


def write_events(path: Path, events: list[dict]) -> None:
    """Replace a JSONL file as a whole."""
    if not is_main_process():
        return
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(map(format_line, events)), encoding="utf-8")
    scratch.replace(path)


def append_event(path: Path, event: dict) -> None:
    """Append one object, on the disk when this returns."""
    append_events(path, [event])


def append_events(path: Path, events: list[dict]) -> None:
    if not is_main_process():
        return
    check_directory(path.parent)  # now, since a run that goes on without its log would be lost at the end
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(map(format_line, events)))
        file.flush()
        os.fsync(file.fileno())


class Run:
    """A run's directory. It continues a run with the same identity (arguments that change the result, the inputs'
    digests) and starts over otherwise."""

    def __init__(self, path: Path, identity: dict):
        self.path, self.log = Path(path), Path(path) / LOG
        self.mark = self.path / MARK
        if not is_main_process():
            return
        identity = hide_secrets(identity)
        if self.identity() != json.loads(json.dumps(identity)):
            self.clear()
            self.path.mkdir(parents=True, exist_ok=True)
            scratch = self.path / UNMARKED
            artifact.write_json(scratch, identity)
            scratch.replace(self.mark)
        elif self.log.is_file():
            write_events(self.log, self.history())  # an event appended to an incomplete last line would be lost
        file_errors.use_directory(self.path)

    def identity(self) -> dict | None:
        try:
            return json.loads(self.mark.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def clear(self) -> None:
        """Remove another run's work. Files that no run wrote are the user's: InputError."""
        if self.mark.is_file():
            reason = (
                "with other inputs, settings or code" if self.identity() is not None else f"whose {MARK} is damaged"
            )
            print(f"{self.path}: deleting an unfinished run {reason}; starting over")
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
        named = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
        checkpoints = sorted(named, key=lambda path: int(path.name.removeprefix("checkpoint-")))
        complete = [p for p in checkpoints if (p / WHOLE).is_file()]
        for checkpoint in set(checkpoints) - set(complete) if is_main_process() else ():
            print(f"{checkpoint}: deleted, because it is incomplete")
            shutil.rmtree(checkpoint)
        return complete[-1] if complete else None

    def rewind(self, step: int) -> None:
        """Drop the log's events after `step`: those steps will be repeated. InputError if it lacks one up to there."""
        events = [event for event in self.history() if event["step"] <= step]
        if [event["step"] for event in events] != [*range(1, step + 1)]:
            raise InputError(
                f"{self.log}: is damaged: of the {step:,} steps that are finished it holds {len(events):,}, so the run "
                f"would continue without their figures; delete {self.path}, then repeat the command: it starts over"
            )
        write_events(self.log, events)

    def history(self) -> list[dict]:
        return read_events(self.log)

    def finish(self) -> None:
        """Remove everything but the log, once the artifact is written."""
        if not is_main_process():
            return
        file_errors.leave_directory(self.path)
        artifact.remove_leftovers(self.path)
        try:
            for entry in self.path.iterdir():
                if entry.is_dir():
                    (entry / WHOLE).unlink(missing_ok=True)  # half a checkpoint must not look complete
                    shutil.rmtree(entry)
                elif entry not in (self.log, self.mark):
                    entry.unlink()
            self.mark.unlink()
        except FileNotFoundError:
            raise InputError(
                f"{self.path}: was deleted or moved while this command was working in it, so its log is lost. The "
                "result is complete, and nothing needs to be repeated"
            ) from None
