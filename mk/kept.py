"""What a stage replaces is kept beside it once, so that going back to earlier values makes nothing again.

`make all SAMPLES=200`, then SAMPLES=500, then SAMPLES=200: the third takes back what the second replaced, from
models/.kept, if the same command would make it from the same inputs with the same code. It keeps one earlier version of
each artifact, and none where the disk has not three times its size left. `make clean` removes them.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

METADATA = "metadata.json"


class Replaced:
    """The artifact at a stage's place, before and after the stage. `values` is the file with the stage's values."""

    def __init__(self, folder: Path, output: Path, command: list, values: str):
        self.output, self.record = output, folder / "keys" / output.relative_to(folder.parent)
        self.key, self.old = key_of(command, output, Path(values)), None
        self.kept = output.parent / ".kept"
        with contextlib.suppress(OSError, ValueError):  # of another version, or made by hand: its key is not known
            key, digest = self.record.read_text().split()
            self.old = key if digest == digest_of(output) else None

    def place(self, key: str) -> Path:
        return self.kept / f"{self.output.name}-{key[:12]}"

    def take_back(self) -> str:
        """Whether the artifact is here already, and how; '' where it has to be made. One that this command made before
        takes the place of the one that is there."""
        if self.old is None or "B" in os.environ.get("MAKEFLAGS", "").partition(" ")[0]:  # make -B
            return ""
        if self.old != self.key:
            earlier = self.place(self.key)
            if not (earlier / METADATA).is_file():
                return ""
            self.output.rename(self.place(self.old))
            earlier.rename(self.output)  # killed between these two, the next run makes it
            self.write_record()
        os.utime(self.output / METADATA)  # for Make: newer than what it is made of
        return "up to date" if self.old == self.key else "taken back as it was made with the same values"

    def set_aside(self) -> None:
        """Before the stage: its artifact by hard links, which take no room until it is replaced."""
        self.aside = self.kept / f"{self.output.name}.aside"
        shutil.rmtree(self.aside, ignore_errors=True)
        if self.old in (None, self.key):
            return
        size = sum(file.stat().st_size for file in self.output.rglob("*") if file.is_file())
        if shutil.disk_usage(self.output).free < 3 * size:
            return
        with contextlib.suppress(OSError):  # a file system without hard links keeps nothing
            shutil.copytree(self.output, self.aside, copy_function=os.link)

    def finish(self, done: bool) -> None:
        """After the stage: the old artifact is kept in the place of an older one, or was not replaced."""
        if done:
            self.write_record()
            if self.aside.is_dir():
                for older in self.kept.glob(f"{self.output.name}-*"):
                    if re.fullmatch(re.escape(self.output.name) + "-[0-9a-f]{12}", older.name):
                        shutil.rmtree(older)
                self.aside.rename(self.place(self.old))
        shutil.rmtree(self.aside, ignore_errors=True)

    def write_record(self) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(f"{self.key} {digest_of(self.output)}\n")


def digest_of(artifact: Path) -> str:
    return json.loads((artifact / METADATA).read_text())["digest"]


def key_of(command: list, output: Path, values: Path) -> str:
    """A digest of all that the artifact is made of: command, values, inputs, and the code and configs of its script."""
    script = next(n for n, word in reversed([*enumerate(command)]) if re.fullmatch(r"scripts/\w+\.py", word))
    words = command[script:]
    name = Path(words[0]).stem
    imported = re.search(f"^imports_{name} := (.*)$", Path(".make/imports.mk").read_text(), re.M)[1].split()
    files = [Path(words[0]), *map(Path, imported), *sorted(Path("configs").rglob("*.yaml")), values]
    total = hashlib.sha256("\0".join(words).encode())
    for word in words[1:]:
        if (Path(word) / METADATA).is_file() and Path(word) != output:
            total.update(digest_of(Path(word)).encode())
        elif Path(word).is_file():
            files.append(Path(word))
    for file in files:
        if file.is_file():
            with open(file, "rb") as opened:
                for block in iter(lambda: opened.read(1 << 20), b""):
                    total.update(block)
    return total.hexdigest()
