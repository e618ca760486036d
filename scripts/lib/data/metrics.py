"""Scores of short answers, and intervals for them.

Token F1 and exact match follow SQuAD (arXiv 1606.05250): lower case, no punctuation, no articles, best over
the accepted answers. Changed here: numbers are kept whole (1,234.5 is one token, equal to 1234.5) and
Chinese, Japanese and Korean text is compared by character, since it has no spaces.
"""

import re
import unicodedata
from collections import Counter

# A comma only between thousands, since 1,2 is two numbers; a minus only where it is no hyphen, as in 3-5.
NUMBER = r"(?:(?<![\w.)%])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)*)"
CJK = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
TOKEN = re.compile(rf"{NUMBER}|{CJK}|[^\W\d_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+")
ARTICLES = {"a", "an", "the"}
# In a two-sided sign test, five rows that all point one way have p = 0.06, and six have p = 0.03. With fewer than
# six, the bootstrap cannot see the rows that might have pointed the other way.
LEAST_DIFFERING = 6
NOISE = "within noise"


def tokenise(text: str) -> list[str]:
    normal = unicodedata.normalize("NFC", text.lower().replace("−", "-"))  # é is one character or two, by the keyboard
    tokens = (token.replace(",", "") if token[-1].isdigit() else token for token in TOKEN.findall(normal))
    return [token for token in tokens if token not in ARTICLES]


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of token precision and recall, 0 to 1. Two texts without tokens are equal."""
    answer_tokens, gold_tokens = tokenise(answer), tokenise(gold)
    if not answer_tokens or not gold_tokens:
        return float(answer_tokens == gold_tokens)
    common = sum((Counter(answer_tokens) & Counter(gold_tokens)).values())
    return 2 * common / (len(answer_tokens) + len(gold_tokens))


def exact(answer: str, gold: str) -> float:
    return float(tokenise(answer) == tokenise(gold))


def contained(answer: str, gold: str) -> float:
    """1.0 when the gold answer's tokens stand in the answer, one after the other."""
    answer_tokens, gold_tokens = tokenise(answer), tokenise(gold)
    if not gold_tokens:
        return float(not answer_tokens)
    return float(
        any(
            answer_tokens[n : n + len(gold_tokens)] == gold_tokens
            for n in range(len(answer_tokens) - len(gold_tokens) + 1)
        )
    )


def score_answer(answer: str, gold: list[str]) -> dict[str, float]:
    """Token F1, exact match and containment: the best over all accepted answers."""
    rules = {"token_f1": f1, "exact_match": exact, "contained": contained}
    return {name: max(rule(answer, reference) for reference in gold) for name, rule in rules.items()}


def interval(values, seed: int = 0, resamples: int = 10_000) -> dict[str, float]:
    """{mean, low, high, n}: the mean and its 95 % percentile bootstrap interval over rows (Efron 1979).

    For a paired comparison, pass the differences row by row.
    """
    import numpy as np

    low, high = np.percentile(resampled_means(values, seed, resamples), [2.5, 97.5])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high), "n": len(values)}


def ratio(ours, theirs, seed: int = 0) -> dict[str, float] | None:
    """{mean, low, high, n}: the ratio of two means over the same rows, and its interval; None when theirs is 0."""
    import numpy as np

    if not np.mean(theirs):
        return None
    numerators, denominators = resampled_means(np.stack([ours, theirs], 1), seed).T
    low, high = np.percentile(numerators / np.maximum(denominators, 1e-9), [2.5, 97.5])
    return {"mean": float(np.mean(ours) / np.mean(theirs)), "low": float(low), "high": float(high), "n": len(ours)}


def resampled_means(values, seed: int, resamples: int = 10_000):
    """Means of rows drawn with replacement; float64 [resamples, …] of values [rows, …]."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(values), (1000, len(values))) for _ in range(resamples // 1000))
    return np.concatenate([values[indices].mean(1) for indices in draws])


def spread(values) -> dict[str, float]:
    """{median, min, max, n} of repeated measurements."""
    import statistics

    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def compare_paired(ours: dict, theirs: dict, score: str, seed: int) -> dict:
    """The mean of the differences row by row, its interval, and the verdict that it supports."""
    gaps = [ours[name][score] - theirs[name][score] for name in sorted(ours)]
    difference = interval(gaps, seed) | {"differing": sum(gap != 0 for gap in gaps)}
    certain = difference["differing"] >= LEAST_DIFFERING and not difference["low"] <= 0 <= difference["high"]
    better = difference["mean"] < 0 if score == "nll" else difference["mean"] > 0
    return difference | {"verdict": ("better" if better else "worse") if certain else NOISE}
