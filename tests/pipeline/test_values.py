"""Hostile and unusual values of Make variables, and makes that are stopped or run twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lib.core import artifact
from tests.conftest import REPOSITORY, WARM_PYTHON, warm
from tests.pipeline.test_make import copy_of_the_project, make

VARIABLES = re.findall(r"(\w+)", make(REPOSITORY, "help").stdout.rpartition("mk/*.mk:")[2])
PATHS = ("MODEL", "SOURCE", "ALIGN_DATA", "CLARA_AGAINST", "TO", "MIRROR_TO", "MIRROR_FROM")
HOSTILE = ["$(shell touch CANARY)x", "`touch CANARY`", '"; touch CANARY; "', "'; touch CANARY; '", "$$(touch CANARY)"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_of_the_project(tmp_path_factory.mktemp("project"))


def test_no_value_is_run(project):
    assert len(VARIABLES) > 40 and {"SOURCE", "SFT_FLAGS", "TO", "V"} <= {*VARIABLES}
    for name in VARIABLES:  # one by one, since a value that is refused would keep the others from being read
        make(project, "help", f"{name}={HOSTILE[0]}")
        assert not (project / "CANARY").exists(), name


@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_is_run_by_a_recipe(project, value):
    accepted = [name for name in VARIABLES if name in PATHS or name.endswith("FLAGS")]
    words = [f"{name}={value}" for name in accepted] + ["DATA_NAME=rows", "MODEL_NAME=model"]
    goals = ("-n all align clara", "-n export-zip", "data", "clean") if value.startswith("'") else ("data",)
    for goal in goals:
        make(project, *goal.split(), *words)
        assert not (project / "CANARY").exists(), goal


@pytest.mark.parametrize("url", ["http://user:s3cr3t@127.0.0.1:9/v1", "https://127.0.0.1:9/v1?api_key=s3cr3t"])
def test_a_password_in_a_url_is_refused_before_it_is_stored(project, url):
    for name, value in (("MAGPIE_FLAGS", f"--engine openai --base-url {url}"), ("SOURCE", url), ("MODEL_NAME", url)):
        done = make(project, "align", "MODEL=tiny-random", f"{name}={value}")
        assert (
            done.returncode == 2
            and f"{name}: contains a URL with an @" in done.stderr
            and "--api-key-env" in done.stderr
        )
        assert "s3cr3t" not in done.stdout + done.stderr
    assert subprocess.run(["grep", "-rl", "s3cr3t", project / ".make"], capture_output=True).stdout == b""
    flags = "--base-url http://127.0.0.1:9/v1"
    done = make(project, "-n", "align", "MODEL=tiny-random", f"MAGPIE_FLAGS={flags} --system a@b")
    assert done.returncode == 0 and flags in done.stdout


@pytest.mark.parametrize(
    "name", ["rows-2026-11-28T10:00.jsonl", "rows (1).jsonl", "it's.jsonl", "a;b.jsonl", "50%.jsonl", "a$b#c&d.jsonl"]
)
def test_a_file_may_have_any_name(project, name):
    (project / name).write_bytes((REPOSITORY / "tests" / "data" / "capitals.jsonl").read_bytes())
    done = make(project, "data", f"SOURCE={name}")
    assert done.returncode == 0, done.stderr
    (output,) = re.findall(r"generate_data -> (\S+): done", done.stderr)
    assert re.fullmatch(r"data/[\w-]+/raw", output)
    assert artifact.read(project / output)["arguments"]["source"] == name
    again = make(project, "data", f"DATA_NAME={Path(output).parent.name}")  # the file's name is remembered
    assert again.returncode == 0 and "Nothing to be done" in again.stdout, again.stderr


def test_a_bad_value_is_refused_with_a_sentence(project):
    def refusal(*words):
        done = make(project, "-n", "all", *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "SAMPLES=8;x: must not contain ;" in refusal("SAMPLES=8;x")
    assert "SOURCE must be one line" in refusal("SOURCE=a\nb")
    assert "SFT_FLAGS: a quote is not closed" in refusal("SFT_FLAGS=--lora-targets 'q_proj")
    assert "SAMPELS: no variable of this Makefile" in refusal("SAMPELS=8")
    assert "must not contain /" in refusal("DATA_NAME=a/b")


def test_flags_are_split_as_by_a_shell(project):
    printed = make(
        project, "-n", "lora", """SFT_FLAGS=--run-dir "my runs" --lora-targets 'q_proj;$x' --lora-r 4"""
    ).stdout
    assert """--run-dir 'my runs' --lora-targets 'q_proj;$x' --lora-r 4""" in re.sub(r"\\\n\s*", "", printed)


def test_a_variable_of_the_environment_is_not_used_and_named(project):
    environment = os.environ | warm() | {"SEED": "7", "MODEL": "$(shell touch CANARY)", "PYTHON": "/nowhere"}
    done = subprocess.run(["make", "-n", "all"], cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "--seed 42" in done.stdout and "/nowhere" not in done.stdout
    assert "SEED in the environment is not used; give it on the command line: make all SEED=" in done.stderr
    assert not (project / "CANARY").exists()


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A copy whose next `make lora` trains for long, and the words of that command."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("training"))
    words = ["ROOT=.long", "MODEL=tiny-random", "SOURCE=tests/data/capitals.jsonl", "SAMPLES=40", "EPOCHS=100"]
    words += ["SFT_FLAGS=--checkpoint-steps 5"]
    assert make(folder, "base", "data", *words).returncode == 0
    return folder, words


def start_training(folder: Path, words: list[str]) -> subprocess.Popen:
    command = ["make", "lora", *words, f"PYTHON={WARM_PYTHON}"]
    process = subprocess.Popen(command, cwd=folder, env=os.environ | warm(), stderr=subprocess.PIPE, text=True)
    steps = count_steps(folder)
    while count_steps(folder) < steps + 6:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def count_steps(folder: Path) -> int:
    log = folder / ".long" / "runs" / "sft-tiny-random" / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_make_alone_ends_the_training_which_keeps_its_work(training, number):
    folder, words = training
    process = start_training(folder, words)
    process.send_signal(number)
    process.wait(20)
    assert process.returncode != 0
    deadline = time.time() + 10
    while is_locked(folder) and time.time() < deadline:
        time.sleep(0.05)
    assert not is_locked(folder)  # the stage inherits the lock, so it has ended
    assert "progress is saved" in process.stderr.read()


def is_locked(folder: Path) -> bool:
    return subprocess.run(["flock", "-n", folder / ".long/.make/lock", "true"]).returncode != 0


def test_two_makes_at_once_train_once(training):
    folder, words = training
    words = [word.replace("EPOCHS=100", "EPOCHS=20") for word in words]
    shutil.rmtree(folder / ".long" / "runs", ignore_errors=True)
    first = start_training(folder, words)
    second = make(folder, "lora", *words)
    assert first.wait(100) == 0 and second.returncode == 0
    assert "sft -> .long/models/tiny-random-lora: waiting for another make in this directory: " in second.stderr
    assert re.search(r"sft -> \S+, process \d+, since \d\d:\d\d:\d\d", second.stderr)
    assert "sft -> .long/models/tiny-random-lora: up to date" in second.stderr
    assert json.loads((folder / ".long/models/tiny-random-lora/metadata.json").read_text())["kind"] == "adapter"


@pytest.mark.parametrize("goal", ["smoke", "align-smoke"])
def test_a_smoke_run_leaves_the_mirror_alone(project, goal):
    printed = make(project, "-n", goal, "MIRROR_TO=drive", "MIRROR_FROM=drive").stdout
    assert "sft.py" in printed and "mirror.py" not in printed
