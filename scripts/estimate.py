"""Estimate time, disk and cost of each stage of a pipeline before it runs.

    python scripts/estimate.py --pipeline all --values SAMPLES=200 --output reports/smollm2-135m-estimate

Takes values as `make` takes them, and reads from Make which stages they lead to. Needs the base model (config.json and
the tokenizer are enough, since missing weights are replaced by random ones) and the data. Counts the tokens of the
examples that the stages will read, and times a few steps of each kind on this machine. For a GPU in another machine,
for instance with --profile t4, times follow from the published peaks in configs/prices.yaml and are rough. Texts that a
model has yet to write (--pipeline align) are assumed to be as long as those of the default model. Leaves estimate.json:
the stages, the measured rates with their repeats, and the assumptions. The report of the finished pipeline compares the
estimate with the actual figures.
"""

import argparse
import importlib
import json
import re
import time
from contextlib import nullcontext
from pathlib import Path

from lib.core import artifact, cli, hardware
from lib.core.cli import InputError
from lib.core.pipeline import list_stages
from lib.core.wording import duration, megabytes
from lib.forecast import workload
from lib.forecast.costs import Cost, Job
from lib.forecast.plan import Plan, read_plan
from lib.forecast.timing import KINDS, choose_timed_quantisation, find_weight_files, make_rate, measure

SCRIPTS = [path.stem for path in (cli.ROOT / "scripts").glob("*.py")]
NOT_COMPARED = {"profile", "threads"}  # arguments that do not change what a stage builds


def make_parser():
    parser = cli.parser(__doc__, __file__, also=tuple(SCRIPTS))
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--pipeline", choices=("all", "align", "clara"), help="pipeline to estimate, by the name of its make target"
    )
    files.add_argument(
        "--values", nargs="+", action="extend", type=make_value, default=[], metavar="NAME=VALUE",
        help="values as make takes them, for example SAMPLES=200 (default: none)",
    )  # fmt: skip
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument(
        "--all-stages", action=cli.OnOff, default=False, help="include the stages that are already finished"
    )
    options = parser.add_argument_group("options")
    options.add_argument(
        "--rates", type=Path, help="earlier estimate whose measured rates are used again (default: measure them)"
    )
    options.add_argument(
        "--price-per-hour", type=cli.number(0),
        help="price of the machine in dollars per hour (default: a GPU's list price; none for this machine)",
    )  # fmt: skip
    for peak in ("compute", "bandwidth"):
        words = f"fraction of a GPU's peak {peak} that is reached in practice"
        options.add_argument(f"--{peak}-efficiency", type=cli.number(0.01, 1), help=words)
    return parser


def make_value(text: str) -> str:
    if not re.match("[A-Z][A-Z0-9_]*=", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a variable of make; expected, for example, SAMPLES=200")
    return text


def main(args):
    # --- check, count the work -------------------------------------------------------------------------
    peak = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml").get(args.profile)
    if args.profile == hardware.recognise_profile()[0]:
        peak = None  # this machine has that GPU, so it is timed
    plan = read_plan(args.pipeline, args.values, args.profile, elsewhere=bool(peak))
    inputs = artifact.identify_inputs({"model": plan.model, "data": plan.data, "clara data": plan.clara_data or None})
    if not (plan.model / "config.json").is_file():
        raise InputError(
            f"{plan.model}: expected a base model directory, with a config.json; run `make base` to build one"
        )
    started = time.perf_counter()
    from lib.core import compute
    from lib.model import directory

    compute.use_threads(args.threads)
    tokenizer = directory.load_tokenizer(directory.open_directory(plan.model))
    imports = time.perf_counter() - started
    work, samples = workload.count_work(plan, tokenizer)

    # --- time a few steps of each kind -----------------------------------------------------------------
    values = plan.values
    conditions = {
        "model": inputs["model"]["digest"], "machine": [hardware.machine()[key] for key in ("cpu", "cores", "gpu")],
        "--threads": args.threads, "kind of profile": "elsewhere" if peak else "here",
        "--pipeline": args.pipeline, "--method": plan.method,
        "--calibration-samples": bool(values.get("quantize", {}).get("calibration_samples")),
        "sampling": [values[name]["batch_size"] for name in SAMPLERS if name in values],
        "evaluation": {key: plan.evaluation[key] for key in ("batch_size", "precision")},
        "training": {key: values["sft"][key] for key in ("lora_r", "lora_targets", *TRAINING)},
    }  # fmt: skip
    if args.pipeline == "clara":
        keys = (*TRAINING, *workload.SHAPE)
        conditions["clara"] = [{key: values[stage].get(key) for key in keys} for stage in KINDS.values()]
    if args.rates:
        measured = read_rates(args.rates, conditions)
    else:
        measured = measure(plan, samples, args.threads, bool(peak), imports)
    rates = derive_gpu_rates(args, plan, work, measured, peak) if peak else measured

    # --- estimate, write -------------------------------------------------------------------------------
    price = 0.0 if not peak else peak.get("dollars_per_hour")
    price = price if args.price_per_hour is None else args.price_per_hour
    with hardware.simulate(describe_gpu(peak)) if peak else nullcontext():
        stages = estimate_stages(args, plan, work, rates, price, everything=args.all_stages or bool(peak))
    remaining = [stage for stage in stages if stage["status"] != FINISHED]
    estimate = {
        "goal": args.pipeline, "profile": args.profile, "rough": bool(peak), "price_per_hour": price, "stages": stages,
        "seconds": sum(stage["seconds"] for stage in remaining), "bytes": sum(stage["bytes"] for stage in remaining),
        "peak_memory_bytes": max((stage["peak_memory_bytes"] for stage in remaining), default=0),
        "assumptions": list_assumptions(args, plan, work, peak, price),
    }  # fmt: skip
    estimate["cost"] = None if price is None else estimate["seconds"] / 3600 * price
    with artifact.write_artifact(args.output, "estimate", args, inputs) as build:
        details = {"timed_on": conditions, "work": work, "rates": measured, "rates_used": rates}
        artifact.write_json(build.path / "estimate.json", estimate | details)
        build.metrics = estimate
    print(format_table(estimate))
    print(args.output)


SAMPLERS = ("generate_data", "generate_preferences")
TRAINING = ("batch_size", "precision", "gradient_checkpointing")


def describe_gpu(peak: dict) -> hardware.GPU:
    return hardware.GPU(peak["gpu"], tuple(peak["capability"]), int(peak["gigabytes"] * 1e9))


# --- rates --------------------------------------------------------------------------------------------------


def read_rates(path: Path, conditions: dict) -> dict:
    """The rates of an earlier estimate; InputError if they were measured under other conditions."""
    artifact.read(path, "estimate")
    stored = json.loads((path / "estimate.json").read_text(encoding="utf-8"))
    if differing := [key for key, value in conditions.items() if stored["timed_on"].get(key) != value]:
        raise InputError(
            f"--rates {path}: measured with a different {', '.join(differing)}; leave --rates out to measure again"
        )
    return stored["rates"]


def derive_gpu_rates(args, plan: Plan, work: dict, rates: dict, peak: dict) -> dict:
    """The rates of a GPU in another machine: the requested fractions of its published peaks, plus the measured time to
    launch each pass."""
    half, single = (peak[f"tflops_{bits}bit"] * 1e12 * args.compute_efficiency for bits in (16, 32))
    memory, batch = peak["gigabytes_per_second"] * 1e9 * args.bandwidth_efficiency, plan.evaluation["batch_size"]
    parameters, matrices = work["model"]["parameters"], work["model"]["matrices"]

    def answer_rates(launch: float) -> dict:
        read = make_rate([2 * matrices / half], launch)
        step, batch_step = (launch + max(2 * parameters / memory, 2 * parameters * rows / half) for rows in (1, batch))
        return {"read": read, "read batch": read, "step": make_rate([step]), "step batch": make_rate([batch_step])}

    launch = rates["base"]["step"]["seconds"]
    operations = 6 if plan.values["sft"]["gradient_checkpointing"] else 4  # forward, backward, and forward again
    sampling = make_rate([2 * parameters / half], launch + 2 * parameters / memory)
    derived = {
        "base": answer_rates(launch), "lora": answer_rates(rates["lora"]["step"]["seconds"]),
        "read": make_rate([2 * matrices / single], launch),
        "train": make_rate([operations * matrices / half], rates["train"]["of_a_pass"]),
        "sample": dict.fromkeys(rates["sample"], sampling),
    }  # fmt: skip
    if "clara" in rates:

        def derive(kind: str) -> dict:
            checkpointed = kind in KINDS and plan.values[KINDS[kind]]["gradient_checkpointing"]
            operations = 2 if kind == "read" else 6 if checkpointed else 4
            return make_rate([operations * matrices / half], rates["clara"][kind]["of_a_pass"])

        derived["clara"] = rates["clara"] | {kind: derive(kind) for kind in (*KINDS, "read")}
    return {"int4": derived["base"]} | rates | derived


# --- stages -------------------------------------------------------------------------------------------------

FINISHED, MEASURED, ESTIMATED = "finished", "as measured here", "estimated"


def estimate_stages(args, plan: Plan, work: dict, rates: dict, price: float | None, everything: bool) -> list[dict]:
    """The stages of the goal with their time, disk and memory: estimated, or measured where Make would not run the
    stage again. A stage whose script has no estimate_cost is listed only after it has run."""
    from lib.budget import memory
    from lib.model import directory

    config = directory.load_config(directory.open_directory(plan.model))
    targets = plan.values["sft"]["lora_targets"]
    targets = targets if targets == "all-linear" else targets.split(",")
    lora, stages = {"r": plan.values["sft"]["lora_r"], "target_modules": targets}, []
    stale = {stage.output for stage in list_stages(args.pipeline, args.values, only_stale=True)}
    for stage, arguments in plan.stages:
        job = Job(arguments, *plan.describe_model(stage), plan.method, config, lora, work, rates)
        cost = getattr(importlib.import_module(stage.script), "estimate_cost", lambda job: None)(job)
        exists = (stage.output / artifact.METADATA).is_file()
        if exists and (cost is None or (not everything and stage.output not in stale)):
            meta, status = artifact.read_metadata(stage.output), MEASURED if everything else FINISHED
            cost = Cost(meta["seconds"], {"peak": artifact.peak_bytes(meta)}, meta["size_bytes"])
        elif cost is None:
            continue
        else:
            status = ESTIMATED
        stages.append({
            "stage": name_stage(stage.output), "artifact": str(stage.output), "status": status,
            "seconds": cost.seconds, "bytes": int(cost.bytes), "peak_memory_bytes": int(memory.total(cost.memory)),
            "cost": None if price is None else cost.seconds / 3600 * price,
            "arguments": {k: v for k, v in vars(arguments).items() if is_compared(k, v)} if status == ESTIMATED else {},
        })  # fmt: skip
    return stages


def name_stage(output: Path) -> str:
    """The artifact's path below its root, for example models/x-lora."""
    return "/".join(output.parts[-3 if output.parts[-3:-2] == ("data",) else -2 :])


def is_compared(name: str, value) -> bool:
    """Whether a report compares this argument with the artifact's. --learning-rate 0 means the method's own default."""
    return (
        isinstance(value, bool | int | float | str)
        and name not in NOT_COMPARED
        and (name, value) != ("learning_rate", 0)
    )


# --- text ---------------------------------------------------------------------------------------------------


def list_assumptions(args, plan: Plan, work: dict, peak: dict | None, price: float | None) -> list[str]:
    method, gguf = plan.method, bool(plan.method and plan.method.startswith("gguf-"))
    if "clara" in work:
        mean = work["clara"]["evaluation"]["mean"]
        lines = [
            f"The length of the answers is unknown. Assumed: {mean:.1f} tokens, the mean of the reference answers. "
            "Documents found by MiniLM and the reasoner are assumed to be as long as those found by BM25."
        ]
    else:
        answers = work["evaluation"]
        tuned = f"{answers['tuned']['mean']:.1f} tokens, the mean of the reference answers, for fine-tuned models"
        lines = [
            f"The length of the answers is unknown. Assumed: {answers['untuned']['mean']:.0f} tokens, the maximum, "
            + ("for all models." if plan.writes_rows else f"for models without fine-tuning; {tuned}.")
        ]
    lines.append("Not counted: installation, the report (about a second), and repeated work after an interruption.")
    if "dpo" in plan.values:
        lines += workload.list_assumptions(plan)
    if not find_weight_files(plan.model):
        lines.append(f"{plan.model} contains no weights. Steps were timed with random weights of the same shape.")
    if gguf and (timed := choose_timed_quantisation(method)) != method.removeprefix("gguf-"):
        lines.append(f"llama.cpp was timed with a file in {timed}, which is faster to write and about as fast to run.")
    if method and plan.values["quantize"]["distil_samples"]:
        lines.append("Not counted: tuning the scales (--distil-samples).")
    if not peak:
        return lines
    lines += [
        f"Rough: nothing was measured on a {peak['gpu']}. Assumed: passes compute at {args.compute_efficiency:.0%} of "
        f"{peak['tflops_16bit']:g} TFLOP/s ({peak['tflops_32bit']:g} in fp32), and each generated token reads all "
        f"weights at {args.bandwidth_efficiency:.0%} of {peak['gigabytes_per_second']:g} GB/s ({peak['peaks_source']}, "
        f"{peak['peaks_date']}). The time to launch a pass was measured on this machine's CPU.",
        f"CPU work (starting, loading, merging{', quantising, llama.cpp' * gguf}{', MiniLM' * ('clara' in work)}) and "
        "downloads are assumed to take as long as "
        f"here{f', and {method} to compute as fast as 16 bit' * bool(method and not gguf)}.",
    ]
    if args.price_per_hour is not None:
        lines.append(f"Price: ${price:g} per hour, from --price-per-hour.")
    elif price is None:
        lines.append(f"No list price of a {peak['gpu']} is known; --price-per-hour sets one.")
    else:
        lines.append(f"Price: ${price:g} per hour ({peak['price_source']}, {peak['price_date']}).")
    return lines


def format_table(estimate: dict) -> str:
    def format_row(name: str, figures: dict, status: str = "") -> list[str]:
        cost = "–" if figures["cost"] is None else f"${figures['cost']:.3f}" if figures["cost"] else "free"
        size = f"{megabytes(figures['bytes'])} MB" if figures["bytes"] else "–"
        peak = f"{figures['peak_memory_bytes'] / 1e9:.1f} GB"
        return [name, duration(figures["seconds"]), peak, size, cost, status]

    rows = [["stage", "time", "peak memory", "disk", "cost", ""]]
    rows += [format_row(stage["stage"], stage, stage["status"]) for stage in estimate["stages"]]
    rows.append(format_row("total remaining", estimate))
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*table, "", *(f"- {line}" for line in estimate["assumptions"])])


if __name__ == "__main__":
    cli.run(main, make_parser)
