"""Artifacts under attack: kills, full disks, meddled bytes, wrong places."""

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.budget import memory
from lib.core import artifact
from lib.core.cli import STARTED, InputError
from tests.conftest import SCRIPTS, beside, call, refused

ARGS = argparse.Namespace(seed=7, output=Path("x"), many=[Path("a"), Path("b")], rate=0.5, name=None)

# Writes argv[1] with the text argv[2] in three files, and kills itself at the point argv[3].
WRITER = f"""
import argparse, os, signal, sys
sys.path.insert(0, {str(SCRIPTS)!r})
from lib.core import artifact
path, text, point = sys.argv[1:4]

def dies(function, after):
    def wrapped(*given):
        if after:
            function(*given)
        os.kill(os.getpid(), signal.SIGKILL)
    return wrapped

def moved_aside(self, target):
    before_rename(self, target)
    if ".old-" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)

if point == "before":
    artifact.replace = dies(artifact.replace, after=False)
if point in ("exchanged", "renamed"):
    artifact.replace = dies(artifact.replace, after=True)
if point in ("aside", "by hand"):  # a file system that cannot exchange
    artifact.swap = lambda one, other: False
if point == "aside":
    before_rename = artifact.Path.rename
    artifact.Path.rename = moved_aside
while True:
    with artifact.write_artifact(path, "data", argparse.Namespace(seed=None)) as build:
        (build.path / "sub").mkdir()
        for n in range(3):
            (build.path / "sub" / f"{{n}}.txt").write_text(text)
            if n == 1 and point == "writing":
                os.kill(os.getpid(), signal.SIGKILL)
    if point != "forever":
        break
"""


def writer(path, text, point="none") -> int:
    command = [sys.executable, "-c", WRITER, str(path), text, point]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=30).returncode


def make(path, inputs=None, **texts) -> dict:
    with artifact.write_artifact(path, "data", ARGS, inputs) as build:
        for name, text in texts.items():
            (build.path / name).write_text(text)
        build.metrics = {"rows": len(texts)}
    return artifact.read(path, "data")


def texts(path) -> set[str]:
    """The different texts of a writer's artifact, which must be whole."""
    artifact.read(path, "data")
    files = list((path / "sub").iterdir())
    assert len(files) == 3
    return {file.read_text() for file in files}


# --- metadata ----------------------------------------------------------------------------------------------


def test_metadata_holds_the_schema_and_what_was_really_so(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    before = time.time()
    meta = make(tmp_path / "a b" / "made", {"file": tmp_path / "rows.jsonl"}, one="1", two="22")
    for key, kinds in artifact.SCHEMA.items():
        assert isinstance(meta[key], kinds), key
    assert json.loads((tmp_path / "a b" / "made" / "metadata.json").read_text()) == meta
    assert meta["size_bytes"] == 3 and set(meta["files"]) == {"one", "two"}
    assert meta["arguments"] == {"seed": 7, "output": "x", "many": ["a", "b"], "rate": 0.5, "name": None}
    assert meta["inputs"]["file"]["path"] == str(tmp_path / "rows.jsonl")
    assert meta["metrics"] == {"rows": 2} and meta["seed"] == 7
    assert meta["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert 0 < meta["peak_memory_bytes"] < meta["machine"]["ram_bytes"]
    assert before - STARTED - 1 < meta["seconds"] < time.time() - STARTED + 1
    assert abs((tmp_path / "a b" / "made" / "metadata.json").stat().st_mtime - STARTED) < 1e-3


def test_modification_time_is_the_start_of_the_process_not_its_end(tmp_path):
    began = time.time()
    slow = WRITER.replace("for n in range(3):", "import time; time.sleep(0.4)\n        for n in range(3):")
    command = [sys.executable, "-c", slow, str(tmp_path / "x"), "1", "none"]
    assert subprocess.run(command).returncode == 0
    assert began <= (tmp_path / "x" / "metadata.json").stat().st_mtime < time.time() - 0.3
    assert artifact.read(tmp_path / "x")["seconds"] >= 0.4


def test_digest_is_content_and_names_and_nothing_else(tmp_path):
    first = make(tmp_path / "here", one="1", two="2")
    again = make(tmp_path / "else where" / "there", two="2", one="1")
    assert first["digest"] == again["digest"]
    os.utime(tmp_path / "here" / "one", (1, 1))
    assert artifact.read(tmp_path / "here")["digest"] == first["digest"]
    others = [
        make(tmp_path / "b", one="1", two="3"),
        make(tmp_path / "c", one="1", too="2"),
        make(tmp_path / "d", one="2", two="1"),
        make(tmp_path / "e", one="1"),
        make(tmp_path / "f", one="1", two="2", three=""),
    ]
    assert len({first["digest"], *(meta["digest"] for meta in others)}) == 6


def test_files_can_be_read_by_other_users_of_the_machine(base):
    """safetensors writes with mode 0600, which a server under another account cannot read."""
    mask = os.umask(0)
    os.umask(mask)
    for file in base.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file.name


# --- meddling ----------------------------------------------------------------------------------------------


def test_bytes_that_changed_are_refused_by_name(tmp_path):
    path = tmp_path / "made"

    def meddle(change, *words):
        shutil.rmtree(path, ignore_errors=True)
        make(path, one="1", two="22")
        change()
        with pytest.raises(InputError) as error:
            artifact.read(path, "data")
        for word in (str(path), *words):
            assert word in str(error.value)
        with pytest.raises(InputError):
            artifact.identify(path)

    meddle(lambda: (path / "two").write_text("23"), "two", "rebuild it")
    meddle(lambda: (path / "one").unlink(), "one")
    meddle(lambda: (path / "extra").write_text(""), "extra")
    meddle(lambda: (path / "two").rename(path / "three"), "two", "three")
    meddle(lambda: (path / "metadata.json").write_text('{"kind": '), "JSON")
    meddle(lambda: (path / "metadata.json").write_bytes(b"\xff\xfe\x00"), "metadata.json")
    meddle(lambda: (path / "metadata.json").write_text("[]"), "metadata.json")

    def edit(**change):
        file = path / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    meddle(lambda: edit(digest="0" * 64), "metadata.json")
    meddle(lambda: edit(files=[]), "'files'")
    meddle(lambda: edit(size_bytes="3"), "'size_bytes'")


def test_another_kind_and_no_artifact_are_refused(tmp_path):
    make(tmp_path / "made", one="1")
    with pytest.raises(InputError, match=r"expected kind 'adapter', found 'data'"):
        artifact.read(tmp_path / "made", "adapter")
    (tmp_path / "data" / "x" / "raw").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no metadata\.json.*make data"):
        artifact.read(tmp_path / "data" / "x" / "raw", "data")
    with pytest.raises(InputError, match=r"does not exist.*make int4"):
        artifact.identify(tmp_path / "models" / "tiny-int4")


# --- places ------------------------------------------------------------------------------------------------


def test_nothing_that_is_not_ours_is_overwritten(tmp_path):
    """A user's directory, even one with a metadata.json of another tool, and a user's file."""
    for name, files in {"project": ["main.py"], "other": ["metadata.json", "photo.jpg"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text('{"name": "mine"}')
        with pytest.raises(InputError, match="exists and was not made by Quartet"):
            make(tmp_path / name, one="1")
        assert beside(tmp_path / name) == sorted(files)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists and was not made by Quartet"):
        make(tmp_path / "file", one="1")
    assert (tmp_path / "file").read_text() == "mine"
    assert beside(tmp_path) == ["file", "other", "project"]


def test_an_output_never_replaces_its_own_input(tmp_path):
    model = make(tmp_path / "model", one="1")
    for place in (tmp_path / "model", tmp_path / "model" / "int4", tmp_path / "x" / ".." / "model"):
        with pytest.raises(InputError, match="input"):
            make(place, {"model": tmp_path / "model"}, two="2")
    assert artifact.read(tmp_path / "model") == model
    assert beside(tmp_path) == ["model"]


def test_an_empty_directory_and_the_current_one_can_be_filled(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", one="1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with artifact.write_artifact(Path("."), "data", ARGS) as build:
        (build.path / "one").write_text("1")
    assert artifact.read(tmp_path / "here")["files"].keys() == {"one"}


def test_names_that_a_shell_or_a_glob_would_trip_over(tmp_path):
    for name in ("two words", "a[1]-base", "*", "größe", "-rf"):
        left = tmp_path / f"{name}.tmp-999999999"
        left.mkdir()
        (left / "half").write_text("x")
        make(tmp_path / name, one="1")
        make(tmp_path / name, one="2")
        assert not left.exists(), name
    assert beside(tmp_path) == sorted(["two words", "a[1]-base", "*", "größe", "-rf"])


def test_a_link_to_a_larger_disk_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "disk" / "models")  # dangling at first
    for text in ("1", "2"):
        make(tmp_path / "models", one=text)
        assert (tmp_path / "models").is_symlink()
        assert (tmp_path / "disk" / "models" / "one").read_text() == text
    assert beside(tmp_path) == ["disk", "models"] and beside(tmp_path / "disk") == ["models"]


# --- kills -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["writing", "before", "exchanged", "renamed", "aside"])
def test_kill_9_leaves_the_old_or_the_new_and_the_next_run_sweeps(tmp_path, point):
    path = tmp_path / "made"
    if point != "renamed":  # there it is the first one ever
        assert writer(path, "old") == 0
    assert writer(path, "new", point) == -signal.SIGKILL
    if point == "aside":  # the one case in which the next run must help: see put_in_place
        assert not path.exists() and len(beside(tmp_path)) == 2
    else:
        assert texts(path) == ({"old"} if point in ("writing", "before") else {"new"})
    # the next run fails by an error of its own: it must not cost the old artifact either
    with contextlib.suppress(ZeroDivisionError), artifact.write_artifact(path, "data", ARGS):
        raise ZeroDivisionError
    assert texts(path) == ({"new"} if point in ("exchanged", "renamed") else {"old"})
    assert writer(path, "third", "by hand" if point == "aside" else "none") == 0
    assert texts(path) == {"third"}
    assert beside(tmp_path) == ["made"]


def test_kills_at_random_moments(tmp_path):
    """A writer that rewrites without pause, killed 12 times at an unknown point."""
    path, moments = tmp_path / "made", random.Random(1)
    assert writer(path, "first") == 0
    for round in range(12):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"{round}", "forever"])
        time.sleep(0.1 + moments.random() * 0.12)
        process.kill()
        process.wait()
        assert len(texts(path)) == 1
        assert len(beside(tmp_path)) <= 2, "one left-over at most: the run before swept the older ones"
    assert writer(path, "last") == 0
    assert texts(path) == {"last"} and beside(tmp_path) == ["made"]


# Reads argv[1]/metadata.json without pause until argv[2] is there; says how often, and all that it saw.
READER = """
import json, os, sys
count, seen = 0, set()
while not os.path.exists(sys.argv[2]):
    count += 1
    try:
        with open(sys.argv[1] + "/metadata.json") as file:
            seen.add(len(json.load(file)["files"]))
    except (OSError, ValueError) as error:
        seen.add(repr(error))
print(count, *seen)
"""


def test_a_reader_never_finds_it_missing_or_half_there(tmp_path, monkeypatch):
    described = make(path := tmp_path / "made", one="1", same="x")
    monkeypatch.setattr(artifact, "describe", lambda *_: described)  # 400 times git would take longest
    command = [sys.executable, "-c", READER, str(path), str(tmp_path / "stop")]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for n in range(200):
        with artifact.write_artifact(path, "data", argparse.Namespace()) as build:
            (build.path / "one").write_text(str(n))
            (build.path / "same").write_text("x")
    (tmp_path / "stop").touch()
    count, *seen = reader.communicate(timeout=20)[0].split(maxsplit=1)
    assert int(count) > 1000 and seen == ["2\n"]


def test_left_overs_of_a_run_with_our_own_process_id_are_swept(tmp_path):
    """In a container the next run often has the id of the killed one."""
    (tmp_path / f"made.tmp-{os.getpid()}").mkdir()
    make(tmp_path / "made", one="1")
    assert beside(tmp_path) == ["made"]


def test_a_running_neighbour_is_not_swept(tmp_path):
    neighbour = subprocess.Popen(["sleep", "30"])
    try:
        (tmp_path / f"made.tmp-{neighbour.pid}").mkdir()
        make(tmp_path / "made", one="1")
        assert beside(tmp_path) == ["made", f"made.tmp-{neighbour.pid}"]
    finally:
        neighbour.kill()
        neighbour.wait()


def test_a_directory_that_cannot_be_synced_is_no_failure():
    """/proc takes no fsync, as CIFS and some FUSE mounts take none for directories. For a file it stays an error."""
    artifact.fsync(Path("/proc"))
    with pytest.raises(OSError, match="Invalid argument"):
        artifact.fsync(Path("/proc/self/status"))


@contextlib.contextmanager
def halted_writer(path):
    """A process that has begun to write an artifact, and does not go on."""
    code = WRITER.replace(
        'if n == 1 and point == "writing":', "if n == 1:\n                sys.stdin.read()\n            if False:"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path), "half", "writing"], stdin=subprocess.PIPE)
    try:
        until = time.time() + 30
        while not list(path.parent.glob(f"{path.name}.tmp-*/sub/1.txt")):
            assert time.time() < until and process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_build_of_another_container_is_told_from_one_that_was_killed(tmp_path):
    """Its process id means nothing here: renamed, the directory has that of no process, and then our own."""
    with halted_writer(tmp_path / "made") as process:
        (living,) = tmp_path.iterdir()
        for pid in (999999999, os.getpid()):
            living = living.rename(tmp_path / f"made.tmp-{pid}")
            make(tmp_path / "made", one="1")
            make(tmp_path / "other", one="1")
            assert artifact.read(tmp_path / "made") and (living / "sub" / "1.txt").is_file()
        process.kill()
        process.wait()
        living.rename(tmp_path / f"made.tmp-{os.getppid()}")  # an id that is in use again
    make(tmp_path / "other", one="2")  # which is another artifact
    assert beside(tmp_path) == ["made", "other"]


def test_only_what_a_build_has_marked_is_swept_beside_another_artifact(tmp_path):
    (tmp_path / "photos.tmp-2023").mkdir()
    make(tmp_path / "made", one="1")
    assert beside(tmp_path) == ["made", "photos.tmp-2023"] and beside(tmp_path / "made") == ["metadata.json", "one"]


def test_where_nothing_can_be_locked_left_overs_stay(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    assert writer(tmp_path / "made", "new", "writing") == -signal.SIGKILL
    (left,) = beside(tmp_path)
    monkeypatch.setattr(artifact.fcntl, "flock", flock)
    make(tmp_path / "made", one="1")
    assert beside(tmp_path) == ["made", left]


@pytest.mark.parametrize("again", [False, True])
def test_a_scratch_directory_that_is_deleted_is_said(again, tmp_path):
    """Also if a library makes it again for the rest of its files: half of a model would be an artifact."""
    said = pytest.raises(InputError, match=r"made\.tmp-\d+: was deleted or moved .*repeat the command")
    with said, artifact.write_artifact(tmp_path / "made", "data", ARGS) as build:
        (build.path / "one").write_text("1")
        shutil.rmtree(build.path)
        if again:
            build.path.mkdir()
        (build.path / "two").write_text("2")
    assert beside(tmp_path) == []


# --- full and forbidden disks ------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 100 kB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], stderr=-3).returncode:
        pytest.skip("may not mount a disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("method", ["gguf-q4_0", "gguf-f16", "int8"])
def test_a_full_disk_is_said_and_nothing_is_left(small_disk, base, data, method, monkeypatch):
    """Before anything is loaded; and where another program fills it meanwhile, as it is written: the writers of
    safetensors (Rust) and of GGUF (numpy) report that in ways of their own."""
    make(small_disk / "old", one="1")
    (small_disk / "ballast").write_bytes(b"x" * 60_000)
    flags = ("--model", base, "--data", data, "--method", method, "--output", small_disk / "old")
    done = call("quantize", *flags)
    assert done.code == 3 and "GB, but the disk has" in done.err
    monkeypatch.setattr(memory, "check_disk", lambda *_: None)
    refused(call("quantize", *flags), "disk is full")
    assert artifact.read(small_disk / "old")["files"].keys() == {"one"}
    assert beside(small_disk) == ["ballast", "old"]


def test_a_full_disk_at_the_base_model(small_disk):
    refused(call("fetch_base", "--model", "tiny-random", "--output", small_disk / "new"), "disk is full")
    assert beside(small_disk) == []


def test_a_limit_on_the_size_of_files_is_said_and_nothing_is_left(tmp_path):
    """Quotas of batch systems; unlike a small disk this needs no rights."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}" * 999, "completion": "b"}) + "\n" for n in range(99)))
    (tmp_path / "out").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        done = call("generate_data", "--source", rows, "--output", tmp_path / "out" / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(done, "a file became too large", os.strerror(errno.EFBIG), str(tmp_path / "out" / "new"), "ulimit -f")
    assert beside(tmp_path / "out") == []


def test_a_read_only_directory_is_said(tiny_artifacts, request, tmp_path):
    folder = tmp_path
    if os.getuid():
        folder.chmod(0o555)
    else:  # root may write wherever the disk itself does not forbid it
        folder = request.getfixturevalue("small_disk")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for output in (folder / "new", folder / "deep" / "new"):
        done = call("generate_data", "--source", tiny_artifacts["rows"], "--output", output)
        refused(done, str(folder), "that place must be writable", "--output")
    assert beside(folder) == []


def test_a_link_to_itself_is_said(tiny_artifacts, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for output in (tmp_path / "loop", tmp_path / "loop" / "new"):
        done = call("generate_data", "--source", tiny_artifacts["rows"], "--output", output)
        refused(done, "loop", "a link leads back to itself")


def test_a_metadata_json_of_another_tool_makes_no_artifact(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "metadata.json").write_text('{"title": "My notes"}')
    (tmp_path / "notes" / "a.txt").write_text("a")
    assert len(artifact.identify(tmp_path / "notes")["digest"]) == 64
