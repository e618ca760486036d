"""Rows of CLaRa's three stages: the published forms, what its authors' loader takes as well, and what is refused."""

import json
from collections import Counter

import pytest

from lib.clara import passages
from lib.clara.passages import Passage, Question
from lib.core.cli import InputError

QA = {"data_type": "qa", "question": ["Capital?", "Port?"], "answers": ["Lima", "Callao"], "docs": ["Peru: Lima."]}
ASKED = {"question": "Capital?", "docs": ["Peru: Lima.", "Chile: Santiago."], "gold_answer": "Lima"}
PAIRS = [("Capital?", "Lima"), ("Port?", "Callao")]

PASSAGES = {
    "published": (QA, Passage("Peru: Lima.", PAIRS, "qa")),
    "no data_type": ({k: v for k, v in QA.items() if k != "data_type"}, Passage("Peru: Lima.", PAIRS, "qa")),
    "one pair, as texts": (
        {"question": "Capital?", "answer": "Lima", "context": ["Peru: Lima."]},
        Passage("Peru: Lima.", PAIRS[:1], "qa"),
    ),
    "paraphrase": (
        {"data_type": "paraphrase", "question": [""], "answers": ["Lima lies in Peru."], "docs": ["Peru: Lima."]},
        Passage("Peru: Lima.", [("", "Lima lies in Peru.")], "paraphrase"),
    ),
    "paraphrase without a question": (
        {"data_type": "paraphrase", "answers": ["a", "b"], "docs": ["Peru: Lima."]},
        Passage("Peru: Lima.", [("", "a"), ("", "b")], "paraphrase"),
    ),
}
DOCUMENTS = ASKED["docs"]
QUESTIONS = {
    "gold_answer alone": (ASKED, Question("Capital?", DOCUMENTS, "Lima", ["Lima"], [])),
    "stage 2": (
        ASKED | {"answer": "It is Lima."},
        Question("Capital?", DOCUMENTS, "It is Lima.", ["Lima"], []),
    ),
    "stage 3": (
        {"question": "Capital?", "answer": "Lima", "docs": DOCUMENTS, "pos_index": [1, 0]},
        Question("Capital?", DOCUMENTS, "Lima", ["Lima"], [0, 1]),
    ),
    "a document twice": (
        ASKED | {"docs": ["a", "b", "a", "c"], "pos_index": [2, 3]},
        Question("Capital?", ["a", "b", "c"], "Lima", ["Lima"], [0, 2]),
    ),
    "one place as a number": (ASKED | {"pos_index": 1}, Question("Capital?", DOCUMENTS, "Lima", ["Lima"], [1])),
    "no place": (ASKED | {"pos_index": None}, Question("Capital?", DOCUMENTS, "Lima", ["Lima"], [])),
    "all spellings": (
        ASKED | {"golden_answers": ["Lima", "Ciudad de los Reyes"], "answer": ""},
        Question("Capital?", DOCUMENTS, "Lima", ["Lima", "Ciudad de los Reyes"], []),
    ),
    "spellings alone": (
        {"question": "Capital?", "answers": ["Lima", "lima"], "content": DOCUMENTS},
        Question("Capital?", DOCUMENTS, "Lima", ["Lima", "lima"], []),
    ),
}
MALFORMED = {
    1: {
        "list": ([1], "expected an object, found list"),
        "other kind": (QA | {"data_type": "sum"}, "field 'data_type': 'sum' is neither 'qa' nor 'paraphrase'"),
        "an answer too few": (QA | {"answers": ["Lima"]}, "fields 'question' and 'answers': contain 2 and 1 texts"),
        "no question": ({"answers": ["Lima"], "docs": ["x"]}, "fields 'question' and 'answers': contain 0 and 1 texts"),
        "no answer": (QA | {"answers": []}, "field 'answers': is missing or empty"),
        "an empty answer": (QA | {"answers": ["Lima", " "]}, "field 'answers': expected a list of non-empty texts"),
        "a number asked": (QA | {"question": ["a", 5]}, "field 'question': expected a list of non-empty texts"),
        "no docs": (QA | {"docs": []}, "field 'docs': contains no document"),
        "docs missing": ({"question": ["a"], "answers": ["b"]}, "field 'docs': contains no document"),
        "docs of numbers": (QA | {"docs": [5]}, "field 'docs': expected a list of non-empty texts"),
        "several docs": (QA | {"docs": ["a", "b"]}, "field 'docs': contains 2 documents; expected one"),
        "half an emoji": (QA | {"docs": ["\ud83d"]}, "field 'docs': character 1 is half a surrogate pair"),
        "a row of stage 2": (ASKED, "field 'docs': contains 2 documents; expected one"),
    },
    3: {
        "no answer": ({"question": "a", "docs": ["x"]}, "fields 'gold_answer' and 'answer': are missing or empty"),
        "a number for an answer": (ASKED | {"answer": 5}, "field 'answer': expected a list of non-empty texts"),
        "no question": (ASKED | {"question": " "}, "field 'question': is empty"),
        "a row of stage 1": (QA, "field 'question': expected a text, found list"),
        "a place beyond": (
            ASKED | {"pos_index": [0, 2]},
            "field 'pos_index': 2 is not an index into docs; expected 0 to 1",
        ),
        "a place before": (ASKED | {"pos_index": [-1]}, "field 'pos_index': -1 is not an index into docs"),
        "a place in words": (ASKED | {"pos_index": ["0"]}, "field 'pos_index': expected a list of whole numbers"),
        "a place as true": (ASKED | {"pos_index": [True]}, "field 'pos_index': expected a list of whole numbers"),
        "an object of docs": (ASKED | {"docs": {"a": 1}}, "field 'docs': expected a list of non-empty texts"),
    },
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", PASSAGES)
def test_each_form_of_a_passage_with_its_pairs(tmp_path, name):
    raw, expected = PASSAGES[name]
    assert list(passages.load_rows(write(tmp_path / "rows.jsonl", [raw, raw]), 1, "train")) == [expected] * 2


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", QUESTIONS)
def test_each_form_of_a_question_with_its_documents(tmp_path, name, stage):
    raw, expected = QUESTIONS[name]
    assert list(passages.load_rows(write(tmp_path / "rows.jsonl", [raw]), stage, "test")) == [expected]


def test_fewer_candidates_keep_the_right_ones_and_their_order():
    row = Question("Capital?", list("abcdef"), "Lima", ["Lima"], [1, 4])
    assert passages.limit_documents(row, 4) == row._replace(documents=list("abce"), positions=[1, 3])
    assert passages.limit_documents(row, 1) == row._replace(documents=list("be"), positions=[0, 1])
    assert passages.limit_documents(row, 9) == row


PERU = Passage(
    "Peru, geography. Capital: Lima. Largest port: Callao, at the Pacific. Highest point: Huascaran 6,768 m. Ice: 1.",
    [("What is the highest point of Peru?", "Huascaran"), ("State the capital of Peru.", "Lima"),
     ("Which ocean is the largest port of Peru at?", "pacific")],
    "qa",
)  # fmt: skip


def test_a_passage_is_cut_into_stretches_of_whole_sentences_with_what_each_answers():
    assert passages.cut_into_segments(PERU, 10) == [
        Passage("Peru, geography. Capital: Lima. Largest port: Callao, at the Pacific.", PERU.pairs[1:], "qa"),
        Passage("Peru, geography. Highest point: Huascaran 6,768 m. Ice: 1.", PERU.pairs[:1], "qa"),
    ]
    capital, port, highest = passages.cut_into_segments(
        PERU, 1
    )  # no sentence is cut; one without an answer is left out
    assert [one.document.count(".") for one in (capital, port, highest)] == [2, 2, 2]
    assert (capital.pairs, port.pairs, highest.pairs) == (PERU.pairs[1:2], PERU.pairs[2:], PERU.pairs[:1])
    assert passages.cut_into_segments(PERU, 99) == [PERU]


def test_an_answer_in_several_stretches_goes_where_most_of_its_question_stands():
    row = Passage("Peru. Coal exports: no. Dual citizenship: no.", [("Is dual citizenship recognized?", "no")], "qa")
    (cut,) = passages.cut_into_segments(row, 4)
    assert cut.document == "Peru. Dual citizenship: no."


@pytest.mark.parametrize("pair", [("What of?", "of coal"), ("", "In Peru there is no coal."), ("Which?", "itizen")])
def test_a_passage_whose_answers_do_not_stand_in_a_stretch_is_not_cut(pair):
    row = Passage("Peru. Coal exports: no. Dual citizenship: no.", [("Coal exports?", "no"), pair], "qa")
    assert passages.cut_into_segments(row, 4) == [row]


def test_the_first_rows_come_in_stretches_and_the_others_whole():
    rows, short = passages.put_segments_first([PERU] * 4, 0.5, 10)
    assert short == 4 and rows == [*passages.cut_into_segments(PERU, 10)] * 2 + [PERU] * 2
    assert passages.put_segments_first([PERU] * 4, 0, 10) == ([PERU] * 4, 0)


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in MALFORMED for name in MALFORMED[stage]])
def test_a_malformed_row_is_named_by_its_line(tmp_path, stage, name):
    raw, said = MALFORMED[stage][name]
    path = write(tmp_path / "rows.jsonl", [QA if stage == 1 else ASKED, raw])
    with pytest.raises(InputError) as error:
        list(passages.load_rows(path, stage, "train"))
    assert str(error.value).startswith(f"{path}:2: {said}")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_few_rows_without_an_answer_are_left_out(tmp_path, capsys, stage):
    row = {"docs": ["a"], "question": ["b"] if stage == 1 else "b", "answers": ["d"]}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row | ({"answers": []} if n == 7 else {})) + "\n" for n in range(100)))
    assert len([*passages.load_rows(file, stage, "train")]) == 99
    assert f"rows that are left out, the first at {file}:8" in capsys.readouterr().out


def test_rows_come_one_by_one_until_the_first_bad_one(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ASKED, ASKED, {}, ASKED, *[{}] * 99])
    rows = passages.load_rows(path, 2, "train")
    assert [next(rows).answer, next(rows).answer] == ["Lima", "Lima"]
    with pytest.raises(InputError) as error:
        next(rows)
    assert "rows.jsonl:3: field 'question': expected a text, found NoneType (also 5, 6, 7" in str(error.value)


def test_bytes_of_other_systems(tmp_path):
    path, body = tmp_path / "rows.jsonl", json.dumps(QA)
    path.write_bytes(b"\xef\xbb\xbf" + f"{body}\r\n\r\n{body}\r\n".encode())
    assert len(list(passages.load_rows(path, 1, "train"))) == 2
    for raw, said in {
        b"": "contains no rows; expected at least one, in one of these formats: data_type + question",
        f"{body}\n{body[:-2]}\n".encode(): "rows.jsonl:2: not JSON",
        f"{body}\n".encode() + b'{"docs": ["Z\xfcrich"]}\n': "rows.jsonl:2: byte 13 is not UTF-8",
    }.items():
        path.write_bytes(raw)
        with pytest.raises(InputError) as error:
            list(passages.load_rows(path, 1, "train"))
        assert said in str(error.value)


def test_what_is_neither_a_file_nor_such_an_artifact_is_refused(tmp_path, data):
    for path, said in {
        tmp_path: "is not an artifact",
        tmp_path / "rows.jsonl": "does not exist",
        data: "expected kind 'clara-data', found 'data'",
    }.items():
        with pytest.raises(InputError, match=said):
            passages.load_rows(path, 1, "train")


def test_no_document_of_a_held_out_row_of_a_file_is_trained_on(tmp_path):
    rows = [
        {"question": f"q{n}?", "docs": [f"Text {n // 4}.", "A distractor."], "answer": "a", "pos_index": [0]}
        for n in range(40)
    ]
    for stage, key in ((2, 40), (1, 40)):
        if stage == 1:
            rows = [{"question": [row["question"]], "answers": ["a"], "docs": row["docs"][:1]} for row in rows]
        train, held_out = passages.load_splits(write(tmp_path / "rows.jsonl", rows), stage, 100, 100, 7)
        texts = [{text for row in part for text in passages.list_documents(row)} for part in (train, held_out)]
        assert not texts[0] & texts[1] and len(train) + len(held_out) == key and len(held_out) == 4
    one = write(tmp_path / "one.jsonl", [{"question": f"q{n}?", "docs": ["Text."], "answer": "a"} for n in range(20)])
    assert [len(part) for part in passages.load_splits(one, 2, 100, 100, 7)] == [18, 2]


def test_a_group_is_known_and_moves_no_row():
    """Rows are shuffled by their repr, so training on rows that have groups keeps its order and its losses."""
    notes = Counter()
    plain, grouped = (passages.parse_question(ASKED | more, notes) for more in ({}, {"group": "Peru"}))
    assert (plain.group, grouped.group) == ("", "Peru") and repr(plain) == repr(grouped)
    assert repr(plain).startswith("Question(question='Capital?', documents=[") and "group" not in repr(plain)
    assert not notes  # of unused fields
