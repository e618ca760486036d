"""Artifacts: directories that are either complete or missing, and that record what they were made from.

An artifact is built beside its final path. Every file is fsynced, `metadata.json` last; then it is exchanged with the
old artifact in a single rename. Its digest is the sha256 over the sorted `path sha256` lines of its files (without
metadata.json), so two artifacts with the same content have the same digest, wherever and whenever they were made.
"""

import ctypes
import errno
import fcntl
import glob
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from lib.core import file_errors, hardware, imports
from lib.core.cli import ROOT, STARTED, InputError, check_directory, hide_secrets
from lib.core.inputs import BUILDING, METADATA, digest_of, file_digests, find_changed, is_identity
from lib.core.inputs import sha256 as sha256
from lib.core.pipeline import find_goal
from lib.core.ranks import is_main_process

HUB = "hf://"  # precedes the kind and the id of a Hub repository, as huggingface_hub writes them

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


def content_bytes(path: Path) -> int:
    """The size of an artifact's files, without its metadata.json."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p != path / METADATA)


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
    digests, recorded = file_digests(path), meta["files"]
    if digests != recorded or digest_of(digests) != meta["digest"]:
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
    malformed = [key for key in ("files", "versions") if not all(isinstance(text, str) for text in meta[key].values())]
    malformed += ["inputs"] * (not all(map(is_identity, meta["inputs"].values())))
    malformed += ["requested"] * (not isinstance(meta.get("requested", {}), dict))
    if malformed:
        raise InputError(f"{file}: {malformed[0]!r} is malformed; delete {path} and rebuild it")
    return meta


def state(path: Path | str) -> tuple[str, str]:
    """("intact", its kind), ("stale", the inputs that have changed since) or ("broken", the reason)."""
    try:
        meta = read(path)
        changed = find_changed(meta, {})
    except (InputError, OSError) as error:
        return "broken", str(error)
    return ("stale", ", ".join(changed)) if changed else ("intact", meta["kind"])


def identify(path: Path | str) -> dict:
    """{path, digest} of an input. An artifact is checked; any other file or directory is hashed."""
    path = Path(path)
    if (path / METADATA).is_file() and not is_foreign(path):
        return {"path": str(path), "digest": read(path)["digest"]}
    if not path.exists():
        raise missing_error(path)
    return {"path": str(path), "digest": digest_of(file_digests(path))}


def identify_inputs(paths: dict) -> dict[str, dict]:
    """{name: {path, digest}} of a stage's inputs, without those that are None. Called before the stage reads them: what
    changes while it runs was perhaps read before, perhaps after."""
    code_version(sys.argv[0])
    return {name: identify(path) for name, path in paths.items() if path is not None}


def identify_hub(kind: str, hub_id: str, commit: str, split: str = "") -> dict:
    """The identity of a repository of the Hub, which is its commit, and of a split in it."""
    return {"path": f"{HUB}{kind}/{hub_id}" + f" {split}" * bool(split), "digest": f"{commit} {split}".strip()}


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
def write_artifact(path: Path | str, kind: str, args, inputs: dict[str, dict | Path | str] | None = None):
    """Build the artifact `path`. The caller writes below `build.path`; on a clean exit the result replaces `path` as a
    whole.

    `inputs` names what it is made from. A stage that has read them before gives their identities from that time
    (`identify_inputs`); a path is checked and hashed here. An input that changed until the end is an error. Any error
    leaves the old artifact as it was, and nothing new. Of processes that train together, only the first writes an
    artifact: the others help to gather the weights, and what they write is deleted.
    """
    if not is_main_process():
        with tempfile.TemporaryDirectory() as scratch:
            yield Build(Path(scratch))
        return
    path = Path(path).resolve()  # a link, perhaps to a larger disk, is written through
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or is_ours(path))):
        raise InputError(f"{path} already exists and was not made by Quartet; move it or choose another --output")
    identities = {
        name: source if isinstance(source, dict) else identify(source) for name, source in (inputs or {}).items()
    }
    for source in identities.values():
        if Path(source["path"]).resolve() in (path, *path.parents):
            raise InputError(f"{path} is the input {source['path']}, or is inside it; choose another --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    with make_scratch(path) as scratch:
        build = Build(scratch)
        yield build
        check_directory(scratch)  # of a deleted directory, a library may have made another for its own files
        check_unchanged(identities, args)
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


@contextmanager
def make_scratch(path: Path):
    """A new directory beside `path`, to be renamed to it. Whatever is left there at the end is deleted, and what killed
    runs left is deleted before. A lock on a file in it tells them apart (`is_abandoned`)."""
    remove_leftovers(path)
    for number in itertools.count(os.getpid()):  # another container's process may have this one's id
        scratch = path.with_name(f"{path.name}.tmp-{number}")
        with suppress(FileExistsError):
            scratch.mkdir()
            break
    try:
        with open(scratch / BUILDING, "wb") as lock:
            with suppress(OSError):  # in a file system without locks, `is_abandoned` gets no lock either
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file_errors.use_directory(scratch)
            yield scratch
    except Exception as error:
        check_directory(scratch)
        number = file_errors.find_errno(error)
        if number and getattr(error, "filename", None) is None:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise
    finally:
        file_errors.leave_directory(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def check_unchanged(identities: dict[str, dict], args) -> None:
    """InputError if an input is no longer what it was before the work. Weights are read late and in parts, so neither
    the earlier digest nor the later one would tell what the artifact was made from."""
    for source in identities.values():
        if source["path"].startswith(HUB):
            continue
        try:
            changed = identify(source["path"])["digest"] != source["digest"]
        except InputError:
            changed = True
        if changed:
            resume = "; if you restore it first, the saved progress is used" if hasattr(args, "run_dir") else ""
            raise InputError(
                f"{source['path']}: changed while this command was running, so it is unclear what was read; nothing "
                f"was written. Repeat the command{resume}"
            )


def is_ours(path: Path) -> bool:
    """Whether a directory's metadata.json is an artifact's: many tools write a file of that name."""
    try:
        meta = json.loads((path / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and {"kind", "digest", "files", "inputs"} <= meta.keys()


def is_foreign(path: Path) -> bool:
    """Whether a directory's metadata.json has no key of an artifact's. One that cannot be read may be ours."""
    try:
        meta = json.loads((path / METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and bool(meta) and not {"kind", "digest", "files", "inputs"} & meta.keys()


def describe(kind: str, args, inputs: dict, files: dict[str, str], folder: Path) -> dict:
    entries = {"kind": kind, "digest": digest_of(files), "files": files, "inputs": inputs}
    return entries | run_metadata(kind, args) | {"size_bytes": content_bytes(folder)}


def run_metadata(kind: str, args) -> dict:
    """The part of metadata.json that this process knows before the artifact is written."""
    finished = time.time()
    return {
        "kind": kind,
        "arguments": {name: to_json(value) for name, value in vars(args).items()},
        # What the arguments were that the script replaced, such as {"method": "auto"}.
        "requested": {
            name: to_json(value) for name, value in getattr(args, "parsed", {}).items() if vars(args)[name] != value
        },
        "seed": getattr(args, "seed", None),
        "command": format_command(sys.argv),
        "code": code_version(sys.argv[0]),
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


def format_command(argv: list[str]) -> str:
    return " ".join(["python", *hide_secrets(argv)])


def to_json(value: object) -> object:
    """An argument in a form that JSON can hold, and that everyone may read."""
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return hide_secrets(str(value) if isinstance(value, Path) else value)


def timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@cache
def code_version(script: str) -> dict:
    """The git commit of the scripts, whether files that git tracks have changed since, and a digest of a script's code.
    Called before a stage works and remembered: the code may change while it runs."""

    def git(*words: str) -> str | None:
        try:
            process = subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, encoding="utf-8", errors="replace", timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None  # without git, commit and dirty are null
        return process.stdout.strip() if process.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    commit, dirty = git("rev-parse", "HEAD"), None if status is None else bool(status)
    return {"commit": commit, "dirty": dirty, "digest": code_digest(script)}


@cache
def code_digest(script: str) -> str | None:
    """A digest of a script, of the modules that affect its artifact, and of the pinned assets; None for other files."""
    file = Path(script).resolve()
    if file.parent != ROOT / "scripts":
        return None
    modules = imports.needed_by(file, without=imports.WITHOUT_EFFECT)
    files = [file, *modules, ROOT / "configs" / "assets.yaml", *(ROOT / "configs" / "models").glob("*.yaml")]
    return digest_of({path.relative_to(ROOT).as_posix(): sha256(path) for path in files})


PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "gguf", "xllamacpp", "py3langid", "rensa", "bm25s")


def versions(names=None) -> dict[str, str]:
    """The versions of Python and of those packages of `names` that are installed; by default, of those in use."""
    from importlib import metadata as packages  # imported here, since it takes a tenth of the time of --help

    found = {"python": sys.version.split()[0]}
    for name in [name for name in PACKAGES if name in sys.modules] if names is None else set(names) - {"python"}:
        with suppress(packages.PackageNotFoundError, ValueError):  # of a name that no package can have
            found[name] = packages.version(name)
    return found


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, which is on the disk when this returns."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Wait until a file or directory is on the disk. CIFS and some FUSE mounts cannot sync a directory, and say so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


LEFTOVER = re.compile(r"(.+)\.(tmp|old)-(\d+)")


def remove_leftovers(path: Path) -> None:
    """Remove what killed runs left beside `path`. An old artifact that a run had only moved aside is moved back."""
    name = glob.escape(path.name)
    if all(map(is_abandoned, path.parent.glob(f"{name}.tmp-*"))):  # else another run may be about to use it
        for leftover in sorted(path.parent.glob(f"{name}.old-*")):
            if path.exists():
                shutil.rmtree(leftover)
            else:
                leftover.rename(path)
    for leftover in path.parent.glob("*.tmp-*"):
        match = LEFTOVER.fullmatch(leftover.name)
        # What has another name may be the user's, unless a build has marked it.
        is_known = match and (match[1] == path.name or (leftover / BUILDING).is_file())
        if is_known and is_abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)  # it may be another user's


def is_abandoned(leftover: Path) -> bool:
    """Whether the process that wrote here has certainly ended: its lock is free. Its id tells nothing, since each of
    several containers on a disk has processes of its own. False in a file system without locks."""
    try:
        with open(leftover / BUILDING, "r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # no build: an artifact or a run on its way to deletion
        return not is_running(leftover.name.rpartition("-")[2])
    except OSError:
        return False
    return True


def is_running(pid: str) -> bool:
    """Whether another process has this id. A leftover with our own id is a killed run's: containers reuse ids."""
    return pid.isdigit() and pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()


def replace(scratch: Path, path: Path) -> None:
    """Rename `scratch` to `path`. An old artifact there is exchanged in one system call, so that a kill at any moment
    leaves either the old one or the new one; afterwards `scratch` holds the old one."""
    file_errors.leave_directory(scratch)
    if not path.exists():
        scratch.rename(path)
    elif not swap(scratch, path):
        aside = path.with_name(f"{path.name}.old-{os.getpid()}")
        path.rename(aside)  # killed between these two, `remove_leftovers` puts it back
        scratch.rename(path)
        shutil.rmtree(aside)
    (path / BUILDING).unlink(missing_ok=True)
    fsync(path.parent)


def swap(first: Path, second: Path) -> bool:
    """Exchange two paths with renameat2(RENAME_EXCHANGE); False if the kernel or the file system lacks that call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_fdcwd, rename_exchange = -100, 2  # from linux/fcntl.h and linux/fs.h
    return libc.renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0
