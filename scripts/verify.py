"""Check that artifacts are complete, intact and up to date.

    python scripts/verify.py models/* data/*/raw reports/*

Takes directories; those without a metadata.json are skipped. Prints one line per artifact: intact, stale (the content
of an input has changed since), or broken with the reason. The exit code is 2 if any artifact is broken or none is
found.
"""

from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import InputError


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("artifacts", type=Path, nargs="+", help="artifact directories")
    return parser


def main(args):
    paths = [path for path in args.artifacts if (path / artifact.METADATA).is_file()]
    if not paths:
        raise InputError("none of these directories contains a metadata.json; run `make all` to build artifacts")
    broken = 0
    for path in paths:
        state, why = artifact.state(path)
        broken += state == "broken"
        words = {
            "intact": f"{path} ({why})",
            "stale": f"{path}: rebuild it, its inputs have changed: {why}",
            "broken": why,
        }
        print(f"{state:<7} {words[state]}")
    return cli.BAD_INPUT if broken else cli.DONE


if __name__ == "__main__":
    cli.run(main, make_parser)
