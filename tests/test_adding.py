"""docs/adding.md: its examples are carried out in a copy of the project."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.pipeline.test_make import copy_of_the_project, make

PAGE = (REPOSITORY / "docs" / "adding.md").read_text(encoding="utf-8")
VALUES = ["ROOT=.smoke", "MODEL=tiny-random", "SOURCE=tests/data/capitals.jsonl"]


def block(before: str) -> str:
    """The first block of code after a piece of text."""
    return re.search(r"```\w+\n(.*?)```", PAGE[PAGE.index(before) :], re.S)[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return copy_of_the_project(tmp_path_factory.mktemp("added"))


def run(folder: Path, *words) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'scripts'}"}
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def shown(folder: Path, script: str, *words: str) -> str:
    """A script's help on one line."""
    return " ".join(run(folder, f"scripts/{script}.py", "--help", *words).stdout.split())


@pytest.mark.slow
def test_the_stage_is_made_listed_remembered_and_tested(copy):
    for name in ("scripts/count_words.py", "configs/count_words.yaml", "tests/test_count_words.py"):
        (copy / name).write_text(block(f"`{name}`:"), encoding="utf-8")
    with open(copy / "mk" / "variants.mk", "a") as rules:
        rules.write("\n" + block("At the end of `mk/variants.mk`"))
    assert "count the words of the data" in make(copy, "help").stdout
    assert "(default: validation; configs/count_words.yaml)" in shown(copy, "count_words")
    done = make(copy, "words", *VALUES)
    assert done.returncode == 0, done.stderr
    assert "count_words -> .smoke/reports/words-capitals: done in" in done.stderr
    words = json.loads((copy / ".smoke" / "reports" / "words-capitals" / "words.json").read_text())
    assert words["prompt"] > words["completion"] > 0
    assert make(copy, "words", *VALUES).stderr == ""
    assert "count_words" in make(copy, "-n", "words", *VALUES, "WORDS_FLAGS=--split test").stdout
    os.utime(copy / "configs" / "count_words.yaml")
    assert "count_words" in make(copy, "-n", "words", *VALUES).stdout
    run(copy, "-m", "pytest", "-q", "tests/test_count_words.py", "tests/test_rooms.py")


def test_the_format_is_read(copy, tmp_path):
    file = copy / "scripts" / "lib" / "data" / "records.py"
    rejected = '    else:\n        raise RowError(f"has the fields'
    code = file.read_text(encoding="utf-8")
    assert code.count(rejected) == 1
    file.write_text(code.replace(rejected, block("before the `else` that rejects a row") + rejected), encoding="utf-8")
    rows = [{"query": f"How many legs have {n} cows?", "reply": str(4 * n)} for n in range(1, 20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(copy, "scripts/generate_data.py", "--source", tmp_path / "rows.jsonl", "--output", tmp_path / "data")
    row = json.loads((tmp_path / "data" / "train.jsonl").read_text().splitlines()[0])
    assert row["prompt"][0]["content"].startswith("How many legs") and row["gold"] == [row["completion"][0]["content"]]


def test_the_profile_is_found_and_shown(copy):
    (copy / "configs" / "profiles" / "l4.yaml").write_text(block("`configs/profiles/l4.yaml`:"))
    file = copy / "scripts" / "lib" / "core" / "hardware.py"
    first = "PROFILES = (\n"
    file.write_text(file.read_text().replace(first, first + block("One entry of `PROFILES`")))
    assert "(default: 8; configs/profiles/l4.yaml)" in shown(copy, "sft", "--profile", "l4")
    gpu = "hardware.GPU('NVIDIA L4', (8, 9), 24 * 10**9)"
    code = f"from lib.core import hardware\nwith hardware.simulate({gpu}): print(hardware.recognise_profile()[0])"
    assert run(copy, "-c", code).stdout == "l4\n"


def test_the_family_is_the_one_in_the_table():
    entry = block("Mistral's entry, for example, is")
    assert entry in (REPOSITORY / "scripts" / "lib" / "gguf" / "families.py").read_text(encoding="utf-8")
