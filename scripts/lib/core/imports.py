"""What each script imports from scripts/lib, directly or through others, as variables for Make.

    python3 scripts/lib/core/imports.py > .make/imports.mk

Prints a line per script, `imports_sft := scripts/lib/core/cli.py …`: the prerequisites of everything that the script
makes. The Makefile includes the output and makes it again when a script changes, so that nobody keeps a list by hand.
The scripts are only parsed, not imported, and any Python from 3.9 will do.
"""

import ast
import sys
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2]
# These estimate what a step needs, find the goals of its inputs and list imports. They do not affect its artifact.
WITHOUT_EFFECT = {"budget", "forecast", "imports", "pipeline"}


@cache
def imported_by(file: Path, scripts: Path = SCRIPTS) -> set[Path]:
    """The modules below scripts/lib that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    files = {scripts / (name.replace(".", "/") + ".py") for name in names if name.startswith("lib.")}
    return {file for file in files if file.is_file()}


def needed_by(file: Path, scripts: Path = SCRIPTS, without: set = frozenset()) -> set[Path]:
    """The modules that a file imports, directly or through others. `without`: rooms and modules that are left out."""
    modules, queue = set(), [file]
    while queue:
        new = {path for path in imported_by(queue.pop(), scripts) if not {path.parent.name, path.stem} & without}
        queue += new - modules
        modules |= new
    return modules


def main() -> None:
    for script in sorted(SCRIPTS.glob("*.py")):
        modules = sorted(needed_by(script, without=WITHOUT_EFFECT))
        print(f"imports_{script.stem} :=", *(file.relative_to(SCRIPTS.parent).as_posix() for file in modules))


if __name__ == "__main__":
    try:
        main()
    except SyntaxError as error:
        sys.exit(f"{error.filename or 'a script'}:{error.lineno}: {error.msg}; fix it, or `git checkout` the file")
