"""Delete what was built or downloaded below a root, and leave the user's own files there.

    python3 mk/clean.py .

An artifact has a metadata.json with a digest; leftovers of killed runs and earlier versions have names of their own.
Everything else in models/ and data/ is listed and stays. A link is removed, and what it leads to stays.

Uses only Python's standard library, because it runs before anything is installed.
"""

import re
import shutil
import sys
from pathlib import Path

import kept

LEFTOVERS = re.compile(r"\.kept|.+\.(tmp|old)-\d+|.+\.partial")


def main(root: Path) -> None:
    left = []
    for folder in (root / "models", root / "data"):
        for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
            left += clean(entry, deeper=folder.name == "data")
    for path in (root / "data" / "assets", root / "exports"):
        remove(path)
    if left:
        print("left, since Quartet did not make it: " + ", ".join(map(str, left)))


def clean(path: Path, deeper: bool) -> list[Path]:
    """Remove what is ours at a path, and return what is not. With `deeper`, artifacts are one folder further down."""
    if path.name == "README.md" or (deeper and path.name == "assets"):
        return []
    if path.is_dir() and (LEFTOVERS.fullmatch(path.name) or kept.read_digest(path)):
        return remove(path)
    if not deeper or not path.is_dir() or path.is_symlink():
        return [path]
    left = [other for entry in sorted(path.iterdir()) for other in clean(entry, deeper=False)]
    return left if left or list(path.iterdir()) else remove(path)


def remove(path: Path) -> list:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
    return []


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file of any name may be left
    main(Path(sys.argv[1]))
