"""What a killed run left is found again, and what no longer belongs is forgotten."""

import pytest

from lib.core.kept import Kept
from lib.core.runlog import read_events

ROWS = [{"id": "1", "way": "a", "n": 0}, {"id": "2", "way": "a", "n": 1}, {"id": "3", "way": "b", "n": 0}]


@pytest.fixture
def file(tmp_path):
    Kept(tmp_path / "rows.jsonl", "id").add(ROWS)
    return tmp_path / "rows.jsonl"


def test_rows_are_found_by_one_field_or_by_several(file):
    assert Kept(file, "id") == {row["id"]: row for row in ROWS}
    assert Kept(file, "way", "n") == {("a", 0): ROWS[0], ("a", 1): ROWS[1], ("b", 0): ROWS[2]}


def test_rows_that_do_not_belong_are_forgotten_on_the_disk_too(file):
    Kept(file, "id", belongs=lambda row: row["way"] == "a")
    assert read_events(file) == ROWS[:2]
    assert Kept(file, "question") == {}, "rows of another form"
    assert read_events(file) == []


def test_what_follows_a_line_that_was_cut_short_is_not_lost(file):
    file.write_bytes(file.read_bytes()[:-5])
    kept = Kept(file, "id")
    assert list(kept) == ["1", "2"]
    kept.add(ROWS[2:])
    assert Kept(file, "id") == {row["id"]: row for row in ROWS}


def test_a_run_that_begins_says_nothing_of_continuing(file, tmp_path, capsys):
    Kept(tmp_path / "none.jsonl", "id").print_count("of 3 rows")
    assert capsys.readouterr().out == ""
    Kept(file, "id").print_count("of 4 rows")
    assert capsys.readouterr().out == "resuming: 3 of 4 rows are done\n"
