"""Artifacts: directories that are whole or not there at all, and say what they were made of.

An artifact is built beside its place, every file fsynced, `metadata.json` last, and then exchanged
with the old one in a single rename. Its digest is the sha256 over the sorted `path sha256` lines of its
files (metadata.json excepted), so two artifacts with the same content have the same digest wherever
and whenever they were made.
"""

import ctypes
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from lib.core import hardware
from lib.core.cli import ROOT, STARTED, InputError
from lib.core.pipeline import find_goal
from lib.core.ranks import is_main_process

METADATA = "metadata.json"

# What every metadata.json holds; `verify.py` and the tests hold every artifact to it.
SCHEMA = {
    "kind": str,
    "digest": str,
    "files": dict,
    "inputs": dict,
    "arguments": dict,
    "seed": (int, type(None)),
    "command": str,
    "code": dict,
    "versions": dict,
    "machine": dict,
    "started": str,
    "finished": str,
    "seconds": (int, float),
    "peak_memory_bytes": int,
    "size_bytes": int,
    "metrics": dict,
}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(path: Path) -> dict[str, str]:
    """{relative path: sha256} of the files below `path`; a single file counts as {name: sha256}."""
    if path.is_file():
        return {path.name: sha256(path)}
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.relative_to(path).as_posix() != METADATA)
    return {p.relative_to(path).as_posix(): sha256(p) for p in files}


def content_bytes(path: Path) -> int:
    """The size of an artifact's files, its metadata.json not counted."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p != path / METADATA)


def digest_of(files: dict[str, str]) -> str:
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def read(path: Path | str, kind: str | None = None) -> dict:
    """The checked metadata of an artifact.

    Raises InputError when it is missing (naming the goal that makes it), of another kind, or when its bytes
    no longer match its digest (naming the files).
    """
    path = Path(path)
    if not (path / METADATA).is_file():
        raise missing_error(path)
    meta = read_metadata(path)
    if kind is not None and meta["kind"] != kind:
        raise InputError(f"{path}: expected kind {kind!r}, found {meta['kind']!r}")
    found = file_digests(path)
    if digest_of(found) != meta["digest"]:
        known = meta["files"]
        changed = sorted(n for n in found.keys() | known.keys() if found.get(n) != known.get(n))
        raise InputError(
            f"{path}: checksum mismatch ({', '.join(changed[:5]) or METADATA} modified after the build); delete {path} "
            "and rebuild it"
        )
    return meta


def read_metadata(path: Path | str) -> dict:
    """metadata.json held to SCHEMA, without reading the files it speaks of."""
    file = Path(path) / METADATA
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); delete {path} and rebuild it") from None
    for key, kinds in SCHEMA.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(key, ...), kinds):
            raise InputError(f"{file}: {key!r} is missing or of the wrong type; delete {path} and rebuild it")
    return meta


def changed_inputs(meta: dict) -> list[str]:
    """The inputs that are artifacts, lie there, and are no longer those that it was made of."""
    old = []
    for given in meta["inputs"].values():
        if (Path(given["path"]) / METADATA).is_file():
            try:
                now = read_metadata(given["path"])["digest"]
            except InputError:  # broken, which is its own matter; it is not what it was
                now = None
            if now != given["digest"]:
                old.append(given["path"])
    return old


def state(path: Path | str) -> tuple[str, str]:
    """("intact", its kind), ("stale", the inputs that have changed since) or ("broken", why)."""
    try:
        meta = read(path)
        old = changed_inputs(meta)
    except (InputError, OSError) as error:
        return "broken", str(error)
    except (KeyError, TypeError):  # SCHEMA looks no deeper than the first level
        return "broken", f"{Path(path) / METADATA}: 'inputs' is malformed; delete {path} and rebuild it"
    return ("stale", ", ".join(old)) if old else ("intact", meta["kind"])


def identify(path: Path | str) -> dict:
    """{path, digest} of an input: an artifact is checked, any other file or directory is hashed."""
    path = Path(path)
    if (path / METADATA).is_file():
        return {"path": str(path), "digest": read(path)["digest"]}
    if not path.exists():
        raise missing_error(path)
    return {"path": str(path), "digest": digest_of(file_digests(path))}


def missing_error(path: Path | str) -> InputError:
    """What to raise for an artifact that is not there, with the goal that makes what is called so."""
    state = "is not an artifact (it has no metadata.json)" if Path(path).exists() else "does not exist"
    goal = find_goal(path)
    return InputError(f"{path} {state}" + (f"; `make {goal}` makes it" if goal else ""))


class Build:
    """An artifact in the making: `path` takes the files, `metrics` what was measured."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics: dict = {}
        self.notes: dict = {}  # further top-level entries of metadata.json


@contextmanager
def write_artifact(path: Path | str, kind: str, args, inputs: dict[str, Path | str] | None = None):
    """Build the artifact `path`: write below `build.path`; on a clean exit it takes its place, whole.

    `inputs` names what it is made of; each is checked or hashed now. Any error leaves the old
    artifact as it was and nothing new behind. Of processes that train together, the first alone leaves an artifact: the
    others have their part in gathering the weights, and what they write is thrown away.
    """
    if not is_main_process():
        with tempfile.TemporaryDirectory() as scratch:
            yield Build(Path(scratch))
        return
    path = Path(path).resolve()  # a link, perhaps to a larger disk, is written through
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or is_ours(path))):
        raise InputError(f"{path} already exists and was not made by Quartet; move it or choose another --output")
    for where in (inputs or {}).values():
        if Path(where).resolve() in (path, *path.parents):
            raise InputError(f"{path} is the input {where}, or is inside it; choose another --output")
    checked = {name: identify(where) for name, where in (inputs or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    scratch = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    scratch.mkdir()
    try:
        build = Build(scratch)
        yield build
        files = file_digests(scratch)
        meta = describe(kind, args, checked, files, scratch) | build.notes | {"metrics": build.metrics}
        for name in files:  # readable by whom the directory is; safetensors writes for its owner alone
            (scratch / name).chmod(scratch.stat().st_mode & 0o666)
            fsync(scratch / name)
        write_json(scratch / METADATA, meta)
        os.utime(scratch / METADATA, (STARTED, STARTED))
        for folder in [scratch, *(p for p in scratch.rglob("*") if p.is_dir())]:
            fsync(folder)
        replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_ours(path: Path) -> bool:
    """Whether a directory's metadata.json is one of these: many tools write a file of that name."""
    try:
        meta = json.loads((path / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and {"kind", "digest", "files", "inputs"} <= meta.keys()


def describe(kind: str, args, inputs: dict, files: dict[str, str], folder: Path) -> dict:
    known = {"kind": kind, "digest": digest_of(files), "files": files, "inputs": inputs}
    return known | run_metadata(kind, args) | {"size_bytes": content_bytes(folder)}


def run_metadata(kind: str, args) -> dict:
    """Of metadata.json what this process can say before the artifact is written."""
    finished = time.time()
    return {
        "kind": kind,
        "arguments": {name: to_json(value) for name, value in vars(args).items()},
        "seed": getattr(args, "seed", None),
        "command": " ".join(["python", *sys.argv]),
        "code": code_version(),
        "versions": versions(),
        "machine": hardware.machine(),
        "started": timestamp(STARTED),
        "finished": timestamp(finished),
        "seconds": round(finished - STARTED, 3),
        "peak_memory_bytes": hardware.peak_memory_bytes(),
    }


def to_json(value: object) -> object:
    """An argument as JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def code_version() -> dict:
    """The git commit of the scripts, and whether files that git tracks were changed since."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None  # no git here: the code is then named by its version of nothing, and says so
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    from importlib import metadata as packages  # takes a tenth of the time of --help

    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "gguf", "xllamacpp", "py3langid", "rensa", "bm25s")
    used = {name: packages.version(name) for name in names if name in sys.modules}
    return {"python": sys.version.split()[0]} | used


def write_json(path: Path, value: object) -> None:
    """Write JSON that is on the disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Remove what killed runs left beside `path`; bring back an old artifact that was only moved aside."""
    name = glob.escape(path.name)
    for left in sorted(path.parent.glob(f"{name}.old-*")):
        if path.exists():
            shutil.rmtree(left)
        else:
            left.rename(path)
    for left in path.parent.glob(f"{name}.tmp-*"):
        if not is_running(left.name.rpartition("-")[2]):
            shutil.rmtree(left)


def is_running(pid: str) -> bool:
    """Whether another process has this id; our own, found at the start, is a killed run's (containers reuse ids)."""
    return pid.isdigit() and pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()


def replace(scratch: Path, path: Path) -> None:
    """Rename `scratch` to `path`. An old artifact there is exchanged in one system call, so that a kill
    at any instant leaves the old one or the new one; `scratch` then holds the old one."""
    if not path.exists():
        scratch.rename(path)
    elif not swap(scratch, path):
        aside = path.with_name(f"{path.name}.old-{os.getpid()}")
        path.rename(aside)  # killed between these two, `remove_leftovers` puts it back
        scratch.rename(path)
        shutil.rmtree(aside)
    fsync(path.parent)


def swap(one: Path, other: Path) -> bool:
    """renameat2(RENAME_EXCHANGE): False where the kernel or the file system has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, rename_exchange = -100, 2  # AT_FDCWD and the flag, from linux/fcntl.h and linux/fs.h
    return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), rename_exchange) == 0
