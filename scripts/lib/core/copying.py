"""Artifacts copied whole: to a mounted drive, to another machine's disk, and back.

A copy is made beside its place, file by file, each held against the digest that the artifact knows, and renamed when
all are there. Cut off at any moment, what was copied stays, and the same copy goes on from there.
"""

import shutil
from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import InputError


def copy_artifact(source: Path, target: Path, replace: bool = False) -> bool:
    """Copy an artifact; False where it is there already. One of other content is replaced, or else refused.

    Raises InputError where `source` is not whole, where something that is no artifact lies at `target`, and where there
    is too little room or the place goes away.
    """
    meta = artifact.read(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    target = target.resolve()
    if target.exists() and not artifact.is_ours(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} already exists and was not made by Quartet; move it or choose another destination")
    partial = target.with_name(f"{target.name}.partial")
    if artifact.is_ours(target):
        there = artifact.read_metadata(target)["digest"] == meta["digest"]
        if there and artifact.digest_of(artifact.file_digests(target)) == meta["digest"]:
            shutil.rmtree(partial, ignore_errors=True)  # killed after the exchange, an old one may be left
            return False
        if not replace and not there:
            raise InputError(f"{target}: contains a different artifact; move it or choose another destination")
    try:
        copy_files(source, partial, meta["files"])
        artifact.replace(partial, target)
    except OSError as error:
        if cli.disk_is_full(error):
            raise
        raise InputError(
            f"{target}: copying failed: {error.strerror or error}. The files copied so far are kept. Check that the "
            "destination is available and writable, then repeat the command to resume"
        ) from None
    shutil.rmtree(partial, ignore_errors=True)  # the old one, where it was exchanged
    return True


def copy_files(source: Path, partial: Path, files: dict[str, str]) -> None:
    """Copy what is not yet in `partial`, metadata.json last; remove what is not to be there."""
    here = artifact.file_digests(partial) if partial.is_dir() else {}
    left = [name for name in files if here.get(name) != files[name]]
    size, free = sum((source / name).stat().st_size for name in left), shutil.disk_usage(partial.parent).free
    if size > free:
        raise InputError(
            f"{partial.parent}: has {free / 1e9:.2f} GB free, but {source} needs {size / 1e9:.2f} GB more; nothing was "
            "copied"
        )
    for name in here.keys() - files.keys():
        (partial / name).unlink()
    for name in left:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, partial / name)
        artifact.fsync(partial / name)
        if artifact.sha256(partial / name) != files[name]:
            raise InputError(
                f"{partial / name}: differs from the original; repeat the command or choose another destination"
            )
    partial.mkdir(exist_ok=True)  # of an artifact without files
    shutil.copyfile(source / artifact.METADATA, partial / artifact.METADATA)
    artifact.fsync(partial / artifact.METADATA)
