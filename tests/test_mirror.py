"""mirror.py: a stage's artifact kept elsewhere, and taken from there in the place of making it."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mirror import copy_if_current, find_difference, resolve_arguments

from lib.core import artifact
from lib.core.cli import InputError
from tests.conftest import REPOSITORY, SCRIPTS, beside, environment, refused, row, script

PLACE = Path("data") / "towns" / "raw"
ROWS = "".join(json.dumps(row(n)) + "\n" for n in range(20))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def mirror(root, *argv, output=PLACE):
    (root / "towns.jsonl").write_text(ROWS)
    made = [REPOSITORY / "scripts" / "generate_data.py", "--source", "towns.jsonl", "--output", output]
    return script("mirror", *argv, "--output", output, "--", *made, cwd=root)


def test_what_is_made_is_kept_and_taken_on_another_machine(root, tmp_path):
    drive = tmp_path / "my drive"
    made = mirror(root, "--to", drive)
    assert made.code == 0 and f"{PLACE}: mirrored to" in made.err and made.out.strip().endswith(str(PLACE)), made.err
    assert artifact.read(drive / PLACE)["digest"] == artifact.read(root / PLACE)["digest"]
    shutil.rmtree(root)
    root.mkdir()
    before = time.time()
    taken = mirror(root, "--from", drive, "--to", drive)
    assert taken.code == 0 and "copied from" in taken.err and "mirrored to" not in taken.err and taken.out == ""
    assert (root / PLACE / artifact.METADATA).stat().st_mtime >= before - 1
    assert artifact.read(root / PLACE)


@pytest.mark.slow
def test_what_another_command_made_or_of_other_inputs_is_made_anew(root, tmp_path):
    drive = tmp_path / "drive"
    assert mirror(root, "--to", drive).code == 0
    stored = drive / PLACE / artifact.METADATA
    meta = json.loads(stored.read_text())
    for other, words in (
        ({"command": meta["command"] + " --seed 2"}, "not used, because another command built it"),
        ({"code": meta["code"] | {"digest": "0"}}, "not used, because another version of the code built it"),
        (
            {"arguments": meta["arguments"] | {"seed": 7}},
            "not used, because --seed was 7 when it was built, and is now 42",
        ),
        (
            {"versions": meta["versions"] | {"python": "3.0", "torch": "0.1"}},
            "not used, because it was built with python 3.0",
        ),
        ({"versions": {"no-such-package": "1"}}, "was built with no-such-package 1, and none is installed"),
        (
            {"inputs": {"source": {"path": "towns.jsonl", "digest": "0"}}},
            "not used, because it was built from another source",
        ),
    ):
        stored.write_text(json.dumps(meta | other))
        done = mirror(root, "--from", drive)
        assert done.code == 0 and words in done.err and "copied from" not in done.err
    stored.write_text(json.dumps(meta))
    (stored.parent / "test.jsonl").write_text("{}")
    refused(mirror(root, "--from", drive), "checksum mismatch (test.jsonl modified")


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": {"file": {"path": "towns.jsonl"}}},
        {"inputs": {"file": {"path": 7, "digest": "0"}}},
        {"inputs": {"file": "towns.jsonl"}},
        {"inputs": {"file": {"path": "towns.jsonl", "digest": None}}},
        {"files": {"train.jsonl": 1}},
        {"requested": ["method"]},
        {"versions": {"python": {"major": 3}}},
    ],
)
def test_a_changed_description_is_refused(root, tmp_path, change):
    stored = tmp_path / "drive" / PLACE
    (root / "towns.jsonl").write_text(ROWS)
    command = [str(SCRIPTS / "generate_data.py"), "--source", str(root / "towns.jsonl"), "--output", "x"]
    with artifact.write_artifact(stored, "data", argparse.Namespace()) as build:
        (build.path / "train.jsonl").write_text("{}\n")
    meta = artifact.read(stored) | {
        "command": " ".join(["python", *command]),
        "code": {"digest": artifact.code_digest(command[0])},
        "arguments": resolve_arguments(command),
        "requested": {},
    }
    (stored / artifact.METADATA).write_text(json.dumps(meta))
    assert find_difference(artifact.read_metadata(stored), command) == ""
    (stored / artifact.METADATA).write_text(json.dumps(meta | change))
    with pytest.raises(InputError, match=f"{next(iter(change))}' is malformed; delete .* and rebuild it"):
        copy_if_current(stored, root / PLACE, command)
    assert not (root / PLACE).exists()


def test_a_version_of_what_can_be_no_package_is_not_installed():
    assert artifact.versions(["", "no-such-package", "python"]) == {"python": sys.version.split()[0]}


def test_an_artifact_names_only_files_of_its_own(root, tmp_path):
    drive = tmp_path / "drive"
    assert mirror(root, "--to", drive).code == 0
    shutil.rmtree(root / "data")
    stored = drive / PLACE
    plain = (stored / "metadata.json").read_text()
    meta = json.loads(plain)
    outside = stored.parent / "outside.txt"
    outside.write_text("mine")
    meta["files"]["../outside.txt"] = artifact.sha256(outside)
    (stored / "metadata.json").write_text(json.dumps(meta))
    refused(mirror(root, "--from", drive), "checksum mismatch (../outside.txt modified")
    (stored / "metadata.json").write_text(plain)
    (stored / "test.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (stored / "test.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    refused(mirror(root, "--from", drive), "test.jsonl: is a link")
    assert beside(root) == ["towns.jsonl"]


@pytest.mark.slow
def test_what_a_script_replaces_in_its_arguments_is_the_same_elsewhere(root, base, data, tmp_path):
    """quantize.py records the method that it chose for auto."""
    shutil.copytree(base, root / "base")
    shutil.copytree(data, root / "data")
    quantize = [REPOSITORY / "scripts" / "quantize.py", "--model", "base", "--data", "data", "--method", "auto"]
    command = ["--output", "models/q", "--", *quantize, "--samples", 2, "--output", "models/q"]
    assert script("mirror", "--to", tmp_path / "drive", *command, cwd=root).code == 0
    meta = artifact.read(root / "models" / "q")
    assert meta["arguments"]["method"] == "gguf-iq4_nl" and meta["requested"] == {"method": "auto"}
    shutil.rmtree(root / "models")
    assert "models/q: copied from" in script("mirror", "--from", tmp_path / "drive", *command, cwd=root).err


def test_a_stage_that_fails_keeps_nothing_and_its_exit_code(root, tmp_path):
    sft = [REPOSITORY / "scripts" / "sft.py", "--model", "none", "--data", "none", "--output", "models/x"]
    done = script("mirror", "--to", tmp_path / "drive", "--output", "models/x", "--", *sft, cwd=root)
    refused(done, "sft: error")
    assert beside(tmp_path / "drive") == []


def test_an_artifact_stands_if_the_drive_is_gone(root, tmp_path):
    (tmp_path / "drive").write_text("no directory")
    done = mirror(root, "--to", tmp_path / "drive")
    assert done.code == 0 and f"warning: {PLACE} is complete here, but was not mirrored:" in done.err
    assert artifact.read(root / PLACE)
    done = script("mirror", "--root", root, "--to", tmp_path / "drive")
    refused(done)  # what `make all` runs last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_that_is_interrupted_may_end_its_work(root, tmp_path, number):
    (root / "stage.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n    pathlib.Path('ended').touch()\n    sys.exit(4)\n"
        "signal.signal(signal.SIGTERM, end)\npathlib.Path('begun').touch()\ntime.sleep(60)\n"
    )
    command = [sys.executable, str(REPOSITORY / "scripts" / "mirror.py"), "--to", str(tmp_path / "drive")]
    process = subprocess.Popen([*command, "--output", "models/x", "--", "stage.py"], cwd=root, env=environment())
    while not (root / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert process.wait(20) == (4 if number == signal.SIGTERM else -number)
    deadline = time.time() + 10
    while not (root / "ended").exists() and time.time() < deadline:
        time.sleep(0.01)
    assert (root / "ended").exists() and beside(tmp_path / "drive") == []


def test_without_a_command_all_that_lies_here_is_kept(root, base, data, tmp_path):
    shutil.copytree(base, root / "models" / "a")
    shutil.copytree(data, root / "data" / "rows" / "raw")
    done = script("mirror", "--root", root, "--to", tmp_path / "drive")
    assert done.code == 0 and done.err.count("mirrored to") == 2
    assert artifact.read(tmp_path / "drive" / "data" / "rows" / "raw", "data")
    assert "mirrored to" not in script("mirror", "--root", root, "--to", tmp_path / "drive").err


def test_flags_that_do_not_go_together_are_refused(root, tmp_path):
    refused(script("mirror", cwd=root), "--to alone")
    refused(script("mirror", "--output", "models/x", cwd=root), "--to alone")
    refused(mirror(root, "--to", root), "is where artifacts are built")
    refused(mirror(root, "--to", tmp_path / "drive", output="../elsewhere"), "is outside --root")
