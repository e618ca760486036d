"""Scores of short answers, and intervals for them.

Token F1 and exact match follow SQuAD (arXiv 1606.05250): lower case, no punctuation, no English articles, best over
the accepted answers. Changed here: numbers are kept whole (1,234.5 is one token, equal to 1234.5), the same characters
in another encoding are equal (`fold` of lib/data/words.py), and scripts without spaces are compared by character.
"""

from collections import Counter

from lib.data import words

# A comma only between thousands, since 1,2 is two numbers; a minus only where it is no hyphen, as in 3-5.
NUMBER = r"(?:(?<![\w.)%])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)*)"
LETTER = rf"[[\p{{L}}\p{{N}}]--\d--{words.SPACELESS}]"
TOKEN = rf"{NUMBER}|{words.SPACELESS}{words.MARK}*|{LETTER}(?:{LETTER}|{words.MARK})*"
ARTICLES = {"a", "an", "the"}
# In a two-sided sign test, five groups that all point one way have p = 0.06, and six have p = 0.03. With fewer than
# six, neither a bootstrap nor a variance can see the groups that might have pointed the other way.
LEAST_GROUPS = 6
NOISE, TOO_FEW = "within noise", "too few"
Z = 1.959964  # the normal distribution's 97.5th percentile
DESCRIPTION = (
    "Brackets: 95 % interval over groups of examples, such as the questions about one country; Wilson's for shares, "
    "the bootstrap's for other figures, and none where it has no limits"
)


def tokenise(text: str) -> list[str]:
    found = words.find_all(TOKEN, words.fold(text).replace("−", "-"))
    tokens = (token.replace(",", "") if token[-1].isdigit() else token for token in found)
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


def interval(values, seed: int = 0, groups=None, bounds=(0, 1), resamples: int = 10_000) -> dict:
    """{mean, low, high, n, groups}: the mean and its 95 % interval.

    `groups` names the group of each row; by default every row is its own. The rows of a group hang together, as the
    questions about one country do, so whole groups are drawn (arXiv 2411.00640, section 2.2). A share, whose values are
    all 0 or 1, has Wilson's interval for its effective number of rows, which Franco et al. (J. Surv. Stat. Methodol. 7,
    2019) found to cover best in clustered samples. Other means have the percentile bootstrap over groups (Field and
    Welsh, J. R. Stat. Soc. B 69, 2007).

    Equal values show no spread. Then as large a share of the groups as Wilson's interval allows for what was never seen
    may lie at either of the `bounds`. Without bounds (None), low and high are None.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    sums, sizes = sum_groups(values, groups)
    mean, low, high = float(np.mean(values)), None, None
    if bounds == (0, 1) and np.isin(values, bounds).all():
        low, high = wilson(mean, count_effective(sums, sizes))
    elif varies(values, sizes):
        low, high = resampled_interval(sums, sizes, seed, resamples)
    elif bounds:
        unseen = wilson(0, count_kish(sizes))[1]
        low, high = (mean + unseen * (bound - mean) for bound in bounds)
    return {"mean": mean, "low": low, "high": high, "n": len(values), "groups": len(sizes)}


def ratio(ours, theirs, seed: int = 0, groups=None) -> dict | None:
    """{mean, low, high, n, groups}: the ratio of two means over the same rows and its interval; None when theirs is 0.

    low and high are None if nothing varies, or if theirs is 0 in a resample: such a ratio has no upper limit.
    """
    import numpy as np

    if not np.mean(theirs):
        return None
    our_sums, sizes = sum_groups(ours, groups)
    their_sums, _ = sum_groups(theirs, groups)
    low, high = None, None
    if varies(ours, sizes) or varies(theirs, sizes):
        low, high = resampled_interval(our_sums, their_sums, seed)
    mean = float(np.mean(ours) / np.mean(theirs))
    return {"mean": mean, "low": low, "high": high, "n": len(ours), "groups": len(sizes)}


def sum_groups(values, groups=None) -> tuple:
    """(the sum, the number of rows) of each group, in the order of their first rows; float64 [groups]."""
    import numpy as np

    groups = range(len(values)) if groups is None else groups
    numbers = {name: n for n, name in enumerate(dict.fromkeys(groups))}
    members = [numbers[name] for name in groups]
    return np.bincount(members, weights=values), np.bincount(members).astype(np.float64)


def varies(values, sizes) -> bool:
    """Whether several groups show a spread."""
    return len(sizes) > 1 and len({*values}) > 1


def resampled_interval(numerators, denominators, seed: int, resamples: int = 10_000) -> tuple:
    """(low, high) of the quotient of two sums over groups drawn with replacement; (None, None) if one divides by 0."""
    import numpy as np

    rng, quotients = np.random.default_rng(seed), []
    for _ in range(resamples // 1000):
        indices = rng.integers(0, len(numerators), (1000, len(numerators)))
        totals = denominators[indices].sum(1)
        if not totals.all():
            return None, None
        quotients.append(numerators[indices].sum(1) / totals)
    low, high = np.percentile(np.concatenate(quotients), [2.5, 97.5])
    return float(low), float(high)


def wilson(share: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of n independent rows (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    centre, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    half = Z * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))


def count_effective(sums, sizes) -> float:
    """How many independent rows tell as much about a share as these groups: their rows divided by the design effect,
    the variance between groups relative to that of as many independent rows. Where the variance shows nothing, since
    all rows are equal or the groups are few, a group counts as one row."""
    rows, groups = sizes.sum(), len(sizes)
    share = sums.sum() / rows
    if share in (0, 1) or groups < LEAST_GROUPS:
        return count_kish(sizes)
    between = ((sums - share * sizes) ** 2).sum() * groups / (groups - 1)
    independent = rows * share * (1 - share) * rows / (rows - 1)
    return float(rows / max(1, between / independent))


def count_kish(sizes) -> float:
    """The effective number of groups of unequal sizes, if the rows of each are alike (Kish, Survey Sampling, 1965)."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def spread(values) -> dict[str, float]:
    """{median, min, max, n} of repeated measurements."""
    import statistics

    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def compare_paired(ours: dict, theirs: dict, score: str, seed: int) -> dict:
    """The mean of the differences row by row, its interval, and the verdict that it supports. A row's `group` may be
    missing from either side."""
    names = sorted(ours)
    gaps = [ours[name][score] - theirs[name][score] for name in names]
    groups = [ours[name].get("group") or theirs[name].get("group") or name for name in names]
    gap = interval(gaps, seed, groups, None if score == "nll" else (-1, 1))
    gap["differing"] = sum(value != 0 for value in gaps)
    gap["differing_groups"] = len({group for group, value in zip(groups, gaps) if value})
    better = gap["mean"] < 0 if score == "nll" else gap["mean"] > 0
    certain = gap["differing_groups"] >= LEAST_GROUPS and excludes(gap, 0)
    verdict = ("better" if better else "worse") if certain else NOISE
    return gap | {"verdict": TOO_FEW if has_few_groups(gap) else verdict}


def excludes(estimate: dict, value: float) -> bool:
    """Whether an interval lies on one side of a value. One without limits, of equal values, is its mean."""
    low, high = (estimate["mean"] if estimate[key] is None else estimate[key] for key in ("low", "high"))
    return not low <= value <= high


def has_few_groups(estimate: dict) -> bool:
    """Whether there are too few groups for a verdict. Older estimates have only a number of rows."""
    return estimate.get("groups", estimate["n"]) < LEAST_GROUPS


def check_threshold(estimate: dict, least: float) -> str:
    """The verdict on a claim that a figure is at least so large."""
    if has_few_groups(estimate):
        return TOO_FEW
    if estimate["low"] is None:
        return NOISE
    return "reached" if estimate["low"] >= least else "not reached" if estimate["high"] < least else NOISE
