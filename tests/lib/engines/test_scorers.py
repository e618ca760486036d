"""The bundled embedding on real sentences; reward models are tested through filter_data.py."""

from collections import Counter

import pytest

from lib.data import embedding, records
from lib.engines import scorers
from lib.model import tiny
from tests.test_filter_data import PASSING


@pytest.mark.slow
def test_an_embedding_tells_an_answer_from_one_to_another_question():
    score = scorers.open_scorer("embedding")
    rows = [{"prompt": records.message("user", asked), "documents": []} for asked, _ in PASSING]
    answers = [answer for _, answer in PASSING]
    own, others = score(rows, answers), score(rows, answers[1:] + answers[:1])
    assert sum(a > b for a, b in zip(own, others)) >= len(PASSING) - 1
    assert score(rows, [asked for asked, _ in PASSING]) == pytest.approx([1.0] * len(PASSING), abs=1e-5)
    assert score(rows[3:4], answers[3:4]) == pytest.approx(own[3:4], abs=1e-5), "batches change nothing"


LONG = "The canal carries ships, ore and grain between the two seas. " * 60
QUESTION = "Who wrote the opera about Figaro?"


def test_the_embedding_is_of_the_question_and_not_of_its_documents():
    row = records.normalise({"question": QUESTION, "documents": [LONG], "gold": ["Mozart"]}, Counter())
    assert scorers.write_instruction(row) == QUESTION
    earlier = records.message("user", LONG) + records.message("assistant", "I see.")
    assert scorers.write_instruction(row | {"prompt": earlier + row["prompt"]}).startswith(QUESTION)


def test_both_ends_of_a_long_text_are_embedded():
    tokenizer = tiny.tokenizer()
    cut = embedding.leave_out_middle(tokenizer, f"Read this first. {LONG}{QUESTION}")
    assert cut.startswith("Read this first.") and cut.endswith(QUESTION)
    assert len(tokenizer(cut)["input_ids"]) <= embedding.EMBEDDED_TOKENS
    assert embedding.leave_out_middle(tokenizer, QUESTION) == QUESTION


@pytest.mark.slow
def test_an_answer_to_the_question_after_long_documents_scores_higher_than_one_about_them():
    score = scorers.open_scorer("embedding")
    row = records.normalise({"question": QUESTION, "documents": [LONG], "gold": ["Mozart"]}, Counter())
    right, wrong = score(
        [row, row], ["Mozart wrote the opera about Figaro.", "The canal carries ships, ore and grain."]
    )
    assert right > wrong + 0.3
    apart = {"prompt": records.message("user", f"{LONG}\n\n{QUESTION}"), "documents": []}
    short = {"prompt": records.message("user", LONG), "documents": []}
    asked, unasked = score([apart, short], ["Mozart wrote the opera about Figaro."] * 2)
    assert asked > unasked + 0.1
