"""Rows that a killed run left in its directory, so that the same command does only what is missing."""

from operator import itemgetter
from pathlib import Path

from lib.core import runlog


class Kept(dict):
    """{key: row} of a JSONL file of a run. `key` names the field that is a row's key, or several, whose tuple is."""

    def __init__(self, file: Path, *key: str, belongs=lambda row: True):
        """Rewrite the file without rows that do not belong or lack a key, and without an incomplete last line: a row
        appended to that line would be lost as well."""
        self.file, self.key = file, itemgetter(*key)
        rows = [row for row in runlog.read_events(file) if row.keys() >= {*key} and belongs(row)]
        super().__init__((self.key(row), row) for row in rows)
        runlog.write_events(file, list(self.values()))

    def add(self, rows: list[dict]) -> None:
        """Add rows; they are on the disk when this returns."""
        self.update((self.key(row), row) for row in rows)
        runlog.append_events(self.file, rows)

    def print_count(self, unit: str) -> None:
        if self:
            print(f"resuming: {len(self)} {unit} are done")
