"""Work in progress that survives a kill: `runs/<stage>-<name>/` with its log, rows so far and checkpoints."""

import json
import os
import shutil
from pathlib import Path

from lib import artifact

WHOLE = "whole.json"  # written last into a checkpoint: without it, the checkpoint was cut short
LOG = "log.jsonl"


def read_events(path: Path) -> list[dict]:
    """The objects of a JSONL file that may have been cut short: the last, broken line is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def write_events(path: Path, events: list[dict]) -> None:
    """Replace a JSONL file as a whole."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(
        "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events), encoding="utf-8"
    )
    scratch.replace(path)


def append_event(path: Path, event: dict) -> None:
    """Append one object, on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(event, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Run:
    """A run's directory. It continues a run with the same identity (arguments that change the result, the
    inputs' digests) and starts anew otherwise."""

    def __init__(self, path: Path, identity: dict):
        self.path, self.log = Path(path), Path(path) / LOG
        mark = self.path / "run.json"
        identity = json.loads(json.dumps(identity))
        if mark.is_file() and json.loads(mark.read_text() or "null") != identity:
            print(f"{path}: an unfinished run with other inputs or values; starting anew")
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        artifact.write_json(mark, identity)

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint; those that a kill cut short are removed."""
        found = sorted(self.path.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        whole = [p for p in found if (p / WHOLE).is_file()]
        for cut in set(found) - set(whole):
            print(f"{cut}: was cut short; removed")
            shutil.rmtree(cut)
        return whole[-1] if whole else None

    def rewind(self, step: int) -> None:
        """Drop the log's events after `step`: the steps that will be done again."""
        write_events(self.log, [event for event in self.history() if event["step"] <= step])

    def history(self) -> list[dict]:
        return read_events(self.log)

    def finish(self) -> None:
        """The artifact stands: only the log is kept."""
        for folder in self.path.glob("checkpoint-*"):
            shutil.rmtree(folder)
        (self.path / "run.json").unlink()
