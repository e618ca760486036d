"""Artifacts copied whole: to a mounted drive, to another machine's disk, and back.

A copy is made beside its target, file by file. Each file is checked against its digest in metadata.json. The copy is
renamed when it is complete. If it is interrupted, the copied files stay, and the same command continues from there.
"""

import shutil
from pathlib import Path

from lib.core import artifact, file_errors
from lib.core.cli import InputError


def copy_artifact(source: Path, target: Path, replace: bool = False) -> bool:
    """Copy an artifact; False if it is at `target` already. With `replace`, a different artifact there is replaced.

    Raises InputError if `source` is not intact or contains links, if `target` is no artifact or (without `replace`) a
    different one, if there is too little disk space, or if the destination becomes unavailable.
    """
    meta = artifact.read(source)
    if links := [path for path in sorted(source.rglob("*")) if path.is_symlink()]:
        raise InputError(f"{links[0]}: is a link, which no artifact contains; delete {source} and rebuild it")
    target.parent.mkdir(parents=True, exist_ok=True)
    target = target.resolve()
    if target.exists() and not artifact.is_ours(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} already exists and was not made by Quartet; move it or choose another destination")
    partial = target.with_name(f"{target.name}.partial")
    if artifact.is_ours(target):
        same_digest = artifact.read_metadata(target)["digest"] == meta["digest"]
        if same_digest and artifact.digest_of(artifact.file_digests(target)) == meta["digest"]:
            shutil.rmtree(partial, ignore_errors=True)  # a run that was killed after the exchange leaves the old one
            if replace:
                update_metadata(source, target)
            return False
        if not replace and not same_digest:
            raise InputError(f"{target}: contains a different artifact; move it or choose another destination")
    try:
        copy_files(source, partial, meta["files"])
        artifact.replace(partial, target)
    except OSError as error:
        if file_errors.disk_is_full(error):
            raise
        raise InputError(
            f"{target}: copying failed: {error.strerror or error}. The files copied so far are kept. Check that the "
            "destination is available and writable, then repeat the command to resume"
        ) from None
    shutil.rmtree(partial, ignore_errors=True)  # the old artifact, if the two were exchanged
    return True


def update_metadata(source: Path, target: Path) -> None:
    """Copy metadata.json alone, if it differs: another command may have built equal files, or measured them again."""
    content = (source / artifact.METADATA).read_bytes()
    if content != (target / artifact.METADATA).read_bytes():
        partial = target / f"{artifact.METADATA}.partial"
        partial.write_bytes(content)
        artifact.fsync(partial)
        partial.replace(target / artifact.METADATA)


def copy_files(source: Path, partial: Path, files: dict[str, str]) -> None:
    """Copy the files that `partial` lacks, metadata.json last; remove those that are not in `files`."""
    digests = artifact.file_digests(partial) if partial.is_dir() else {}
    missing = [name for name in files if digests.get(name) != files[name]]
    size, free = sum((source / name).stat().st_size for name in missing), shutil.disk_usage(partial.parent).free
    if size > free:
        raise InputError(
            f"{partial.parent}: has {free / 1e9:.2f} GB free, but {source} needs {size / 1e9:.2f} GB more; nothing was "
            "copied"
        )
    for name in digests.keys() - files.keys():
        (partial / name).unlink()
    for name in missing:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, partial / name)
        artifact.fsync(partial / name)
        if artifact.sha256(partial / name) != files[name]:
            raise InputError(
                f"{partial / name}: differs from the original; repeat the command or choose another destination"
            )
    partial.mkdir(exist_ok=True)  # for an artifact without files
    shutil.copyfile(source / artifact.METADATA, partial / artifact.METADATA)
    artifact.fsync(partial / artifact.METADATA)
