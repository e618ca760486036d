"""Scores against cases worked out by hand after the definition of SQuAD (arXiv 1606.05250)."""

import random
import statistics

import pytest

from lib.data import metrics


@pytest.mark.parametrize(
    ("answer", "gold", "f1", "exact"),
    [
        ("Lima", "Lima", 1, 1),
        ("The Lima.", "lima", 1, 1),  # case, article, punctuation
        ("It is Lima", "Lima", 2 * (1 / 3) * 1 / (1 / 3 + 1), 0),  # precision 1/3, recall 1
        ("Lima", "Lima and Callao", 2 * 1 * (1 / 3) / (1 + 1 / 3), 0),
        ("the cat sat on the mat", "a cat on a mat", 2 * (3 / 4) * 1 / (3 / 4 + 1), 0),
        ("Lima Lima Lima", "Lima", 2 * (1 / 3) * 1 / (1 / 3 + 1), 0),  # repeats count once
        ("Lima Lima", "Lima Lima", 1, 1),
        ("Callao Lima", "Lima Callao", 1, 0),  # F1 knows no order, exact match does
        ("Quito", "Lima", 0, 0),
        ("", "Lima", 0, 0),
        ("Lima", "", 0, 0),
        ("", "", 1, 1),
        ("the", "a", 1, 1),
        ("northern Peru-Chile border", "Peru Chile", 2 * (2 / 4) * 1 / (2 / 4 + 1), 0),
        ("1,234.5 km", "1234.5 km", 1, 1),
        ("1,234,567", "1234567", 1, 1),
        ("3.14", "3", 0, 0),
        ("3.14", "314", 0, 0),
        ("1,2", "12", 0, 0),  # two numbers, not one
        ("in 2019.", "2019", 2 * (1 / 2) * 1 / (1 / 2 + 1), 0),
        ("It has 1,234.", "1234", 2 * (1 / 3) * 1 / (1 / 3 + 1), 0),
        ("12%", "12", 1, 1),
        ("北京市", "北京", 2 * (2 / 3) * 1 / (2 / 3 + 1), 0),  # by character
        ("東京", "京都", 1 / 2, 0),
        ("서울", "서울", 1, 1),
        ("Zürich", "Zu\u0308rich", 1, 1),  # the same letter in two encodings
        ("São Tomé", "Sao Tome", 0, 0),
        ("Москва", "москва!", 1, 1),
        ("का", "की", 0, 0),  # differ in a vowel sign
        ("বই পড়া", "বই পড়ি", 1 / 2, 0),
        ("กาแฟ", "กาแฟ", 1, 1),
        ("ไม้", "ไม่", 1 / 2, 0),  # by character, with the marks on it
        ("İstanbul", "İstanbul".lower(), 1, 1),
        ("İstanbul", "istanbul", 1, 1),
        ("Straße", "STRASSE", 1, 1),
        ("ΟΔΟΣ", "οδος", 1, 1),
        ("１，２３４ ｋｍ", "1234 km", 1, 1),
        ("१२", "12", 1, 1),
        ("१२", "१३", 0, 0),
        ("ﾄｳｷｮｳ", "トウキョウ", 1, 1),
        ("\u1112\u1161\u11ab", "한", 1, 1),
        ("co\u00adoperate", "cooperate", 1, 1),  # a soft hyphen
        ("Java™", "Java", 1, 1),
        ("10² m", "102 m", 2 / 5, 0),
    ],
)
def test_reference_values(answer, gold, f1, exact):
    assert metrics.f1(answer, gold) == pytest.approx(f1, abs=1e-12)
    assert metrics.f1(gold, answer) == pytest.approx(f1, abs=1e-12), "F1 is symmetric"
    assert metrics.exact(answer, gold) == exact


@pytest.mark.parametrize(
    ("answer", "gold", "found"),
    [
        ("The capital is Lima, in Peru.", "Lima", 1),
        ("The capital is Lima", "the Lima", 1),
        ("New and York", "New York", 0),  # one after the other
        ("Limassol", "Lima", 0),  # whole words
        ("in 2019", "201", 0),
        ("about 1,234 km", "1234", 1),
        ("", "Lima", 0),
        ("whatever", "!!", 0),
        ("", "!!", 1),
    ],
)
def test_contained_is_a_run_of_whole_tokens(answer, gold, found):
    assert metrics.contained(answer, gold) == found


def test_the_best_accepted_answer_counts_for_each_score_apart():
    assert metrics.score_answer("Lima Peru", ["Lima", "Peru Lima"]) == {
        "token_f1": 1.0, "exact_match": 0.0, "contained": 1.0,
    }  # fmt: skip


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    """Of 200 samples of 60 coin throws, about 190 intervals must hold the true mean; 0.5 % chance of < 180."""
    rng = random.Random(0)
    held = 0
    for seed in range(200):
        found = metrics.interval([rng.random() < 0.3 for _ in range(60)], seed, resamples=1000)
        assert found["low"] <= found["mean"] <= found["high"] and found["n"] == 60
        held += found["low"] <= 0.3 <= found["high"]
    assert 178 <= held <= 198


def test_a_ratio_of_means_is_paired_and_has_none_where_nothing_is_below():
    theirs = [random.Random(n).random() for n in range(300)]
    ours = [2 * value for value in theirs]
    found = metrics.ratio(ours, theirs)  # the same rows on both sides: no uncertainty is left
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([2, 2, 2]) and found["n"] == 300
    others = metrics.ratio(ours[::-1], theirs)
    assert others["mean"] == pytest.approx(2) and others["low"] < 2 < others["high"]
    assert metrics.ratio([1.0, 0.0], [0.0, 0.0]) is None


def test_an_interval_shrinks_with_the_root_of_n_and_is_that_of_the_normal_law():
    rng = random.Random(1)
    values = [rng.gauss(5, 2) for _ in range(1600)]
    widths = {}
    for n in (100, 400, 1600):
        found = metrics.interval(values[:n])
        widths[n] = found["high"] - found["low"]
        expected = 2 * 1.96 * statistics.pstdev(values[:n]) / n**0.5
        assert widths[n] == pytest.approx(expected, rel=0.05)
    assert 1.7 < widths[100] / widths[400] < 2.4 and 1.7 < widths[400] / widths[1600] < 2.4


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(100, 100, 0.963, 1), (0, 100, 0, 0.037), (1, 1, 0.207, 1), (0, 1, 0, 0.793), (81, 263, 0.255, 0.366)],
)
def test_a_share_has_the_interval_of_wilson(right, of, low, high):
    """81 of 263 is the worked example of Newcombe (Stat. Med. 17, 1998), the others are n / (n + z²)."""
    found = metrics.interval([1.0] * right + [0.0] * (of - right))
    assert found["mean"] == right / of
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=6e-4)


def test_equal_values_leave_room_for_what_was_not_seen():
    for count in (1, 10):
        found = metrics.interval([0.25] * count)
        unseen = metrics.wilson(0, count)[1]
        assert [found["low"], found["high"]] == pytest.approx([0.25 - 0.25 * unseen, 0.25 + 0.75 * unseen])
        assert metrics.interval([0.25] * count, bounds=None)["high"] is None  # of a likelihood nothing is known


def test_equal_rows_of_a_group_count_as_one():
    """Ten countries with ten questions each, and all answers about a country alike: it is as if one were asked."""
    one = [random.Random(n).random() for n in range(10)]
    groups = [f"country {n // 10}" for n in range(100)]
    many = [one[n // 10] for n in range(100)]
    for made in (lambda x: x, lambda x: float(x < 0.5), lambda x: 1.0):  # a score, a share, a share without a miss
        alone = metrics.interval([made(x) for x in one], 1)
        found = metrics.interval([made(x) for x in many], 1, groups)
        assert found["n"] == 100 and found["groups"] == 10
        assert [found[key] for key in ("mean", "low", "high")] == pytest.approx(
            [alone[key] for key in ("mean", "low", "high")], abs=0.03
        )


def test_an_interval_of_groups_covers_the_true_mean_as_often_as_it_says():
    """40 groups of 5 rows that share most of their luck. Row by row, about 130 of 200 intervals would hold the mean."""
    rng = random.Random(3)
    groups = [n // 5 for n in range(200)]
    for is_share in (False, True):
        held = 0
        for seed in range(200):
            luck = [rng.gauss(0, 1) for _ in range(40)]
            values = [luck[group] + rng.gauss(0, 0.3) for group in groups]
            values = [float(value > 0) for value in values] if is_share else values
            found = metrics.interval(values, seed, groups, (0, 1) if is_share else None, 1000)
            held += found["low"] <= (0.5 if is_share else 0) <= found["high"]
        assert 176 <= held <= 199


def test_groups_are_drawn_whole_in_differences_and_ratios():
    rng = random.Random(5)
    groups = [f"country {n // 10}" for n in range(200)]
    luck = {group: rng.random() for group in groups}
    ours = {n: {"token_f1": luck[group], "group": group} for n, group in enumerate(groups)}
    theirs = {n: {"token_f1": 0.5} for n in ours}
    together = metrics.compare_paired(ours, theirs, "token_f1", 0)
    apart = metrics.compare_paired({n: row | {"group": n} for n, row in ours.items()}, theirs, "token_f1", 0)
    assert together["mean"] == apart["mean"] and (together["groups"], apart["groups"]) == (20, 200)
    assert together["high"] - together["low"] > 2.5 * (apart["high"] - apart["low"])
    values, ones = [luck[group] for group in groups], [1.0 + n % 2 for n in range(200)]
    together, apart = metrics.ratio(values, ones, 0, groups), metrics.ratio(values, ones)
    assert together["mean"] == apart["mean"]
    assert together["high"] - together["low"] > 2.5 * (apart["high"] - apart["low"])


def test_rows_of_few_groups_bear_no_verdict():
    """A hundred rows about five countries are five observations."""
    for countries, verdict in ((5, metrics.TOO_FEW), (6, "better")):
        ours = {n: {"token_f1": 0.5 + n / 1000, "group": str(n % countries)} for n in range(100)}
        theirs = {n: {"token_f1": 0.0} for n in ours}
        assert metrics.compare_paired(ours, theirs, "token_f1", 0)["verdict"] == verdict
    ours = {n: {"token_f1": float(n % 20 < 5), "group": str(n % 20)} for n in range(100)}
    assert metrics.compare_paired(ours, theirs, "token_f1", 0)["verdict"] == metrics.NOISE  # five of twenty differ


def test_a_ratio_to_what_may_be_zero_has_no_interval():
    found = metrics.ratio([1.0] * 30, [1.0] + [0.0] * 29)
    assert found["mean"] == 30 and found["low"] is found["high"] is None
    assert metrics.ratio([1.0], [0.5])["low"] is None  # of one row
    assert metrics.check_threshold(found, 2) == metrics.NOISE
    assert metrics.check_threshold(metrics.ratio([1.0, 0.9], [0.5, 0.4]), 2) == metrics.TOO_FEW


def test_an_interval_is_the_same_twice():
    assert metrics.interval([0, 1, 1, 0, 1], 3) == metrics.interval([0, 1, 1, 0, 1], 3)


def test_spread_is_of_all_values():
    assert metrics.spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "min": 1.0, "max": 10.0, "n": 4}


def test_a_minus_is_part_of_a_number_and_a_hyphen_is_not():
    assert metrics.exact("-1.2%", "1.2%") == 0 and metrics.exact("−1.2 %", "-1.2%") == 1
    assert metrics.tokenise("3-5 and 1500-1,800") == ["3", "5", "and", "1500", "1800"]
    assert metrics.tokenise("(-86)") == ["-86"]
