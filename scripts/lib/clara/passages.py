"""Rows of CLaRa's three stages (arXiv 2511.18659) in the forms that its authors publish: read, and made of questions.

    stage 1: {"data_type": "qa", "question": [str…], "answers": [str…], "docs": [one document]}
             {"data_type": "paraphrase", "answers": [a paraphrase], "docs": [one document]}
    stage 2: {"question": str, "docs": [str…], "gold_answer": str, "answer": str, a teacher's wording}
    stage 3: {"question": str, "docs": [candidates…], "answer": str, "pos_index": [places of the gold ones, from 0]}

Stages 2 and 3 read one another's rows: one of `gold_answer` and `answer` is enough, and `pos_index` may be missing. As
the authors' loader does, both take `golden_answers`, a list of accepted spellings, and call `docs` also `context` or
`content`.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lib.core import artifact
from lib.core.cli import InputError
from lib.data import records, retrieval
from lib.data.records import RowError, check_object, read_text, read_texts

KIND = "clara-data"
DOCUMENTS = ("docs", "context", "content")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[^a-z\s])")  # between two sentences
FORMS = {
    1: "data_type + question + answers + docs, one document a row",
    2: "question + docs + gold_answer or answer",
    3: "question + docs + answer or gold_answer + pos_index",
}


class Passage(NamedTuple):
    """A row of stage 1."""

    document: str
    pairs: list[tuple[str, str]]  # question and answer; of a paraphrase "" and the paraphrase
    kind: str  # qa or paraphrase


class Question(NamedTuple):
    """A row of stage 2 or 3."""

    question: str
    documents: list[str]  # each once, also where the file repeats one
    answer: str  # to be learnt: a teacher's wording, where there is one
    golds: list[str]  # to be measured against
    positions: list[int]  # of the gold documents, in order; empty where they are not known


# --- reading -----------------------------------------------------------------------------------------


def load_rows(path: Path | str, stage: int, split: str) -> Iterator[Passage] | Iterator[Question]:
    """The rows of one split of an artifact, or all rows of a file of the user's, line by line.

    InputError lists the first bad places, once the good rows before them have been given.
    """
    path = Path(path)
    if not path.is_file():
        artifact.read(path, KIND)
        path = path / f"stage{stage}-{split}.jsonl"
    read = parse_passage if stage == 1 else parse_question
    return records.parse_stream(records.raw_rows(path), lambda n, place, raw: read(raw), path, FORMS[stage])


def load_splits(path: Path, stage: int, samples: int, watched: int, seed: int) -> tuple[list, list]:
    """(rows to train on, held-out rows to watch), in a seeded order. Of a user's file a tenth is held out, at most
    `watched`; of one with a single row, that row is watched as well."""

    def ordered(rows: Iterable) -> list:
        return sorted(rows, key=lambda row: records.shuffle_key(seed, repr(row)))

    if Path(path).is_file():
        rows = ordered(load_rows(path, stage, "train"))
        held_out = min(watched, max(1, len(rows) // 10))
        return (rows[held_out:] or rows)[:samples], rows[:held_out]
    return ordered(load_rows(path, stage, "train"))[:samples], ordered(load_rows(path, stage, "validation"))[:watched]


def test_questions(path: Path, samples: int, seed: int) -> tuple[list[Question], list[list[str]], list[str]]:
    """(test questions whose right documents are known, in a seeded order; those documents of each; all documents that
    there are to search)."""
    rows = [row for row in load_rows(path, 3, "test") if row.positions]
    rows = sorted(rows, key=lambda row: records.shuffle_key(seed, repr(row)))[:samples]
    if not rows:
        raise InputError(f"{path}: no test question has pos_index, which marks the documents that contain the answer")
    golds = [[row.documents[n] for n in row.positions] for row in rows]
    passages = [passage.document for passage in load_rows(path, 1, "test")]
    return rows, golds, list(dict.fromkeys([*passages, *(one for gold in golds for one in gold)]))


def parse_passage(row: object) -> Passage:
    """Raises RowError."""
    check_object(row)
    kind = row.get("data_type") or "qa"
    if kind not in ("qa", "paraphrase"):
        raise RowError(f"field 'data_type': {kind!r} is neither 'qa' nor 'paraphrase'")
    found = read_documents(row)
    if len(found) > 1:
        raise RowError(f"field 'docs': contains {len(found)} documents; expected one per example in stage 1")
    answers = read_texts(row, "answers") or read_texts(row, "answer")
    questions = read_texts(row, "question") if kind == "qa" else [""] * len(answers)
    if not answers:
        raise RowError("field 'answers': is missing or empty; expected a list of texts")
    if len(questions) != len(answers):
        raise RowError(
            f"fields 'question' and 'answers': contain {len(questions)} and {len(answers)} texts; expected one answer "
            "per question"
        )
    return Passage(found[0], list(zip(questions, answers)), kind)


def parse_question(row: object) -> Question:
    """Raises RowError."""
    check_object(row)
    asked, found = read_text(row, "question"), read_documents(row)
    wording = read_texts(row, "answer")
    accepted = [one for key in ("gold_answer", "golden_answers", "answers") for one in read_texts(row, key)]
    if not wording and not accepted:
        raise RowError("fields 'gold_answer' and 'answer': are missing or empty; expected one of them")
    golds, kept = list(dict.fromkeys(accepted or wording)), list(dict.fromkeys(found))
    positions = sorted({kept.index(found[n]) for n in read_positions(row, len(found))})
    return Question(asked, kept, (wording or golds)[0], golds, positions)


def read_documents(row: dict) -> list[str]:
    key = next((key for key in DOCUMENTS if key in row), DOCUMENTS[0])
    found = read_texts(row, key)
    if not found:
        raise RowError(f"field {key!r}: contains no document; expected a list of texts")
    return found


def read_positions(row: dict, count: int) -> list[int]:
    value = row.get("pos_index")
    found = [] if value is None else value if isinstance(value, list) else [value]
    for n in found:
        if type(n) is not int:
            raise RowError(f"field 'pos_index': expected a list of whole numbers, found {value!r}")
        if not 0 <= n < count:
            raise RowError(f"field 'pos_index': {n} is not an index into docs; expected 0 to {count - 1}")
    return sorted(set(found))


def limit_documents(row: Question, most: int) -> Question:
    """With at most so many documents: the right ones, and the first of the others, in their order."""
    others = [n for n in range(len(row.documents)) if n not in row.positions]
    kept = sorted([*row.positions, *others[: max(0, most - len(row.positions))]])
    places = [kept.index(n) for n in row.positions]
    return row._replace(documents=[row.documents[n] for n in kept], positions=places)


# --- short ones first --------------------------------------------------------------------------------


def put_segments_first(rows: list[Passage], share: float, words: int) -> tuple[list[Passage], int]:
    """(the rows, the first `share` of them in stretches; how many stretches these are)."""
    cut = [one for row in rows[: round(share * len(rows))] for one in cut_into_segments(row, words)]
    return cut + rows[round(share * len(rows)) :], len(cut)


def cut_into_segments(row: Passage, words: int) -> list[Passage]:
    """A passage as stretches of whole sentences, each of at most so many words where a sentence allows it, behind the
    first sentence, which says what the passage is about. Of each the questions that it answers; one that answers none
    is left out. A passage is not cut where an answer stands in no stretch word for word."""
    first, *rest = SENTENCE.split(row.document)
    texts = [first]
    for sentence in rest:
        longer = f"{texts[-1]} {sentence}"
        if texts[-1] == first or len(longer.split()) <= words:
            texts[-1] = longer
        else:
            texts.append(f"{first} {sentence}")
    known, pairs = [{*retrieval.stem_words(text)} for text in texts], [[] for _ in texts]
    for question, answer in row.pairs:
        says = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
        saying = [n for n, text in enumerate(texts) if says.search(text)]
        if not saying:
            return [row]
        asked = {*retrieval.stem_words(question)}
        pairs[max(saying, key=lambda n: len(asked & known[n]))].append((question, answer))
    return [Passage(text, some, row.kind) for text, some in zip(texts, pairs) if some]


# --- making ------------------------------------------------------------------------------------------


def extract_question(row: dict) -> str:
    """The question of a row in the project's form."""
    return records.question_alone(row["prompt"][-1]["content"], row["documents"])


def attach_pairs(rows: Iterable[dict], seed: int) -> list[dict]:
    """Rows of stage 1: each document that rows ask about alone, with all their questions. In a seeded order."""
    about = {}
    for row in rows:
        if len(row["documents"]) == 1:
            about.setdefault(row["documents"][0], []).append(row)
    return [
        {
            "data_type": "qa",
            "question": [extract_question(row) for row in about[document]],
            "answers": [row["completion"][0]["content"] for row in about[document]],
            "docs": [document],
        }
        for document in sorted(about, key=lambda one: records.shuffle_key(seed, one))
    ]


def attach_candidates(row: dict, ranked: Iterable[str], count: int, seed: int) -> dict:
    """A row of stages 2 and 3: its own documents and the first others of `ranked` that do not answer its question, so
    many together, at seeded places."""
    gold, answers_too = list(dict.fromkeys(row["documents"])), answer_matcher(row)
    others = (one for one in ranked if one not in gold and not answers_too(one))
    docs = gold + list(islice(others, max(0, count - len(gold))))
    docs.sort(key=lambda one: records.shuffle_key(seed, row["id"] + one))
    return {
        "question": extract_question(row),
        "docs": docs,
        "gold_answer": row["gold"][0],
        "answer": row["completion"][0]["content"],
        "golden_answers": row["gold"],
        "pos_index": [n for n, one in enumerate(docs) if one in gold],
    }


def answer_matcher(row: dict) -> Callable[[str], bool]:
    """A function: whether a passage answers a row's question like its own documents, as the passage on B does when the
    border of A with B is asked: it has the answer, and all words of the question that they have.

    DPR (arXiv 2004.04906) leaves out whatever has the answer. Then "no" or "unicameral" would stand in the right
    passage alone, which could be learnt instead of what is asked.
    """
    answer = re.compile(rf"(?<!\w){re.escape(row['gold'][0])}(?!\w)", re.IGNORECASE)
    known = {*retrieval.stem_words(extract_question(row))} & {
        word for text in row["documents"] for word in retrieval.stem_words(text)
    }
    return lambda text: bool(answer.search(text)) and known <= {*retrieval.stem_words(text)}
