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


@pytest.mark.parametrize(
    "damage",
    [b"", b"7", b'["2", "a", 1]', b'{"way": "a", "n": 1}', b'{"id": ["2"], "way": "a", "n": "1"}', b'{"id": "2"'],
)
def test_a_damaged_row_is_done_again_and_no_other(file, damage, capsys):
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], damage, lines[2], b""]))
    assert [*Kept(file, "way", "n", belongs=lambda row: row["n"] < 2)] == [("a", 0), ("b", 0)]
    assert f"{file}:2: this line is damaged and left out" in capsys.readouterr().err
    assert [*Kept(file, "id")] == ["1", "3"] and capsys.readouterr().err == ""


def test_a_row_with_another_value_does_not_count(file):
    file.write_bytes(file.read_bytes().replace(b'"id": "2", "way": "a"', b'"id": "2", "way": "c"'))
    assert [*Kept(file, "way", "n")] == [("a", 0), ("b", 0)]


def test_a_run_that_begins_says_nothing_of_continuing(file, tmp_path, capsys):
    Kept(tmp_path / "none.jsonl", "id").print_count("of 3 rows")
    assert capsys.readouterr().out == ""
    Kept(file, "id").print_count("of 4 rows")
    assert capsys.readouterr().out == "resuming: 3 of 4 rows are done\n"
