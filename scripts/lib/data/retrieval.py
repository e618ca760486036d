"""Plain retrievers: which of a list of passages a question is about.

`bm25`: words in common, the rarer the more (Robertson and Zaragoza 2009, in Lucene's form: arXiv 2407.03618).
`minilm`: the cosine of question and passage by all-MiniLM-L6-v2 (bundled).
"""

from collections.abc import Callable, Iterator

from lib.data import embedding, metrics

RETRIEVERS = ("bm25", "minilm")


def open_retriever(name: str, passages: list[str]) -> Callable:
    """A function (questions, k) -> indices of passages, best first, int64 [questions, k]; k is at most their number.

    Passages with equal scores stay in their order.
    """
    import numpy as np

    scores = {"bm25": scores_by_words, "minilm": scores_by_embedding}[name](passages)
    return lambda questions, k: np.stack([np.argsort(-row, kind="stable")[:k] for row in scores(questions)])


def scores_by_words(passages: list[str]) -> Callable[[list[str]], Iterator]:
    import bm25s

    index = bm25s.BM25()
    # A text without words keeps its place; bm25s knows the empty word.
    index.index([stem_words(text) or [""] for text in passages], show_progress=False)
    return lambda questions: (
        index.get_scores_from_ids(index.get_tokens_ids(stem_words(question))) for question in questions
    )


def stem_words(text: str) -> list[str]:
    """The stems of a text's words, without stop words. Question words such as "what" and "how" stand in few passages:
    they would count for more than most names."""
    import Stemmer
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    stop_words = {*STOPWORDS_EN_PLUS}
    return Stemmer.Stemmer("english").stemWords([word for word in metrics.tokenise(text) if word not in stop_words])


def scores_by_embedding(passages: list[str]) -> Callable[[list[str]], Iterator]:
    embed = embedding.open_embedding()
    passage_vectors = embed(passages)
    return lambda questions: ((passage_vectors @ vector).numpy() for vector in embed(questions))


def recall(ranked, gold: list[list[int]], k: int) -> list[float]:
    """For each question the share of its gold passages among the first k of its list in `ranked`, which has k or more.

    With two gold passages, k = 1 finds half of them at most; CLaRa's authors count in the same way. A question without
    gold passages is an error.
    """
    return [len({*places[:k]} & {*relevant}) / len({*relevant}) for places, relevant in zip(ranked, gold)]
