"""mk/kept.py by itself: the key of an artifact."""

import fcntl
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SPEC = importlib.util.spec_from_file_location("kept", REPOSITORY / "mk" / "kept.py")
kept = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kept)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project of one script, with an input and the values of a stage."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "scripts/stage.py": "pass", "scripts/lib/core/cli.py": "1", "configs/stage.yaml": "a: 1", "values": "SEED ?= 1",
        "configs/profiles/cpu.yaml": "b: 1", "configs/profiles/t4.yaml": "b: 1",
        ".make/imports.mk": "imports_other :=\nimports_stage := scripts/lib/core/cli.py\n",
        "models/in/metadata.json": json.dumps({"digest": "abc", "seconds": 1}), "rows.jsonl": "{}",
    }.items():  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    return tmp_path


def key(*more: str) -> str:
    command = [
        "python",
        "scripts/stage.py",
        "--model",
        "models/in",
        "--data",
        "rows.jsonl",
        *more,
        "--output",
        "models/out",
    ]
    return kept.compute_key(command, Path("models/out"), ["configs/profiles/cpu.yaml", "values"])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("scripts/stage.py", "1"), ("scripts/lib/core/cli.py", "2"), ("configs/stage.yaml", "a: 2"),
        ("configs/profiles/cpu.yaml", "b: 2"), ("values", "SEED ?= 2"),
        ("rows.jsonl", "[]"), ("models/in/metadata.json", json.dumps({"digest": "abd"})),
    ],
)  # fmt: skip
def test_whatever_an_artifact_depends_on_changes_its_key(root, file, text):
    before = key()
    Path(file).write_text(text)
    assert key() != before


def test_what_it_does_not_depend_on_leaves_its_key(root):
    before = key()
    assert key("--seed", "2") != before
    Path("models/in/metadata.json").write_text(json.dumps({"digest": "abc", "seconds": 2}))
    Path("scripts/other.py").write_text("pass")
    Path("configs/profiles/t4.yaml").write_text("b: 2")
    assert key() == before


def test_a_long_prompt_and_a_broken_input_are_no_error_here(root):
    """The stage itself says what is wrong with its input."""
    assert key("--system", "Be brief. " * 500) != key()
    Path("models/in/metadata.json").write_text("[")
    assert len(key()) == 64


def replaced(stage: str):
    """The artifact reports/out of a project whose scripts/<stage>.py built it once."""
    Path(f"scripts/{stage}.py").write_text("pass")
    Path(".make/imports.mk").write_text(f"imports_{stage} :=\n")
    command = ["python", f"scripts/{stage}.py", "--model", "models/in", "--output", "reports/out"]
    return kept.Replaced(Path(".make"), Path("reports/out"), command, ["values"])


@pytest.mark.parametrize(("stage", "restored"), [("evaluate", "up to date"), ("report", ""), ("pareto", "")])
def test_a_report_of_figures_is_written_again_though_all_digests_are_equal(root, stage, restored):
    """An evaluation that measured other speeds has other metadata and the same digest."""
    Path("reports/out").mkdir(parents=True)
    Path("reports/out/metadata.json").write_text(json.dumps({"digest": "out"}))
    replaced(stage).write_record()
    assert replaced(stage).restore() == restored


def test_a_kill_while_versions_change_places_is_got_over(root):
    """Between the two renames neither version is in its place; the next run built it again."""
    first, second = replaced("evaluate"), replaced("evaluate")
    for name in ("reports/out", "reports/.kept/out-000000000000", f"reports/.kept/out-{first.key[:12]}"):
        Path(name).mkdir(parents=True)
        Path(name, "metadata.json").write_text(json.dumps({"digest": name}))
    second.key = "0" * 64  # the present version was made with other values
    second.write_record()
    assert replaced("evaluate").restore().startswith("reused the version")
    assert kept.read_digest(Path("reports/out")) == f"reports/.kept/out-{first.key[:12]}"
    assert kept.read_digest(Path("reports/.kept/out-000000000000")) == "reports/out"


def test_an_artifact_that_is_made_does_not_fail_for_what_is_noted_of_it(root):
    Path("scripts/stage.py").write_text("from pathlib import Path; Path('models/out').mkdir()")
    Path(".make/values/stage").mkdir(parents=True)
    Path(".make/values/stage/x").write_text("SEED ?= 1")
    Path(".make/made").write_text("in the way of a directory")
    command = [sys.executable, "scripts/stage.py", "--output", "models/out"]
    words = [".make", "goal", ".make/values/stage/x", *command]
    done = subprocess.run([sys.executable, REPOSITORY / "mk" / "stage.py", *words], capture_output=True, text=True)
    assert done.returncode == 0 and Path("models/out").is_dir()
    assert "warning: " in done.stderr and "done in" in done.stderr and "Traceback" not in done.stderr


def build(digest: str, place: str = "reports/out") -> Path:
    Path(place).mkdir(parents=True, exist_ok=True)
    Path(place, "metadata.json").write_text(json.dumps({"digest": digest}))
    return Path(place)


def kept_digests() -> list[str]:
    return [kept.read_digest(path) for path in Path("reports/.kept").glob("out-*")]


def test_an_artifact_that_make_did_not_build_is_kept_too(root):
    build("by hand")
    stage = replaced("evaluate")
    stage.set_aside()
    shutil.rmtree("reports/out")
    build("by make")
    stage.finish(True)
    assert kept_digests() == ["by hand"]


def test_what_a_stage_replaced_before_it_failed_is_kept(root):
    """Its artifact was complete when the copy to a mirror failed, for instance."""
    build("first")
    replaced("evaluate").write_record()
    Path("values").write_text("SEED ?= 2")
    stage = replaced("evaluate")
    stage.set_aside()
    stage.finish(False)
    assert not stage.is_new() and kept_digests() == []
    stage.set_aside()
    shutil.rmtree("reports/out")
    build("second")
    stage.finish(False)
    assert stage.is_new() and kept_digests() == ["first"] and replaced("evaluate").restore() == "up to date"


def test_a_kept_version_that_lacks_a_file_is_not_put_back(root):
    build("present")
    first, second = replaced("evaluate"), replaced("evaluate")
    second.key = "0" * 64
    second.write_record()
    version = build("earlier", f"reports/.kept/out-{first.key[:12]}")
    (version / "metadata.json").write_text(json.dumps({"digest": "earlier", "files": {"weights": "abc"}}))
    assert replaced("evaluate").restore() == "" and kept.read_digest(Path("reports/out")) == "present"
    (version / "weights").write_text("w")
    assert replaced("evaluate").restore().startswith("reused")


def test_an_artifact_behind_a_link_is_never_moved(root):
    build("first", "disk/out")
    Path("reports").mkdir()
    Path("reports/out").symlink_to("../disk/out")
    for n in range(2):
        Path("values").write_text(f"SEED ?= {n}")
        stage = replaced("evaluate")
        assert stage.restore() == ""
        stage.set_aside()
        build(f"built {n}", "disk/out")
        stage.finish(True)
    assert Path("reports/out").is_symlink() and kept_digests() == []


def test_a_stage_that_waits_for_another_make_says_so(root):
    Path("scripts/stage.py").write_text("pass")
    words = [".make", "goal", "", sys.executable, "scripts/stage.py"]
    with open(".make/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("sft -> models/x-lora, process 12, since 14:05:09\n")
        lock.flush()
        process = subprocess.Popen([sys.executable, REPOSITORY / "mk" / "stage.py", *words], stderr=subprocess.PIPE)
        assert b"in this directory: sft -> models/x-lora, process 12, since 14:05:09" in process.stderr.readline()
    assert process.wait(60) == 0
    assert re.fullmatch(r"stage, process \d+, since [\d:]+\n", Path(".make/lock").read_text())
