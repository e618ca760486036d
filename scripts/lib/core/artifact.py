"""Artifacts: directories that are either complete or missing, and that record what they were made from.

An artifact is built beside its final path. Every file is fsynced, `metadata.json` last; then it is exchanged with the
old artifact in a single rename. Its digest is the sha256 over the sorted `path sha256` lines of its files (without
metadata.json), so two artifacts with the same content have the same digest, wherever and whenever they were made.
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

# The keys and types of every metadata.json; `verify.py` and the tests check every artifact against them.
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
    """{relative path: sha256} of the files below `path`; for a single file, {name: sha256}."""
    if path.is_file():
        return {path.name: sha256(path)}
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.relative_to(path).as_posix() != METADATA)
    return {p.relative_to(path).as_posix(): sha256(p) for p in files}


def content_bytes(path: Path) -> int:
    """The size of an artifact's files, without its metadata.json."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p != path / METADATA)


def digest_of(files: dict[str, str]) -> str:
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def read(path: Path | str, kind: str | None = None) -> dict:
    """The checked metadata of an artifact.

    Raises InputError if it is missing (naming the goal that makes it), if it is of another kind, or if its files no
    longer match its digest (naming the files).
    """
    path = Path(path)
    if not (path / METADATA).is_file():
        raise missing_error(path)
    meta = read_metadata(path)
    if kind is not None and meta["kind"] != kind:
        raise InputError(f"{path}: expected kind {kind!r}, found {meta['kind']!r}")
    digests = file_digests(path)
    if digest_of(digests) != meta["digest"]:
        recorded = meta["files"]
        changed = sorted(name for name in digests.keys() | recorded.keys() if digests.get(name) != recorded.get(name))
        raise InputError(
            f"{path}: checksum mismatch ({', '.join(changed[:5]) or METADATA} modified after the build); delete {path} "
            "and rebuild it"
        )
    return meta


def read_metadata(path: Path | str) -> dict:
    """The content of metadata.json, checked against SCHEMA; the artifact's other files are not read."""
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
    """The paths of the inputs whose content is no longer what the artifact was made from. Only inputs that are still
    artifacts are checked."""
    changed = []
    for source in meta["inputs"].values():
        if (Path(source["path"]) / METADATA).is_file():
            try:
                digest = read_metadata(source["path"])["digest"]
            except InputError:  # a broken input has changed as well; `read` reports what is wrong with it
                digest = None
            if digest != source["digest"]:
                changed.append(source["path"])
    return changed


def state(path: Path | str) -> tuple[str, str]:
    """("intact", its kind), ("stale", the inputs that have changed since) or ("broken", the reason)."""
    try:
        meta = read(path)
        changed = changed_inputs(meta)
    except (InputError, OSError) as error:
        return "broken", str(error)
    except (KeyError, TypeError):  # SCHEMA describes the first level only
        return "broken", f"{Path(path) / METADATA}: 'inputs' is malformed; delete {path} and rebuild it"
    return ("stale", ", ".join(changed)) if changed else ("intact", meta["kind"])


def identify(path: Path | str) -> dict:
    """{path, digest} of an input. An artifact is checked; any other file or directory is hashed."""
    path = Path(path)
    if (path / METADATA).is_file():
        return {"path": str(path), "digest": read(path)["digest"]}
    if not path.exists():
        raise missing_error(path)
    return {"path": str(path), "digest": digest_of(file_digests(path))}


def missing_error(path: Path | str) -> InputError:
    """The error to raise for a missing artifact. It names the goal that makes artifacts of this name."""
    path, goal = Path(path), find_goal(path)
    problem = "is not an artifact (it has no metadata.json)" if path.exists() else "does not exist"
    remedy = f" (`make {goal}` makes it)" if goal else ""
    if not goal and len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists():
        remedy = f" (`make base MODEL={path}` fetches a model of this name from the Hub)"
    return InputError(f"{path} {problem}; check the path{remedy}")


class Build:
    """An artifact under construction: a stage writes files below `path` and puts its measurements into `metrics`."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics: dict = {}
        self.notes: dict = {}  # further top-level entries of metadata.json


@contextmanager
def write_artifact(path: Path | str, kind: str, args, inputs: dict[str, Path | str] | None = None):
    """Build the artifact `path`. The caller writes below `build.path`; on a clean exit the result replaces `path` as a
    whole.

    `inputs` names what it is made from; each input is checked or hashed before the build. Any error leaves the old
    artifact as it was, and nothing new. Of processes that train together, only the first writes an artifact: the others
    help to gather the weights, and what they write is deleted.
    """
    if not is_main_process():
        with tempfile.TemporaryDirectory() as scratch:
            yield Build(Path(scratch))
        return
    path = Path(path).resolve()  # a link, perhaps to a larger disk, is written through
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or is_ours(path))):
        raise InputError(f"{path} already exists and was not made by Quartet; move it or choose another --output")
    for source in (inputs or {}).values():
        if Path(source).resolve() in (path, *path.parents):
            raise InputError(f"{path} is the input {source}, or is inside it; choose another --output")
    identities = {name: identify(source) for name, source in (inputs or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    scratch = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    scratch.mkdir()
    try:
        build = Build(scratch)
        yield build
        files = file_digests(scratch)
        meta = describe(kind, args, identities, files, scratch) | build.notes | {"metrics": build.metrics}
        for name in files:  # readable by everyone who can read the directory; safetensors lets only the owner read
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
    """Whether a directory's metadata.json is an artifact's: many tools write a file of that name."""
    try:
        meta = json.loads((path / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and {"kind", "digest", "files", "inputs"} <= meta.keys()


def describe(kind: str, args, inputs: dict, files: dict[str, str], folder: Path) -> dict:
    entries = {"kind": kind, "digest": digest_of(files), "files": files, "inputs": inputs}
    return entries | run_metadata(kind, args) | {"size_bytes": content_bytes(folder)}


def run_metadata(kind: str, args) -> dict:
    """The part of metadata.json that this process knows before the artifact is written."""
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
        "peak_gpu_memory_bytes": hardware.peak_gpu_memory_bytes(),
    }


def peak_bytes(meta: dict) -> int:
    """The peak of an artifact's process where it computed, as estimates give it: on the GPU, if it used one."""
    return meta.get("peak_gpu_memory_bytes") or meta["peak_memory_bytes"]


def to_json(value: object) -> object:
    """An argument in a form that JSON can hold."""
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def code_version() -> dict:
    """The git commit of the scripts, and whether files that git tracks have changed since."""

    def git(*words: str) -> str | None:
        try:
            process = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None  # without git, commit and dirty are null
        return process.stdout.strip() if process.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    from importlib import metadata as packages  # imported here, since it takes a tenth of the time of --help

    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "gguf", "xllamacpp", "py3langid", "rensa", "bm25s")
    loaded = {name: packages.version(name) for name in names if name in sys.modules}
    return {"python": sys.version.split()[0]} | loaded


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, which is on the disk when this returns."""
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
    """Remove what killed runs left beside `path`. An old artifact that a run had only moved aside is moved back."""
    name = glob.escape(path.name)
    for leftover in sorted(path.parent.glob(f"{name}.old-*")):
        if path.exists():
            shutil.rmtree(leftover)
        else:
            leftover.rename(path)
    for leftover in path.parent.glob(f"{name}.tmp-*"):
        if not is_running(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover)


def is_running(pid: str) -> bool:
    """Whether another process has this id. A leftover with our own id is a killed run's: containers reuse ids."""
    return pid.isdigit() and pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()


def replace(scratch: Path, path: Path) -> None:
    """Rename `scratch` to `path`. An old artifact there is exchanged in one system call, so that a kill at any moment
    leaves either the old one or the new one; afterwards `scratch` holds the old one."""
    if not path.exists():
        scratch.rename(path)
    elif not swap(scratch, path):
        aside = path.with_name(f"{path.name}.old-{os.getpid()}")
        path.rename(aside)  # killed between these two, `remove_leftovers` puts it back
        scratch.rename(path)
        shutil.rmtree(aside)
    fsync(path.parent)


def swap(first: Path, second: Path) -> bool:
    """Exchange two paths with renameat2(RENAME_EXCHANGE); False if the kernel or the file system lacks that call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_fdcwd, rename_exchange = -100, 2  # from linux/fcntl.h and linux/fs.h
    return libc.renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0
