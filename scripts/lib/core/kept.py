"""Rows that a killed run left in its directory, so that the same command does only what is missing."""

from operator import itemgetter
from pathlib import Path

from lib.core import runlog


class Kept(dict):
    """{key: row} of a JSONL file of a run. A row's key is its value of the fields `key`, or a tuple of several."""

    def __init__(self, file: Path, *key: str, belongs=lambda row: True):
        """Forget rows that do not belong or have another form, and a line that was cut short: one after it, too, would
        be lost."""
        self.file, self.key = file, itemgetter(*key)
        rows = [row for row in runlog.read_events(file) if row.keys() >= {*key} and belongs(row)]
        super().__init__((self.key(row), row) for row in rows)
        runlog.write_events(file, list(self.values()))

    def add(self, rows: list[dict]) -> None:
        """Keep more rows, on the disk when this returns."""
        self.update((self.key(row), row) for row in rows)
        runlog.append_events(self.file, rows)

    def print_count(self, what: str) -> None:
        if self:
            print(f"resuming: {len(self)} {what} are done")
