"""Benchmark dpo.py against TRL's DPOTrainer with a full reference model, on the same pairs, in interleaved runs.

    python scripts/bench_dpo.py --model models/smollm2-135m-base --adapter models/smollm2-135m-lora \\
        --data data/factbook/preferences --output reports/bench-dpo-smollm2-135m

Each run is a process of its own. Measured are its wall-clock seconds and its peak resident memory; on a GPU, the latter
does not include GPU memory. DPOTrainer trains the same adapter with its own defaults, and its reference is a second,
merged copy of the model. Dtype, beta, learning rate, epochs and pairs per step are those of dpo.py with
configs/dpo.yaml. DPOTrainer runs twice: once with all pairs of a step in one forward pass, its default, and once with
as many as dpo.py. Leaves bench.json and bench.md.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.core import artifact, cli, compute
from lib.core.wording import duration, megabytes
from lib.model import directory, loading
from lib.report.page import as_markdown

SCRIPTS = Path(__file__).resolve().parent


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="base model directory")
    files.add_argument("--adapter", type=Path, required=True, help="LoRA adapter to start from")
    files.add_argument("--data", type=Path, required=True, help="preference artifact, or a file of pairs")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    options = parser.add_argument_group("options")
    options.add_argument("--samples", type=cli.integer(1), help="training pairs; all if there are fewer")
    options.add_argument("--turns", type=cli.integer(1), help="runs of each trainer")
    options.add_argument("--seed", type=cli.integer(0), help="random seed for the pairs' choice and order")
    options.add_argument(
        "--stock", type=cli.integer(1),
        help="train with DPOTrainer alone into --output, with this many pairs per forward pass "
             "(default: run the benchmark)",
    )  # fmt: skip
    return parser


def main(args):
    from lib.data import records

    settings = cli.read_yaml(cli.ROOT / "configs" / "dpo.yaml")
    inputs = artifact.identify_inputs({"base": args.model, "adapter": args.adapter, "data": args.data})
    pairs = records.sample_rows(records.load_pairs(args.data, "train"), args.samples, args.seed)
    if args.stock:
        return train_stock(args, pairs, settings)
    batch, step = settings["batch_size"], settings["batch_size"] * settings["accumulation_steps"]
    trainers = {
        "dpo.py": ["dpo.py", "--profile", "none"],
        "DPOTrainer": ["bench_dpo.py", "--stock", step],
        f"DPOTrainer, {batch} at a time": ["bench_dpo.py", "--stock", batch],
    }
    with artifact.write_artifact(args.output, "bench", args, inputs) as build:
        runs = {name: [] for name in trainers}
        for turn in range(args.turns):
            for name in sorted(trainers, reverse=turn % 2 == 1):  # no trainer always follows the same other
                runs[name].append(measure(trainers[name], pairs, args))
                seconds, peak = runs[name][-1].values()
                print(f"run {turn + 1}: {name}: {duration(seconds)}, {megabytes(peak)} MB", file=sys.stderr)
        build.metrics = compare(runs, len(pairs))
        artifact.write_json(build.path / "bench.json", build.metrics)
        text = as_markdown(build_blocks(build.metrics))
        (build.path / "bench.md").write_text(text, encoding="utf-8")
    print(text, end="")
    print(args.output)


def measure(trainer: list, pairs: list[dict], args) -> dict[str, float]:
    """Seconds and peak bytes of a trainer on a file of the pairs. From a file dpo.py holds no pairs out to judge."""
    from lib.data import records

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        records.write(folder / "pairs.jsonl", pairs)
        flags = ["--model", args.model, "--adapter", args.adapter, "--data", folder / "pairs.jsonl"]
        flags += ["--samples", len(pairs), "--seed", args.seed, "--threads", args.threads, "--output", folder / "made"]
        flags += ["--run-dir", folder / "run"] if trainer[0] == "dpo.py" else []
        command = [sys.executable, SCRIPTS / trainer[0], *trainer[1:], *flags]
        with open(folder / "said", "w+b") as log:
            started = time.perf_counter()
            process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                raise RuntimeError(
                    f"{trainer[0]} failed with exit code {process.returncode}:\n{log.read().decode()[-3000:]}"
                )
    return {"seconds": round(seconds, 3), "peak_bytes": usage.ru_maxrss * 1024}


def train_stock(args, pairs: list[dict], settings: dict) -> None:
    """Train with DPOTrainer as its documentation does."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    compute.use_threads(args.threads)
    base = directory.open_directory(args.model)
    policy, reference = (
        loading.attach_adapter(loading.load_model(base, "fp32"), args.adapter, args.model, trainable=trainable)
        for trainable in (True, False)
    )
    step = settings["batch_size"] * settings["accumulation_steps"]
    config = DPOConfig(
        output_dir=str(args.output), per_device_train_batch_size=args.stock,
        gradient_accumulation_steps=step // args.stock, num_train_epochs=settings["epochs"],
        learning_rate=settings["learning_rate"], beta=settings["beta"], seed=args.seed,
        bf16=loading.torch_dtype("auto") == torch.bfloat16, fp16=loading.torch_dtype("auto") == torch.float16,
        use_cpu=not torch.cuda.is_available(), report_to="none",
    )  # fmt: skip
    rows = Dataset.from_list([{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs])
    DPOTrainer(
        policy,
        reference.merge_and_unload(),
        config,
        train_dataset=rows,
        processing_class=directory.load_tokenizer(base),
    ).train()


def compare(runs: dict[str, list[dict]], pairs: int) -> dict:
    from lib.data import metrics

    def spread(name: str, key: str) -> dict:
        return metrics.spread([run[key] for run in runs[name]])

    def ratio(name: str, key: str) -> dict:
        return metrics.spread([a[key] / b[key] for a, b in zip(runs["dpo.py"], runs[name])])

    return {
        "pairs": pairs,
        "turns": runs,
        "ways": {name: {key: spread(name, key) for key in ("seconds", "peak_bytes")} for name in runs},
        "dpo.py_to": {
            name: {key: ratio(name, key) for key in ("seconds", "peak_bytes")} for name in runs if name != "dpo.py"
        },
    }


def build_blocks(metrics: dict) -> list[tuple]:
    rows = []
    for name, spreads in metrics["ways"].items():
        seconds, peak = spreads["seconds"], spreads["peak_bytes"]
        relative = metrics["dpo.py_to"].get(name)
        rows.append([
            name, f"{seconds['median']:.1f} ({seconds['min']:.1f}–{seconds['max']:.1f})",
            f"{megabytes(peak['median'])} ({megabytes(peak['min'])}–{megabytes(peak['max'])})",
            *(f"{relative[key]['median']:.2f}" if relative else "" for key in ("seconds", "peak_bytes")),
        ])  # fmt: skip
    header = ["trainer", "seconds", "peak memory, MB", "relative time of dpo.py", "relative peak of dpo.py"]
    runs = len(metrics["turns"]["dpo.py"])
    caption = f"{metrics['pairs']} pairs, {runs} interleaved runs: median and range. Ratios are within a run."
    return [("title", "Interleaved DPO benchmark"), ("text", caption), ("table", "words", header, rows)]


if __name__ == "__main__":
    cli.run(main, make_parser)
