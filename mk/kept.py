"""Keep the previous version of each artifact, so that going back to earlier values rebuilds nothing.

`make all SAMPLES=200`, then SAMPLES=500, then SAMPLES=200: the third run moves the first version back from
models/.kept, provided that command, code and the content of the inputs are the same. One earlier version of each
artifact is kept, and none if the free disk space is less than three times its size. `make clean` deletes these
versions.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "lib" / "core"))
import inputs  # one that needs no other module, since nothing is installed yet

METADATA = "metadata.json"
# Stages that read figures from the metadata of their inputs, which digests leave out, or that only measure.
ALWAYS_RUN = ("report", "pareto", "bench_memory")


class Replaced:
    """The artifact that a stage replaces. `settings` are the files with the stage's profile and values."""

    def __init__(self, folder: Path, output: Path, command: list, settings: list):
        self.root, self.output = folder.parent, output
        self.record = folder / "keys" / output.relative_to(self.root)
        self.stage = find_script(command)[0].stem
        self.key, self.old = compute_key(command, output, settings), None
        self.kept = output.parent / ".kept"
        self.before = read_digest(output)
        if output.is_symlink():  # to a larger disk, perhaps: it would have to be renamed there
            return
        with contextlib.suppress(OSError, ValueError):  # an artifact that was built without make has no key
            key, digest = self.record.read_text(encoding="utf-8").split()
            self.old = key if digest == self.before else None

    def version(self, key: str) -> Path:
        return self.kept / f"{self.output.name}-{key[:12]}"

    def restore(self) -> str:
        """A message if the artifact need not be built, otherwise ''. A version that this command built before replaces
        the present one."""
        if self.stage in ALWAYS_RUN:
            return ""
        if self.old is None or "B" in os.environ.get("MAKEFLAGS", "").partition(" ")[0]:  # make -B
            return ""
        earlier = self.output if self.old == self.key else self.version(self.key)
        meta = inputs.read_json(earlier / METADATA)
        if not meta or not all((earlier / name).is_file() for name in meta.get("files", ())):
            return ""
        if inputs.find_changed(meta, inputs.list_digests(inputs.read_artifacts(self.root))):
            return ""
        if self.old != self.key:
            shutil.rmtree(self.version(self.old), ignore_errors=True)  # left by a kill between the next two lines
            self.output.rename(self.version(self.old))
            earlier.rename(self.output)  # after a kill between these two lines, the next run builds it
            self.write_record()
        os.utime(self.output / METADATA)  # for Make: newer than its inputs
        return "up to date" if self.old == self.key else "reused the version that was built with the same values"

    def set_aside(self) -> None:
        """Before the stage: copy its artifact as hard links. They need no disk space until the artifact is replaced."""
        self.aside = self.kept / f"{self.output.name}.aside"
        shutil.rmtree(self.aside, ignore_errors=True)
        if self.output.is_symlink() or not self.before or self.old == self.key:
            return
        size = sum(file.stat().st_size for file in self.output.rglob("*") if file.is_file())
        if shutil.disk_usage(self.output).free < 3 * size:
            return
        with contextlib.suppress(OSError):  # without hard links, nothing is kept
            shutil.copytree(self.output, self.aside, copy_function=os.link)

    def is_new(self) -> bool:
        """Whether the artifact has been replaced, also by a stage that failed afterwards."""
        return read_digest(self.output) not in ("", self.before)

    def finish(self, succeeded: bool) -> None:
        """After the stage: if it made the artifact, keep the replaced one instead of an older version. One that was
        built without make, whose key is unknown, is kept under its digest."""
        if succeeded or self.is_new():
            self.write_record()
            if self.aside.is_dir():
                for version in self.kept.glob(f"{self.output.name}-*"):
                    if re.fullmatch(re.escape(self.output.name) + "-[0-9a-f]{12}", version.name):
                        shutil.rmtree(version, ignore_errors=True)
                self.aside.rename(self.version(self.old or self.before))
        shutil.rmtree(self.aside, ignore_errors=True)

    def write_record(self) -> None:
        write_file(self.record, f"{self.key} {read_digest(self.output)}\n".encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def read_digest(artifact: Path) -> str:
    """The digest of an artifact; '' if its metadata cannot be read, which the stage itself reports."""
    try:
        return json.loads((artifact / METADATA).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def find_script(command: list) -> tuple[Path, list]:
    """The script that a command runs, and its arguments."""
    n = next(n for n, word in reversed([*enumerate(command)]) if re.fullmatch(r"scripts/\w+\.py", word))
    return Path(command[n]), command[n + 1 :]


def compute_key(command: list, output: Path, settings: list) -> str:
    """A digest of all that an artifact depends on: command, settings, inputs, and its script's code and configs."""
    script, words = find_script(command)
    rules = Path(".make/imports.mk").read_text(encoding="utf-8")
    imported = re.search(f"^imports_{script.stem} :=(.*)$", rules, re.M)[1].split()
    configs = (path for path in Path("configs").rglob("*.yaml") if path.parent.name != "profiles")
    files = [script, *map(Path, [*imported, *settings]), *sorted(configs)]
    digest = hashlib.sha256(os.fsencode("\0".join([str(script), *words])))
    for word in words:
        # os.path, since a word may be a prompt that is too long for a path.
        if os.path.isfile(os.path.join(word, METADATA)) and Path(word) != output:
            digest.update(read_digest(Path(word)).encode())
        elif os.path.isfile(word):
            files.append(Path(word))
    for file in files:
        if file.is_file():
            with open(file, "rb") as stream:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(block)
    return digest.hexdigest()
