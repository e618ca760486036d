"""Who may import whom: the rooms of scripts/lib, from the ground floor up."""

import subprocess
import sys
from pathlib import Path

from lib.core import imports
from tests.conftest import REPOSITORY, SCRIPTS

MAY_IMPORT = {
    "core": "",
    "gguf": "core",
    "data": "core",
    "model": "core gguf",
    "budget": "core model",
    "engines": "core gguf data model budget",
    "train": "core model budget",
    "quant": "core gguf data model engines",
    "clara": "core data model engines train",
    "forecast": "core gguf data model budget engines train quant clara",
    "report": "core data",
    "export": "core data model report",
}
MODULES = {file: imports.imported_by(file) for file in SCRIPTS.glob("lib/*/*.py")}
SCRIPT_FILES = sorted(SCRIPTS.glob("*.py"))
SCRIPT_NAMES = {file.stem for file in SCRIPT_FILES}


def test_every_module_stands_in_a_room():
    assert {file.parent.name for file in MODULES} == MAY_IMPORT.keys()
    assert [file.name for file in (SCRIPTS / "lib").glob("*.py")] == ["__init__.py"]


def test_a_room_imports_only_the_rooms_below_it():
    wrong = [
        f"{file.relative_to(SCRIPTS)} imports {other.relative_to(SCRIPTS)}"
        for file, others in MODULES.items()
        for other in others
        if other.parent.name not in {file.parent.name, *MAY_IMPORT[file.parent.name].split()}
    ]
    assert not wrong


def test_no_module_imports_itself_through_others():
    circles = [str(file.relative_to(SCRIPTS)) for file in MODULES if file in imports.needed_by(file)]
    assert not circles


def test_floors_and_arrows_stay_few():
    def floor(room: str) -> int:
        return 1 + max((floor(below) for below in MAY_IMPORT[room].split()), default=0)

    between = [(file, other) for file, others in MODULES.items() for other in others if file.parent != other.parent]
    assert max(map(floor, MAY_IMPORT)) <= 8
    assert len(between) < 160, len(between)


def test_nothing_imports_a_script():
    for file in [*SCRIPT_FILES, *MODULES]:
        code = file.read_text()
        assert not [name for name in SCRIPT_NAMES if f"\nimport {name}\n" in code or f"from {name} import" in code], (
            file
        )


def test_what_is_printed_for_make_is_what_a_process_really_imports():
    """The scripts' own modules after `main` has imported what stands at its top, against the list: none is missing."""
    printed = subprocess.run([sys.executable, imports.__file__], capture_output=True, text=True, check=True).stdout
    known = {name.removeprefix("imports_").strip(): set(files.split()) for name, _, files in
             (line.partition(":=") for line in printed.splitlines())}  # fmt: skip
    assert known.keys() == SCRIPT_NAMES
    for script in ("report", "filter_data", "generate_preferences"):
        code = (
            f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import {script}\n"
            "print(*(m.__file__ for n, m in sorted(sys.modules.items()) if n.startswith('lib.') and m.__file__))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded = {file.removeprefix(f"{REPOSITORY}/") for file in done.stdout.split() if "__init__" not in file}
        without = {file for file in loaded if not {Path(file).parent.name, Path(file).stem} & imports.WITHOUT_EFFECT}
        assert without <= known[script], script


def test_rows_of_a_file_need_nothing_that_make_leaves_out_of_their_prerequisites(tiny_artifacts, tmp_path):
    """Apart from core and records, generate_data.py then calls only what declares flags."""
    rows, output = tiny_artifacts["rows"], tmp_path / "raw"
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPTS)!r})
sys.argv = ["generate_data.py", "--source", {str(rows)!r}, "--output", {str(output)!r}]
import generate_data
from lib.core import cli
called = set()
sys.setprofile(lambda frame, event, _: called.add((frame.f_code.co_filename, frame.f_code.co_name)))
try:
    cli.run(generate_data.main, generate_data.make_parser)
finally:
    sys.setprofile(None)
    print("|".join(f"{{file}}:{{name}}" for file, name in called if "/scripts/lib/" in file))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and output.is_dir(), done.stderr
    called = [place.split("/scripts/lib/")[1] for place in done.stdout.splitlines()[-1].split("|")]
    assert "data/records.py:read_file" in called
    listed = ("core/", "data/records.py", "data/fields.py")  # by code_of_rows in mk/variants.mk
    assert {place.split(":")[1] for place in called if not place.startswith(listed)} <= {
        "add_sampler_flags", "add_load_flags", "<module>", "<genexpr>", "<listcomp>",
    }  # fmt: skip
