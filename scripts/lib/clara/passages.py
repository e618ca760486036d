"""Rows of CLaRa's three stages (arXiv 2511.18659) in its authors' published formats: read, and made from questions.

    stage 1: {"data_type": "qa", "question": [str…], "answers": [str…], "docs": [one document]}
             {"data_type": "paraphrase", "answers": [a paraphrase], "docs": [one document]}
    stage 2: {"question": str, "docs": [str…], "gold_answer": str, "answer": str, a teacher's wording}
    stage 3: {"question": str, "docs": [candidates…], "answer": str, "pos_index": [places of the gold ones, from 0]}

Stages 2 and 3 read one another's rows: one of `gold_answer` and `answer` is enough, and `pos_index` may be missing. As
the authors' loader does, both take `golden_answers`, a list of accepted spellings, and call `docs` also `context` or
`content`. `group` may name questions whose answers hang together, as in lib/data/records.py.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lib.core import artifact
from lib.core.cli import InputError
from lib.data import records, retrieval
from lib.data.fields import RowError, Unlearnable, check_unused, is_missing
from lib.data.records import check_object, read_text, read_texts

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
    answer: str  # to train on: a teacher's wording, if there is one
    golds: list[str]  # reference answers to measure against
    positions: list[int]  # of the gold documents, in order; empty if they are unknown
    group: str = ""  # of questions whose answers hang together; empty if it is unknown

    def __repr__(self) -> str:
        """Without the group, which is no part of what is learnt: rows are shuffled by this text."""
        fields = (f"{name}={value!r}" for name, value in zip(self._fields[:-1], self))
        return f"Question({', '.join(fields)})"


# --- reading -----------------------------------------------------------------------------------------


def load_rows(path: Path | str, stage: int, split: str) -> Iterator[Passage] | Iterator[Question]:
    """The rows of one split of an artifact, or all rows of a user's file, line by line.

    Raises InputError with the first bad lines, after yielding the good rows before them.
    """
    path = Path(path)
    if not path.is_file():
        artifact.read(path, KIND)
        path = path / f"stage{stage}-{split}.jsonl"
    parse = parse_passage if stage == 1 else parse_question
    return records.parse_stream(
        records.raw_rows(path), lambda n, place, raw, notes: parse(raw, notes), path, FORMS[stage]
    )


def load_splits(path: Path, stage: int, samples: int, eval_samples: int, seed: int) -> tuple[list, list]:
    """(rows to train on, held-out rows), in a seeded order. Of a user's file a tenth is held out, at most
    `eval_samples`, and no document of a held-out row is trained on, if there are enough documents. The row of a file
    with a single row is in both."""

    def ordered(rows: Iterable) -> list:
        return sorted(rows, key=lambda row: records.shuffle_key(seed, repr(row)))

    if Path(path).is_file():
        rows = ordered(load_rows(path, stage, "train"))
        count = min(eval_samples, max(1, len(rows) // 10))
        groups = records.join_by_keys([list_documents(row) for row in rows])
        sizes, held_out, total = Counter(groups), set(), 0
        for group in dict.fromkeys(groups):
            if total + sizes[group] <= count:
                held_out.add(group)
                total += sizes[group]
        held_out = held_out or {min(sizes, key=sizes.get)}
        if len(sizes) == 1:  # a single document, or one that all rows share
            return (rows[count:] or rows)[:samples], rows[:count]
        return (
            [row for row, group in zip(rows, groups) if group not in held_out][:samples],
            [row for row, group in zip(rows, groups) if group in held_out][:eval_samples],
        )
    return (
        ordered(load_rows(path, stage, "train"))[:samples],
        ordered(load_rows(path, stage, "validation"))[:eval_samples],
    )


def list_documents(row: Passage | Question) -> list[str]:
    """The documents that a row is about: the right ones, or all where it does not say which are right."""
    if isinstance(row, Passage):
        return [row.document]
    return [row.documents[n] for n in row.positions] or row.documents


def test_questions(path: Path, samples: int, seed: int) -> tuple[list[Question], list[list[str]], list[str]]:
    """(test questions whose right documents are known, in a seeded order; the right documents of each; all documents to
    search)."""
    rows = [row for row in load_rows(path, 3, "test") if row.positions]
    rows = sorted(rows, key=lambda row: records.shuffle_key(seed, repr(row)))[:samples]
    if not rows:
        raise InputError(f"{path}: no test question has pos_index, which marks the documents that contain the answer")
    golds = [[row.documents[n] for n in row.positions] for row in rows]
    passages = [passage.document for passage in load_rows(path, 1, "test")]
    return rows, golds, list(dict.fromkeys([*passages, *(document for gold in golds for document in gold)]))


def parse_passage(row: object, notes: Counter) -> Passage:
    """Raises RowError."""
    check_object(row)
    kind = row.get("data_type") or "qa"
    if kind not in ("qa", "paraphrase"):
        raise RowError(f"field 'data_type': {kind!r} is neither 'qa' nor 'paraphrase'")
    documents = read_documents(row)
    if len(documents) > 1:
        raise RowError(f"field 'docs': contains {len(documents)} documents; expected one per example in stage 1")
    answer_key = "answer" if is_missing(row.get("answers")) else "answers"
    answers = read_texts(row, answer_key)
    questions = read_texts(row, "question") if kind == "qa" else [""] * len(answers)
    check_unused(row, {"data_type", find_documents(row), "question", answer_key}, [], notes)
    if not answers:
        raise Unlearnable("field 'answers': is missing or empty; expected a list of texts")
    if len(questions) != len(answers):
        raise RowError(
            f"fields 'question' and 'answers': contain {len(questions)} and {len(answers)} texts; expected one answer "
            "per question"
        )
    return Passage(documents[0], list(zip(questions, answers)), kind)


def parse_question(row: object, notes: Counter) -> Question:
    """Raises RowError."""
    check_object(row)
    question, documents = read_text(row, "question"), read_documents(row)
    wording = read_texts(row, "answer")
    accepted = [text for key in ("gold_answer", "golden_answers", "answers") for text in read_texts(row, key)]
    if not wording and not accepted:
        raise Unlearnable("fields 'gold_answer' and 'answer': are missing or empty; expected one of them")
    used = {"question", "answer", "gold_answer", "golden_answers", "answers", "pos_index", "group", find_documents(row)}
    check_unused(row, used, [], notes)
    golds, unique = list(dict.fromkeys(accepted or wording)), list(dict.fromkeys(documents))
    positions = sorted({unique.index(documents[n]) for n in read_positions(row, len(documents))})
    return Question(
        question,
        unique,
        (wording or golds)[0],
        golds,
        positions,
        "" if is_missing(row.get("group")) else str(row["group"]),
    )


def find_documents(row: dict) -> str:
    """The name of the field with the documents."""
    return next((key for key in DOCUMENTS if not is_missing(row.get(key))), DOCUMENTS[0])


def read_documents(row: dict) -> list[str]:
    documents = read_texts(row, key := find_documents(row))
    if not documents:
        raise RowError(f"field {key!r}: contains no document; expected a list of texts")
    return documents


def read_positions(row: dict, count: int) -> list[int]:
    value = row.get("pos_index")
    positions = [] if value is None else value if isinstance(value, list) else [value]
    for n in positions:
        if type(n) is not int:
            raise RowError(f"field 'pos_index': expected a list of whole numbers, found {value!r}")
        if not 0 <= n < count:
            raise RowError(f"field 'pos_index': {n} is not an index into docs; expected 0 to {count - 1}")
    return sorted(set(positions))


def limit_documents(row: Question, limit: int) -> Question:
    """The row with at most `limit` documents, in their order: the right ones, and the first of the others."""
    distractors = [n for n in range(len(row.documents)) if n not in row.positions]
    indices = sorted([*row.positions, *distractors[: max(0, limit - len(row.positions))]])
    places = [indices.index(n) for n in row.positions]
    return row._replace(documents=[row.documents[n] for n in indices], positions=places)


# --- short segments first ----------------------------------------------------------------------------


def put_segments_first(rows: list[Passage], share: float, words: int) -> tuple[list[Passage], int]:
    """(the rows, with the first `share` of them cut into segments; the number of segments)."""
    segments = [segment for row in rows[: round(share * len(rows))] for segment in cut_into_segments(row, words)]
    return segments + rows[round(share * len(rows)) :], len(segments)


def cut_into_segments(row: Passage, words: int) -> list[Passage]:
    """A passage as segments of whole sentences, each of at most `words` words as far as sentences allow. A segment
    starts with the passage's first sentence, which says what the passage is about, and keeps the questions that it
    answers. Segments without a question are dropped. A passage is not cut if an answer is in no segment word for word.
    """
    first, *rest = SENTENCE.split(row.document)
    texts = [first]
    for sentence in rest:
        longer = f"{texts[-1]} {sentence}"
        if texts[-1] == first or len(longer.split()) <= words:
            texts[-1] = longer
        else:
            texts.append(f"{first} {sentence}")
    stems, text_pairs = [{*retrieval.stem_words(text)} for text in texts], [[] for _ in texts]
    for question, answer in row.pairs:
        pattern = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
        matches = [n for n, text in enumerate(texts) if pattern.search(text)]
        if not matches:
            return [row]
        question_stems = {*retrieval.stem_words(question)}
        text_pairs[max(matches, key=lambda n: len(question_stems & stems[n]))].append((question, answer))
    return [Passage(text, pairs, row.kind) for text, pairs in zip(texts, text_pairs) if pairs]


# --- making ------------------------------------------------------------------------------------------


def extract_question(row: dict) -> str:
    """The question of a row in the project's form."""
    return records.question_alone(row["prompt"][-1]["content"], row["documents"])


def attach_pairs(rows: Iterable[dict], seed: int) -> list[dict]:
    """Rows of stage 1: each document that is the only one of some rows, with the questions of those rows. In a seeded
    order."""
    rows_by_document = {}
    for row in rows:
        if len(row["documents"]) == 1:
            rows_by_document.setdefault(row["documents"][0], []).append(row)
    return [
        {
            "data_type": "qa",
            "question": [extract_question(row) for row in rows_by_document[document]],
            "answers": [row["completion"][0]["content"] for row in rows_by_document[document]],
            "docs": [document],
        }
        for document in sorted(rows_by_document, key=lambda text: records.shuffle_key(seed, text))
    ]


def attach_candidates(row: dict, ranked: Iterable[str], count: int, seed: int) -> dict:
    """A row of stages 2 and 3 with `count` documents, in a seeded order: its own, and the first others of `ranked` that
    do not answer its question."""
    gold, is_answer = list(dict.fromkeys(row["documents"])), answer_matcher(row)
    distractors = (text for text in ranked if text not in gold and not is_answer(text))
    docs = gold + list(islice(distractors, max(0, count - len(gold))))
    docs.sort(key=lambda text: records.shuffle_key(seed, row["id"] + text))
    return {
        "question": extract_question(row),
        "docs": docs,
        "gold_answer": row["gold"][0],
        "answer": row["completion"][0]["content"],
        "golden_answers": row["gold"],
        "pos_index": [n for n, text in enumerate(docs) if text in gold],
        "group": row["group"],
    }


def answer_matcher(row: dict) -> Callable[[str], bool]:
    """A predicate: whether a passage answers a row's question like the row's own documents, as the passage on B does
    for the border of A with B. It must contain the answer, and all words of the question that these documents contain.

    DPR (arXiv 2004.04906) drops every passage that contains the answer. Then only the right passage would contain "no"
    or "unicameral", and a model could learn that instead of reading the question.
    """
    answer = re.compile(rf"(?<!\w){re.escape(row['gold'][0])}(?!\w)", re.IGNORECASE)
    stems = {*retrieval.stem_words(extract_question(row))} & {
        word for text in row["documents"] for word in retrieval.stem_words(text)
    }
    return lambda text: bool(answer.search(text)) and stems <= {*retrieval.stem_words(text)}
