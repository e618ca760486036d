"""Benchmark stages on a quiet machine and beside one busy process per core, with several spin counts of OpenMP.

    python scripts/bench_busy.py --model models/smollm2-135m-base --int4 models/smollm2-135m-int4 \\
        --data data/factbook/raw --output reports/bench-busy-smollm2-135m

The threads of torch and of llama.cpp wait for each other after every product. A thread that spins while it waits keeps
a core from the other thread, if that one has to share its core with another program. GOMP_SPINCOUNT is how often a
thread of GNU's OpenMP looks before it sleeps: 300000 is OpenMP's own default, --spins the others to try. Each run is a
process of its own, and its figure the wall-clock seconds of the whole command. The turns go through the spin counts in
alternating order. Nothing else may run meanwhile. Leaves bench.json and bench.md.
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from lib.core import artifact, cli, hardware
from lib.report.page import as_markdown

SCRIPTS = Path(__file__).resolve().parent
STAGES = ("train", "evaluate", "evaluate INT4")
LOADS = ("quiet", "busy")


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="base model directory, to train and to evaluate")
    files.add_argument("--int4", type=Path, required=True, help="GGUF model directory, to evaluate in llama.cpp")
    files.add_argument("--data", type=Path, required=True, help="data artifact, or a file of examples")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    options = parser.add_argument_group("options")
    options.add_argument(
        "--spins", type=cli.integer(0), nargs="+", default=[300000, 10000, 1000, 0], help="values of GOMP_SPINCOUNT"
    )
    options.add_argument("--turns", type=cli.integer(1), help="runs of each stage with each value and load")
    options.add_argument("--samples", type=cli.integer(1), help="training examples; a quarter as many are evaluated")
    options.add_argument("--seed", type=cli.integer(0), help="random seed for the choice of examples")
    return parser


def main(args):
    inputs = artifact.identify_inputs({"model": args.model, "int4": args.int4, "data": args.data})
    with artifact.write_artifact(args.output, "bench", args, inputs) as build:
        runs = []
        for turn in range(args.turns):
            for spins in sorted(args.spins, reverse=turn % 2 == 1):  # no value always follows the same other
                for load in LOADS:
                    for stage in STAGES:
                        seconds = measure(stage, spins, load, args)
                        runs.append({"stage": stage, "spins": spins, "load": load, "seconds": round(seconds, 2)})
                        print(f"run {turn + 1}: {stage}, {spins} spins, {load}: {seconds:.1f} s", file=sys.stderr)
        build.metrics = {"cores": hardware.count_cores(), "runs": runs, "cells": summarise(runs, args.spins)}
        artifact.write_json(build.path / "bench.json", build.metrics)
        text = as_markdown(build_blocks(build.metrics, args))
        (build.path / "bench.md").write_text(text, encoding="utf-8")
    print(text, end="")
    print(args.output)


def measure(stage: str, spins: int, load: str, args) -> float:
    """Wall-clock seconds of one stage's command."""
    few = ["--samples", args.samples] if stage == "train" else ["--samples", max(1, args.samples // 4)]
    script = "sft.py" if stage == "train" else "evaluate.py"
    model = args.int4 if stage == "evaluate INT4" else args.model
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, SCRIPTS / script, "--model", model, "--data", args.data, *few, "--seed", args.seed]
        command += ["--threads", args.threads, "--output", Path(scratch) / "made", "--run-dir", Path(scratch) / "run"]
        with keep_busy(hardware.count_cores() if load == "busy" else 0):
            started = time.perf_counter()
            process = subprocess.run(
                [*map(str, command)], env=os.environ | {"GOMP_SPINCOUNT": str(spins)},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            seconds = time.perf_counter() - started
        if process.returncode:
            raise RuntimeError(
                f"{script} failed with exit code {process.returncode}:\n{process.stderr.decode()[-3000:]}"
            )
    return seconds


@contextmanager
def keep_busy(count: int):
    """Run `count` processes that do nothing but compute."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def summarise(runs: list[dict], spins: list[int]) -> list[dict]:
    """For each stage and spin count: the seconds quiet and busy, and the share of the quiet speed that is left."""
    from lib.data import metrics

    cells = []
    for stage in STAGES:
        for count in spins:
            quiet, busy = (
                [run["seconds"] for run in runs if (run["stage"], run["spins"], run["load"]) == (stage, count, load)]
                for load in LOADS
            )
            speeds = [a / b for a, b in zip(quiet, busy)]
            cells.append({"stage": stage, "spins": count, "quiet": metrics.spread(quiet), "busy": metrics.spread(busy),
                          "speed_kept": metrics.spread(speeds)})  # fmt: skip
    return cells


def build_blocks(metrics: dict, args) -> list[tuple]:
    def format_spread(spread: dict, digits: int) -> str:
        low, high = (f"{spread[key]:.{digits}f}" for key in ("min", "max"))
        return f"{spread['median']:.{digits}f} ({low}–{high})"

    rows = [
        [cell["stage"], str(cell["spins"]), format_spread(cell["quiet"], 1), format_spread(cell["busy"], 1),
         format_spread(cell["speed_kept"], 2)]
        for cell in metrics["cells"]
    ]  # fmt: skip
    caption = (
        f"{args.samples} training examples and {max(1, args.samples // 4)} evaluated ones on {metrics['cores']} cores, "
        f"{args.turns} alternating runs: median and range. Busy: beside {metrics['cores']} processes that only compute."
    )
    header = ["stage", "GOMP_SPINCOUNT", "seconds, quiet", "seconds, busy", "speed kept"]
    return [("title", "Stages beside other programs"), ("text", caption), ("table", "words", header, rows)]


if __name__ == "__main__":
    cli.run(main, make_parser)
