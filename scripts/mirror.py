"""Run a stage with a mirror of finished artifacts, for preemptible machines.

    python scripts/mirror.py --output models/smollm2-135m-lora --from /mnt/drive/x --to /mnt/drive/x -- \\
        scripts/sft.py --model models/smollm2-135m-base … --output models/smollm2-135m-lora

`make all MIRROR_TO=/mnt/drive/x` copies each artifact there once it is finished. `make all MIRROR_FROM=/mnt/drive/x`,
on a new machine, copies an artifact back instead of building it, if the same command built it with the same code,
defaults and library versions from the same inputs; otherwise it builds the artifact and prints why. Checksums are
verified in both directions. An interrupted copy is resumed, and a file that is already there is not copied again. If
the mirror is full or gone, that is a warning, and the stage counts as done. With --to alone, all local artifacts are
copied there, and a copy that fails is an error; `make all` ends with it.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from lib.core import artifact, children, cli, copying
from lib.core.cli import InputError


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--output", type=Path, help="artifact that the command builds (default: none)")
    files.add_argument("--root", type=Path, default=Path("."), help="directory that contains models, data and reports")
    files.add_argument(
        "--from", dest="source", type=Path, help="mirror to copy the artifact from, if it is there (default: none)"
    )
    files.add_argument("--to", dest="target", type=Path, help="mirror to copy the artifact to (default: none)")
    files.add_argument("command", nargs=argparse.REMAINDER, help="-- followed by the script and flags that build it")
    return parser


def main(args):
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if bool(command) != bool(args.output) or not (command or args.target):
        raise InputError("expected --output and, after --, the command that builds it; or --to alone")
    for folder in (args.source, args.target):
        if folder and folder.resolve() == args.root.resolve():
            raise InputError(f"{folder}: is where artifacts are built; choose another directory")
    if not command:
        kinds = ("models/*", "data/*/*", "reports/*")
        metadata_files = [file for kind in kinds for file in sorted(args.root.glob(f"{kind}/{artifact.METADATA}"))]
        return mirror([file.parent for file in metadata_files], args)
    place = relative_path(args.output, args.root)
    stored = args.source and args.source / place
    if not (stored and copy_if_current(stored, args.output, command)) and (code := run(command)):
        return code
    try:
        mirror([args.output], args)
    except (InputError, OSError) as error:  # hours of work must not count as failed because a drive is full or gone
        print(f"warning: {args.output} is complete here, but was not mirrored: {error}", file=sys.stderr)


def relative_path(path: Path, root: Path) -> Path:
    """A path relative to the root."""
    relative = Path(os.path.relpath(path, root))
    if relative.parts[:1] in ((), ("..",)):
        raise InputError(f"--output {path}: is outside --root {root}")
    return relative


def mirror(paths: list[Path], args) -> None:
    for path in paths if args.target else ():
        if copying.copy_artifact(path, target := args.target / relative_path(path, args.root), replace=True):
            print(f"{path}: mirrored to {target}", file=sys.stderr)


def copy_if_current(stored: Path, output: Path, command: list[str]) -> bool:
    """Copy an artifact instead of building it. False if the stored one cannot replace it."""
    if not (stored / artifact.METADATA).is_file():
        return False
    meta = artifact.read_metadata(stored)
    if why := find_difference(meta, command):
        print(f"{stored}: not used, because {why}", file=sys.stderr)
        return False
    copying.copy_artifact(stored, output, replace=True)
    os.utime(output / artifact.METADATA, (cli.STARTED, cli.STARTED))  # for Make: newer than its inputs
    print(f"{output}: copied from {stored}", file=sys.stderr)
    return True


def find_difference(meta: dict, command: list[str]) -> str:
    """Why the command would not build the artifact of this metadata, or ''."""
    if meta["command"] != artifact.format_command(command):
        return f"another command built it: {meta['command']}"
    digest = artifact.code_digest(command[0])
    if not digest or meta["code"].get("digest") != digest:
        return f"another version of the code built it: commit {meta['code'].get('commit')}"
    recorded, current = meta["arguments"] | meta.get("requested", {}), resolve_arguments(command)
    for name in sorted(recorded.keys() | current.keys()):
        if recorded.get(name) != current.get(name):
            flag = f"--{name.replace('_', '-')}"
            return f"{flag} was {recorded.get(name)} when it was built, and is now {current.get(name)}"
    installed = artifact.versions(meta["versions"])
    for name, version in meta["versions"].items():
        if version != installed.get(name):
            return f"it was built with {name} {version}, and {installed.get(name, 'none')} is installed here"
    changed = [name for name, identity in meta["inputs"].items() if has_changed(identity, meta["finished"])]
    return f"it was built from another {' and '.join(changed)}" if changed else ""


def resolve_arguments(command: list[str]) -> dict:
    """The arguments of a script with the defaults of this machine and this version of the configs."""
    script = importlib.import_module(Path(command[0]).stem)
    args = cli.parse(script.make_parser(), command[1:])
    return {name: artifact.to_json(value) for name, value in vars(args).items()}


def has_changed(identity: dict, finished: str) -> bool:
    """Whether an input that exists here has other content, or was rebuilt later (with equal content but other timings).
    A missing input counts as unchanged: what was fetched may lie elsewhere, and its digest is in configs/."""
    path = Path(identity["path"])
    if not path.exists():
        return False
    rebuilt = (path / artifact.METADATA).is_file() and artifact.read_metadata(path)["finished"] > finished
    return rebuilt or artifact.identify(path)["digest"] != identity["digest"]


def run(command: list[str]) -> int:
    process = children.start([sys.executable, *command])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()  # the stage saves its progress and prints that
        return process.wait()


if __name__ == "__main__":
    cli.run(main, make_parser)
