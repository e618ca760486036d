"""Compare estimated and actual peak memory of each step, at four settings each.

    python scripts/bench_memory.py --base models/smollm2-135m-base --adapter models/smollm2-135m-lora \\
        --models models/smollm2-135m-base models/smollm2-135m-int4 models/smollm2-135m-lora \\
        --data data/factbook/raw --output reports/bench-memory-smollm2-135m

Takes a base model, an adapter on it, and models that evaluate.py loads one after another in one process. That process
should need as much memory as the largest of them, not their sum. Runs the scripts themselves on a few examples and
reads estimated and actual peak memory from their metadata. Leaves memory.json and memory.md.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from lib.core import artifact, cli
from lib.report.page import as_markdown

SETTINGS = {
    "sft": ("--batch-size 1 --max-length 200", "--batch-size 1", "--batch-size 4", "--batch-size 8 --max-length 320"),
    "evaluate": ("--batch-size 1", "--batch-size 8", "--batch-size 8 --max-new-tokens 200", "--batch-size 32"),
    "merge_lora": ("--samples 1", "--samples 8", "--samples 16", "--samples 32"),
    "quantize": (
        "--method gguf-f16", "--method nf4", "--calibration-samples 4", "--calibration-samples 16",
    ),
}  # fmt: skip
FEW = {  # as few rows and repeats as show the peak
    "sft": "--samples 24", "evaluate": "--samples 32 --max-new-tokens 16 --speed-tokens 4",
    "merge_lora": "", "quantize": "--samples 8 --accept-divergence",
}  # fmt: skip


def make_parser():
    parser = cli.parser(__doc__, __file__, also=tuple(SETTINGS))
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--base", type=Path, required=True, help="base model directory")
    files.add_argument("--adapter", type=Path, required=True, help="adapter directory, trained on --base")
    files.add_argument("--models", type=Path, nargs="+", required=True, help="models to load in one process, in order")
    files.add_argument("--data", type=Path, required=True, help="directory of generate_data.py, or a file (see README)")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    options = parser.add_argument_group("options")
    options.add_argument("--seed", type=cli.integer(0), help="random seed for the examples' choice")
    return parser


def main(args):
    for path in (args.base, args.adapter, *args.models):
        artifact.identify(path)
    inputs = {"base": args.base, "adapter": args.adapter, "data": args.data} | {p.name: p for p in args.models}
    with artifact.write_artifact(args.output, "bench", args, inputs) as build:
        steps = [
            {"step": step, "setting": setting} | run(step, setting, args)
            for step, settings in SETTINGS.items()
            for setting in settings
        ]
        alone = {path.name: measure_peak([path], args) for path in args.models}
        together = measure_peak(args.models, args)
        build.metrics = {"steps": steps, "alone": alone, "one_after_another": together}
        artifact.write_json(build.path / "memory.json", build.metrics)
        text = as_markdown(build_blocks(build.metrics))
        (build.path / "memory.md").write_text(text, encoding="utf-8")
    print(text, end="")
    print(args.output)


def run(step: str, setting: str, args) -> dict:
    """{expected_bytes, peak_bytes} of one run of a script."""
    flags = {
        "sft": ["--model", args.base], "evaluate": ["--model", args.base], "quantize": ["--model", args.base],
        "merge_lora": ["--adapter", args.adapter, "--base", args.base],
    }[step]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="memory-") as scratch:
        folder, script = Path(scratch), Path(__file__).with_name(f"{step}.py")
        runs = ["--run-dir", folder / "run"] if step in ("sft", "evaluate") else []
        command = [sys.executable, script, *flags, "--data", args.data, "--output", folder / "made", *runs]
        command += ["--profile", args.profile, "--threads", str(args.threads), *FEW[step].split(), *setting.split()]
        process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if process.returncode:
            raise cli.InputError(
                f"{step}.py {setting}: exit code {process.returncode}: {process.stderr.strip()[-500:]}"
            )
        meta = artifact.read_metadata(folder / "made")
    figures = {"expected_bytes": meta["expected_memory_bytes"], "peak_bytes": artifact.peak_bytes(meta)}
    print(
        f"{step} {setting}: estimated {figures['expected_bytes'] / 1e9:.2f} GB, used {figures['peak_bytes'] / 1e9:.2f}"
    )
    return figures


def measure_peak(paths: list[Path], args) -> int:
    from lib.data import records
    from lib.quant import divergence

    rows = records.sample_rows(records.load_split(args.data, "test"), 16, args.seed)
    return divergence.run_in_fresh_process(answer_in_turn, paths, rows, args.threads)


def answer_in_turn(paths: list[Path], rows: list[dict], threads: int) -> int:
    """The peak of this process in bytes after a few answers of each model, each closed before the next is loaded."""
    from lib.core import hardware
    from lib.engines.opening import open_engine
    from lib.model.directory import open_directory

    for path in paths:
        engine = open_engine(open_directory(path), threads=threads)
        prompts = [engine.prompt_ids(row["prompt"]) for row in rows]
        engine.examine(prompts, [engine.answer_ids(row["gold"][0]) for row in rows], 8)
        engine.close()
    return hardware.peak_gpu_memory_bytes() or hardware.peak_memory_bytes()


def build_blocks(metrics: dict) -> list[tuple]:
    def gigabytes(size: int) -> str:
        return f"{size / 1e9:.2f}"

    def row(step: dict) -> list[str]:
        expected, peak = step["expected_bytes"], step["peak_bytes"]
        return [step["step"], step["setting"], gigabytes(expected), gigabytes(peak), f"{expected / peak - 1:+.0%}"]

    together, largest = metrics["one_after_another"], max(metrics["alone"].values())
    return [
        ("title", "Memory: estimated and actual"),
        ("text", "Estimated: the script's estimate before it loads a model. Actual: the largest resident set of its "
                 "process, or the most memory that torch allocated on the GPU if it used one. Both are in GB."),
        ("table", "words", ["script", "setting", "estimated", "actual", "difference"], [*map(row, metrics["steps"])]),
        ("text", f"Models that answer one after another in one process use {gigabytes(together)} GB, "
                 f"{together / largest:.2f} times as much as the largest model alone."),
        ("table", "words", ["model", "alone"], [[name, gigabytes(size)] for name, size in metrics["alone"].items()]),
    ]  # fmt: skip


if __name__ == "__main__":
    cli.run(main, make_parser)
