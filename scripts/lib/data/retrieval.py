"""Plain retrievers: which of a list of passages a question is about.

`bm25`: words in common, the rarer the more (Robertson and Zaragoza 2009, in Lucene's form: arXiv 2407.03618).
`minilm`: the cosine of question and passage by all-MiniLM-L6-v2 (bundled).
"""

from collections.abc import Callable, Iterator

from lib.data import embedding, metrics

RETRIEVERS = ("bm25", "minilm")


def open_retriever(name: str, passages: list[str]) -> Callable:
    """A function (questions, k) -> indices of passages, best first, int64 [questions, k]; k is cut to their number.

    Of passages with equal scores the first comes first.
    """
    import numpy as np

    scores = {"bm25": scores_by_words, "minilm": scores_by_embedding}[name](passages)
    return lambda questions, k: np.stack([np.argsort(-one, kind="stable")[:k] for one in scores(questions)])


def scores_by_words(passages: list[str]) -> Callable[[list[str]], Iterator]:
    import bm25s

    index = bm25s.BM25()
    # A text without words keeps its place; bm25s knows the empty word.
    index.index([stem_words(text) or [""] for text in passages], show_progress=False)
    return lambda questions: (
        index.get_scores_from_ids(index.get_tokens_ids(stem_words(question))) for question in questions
    )


def stem_words(text: str) -> list[str]:
    """The stems of a text's words. Those that a question is framed in, as "what" and "how", stand in few passages: they
    would count for more than most names."""
    import Stemmer
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    frame = {*STOPWORDS_EN_PLUS}
    return Stemmer.Stemmer("english").stemWords([one for one in metrics.tokenise(text) if one not in frame])


def scores_by_embedding(passages: list[str]) -> Callable[[list[str]], Iterator]:
    embed = embedding.open_embedding()
    known = embed(passages)
    return lambda questions: ((known @ one).numpy() for one in embed(questions))


def recall(ranked, gold: list[list[int]], k: int) -> list[float]:
    """For each question the share of its gold passages among the first k of `ranked`, its list of k or more.

    Of two gold ones, k = 1 can find half: so count CLaRa's authors, too. A question without any is an error.
    """
    return [len({*places[:k]} & {*right}) / len({*right}) for places, right in zip(ranked, gold)]
