"""Rows in every accepted form, and in every malformed one that a user has been seen to bring."""

import csv
import json

import pytest

from lib.core.cli import InputError
from lib.data import records
from tests.conftest import call, refused

CHAT = [{"role": "user", "content": "Capital of Peru?"}, {"role": "assistant", "content": "Lima"}]

# Each says "Capital of Peru?" -> "Lima" in a form of its own.
FORMS = {
    "prompt-completion": {"prompt": "Capital of Peru?", "completion": "Lima"},
    "prompt-completion chat": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "messages": {"messages": CHAT},
    "messages, dangling question": {"messages": [*CHAT, {"role": "user", "content": "And of Chile?"}]},
    "alpaca": {"instruction": "Capital of Peru?", "output": "Lima"},
    "alpaca, empty input": {"instruction": "Capital of Peru?", "input": "", "output": "Lima"},
    "dolly": {"instruction": "Capital of Peru?", "context": "", "response": "Lima", "category": "open_qa"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Capital of Peru?"}, {"from": "gpt", "value": "Lima"}]},
}  # fmt: skip
WITH_INPUT = {
    "alpaca": {"instruction": "Sum up.", "input": "A long text.", "output": "Text."},
    "dolly": {"instruction": "Sum up.", "context": "A long text.", "response": "Text."},
}
QUESTION = {"question": "Capital?", "documents": ["Peru: Lima.", "Chile: Santiago."], "gold": ["Lima", "lima"]}


def write(path, rows) -> object:
    """The rows in the format that the path's suffix names."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def content(row: dict) -> dict:
    return {key: row[key] for key in ("prompt", "completion", "documents", "gold")}


def read_one(path) -> dict:
    (row,) = records.read_file(path)
    return row


# --- accepted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".parquet", ".JSONL"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_in_each_format_is_the_same_row(tmp_path, form, suffix):
    assert content(read_one(write(tmp_path / f"rows{suffix}", [FORMS[form]]))) == {
        "prompt": CHAT[:1], "completion": CHAT[1:], "documents": [], "gold": ["Lima"],
    }  # fmt: skip


@pytest.mark.parametrize("form", [name for name, row in FORMS.items() if all(isinstance(v, str) for v in row.values())])
def test_each_flat_form_as_csv(tmp_path, form):
    assert content(read_one(write(tmp_path / "rows.csv", [FORMS[form]])))["completion"] == CHAT[1:]


@pytest.mark.parametrize("form", WITH_INPUT)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_the_input_beside_an_instruction_follows_it(tmp_path, form, suffix):
    row = read_one(write(tmp_path / f"rows{suffix}", [WITH_INPUT[form]]))
    assert row["prompt"] == [{"role": "user", "content": "Sum up.\n\nA long text."}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_question_keeps_its_documents_and_all_its_answers(tmp_path, suffix):
    row = read_one(write(tmp_path / f"rows{suffix}", [QUESTION]))
    (turn,) = row["prompt"]
    assert all(text in turn["content"] for text in (*QUESTION["documents"], QUESTION["question"]))
    assert row["completion"] == [{"role": "assistant", "content": "Lima"}]
    assert row["gold"] == QUESTION["gold"] and row["documents"] == QUESTION["documents"]


def test_what_was_written_reads_back_as_it_is(tmp_path):
    rows = records.read_file(write(tmp_path / "rows.jsonl", [QUESTION, *FORMS.values()]))
    records.write(tmp_path / "again.jsonl", rows)
    assert records.read_file(tmp_path / "again.jsonl") == rows


def test_system_turns_and_earlier_turns_stay_in_the_prompt(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": "And?"}, CHAT[1]]
    row = read_one(write(tmp_path / "rows.jsonl", [{"messages": chat}]))
    assert row["prompt"] == chat[:-1] and row["completion"] == chat[-1:]


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    body = json.dumps(FORMS["alpaca"])
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{body}\r\n\r\n{body}\r\n".encode())
    assert len(records.read_file(tmp_path / "rows.jsonl")) == 2
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + f"[{body}]\r\n".encode())
    assert len(records.read_file(tmp_path / "rows.json")) == 1
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbf" + b"prompt,completion\r\na,b\r\nc,d\r\n")
    rows = records.read_file(tmp_path / "rows.csv")
    assert [row["prompt"][0]["content"] for row in rows] == ["a", "c"]


def test_texts_arrive_unchanged(tmp_path):
    """Quotes, line ends inside a text, U+2028, astral characters, and a row of 100,000 characters."""
    odd = 'He said "no",\nthen\u2028\x85 left; 🇫🇷 ½ \\n \t'
    long = "x" * 99_990 + " the end."
    for suffix in (".jsonl", ".json", ".csv", ".parquet"):
        path = write(tmp_path / f"rows{suffix}", [{"prompt": odd, "completion": long}])
        row = read_one(path)
        assert row["prompt"][0]["content"] == odd and row["completion"][0]["content"] == long, suffix
    records.write(tmp_path / "again.jsonl", [row])
    assert read_one(tmp_path / "again.jsonl") == row


# --- refused -----------------------------------------------------------------------------------------------

GOOD = {"prompt": "a", "completion": "b"}
MALFORMED = {
    "list": ([1, 2], "expected an object, found list"),
    "number": (5, "expected an object, found int"),
    "no known form": ({"txt": "a"}, "has the fields txt; expected prompt + completion"),
    "nothing": ({}, "(none)"),
    "no prompt": ({"completion": "b"}, "field 'prompt'"),
    "number for a text": ({"prompt": "a", "completion": 5}, "field 'completion': expected"),
    "null for a text": ({"prompt": "a", "completion": None}, "field 'completion': expected"),
    "empty answer": ({"prompt": "a", "completion": " \n"}, "field 'completion': is empty"),
    "half a chat": ({"prompt": "a", "completion": CHAT[1:]}, "field 'completion': expected a text"),
    "user completes": ({"prompt": CHAT[:1], "completion": CHAT[:1]}, "expected one assistant turn"),
    "two completions": ({"prompt": CHAT[:1], "completion": CHAT[1:] * 2}, "expected one assistant turn"),
    "assistant last": ({"prompt": CHAT, "completion": CHAT[1:]}, "field 'prompt': its last turn is 'assistant'"),
    "messages as text": ({"messages": "hello"}, "field 'messages': expected a non-empty list"),
    "no messages": ({"messages": []}, "field 'messages': expected a non-empty list"),
    "only a question": ({"messages": CHAT[:1]}, "field 'messages': expected a user turn"),
    "only an answer": ({"messages": CHAT[1:]}, "field 'messages': expected a user turn"),
    "unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, "field 'messages'[0].role: 'bot'"),
    "role is a list": ({"messages": [{"role": ["user"], "content": "x"}]}, "field 'messages'[0].role"),
    "turn is a text": ({"messages": [CHAT[0], "Lima"]}, "field 'messages'[1]: expected an object"),
    "empty turn": ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "field 'messages'[1].content"),
    "parts for a text": ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "'messages'[0].content"),
    "sharegpt with roles": ({"conversations": CHAT}, "field 'conversations'[0]"),
    "alpaca without output": ({"instruction": "a", "input": "b"}, "has the field 'instruction', but neither 'output'"),
    "alpaca, empty": ({"instruction": "", "output": "b"}, "field 'instruction': is empty"),
    "alpaca, input a list": ({"instruction": "a", "input": ["x"], "output": "b"}, "field 'input': expected a text"),
    "question alone": ({"question": "a"}, "field 'gold'"),
    "gold a number": ({"question": "a", "gold": 5}, "field 'gold': expected a list"),
    "gold with an empty one": ({"question": "a", "gold": ["b", ""]}, "field 'gold': expected a list of non-empty"),
    "documents an object": ({"question": "a", "documents": {"x": 1}, "gold": "b"}, "field 'documents'"),
    "half an emoji": ({"prompt": "a \ud83d b", "completion": "b"}, "field 'prompt': character 3"),
    "half an emoji in a turn": ({"messages": [CHAT[0], {"role": "assistant", "content": "\ude00"}]}, "'messages'"),
    "half an emoji in an id": (GOOD | {"id": "\ud83d"}, "field 'id'"),
    "id given twice": (GOOD | {"id": "first"}, "field 'id': 'first' is already used at"),
}  # fmt: skip


# Fields without which the task would be another one, in rows that are good otherwise, and what the error says of them.
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
CHANGES_THE_TASK = {
    "system": (SHAREGPT | {"system": "Shout."}, "field 'system': is a system prompt"),
    "System": (GOOD | {"System": "Shout."}, "field 'System': is a system prompt"),
    "input": (GOOD | {"input": "3 and 4"}, "field 'input': is a text that the question is about"),
    "context": ({"question": "a", "answer": "b", "context": "c"}, "field 'context': is a text"),
    "docs": ({"instruction": "a", "output": "b", "docs": ["c"]}, "field 'docs': is a text"),
    "choices": ({"question": "a", "answer": "b", "choices": ["b", "c"]}, "field 'choices': lists the possible answers"),
    "history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history': is the beginning"),
    "images": ({"messages": CHAT, "images": ["1.jpg"]}, "field 'images': is a picture"),
    "tools": ({"messages": CHAT, "tools": [{"name": "f"}]}, "field 'tools': contains tools"),
    "tool calls": (
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "field 'messages'[1].tool_calls: contains tools",
    ),
    "thoughts": ({"messages": [CHAT[0], CHAT[1] | {"thinking": "Hm."}]}, "field 'messages'[1].thinking: is what the"),
    "label": (GOOD | {"label": False}, "field 'label': False marks an answer that must not be learnt"),
    "label in a spreadsheet": (GOOD | {"label": "FALSE"}, "field 'label': 'FALSE' marks an answer"),
    "weight 0": (GOOD | {"weight": 0}, "field 'weight': 0 marks an answer"),
    "weight": (GOOD | {"weight": 0.5}, "field 'weight': 0.5 is a weight of the row"),
    "weight of the last answer": ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}, "'messages'[1].weight: 0 marks"),
    "two forms": (GOOD | {"instruction": "c"}, "field 'instruction': belongs to another form"),
    "two answers": ({"instruction": "a", "output": "b", "response": "c"}, "field 'response': belongs to another form"),
    "answer beside gold": ({"question": "a", "gold": ["b"], "answer": "c"}, "field 'answer': is not in 'gold'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES_THE_TASK)
def test_a_field_that_would_change_the_task_is_an_error(tmp_path, kind):
    row, expected = CHANGES_THE_TASK[kind]
    with pytest.raises(InputError) as error:
        records.read_file(write(tmp_path / "rows.jsonl", [GOOD, row]))
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: ") and expected in str(error.value)


def test_other_unread_fields_are_counted(tmp_path, capsys):
    rows = [
        GOOD | {"topic": "sums", "label": True, "weight": 1, "context": "", "choices": [], "history": None},
        GOOD | {"topic": "sums", "score": 3, "system": float("nan")},
        {"messages": CHAT, "prompt": "Capital of Peru?"},
        {"messages": [*CHAT, *CHAT, CHAT[0] | {"name": "Ann"}]},
        GOOD | {"documents": ["c"]},
        QUESTION,
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    notes = [
        "rows whose field 'topic' is not used: 2",
        "rows whose field 'score' is not used: 1",
        "turns whose field 'name' is not used: 1",
        "last turns that are left out, since no answer follows: 1",
        "answers before the last one of their chat, which are read but not learnt: 1",
        "rows whose 'documents' are not in the prompt, so that only retrieval and CLaRa read them: 1",
    ]
    records.read_file(path)
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"note: {path}: {note}" for note in notes)
    done = call("generate_data", "--source", path, "--output", tmp_path / "out")
    assert done.code == 0 and all(done.out.count(note) == 1 for note in notes)
    left_out = json.loads((tmp_path / "out" / "metadata.json").read_text())["left_out"]
    assert sorted(f"{what}: {number}" for what, number in left_out.items()) == sorted(notes)
    assert sum(len(records.load_split(tmp_path / "out", split)) for split in records.SPLITS) == len(rows)
    assert "note" not in capsys.readouterr().out, "said once, when the file was read"


def test_both_texts_beside_an_instruction_follow_it(tmp_path):
    for answer in ("output", "response"):
        row = {"instruction": "Add.", "input": "3 and 4", "context": "Sums.", answer: "7"}
        (turn,) = read_one(write(tmp_path / "rows.jsonl", [row]))["prompt"]
        assert turn["content"] == "Add.\n\n3 and 4\n\nSums."


def test_nan_is_a_missing_field(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"instruction": "a", "input": NaN, "output": "b", "id": NaN, "group": NaN}\n'
        '{"instruction": "a", "output": NaN}\n'
    )
    with pytest.raises(InputError, match=r":2: field 'output': expected a text, found NaN\n"):
        records.read_file(tmp_path / "rows.jsonl")


def test_deeply_nested_rows_are_an_error(tmp_path):
    for name in ("rows.jsonl", "rows.json"):
        (tmp_path / name).write_text("[" * 200_000 + "]" * 200_000)
        with pytest.raises(InputError, match="too many nested lists"):
            records.read_file(tmp_path / name)


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path, kind):
    bad, expected = MALFORMED[kind]
    path = write(tmp_path / "rows.jsonl", [GOOD | {"id": "first"}, bad, {"prompt": "c", "completion": "d"}])
    with pytest.raises(InputError) as error:
        records.read_file(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert expected in str(error.value)


def test_bad_rows_in_other_formats_have_a_place_too(tmp_path):
    rows = [GOOD, GOOD | {"completion": " "}]
    places = {".json": "rows.json: item 2", ".csv": "rows.csv:3", ".parquet": "rows.parquet: row 2"}
    for suffix, place in places.items():
        with pytest.raises(InputError) as error:
            records.read_file(write(tmp_path / f"rows{suffix}", rows))
        assert f"{place}: field 'completion': is empty" in str(error.value)


def test_a_column_without_a_name_is_counted_as_unread(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text(",prompt,completion\n0,a,b\n1,c,d\n")
    assert len(records.read_file(tmp_path / "rows.csv")) == 2
    assert "column 1" in capsys.readouterr().out


TEACH_NOTHING = {
    "completion": {"prompt": "a", "completion": " \n"},
    "null": {"instruction": "a", "output": None},
    "output": {"instruction": "a", "output": ""},
    "response": {"instruction": "a", "response": float("nan")},
    "last turn": {"messages": [CHAT[0], {"role": "assistant", "content": ""}]},
    "last turn, null": {"messages": [*CHAT, CHAT[0], {"role": "assistant", "content": None}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]},
    "turns": {"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": ""}]},
    "gold": {"question": "a", "gold": ["", " "]},
    "answer": {"question": "a", "answer": ""},
}


@pytest.mark.parametrize("kind", TEACH_NOTHING)
def test_a_few_rows_without_an_answer_are_left_out_and_counted(tmp_path, capsys, kind):
    """Up to 1 %; the others keep their ids, and notes about what was not used count them alone."""
    rows = [{"prompt": f"question {n}", "completion": "b", "topic": "x"} for n in range(198)]
    path = write(
        tmp_path / "rows.jsonl", [*rows[:5], TEACH_NOTHING[kind] | {"topic": "x"}, TEACH_NOTHING[kind], *rows[5:]]
    )
    found = records.read_file(path)
    assert len(found) == 198 and [row["id"] for row in found[4:6]] == ["rows-000004", "rows-000007"]
    out = capsys.readouterr().out
    assert f"rows that are left out, the first at {path}:6, because of field '" in out and out.count(": 2\n") == 1
    assert "rows whose field 'topic' is not used: 198" in out
    with pytest.raises(InputError, match=rf"{path}:6: field .*\(also 7\)"):  # more than 1 %
        records.read_file(write(path, [*rows[:5], TEACH_NOTHING[kind], TEACH_NOTHING[kind], *rows[5:197]]))
    with pytest.raises(InputError, match=f"{path}:1: field"):
        records.read_file(write(path, [TEACH_NOTHING[kind]]))


def test_rows_that_are_left_out_excuse_no_bad_row(tmp_path):
    rows = [{"prompt": f"question {n}", "completion": "b"} for n in range(300)]
    bad = [TEACH_NOTHING["output"], {"prompt": "a", "completion": 5}]
    with pytest.raises(InputError, match=r"rows.jsonl:302: field 'completion': expected a text, found int"):
        records.read_file(write(tmp_path / "rows.jsonl", rows + bad))
    rows[7] = {"prompt": "", "completion": "b"}  # an answer without its question is a mistake
    with pytest.raises(InputError, match=r"rows.jsonl:8: field 'prompt': is empty"):
        records.read_file(write(tmp_path / "rows.jsonl", rows))


def test_what_is_left_out_is_in_the_metadata(tmp_path):
    rows = [{"instruction": f"Say {n}.", "output": "" if n in (3, 150) else f"{n}."} for n in range(200)]
    done = call("generate_data", "--source", write(tmp_path / "rows.jsonl", rows), "--output", tmp_path / "out")
    assert done.code == 0, done.err
    meta = json.loads((tmp_path / "out" / "metadata.json").read_text())
    kept = sum(meta["metrics"][split] for split in records.SPLITS)
    assert kept + sum(meta["left_out"].values()) == len(rows) and [*meta["left_out"].values()] == [2]
    assert "rows.jsonl:4" in done.out


def test_a_few_pairs_that_teach_nothing_are_left_out(tmp_path, capsys):
    pairs = [{"prompt": f"question {n}", "chosen": "b", "rejected": "c"} for n in range(200)]
    pairs[3] |= {"rejected": "b"}
    pairs[9] |= {"chosen": None}
    assert len(records.load_pairs(write(tmp_path / "pairs.jsonl", pairs), "train")) == 198
    out = capsys.readouterr().out
    assert "pairs.jsonl:4, because of fields 'chosen' and 'rejected': are the same" in out and "pairs.jsonl:10" in out


def test_many_bad_rows_do_not_fill_the_screen(tmp_path):
    with pytest.raises(
        InputError, match=r"rows\.jsonl:1: has the fields prompt; .*\(also 2, 3, 4, 5, 6 and 994 more\)"
    ):
        records.read_file(write(tmp_path / "rows.jsonl", [{"prompt": str(n)} for n in range(1000)]))
    with pytest.raises(InputError) as error:
        records.read_file(write(tmp_path / "rows.jsonl", [{f"prompt {n}": "a"} for n in range(1000)]))
    assert str(error.value).count("rows.jsonl:") == records.MOST_ERRORS
    assert "995 more rows with other errors" in str(error.value)


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        ("a.jsonl", b"", ["a.jsonl", "no rows"]),
        ("a.jsonl", b"\n \n", ["a.jsonl", "no rows"]),
        ("a.json", b"", ["a.json", "not JSON"]),
        ("a.json", b"[]", ["a.json", "no rows"]),
        ("a.json", b'{"rows": []}', ["a.json", "expected a list", "dict"]),
        ("a.csv", b"", ["a.csv", "no rows"]),
        ("a.csv", b"prompt,completion\n", ["a.csv", "no rows"]),
        ("a.parquet", b"", ["a.parquet", "not a Parquet file"]),
        ("a.parquet", b"PAR1 not at all PAR1", ["a.parquet", "not a Parquet file"]),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', ["a.jsonl:2", "not JSON"]),
        ("a.jsonl", b'[\n {"prompt": "a"}\n]\n', ["a.jsonl:1", "one object per line"]),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', ["a.jsonl:1", "'prompt' occurs more than"]),
        ("a.json", b'[{"prompt": "a", "completion": "b", "completion": "c"}]', ["a.json", "'completion' occurs more"]),
        ("a.csv", b"prompt,completion,prompt\na,b,c\n", ["a.csv:1", "column 'prompt' occurs more than once"]),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "Größe"}\n'.encode("latin-1"), ["a.jsonl"]),
        ("a.jsonl", '{"prompt": "Rom"}\n{"prompt": "Zürich"}'.encode("latin-1"), ["a.jsonl:2", "byte 14"]),
        ("a.jsonl", '{"prompt": "a"}\n'.encode("utf-16"), ["a.jsonl:1", "is not UTF-8"]),
        ("a.json", '[\n{"prompt": "Zürich"}]'.encode("latin-1"), ["a.json:2", "is not UTF-8"]),
        ("a.csv", "prompt,completion\na,b\nZürich,d\n".encode("latin-1"), ["a.csv:3", "UTF-8"]),
        ("a.csv", b"prompt,completion\na,b\nc\n", ["a.csv:3", "2 fields"]),
        ("a.csv", b"prompt,completion\na,b\nc,d,e\n", ["a.csv:3", "2 fields"]),
        ("a.csv", b"prompt;completion\na;b\n", ["a.csv:2", "prompt;completion"]),
        ("a.csv", b"prompt,completion\ra,b\rc,d\r", ["a.csv:1", "not CSV"]),
        ("a.csv", b'prompt,completion\na,"b\nc,d\n', ["a.csv", "not CSV"]),
        ("a.txt", b"hello", ["a.txt", ".jsonl"]),
        ("rows", b"hello", ["rows", ".jsonl"]),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else(tmp_path, name, body, words):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(InputError) as error:
        records.read_file(tmp_path / name)
    for word in words:
        assert word in str(error.value)


def test_a_directory_and_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="is a directory, expected a file"):
        records.read_file(tmp_path)
    with pytest.raises(InputError, match=r"gone\.jsonl: does not exist"):
        records.read_file(tmp_path / "gone.jsonl")


def test_the_command_line_says_all_that(tmp_path):
    path = write(tmp_path / "my rows.jsonl", [GOOD, {"prompt": 5}])
    done = call("generate_data", "--source", path, "--output", tmp_path / "out")
    refused(done, f"{path}:2: ", "fix or remove these rows")
    assert not (tmp_path / "out").exists()


# --- choice and split --------------------------------------------------------------------------------------


def some(count: int) -> list[dict]:
    raw = ((f"{n}", {"prompt": f"q{n}", "completion": "b", "id": str(n), "group": n // 3}) for n in range(count))
    return records.parse_rows(raw, "test")


def test_ids_are_made_where_there_are_none_and_kept_where_there_are(tmp_path):
    rows = [GOOD | {"id": 0}, GOOD | {"id": "x"}, GOOD, GOOD | {"id": None}]
    ids = [row["id"] for row in records.read_file(write(tmp_path / "rows.jsonl", rows))]
    assert ids == ["0", "x", "rows-000002", "rows-000003"]


def test_a_larger_sample_extends_a_smaller_one(capsys):
    rows = some(500)
    small, large = records.sample_rows(rows, 100, 42), records.sample_rows(rows, 200, 42)
    assert large[:100] == small and len(large) == 200
    assert small != rows[:100] and records.sample_rows(rows, 100, 43) != small
    assert records.sample_rows(rows[::-1], 100, 42) == small, "the order in the file does not matter"
    without = [row for row in rows if row["id"] != small[50]["id"]]
    assert records.sample_rows(without, 99, 42) == small[:50] + small[51:], "a removed row moves no other"
    assert capsys.readouterr().out == ""


def test_more_than_there_are_uses_all_and_says_so(capsys):
    assert len(records.sample_rows(some(30), 1000, 1)) == 30
    assert "1,000 examples requested, only 30 available; using all 30" in capsys.readouterr().out


@pytest.mark.parametrize("count", [9, 10, 60, 999])
def test_a_split_keeps_groups_whole_and_loses_nothing(count):
    rows = some(count)
    parts = records.split_by_group(rows, 42)
    assert sorted(row["id"] for part in parts.values() for row in part) == sorted(row["id"] for row in rows)
    groups = {split: {row["group"] for row in part} for split, part in parts.items()}
    assert all(groups.values())
    assert not groups["train"] & groups["test"] | groups["train"] & groups["validation"]
    assert not groups["test"] & groups["validation"]
    assert records.split_by_group(rows[::-1], 42)["test"] == parts["test"][::-1]
    if count == 999:
        assert 0.75 < len(parts["train"]) / count < 0.85
        assert records.split_by_group(rows, 43)["test"] != parts["test"]


def test_the_same_question_never_stands_in_two_splits(tmp_path):
    rows = [{"prompt": f"q{n % 10}", "completion": f"answer {n}"} for n in range(100)]
    parts = records.split_by_group(records.read_file(write(tmp_path / "rows.jsonl", rows)), 1)
    asked = {split: {row["prompt"][0]["content"] for row in part} for split, part in parts.items()}
    assert sum(map(len, asked.values())) == 10


def groups_of(rows: list[dict]) -> list[str]:
    return [row["group"] for row in records.parse_rows(((str(n), row) for n, row in enumerate(rows)), "test")]


def test_one_question_in_several_spellings_is_one_group():
    asked = [
        "What is X?",
        "What is X? ",
        "what  is x?",
        "Wie heißt das Café?",
        "wie heisst das Cafe\u0301?",
        "Another?",
    ]
    groups = groups_of([{"prompt": text, "completion": str(n)} for n, text in enumerate(asked)])
    assert len({*groups[:3]}) == len({*groups[3:5]}) == 1 and len({*groups}) == 3
    others = [{"prompt": f"q{n}", "completion": "a"} for n in range(4)]
    two = [{"question": "Why?", "documents": [text], "gold": "a"} for text in ("One.", "Two.")]
    assert len({*groups_of(others + two)}) == 5, "one question with other documents"
    same = [{"question": text, "documents": ["One."], "gold": "a"} for text in ("Why?", "How?")]
    assert len({*groups_of(others + same)}) == 5, "one document with other questions"


def test_chats_that_begin_alike_are_one_group():
    chats = [[CHAT[0], CHAT[1], {"role": "user", "content": f"Say it in way {n}."}, CHAT[1]] for n in range(3)]
    rows = [{"messages": chat} for chat in chats] + [{"prompt": f"q{n}", "completion": "a"} for n in range(4)]
    assert len({*groups_of(rows)}) == 5


def test_questions_of_all_documents_split_by_document():
    rows = [
        {"question": question, "documents": [f"Invoice {n}."], "gold": "a"}
        for n in range(10) for question in ("What is the total?", "Who sent it?")
    ]  # fmt: skip
    groups = groups_of(rows)
    assert len({*groups}) == 10 and all(groups[n] == groups[n + 1] for n in range(0, 20, 2))
    assert len({*groups_of([{"instruction": "Sum up.", "input": f"Text {n}.", "output": "a"} for n in range(9)])}) == 9


def test_groups_that_end_in_the_same_words_stay_apart():
    again = {"role": "user", "content": "Please go on."}
    chats = [[{"role": "user", "content": f"Topic {n}?"}, CHAT[1], again, CHAT[1]] for n in range(9)]
    systems = [[{"role": "system", "content": f"Text {n}."}, again, CHAT[1]] for n in range(9)]
    for some in (chats, systems):
        assert len({*groups_of([{"messages": chat} for chat in some])}) == 9
    apart = [{"instruction": "Sum up.", "output": "a", "documents": [f"Text {n}."]} for n in range(9)]
    assert len({*groups_of(apart)}) == 9


def test_questions_about_one_document_are_split_by_question():
    rows = [{"question": f"q{n}?", "documents": ["The manual."], "gold": "a"} for n in range(9)]
    assert len({*groups_of(rows)}) == 9


def test_groups_do_not_depend_on_the_order_of_the_rows():
    rows = [{"prompt": text, "completion": "a"} for text in ("A?", "a?", "B?", "b? ", "C?")]
    assert groups_of(rows) == groups_of(rows[::-1])[::-1]
    assert groups_of([GOOD | {"group": 0}, GOOD | {"group": 1}]) == ["0", "1"]


def test_one_row_can_be_measured_on_but_not_split(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD])
    assert len(records.load_split(path, "test")) == 1
    done = call("generate_data", "--source", path, "--output", tmp_path / "out")
    refused(done, "1 rows in 1 groups", "cannot be split into", "at least 3")


def test_the_question_is_found_again_behind_its_documents():
    documents = ["Question: not this one?\n\nAnswer:", "second"]
    for some in ([], documents):
        assert records.question_alone(records.question_with_documents("Why?", some), some) == "Why?"
    assert records.question_alone("Why? See second.", documents) == "Why? See second."


# --- preference pairs ----------------------------------------------------------------------------------------

OTHER = [CHAT[0], {"role": "assistant", "content": "Cusco"}]
PAIRS = {
    "texts": {"prompt": "Capital of Peru?", "chosen": "Lima", "rejected": "Cusco"},
    "turns": {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": OTHER[1:]},
    "text and turns": {"prompt": "Capital of Peru?", "chosen": CHAT[1:], "rejected": OTHER[1:]},
    "whole chats": {"chosen": CHAT, "rejected": OTHER},
    "UltraFeedback": {"prompt": "Capital of Peru?", "chosen": CHAT, "rejected": OTHER, "score_chosen": 9.0},
}
BAD_PAIRS = {
    "a row": ({"prompt": "a", "completion": "b"}, "expected prompt + chosen + rejected"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "has the fields prompt, chosen"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "field 'prompt'"),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": " "}, "field 'rejected': is empty"),
    "number": ({"prompt": "a", "chosen": 1, "rejected": "c"}, "field 'chosen': expected a non-empty list of turns"),
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same answer"),
    "equal but for spaces": ({"prompt": "a", "chosen": "b", "rejected": "b\n"}, "are the same answer"),
    "equal chats": ({"chosen": CHAT, "rejected": CHAT}, "are the same answer"),
    "other chats": (
        {"chosen": CHAT, "rejected": [{"role": "user", "content": "x"}, OTHER[1]]}, "expected the same chat up to",
    ),
    "prompt before chats": (
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": CHAT, "rejected": OTHER}, "field 'prompt': is not in",
    ),
    "system": ({"system": "Obey.", "prompt": "a", "chosen": "b", "rejected": "c"}, "field 'system': is a system"),
    "history": ({"history": [["a", "b"]], "chosen": CHAT, "rejected": OTHER}, "field 'history': is the beginning"),
    "a question": ({"prompt": "a", "chosen": CHAT[:1], "rejected": OTHER[1:]}, "its turn is 'user'"),
    "no question": ({"chosen": CHAT[:1] * 2, "rejected": OTHER}, "expected a user turn and an assistant turn"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", PAIRS)
def test_each_form_of_a_pair_is_the_same_pair(tmp_path, form, suffix):
    (pair,) = records.load_pairs(write(tmp_path / f"pairs{suffix}", [PAIRS[form]]), "train")
    expected = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": OTHER[1:], "documents": []}
    assert {key: pair[key] for key in expected} == expected
    assert pair["id"] == "pairs-000000" and pair["group"] == "Capital of Peru?"


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_malformed_pair_is_named_by_its_line(tmp_path, name):
    bad, said = BAD_PAIRS[name]
    path = write(tmp_path / "pairs.jsonl", [PAIRS["texts"], bad])
    with pytest.raises(InputError) as error:
        records.load_pairs(path, "train")
    assert f"{path}:2" in str(error.value) and said in str(error.value)


def test_a_file_of_pairs_holds_none_out(tmp_path):
    assert records.load_pairs(write(tmp_path / "pairs.jsonl", [PAIRS["texts"]]), "validation") == []


def test_a_training_on_some_of_the_rows_says_so(capsys):
    rows = [{"id": str(n)} for n in range(12)]
    assert records.draw_training_rows(rows, 12, 1) == records.sample_rows(rows, 12, 1)
    assert capsys.readouterr().out == ""
    assert records.draw_training_rows(rows, 5, 1) == records.sample_rows(rows, 5, 1)
    assert "training on 5 of 12 examples" in capsys.readouterr().out
