"""Check artifacts: whole, unchanged since they were made, and made of the inputs that lie there now.

    python scripts/verify.py models/* data/*/raw reports/*

Takes directories; those without a metadata.json are passed over. Prints a line each: whole, stale (an input was made
anew since), or broken and why. Exit code 2 when one is broken or none is found.
"""

from pathlib import Path

from lib import artifact, cli
from lib.cli import InputError


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument("artifacts", type=Path, nargs="+", help="artifact directories")
    return parser


def main(args):
    found = [path for path in args.artifacts if (path / artifact.METADATA).is_file()]
    if not found:
        raise InputError("none of these directories holds a metadata.json; `make all` makes artifacts")
    broken = 0
    for path in found:
        try:
            meta = artifact.read(path)
        except InputError as error:
            broken += 1
            print(f"broken  {error}")
            continue
        old = outdated(meta)
        print(f"stale   {path}: made anew since: {', '.join(old)}" if old else f"whole   {path} ({meta['kind']})")
    return cli.BAD_INPUT if broken else cli.DONE


def outdated(meta: dict) -> list[str]:
    """The inputs that are artifacts, lie there, and are no longer those that it was made of."""
    inputs = [given for given in meta["inputs"].values() if (Path(given["path"]) / artifact.METADATA).is_file()]
    return [g["path"] for g in inputs if artifact.read_metadata(g["path"])["digest"] != g["digest"]]


if __name__ == "__main__":
    cli.run(main, make_parser)
