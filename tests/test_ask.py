"""ask.py: the documents that it reads, before any model is loaded."""

import json

import ask
import pytest

from lib.core.cli import InputError


def test_the_texts_of_a_folder_are_read_with_their_places(tmp_path):
    (tmp_path / "more.md").mkdir()  # a folder of that name is no text
    (tmp_path / "more.md" / "a.txt").write_text("\ufeffone", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "two"}) + "\n" + json.dumps({"text": "three"}) + "\n")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert ask.read_documents(tmp_path) == {
        str(tmp_path / "more.md" / "a.txt"): "one",
        f"{tmp_path / 'rows.jsonl'}:1": "two",
        f"{tmp_path / 'rows.jsonl'}:2": "three",
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [('["a"]', "expected an object"), ('{"text": "x\\ud800"}', "text"), ('{"title": "a"}', "'text'")],
)
def test_a_line_without_a_text_is_named(tmp_path, line, reason):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match=reason) as error:
        ask.read_documents(tmp_path / "rows.jsonl")
    assert "rows.jsonl:2" in str(error.value)
