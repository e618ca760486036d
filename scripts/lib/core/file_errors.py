"""Errors of the file system that a user can do something about, in our words: what, where, and what to do next."""

import argparse
import errno
import os
import re
import resource
from pathlib import Path

IN_USE = {}  # {directory that this process works in: an open handle on it, which keeps its inode from being used again}


def use_directory(path: Path) -> None:
    """Note that this process works in a directory. Somebody may delete it meanwhile. Libraries then fail in ways of
    their own, or make it again and leave half of the files in it."""
    leave_directory(path)
    IN_USE[path.absolute()] = os.open(path, os.O_RDONLY)


def leave_directory(path: Path) -> None:
    if (handle := IN_USE.pop(path.absolute(), None)) is not None:
        os.close(handle)


def explain_removal(*paths: Path) -> str:
    """What to tell the user if one of these directories in use, by default all, is no longer the one that it was; "" if
    all are."""
    for path, handle in IN_USE.items():
        if paths and path not in paths:
            continue
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(handle)):
            return (
                f"{path}: was deleted or moved while this command was working in it; repeat the command, and leave "
                "that directory alone until it has finished"
            )
    return ""


REPEAT = "then repeat the command"
NO_ROOM = {
    errno.ENOSPC: f"the disk is full: {{}}; free some space (`make clean` deletes runs/ and reports/), {REPEAT}",
    errno.EDQUOT: f"the disk quota is used up: {{}}; free some space or raise it, {REPEAT}",
    errno.EFBIG: f"a file became too large: {{}}; raise its limit (`ulimit -f`) or choose another disk, {REPEAT}",
}
# {errno: what to tell the user}, with the library's own words in the place of {}.
MESSAGES = NO_ROOM | {
    errno.ELOOP: "{}; a link leads back to itself there: delete it, or give another path",
    errno.ENOENT: "{}; check the path. If it was deleted or moved while this command was running, repeat the command",
    errno.EIO: f"{{}}; check the disk and its connection, {REPEAT}",
}
FORBIDDEN = (errno.EACCES, errno.EROFS, errno.EPERM)
MESSAGES |= dict.fromkeys((errno.ESTALE, errno.ENODEV, errno.ENXIO), MESSAGES[errno.EIO])
MESSAGES |= dict.fromkeys(FORBIDDEN, "{}; that place must be writable")
MESSAGES |= dict.fromkeys(
    (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG), "{}; give another path"
)


def find_errno(error: Exception) -> int:
    """The errno of an error of the file system, also if a library has put its own exception in its place; 0 if it is
    another error."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    if number := re.search(r"\(os error (\d+)\)", text):  # Rust: safetensors, tokenizers
        return int(number[1])
    if isinstance(error, RuntimeError) and text.startswith("Symlink loop"):  # Path.resolve, before Python 3.13
        return errno.ELOOP
    if "No space left on device" in text:
        return errno.ENOSPC
    is_numpy_error = isinstance(error, OSError) and re.search(r"\d+ requested and \d+ written", text)
    is_torch_error = re.search(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+", text)
    if is_numpy_error or is_torch_error:  # a short write, without its reason
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
        return errno.ENOSPC if unlimited else errno.EFBIG
    return 0


def disk_is_full(error: Exception) -> bool:
    """Whether a file could not grow: the disk is full, or a limit is reached."""
    return find_errno(error) in NO_ROOM


def explain(error: Exception, args: argparse.Namespace) -> str:
    """What to tell the user about an error of the file system; "" for another error."""
    number, place = find_errno(error), getattr(error, "filename", None)
    if number not in MESSAGES:
        return ""
    text = str(error)
    if place is None and IN_USE and number in NO_ROOM:
        text += f" (in {' or '.join(map(str, IN_USE))})"
    return MESSAGES[number].format(text) + find_alternative(number, place, args)


def find_alternative(number: int, place: object, args: argparse.Namespace) -> str:
    """How to use another place instead of one that cannot be used."""
    if number not in (*FORBIDDEN, errno.ENOENT):
        return ""
    if place is None:  # multiprocessing's semaphores lie in /dev/shm, which their errors do not say
        return ". It may be the directory for temporary files, which TMPDIR names, or /dev/shm; see `mount` for both"
    path = os.path.realpath(place)
    for name, value in vars(args).items():
        given = os.path.realpath(value) if isinstance(value, Path) else None
        if given and (path.startswith(given) or given.startswith(path)):
            return f", or choose another --{name.replace('_', '-')}"
    if path.startswith(os.path.realpath(os.environ.get("TMPDIR") or "/tmp")):
        return ", or set TMPDIR to another directory"
    return ""
