"""BM25 against its formula, MiniLM on real sentences, recall by hand."""

import math
import random

import numpy as np
import pytest

from lib.data import retrieval

PASSAGES = [
    "Peru, cities. Capital: Lima. Population: 1,234.5 thousand.",
    "Chile, cities. Capital: Santiago. Largest port: Valparaíso.",
    "",
    "Peru, nature. Highest point: Huascarán. The river that is longest in Peru, Peru says: Ucayali.",
    "¿…?",
    "日本の首都は東京です",
    "Chile, cities. Capital: Santiago. Largest port: Valparaíso.",
]


def by_formula(passages: list[str], question: str, k1=1.5, b=0.75) -> list[float]:
    """BM25 as Lucene computes it, word by word."""
    texts = [retrieval.stem_words(passage) for passage in passages]
    mean = sum(len(text) or 1 for text in texts) / len(texts)  # an empty text counts as one empty word
    scores = []
    for text in texts:
        score = 0.0
        for word in retrieval.stem_words(question):
            holders, times = sum(word in other for other in texts), text.count(word)
            idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            score += idf * times / (times + k1 * (1 - b + b * (len(text) or 1) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize(
    "question",
    [
        "What is the capital of Peru?",
        "Peru Peru Chile",
        "1234.5",
        "東京",
        "Where is Ucayali in Chile?",
        "zebra",
        "",
        "?",
    ],
)
def test_bm25_is_its_formula_and_ties_stay_in_order(question):
    (found,) = retrieval.open_retriever("bm25", PASSAGES)([question], 99)
    scores = by_formula(PASSAGES, question)
    assert sorted(found) == list(range(len(PASSAGES)))
    assert [scores[n] for n in found] == pytest.approx(sorted(scores, reverse=True))
    assert found.tolist().index(1) < found.tolist().index(6), "equal passages: the first comes first"
    if not any(scores):
        assert found.tolist() == list(range(len(PASSAGES)))


def test_bm25_of_many_questions_is_that_of_each():
    draw = random.Random(0)
    passages = [" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(0, 9))) for _ in range(50)]
    questions = [" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=3)) for _ in range(20)]
    rank = retrieval.open_retriever("bm25", passages)
    together = rank(questions, 7)
    assert together.shape == (20, 7)
    assert np.array_equal(together, np.concatenate([rank([question], 7) for question in questions]))


def test_words_are_found_in_their_other_forms_and_numbers_whole():
    assert retrieval.stem_words("How long are the borders of Peru?") == retrieval.stem_words("Long, the BORDERED Peru")
    assert retrieval.stem_words("1,234.5 km") == retrieval.stem_words("1234.5 km") == ["1234.5", "km"]


def test_recall_is_the_share_of_the_gold_passages():
    ranked = np.array([[2, 0, 1, 3], [3, 1, 0, 2]])
    assert [retrieval.recall(ranked, [[0, 1], [3]], k) for k in (1, 2, 3)] == [[0, 1], [0.5, 1], [1, 1]]
    assert retrieval.recall(ranked, [[2, 2], [2, 0]], 3) == [1, 0.5]


@pytest.mark.slow
def test_minilm_finds_what_is_meant_in_other_words():
    passages = [
        "The harbour froze in January, and no ship left it for six weeks.",
        "Bake the loaf for forty minutes, until its crust is brown.",
        "Interest rates rose again, so that mortgages became dearer.",
    ]
    questions = ["How long does bread stay in the oven?", "Why do home loans cost more?", "When could boats not sail?"]
    assert retrieval.open_retriever("minilm", passages)(questions, 2)[:, 0].tolist() == [1, 2, 0]
