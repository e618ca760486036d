"""Estimate time, disk and cost of each stage of a pipeline before it runs.

    python scripts/estimate.py --goal all --values SAMPLES=200 --output reports/smollm2-135m-estimate

Takes values as `make` takes them, and reads from Make which stages they lead to. Needs the base model (config.json and
the tokenizer are enough, since missing weights are replaced by random ones) and the data. Counts the tokens of the
examples that the stages will read, and times a few steps of each kind on this machine. For a GPU in another machine,
for instance with --profile t4, times follow from the published peaks in configs/prices.yaml and are rough. Texts that a
model has yet to write (--goal align) are assumed to be as long as those of the default model. Leaves estimate.json: the
stages, the measured rates with their repeats, and the assumptions. The report of the finished pipeline compares the
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
from lib.forecast.timing import KINDS, measure, rate, timed_quantisation, weight_files

SCRIPTS = [path.stem for path in (cli.ROOT / "scripts").glob("*.py")]
NOT_COMPARED = {"profile", "threads"}  # arguments that change nothing of what a stage makes


def make_parser():
    parser = cli.parser(__doc__, __file__, also=tuple(SCRIPTS))
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--goal", choices=("all", "align", "clara"), help="pipeline to estimate, by the name of its make target"
    )
    files.add_argument(
        "--values", nargs="+", action="extend", type=make_value, default=[], metavar="NAME=VALUE",
        help="values as make takes them, for example SAMPLES=200 (default: none)",
    )  # fmt: skip
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument("--anew", action=cli.OnOff, default=False, help="include the stages that are already finished")
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
        raise argparse.ArgumentTypeError(f"{text!r} is no value as make takes it; expected, for example, SAMPLES=200")
    return text


def main(args):
    # --- check, count the work -------------------------------------------------------------------------
    peak = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml").get(args.profile)
    if args.profile == hardware.recognise_profile()[0]:
        peak = None  # it is here, and can be timed
    plan = read_plan(args.goal, args.values, args.profile, elsewhere=bool(peak))
    digest = artifact.identify(plan.model)["digest"]
    if not (plan.model / "config.json").is_file():
        raise InputError(f"{plan.model}: expected a base model directory, with a config.json; `make base` makes one")
    started = time.perf_counter()
    from lib.core import compute
    from lib.model import directory

    compute.use_threads(args.threads)
    tokenizer = directory.load_tokenizer(directory.open_directory(plan.model))
    imports = time.perf_counter() - started
    work, timed = workload.count(plan, tokenizer)

    # --- time a few steps of each kind -----------------------------------------------------------------
    values = plan.values
    asked = {
        "model": digest, "machine": [hardware.machine()[key] for key in ("cpu", "cores", "gpu")],
        "--threads": args.threads, "kind of profile": "elsewhere" if peak else "here",
        "--goal": args.goal, "--method": plan.method,
        "--calibration-samples": bool(values.get("quantize", {}).get("calibration_samples")),
        "drawing": [values[one]["batch"] for one in ("generate_data", "generate_preferences") if one in values],
        "evaluation": {key: plan.judge[key] for key in ("batch", "load")},
        "training": {key: values["sft"][key] for key in ("lora_r", "lora_targets", *TRAINING)},
    }  # fmt: skip
    if args.goal == "clara":
        keys = (*TRAINING, *workload.SHAPE)
        asked["clara"] = [{key: values[stage].get(key) for key in keys} for stage in KINDS.values()]
    rates = read_rates(args.rates, asked) if args.rates else measure(plan, timed, args.threads, bool(peak), imports)
    used = published(args, plan, work, rates, peak) if peak else rates

    # --- forecast, write -------------------------------------------------------------------------------
    price = 0.0 if not peak else peak.get("dollars_per_hour")
    price = price if args.price_per_hour is None else args.price_per_hour
    with hardware.simulate(card_of(peak)) if peak else nullcontext():
        stages = forecast(args, plan, work, used, price, everything=args.anew or bool(peak))
    coming = [stage for stage in stages if stage["status"] != THERE]
    found = {
        "goal": args.goal, "profile": args.profile, "rough": bool(peak), "price_per_hour": price, "stages": stages,
        "seconds": sum(stage["seconds"] for stage in coming), "bytes": sum(stage["bytes"] for stage in coming),
        "peak_memory_bytes": max((stage["peak_memory_bytes"] for stage in coming), default=0),
        "assumptions": assumptions(args, plan, work, peak, price),
    }  # fmt: skip
    found["cost"] = None if price is None else found["seconds"] / 3600 * price
    inputs = {"model": plan.model, "data": plan.data} | ({"clara data": plan.clara_data} if plan.clara_data else {})
    with artifact.write_artifact(args.output, "estimate", args, inputs) as build:
        details = {"timed_on": asked, "work": work, "rates": rates, "rates_used": used}
        artifact.write_json(build.path / "estimate.json", found | details)
        build.metrics = found
    print(as_text(found))
    print(args.output)


TRAINING = ("batch", "load", "gradient_checkpointing")


def card_of(peak: dict) -> hardware.GPU:
    return hardware.GPU(peak["gpu"], tuple(peak["capability"]), int(peak["gigabytes"] * 1e9))


# --- rates --------------------------------------------------------------------------------------------------


def read_rates(path: Path, asked: dict) -> dict:
    """The rates of an earlier estimate; InputError where they were timed on something else."""
    artifact.read(path, "estimate")
    stored = json.loads((path / "estimate.json").read_text(encoding="utf-8"))
    if other := [key for key, value in asked.items() if stored["timed_on"].get(key) != value]:
        raise InputError(f"--rates {path}: was timed with another {', '.join(other)}; leave --rates out to time anew")
    return stored["rates"]


def published(args, plan: Plan, work: dict, rates: dict, peak: dict) -> dict:
    """The rates of a GPU that is not here: of its peaks the shares that are asked for, and the launch of each pass."""
    half, single = (peak[f"tflops_{bits}bit"] * 1e12 * args.compute_efficiency for bits in (16, 32))
    memory, batch = peak["gigabytes_per_second"] * 1e9 * args.bandwidth_efficiency, plan.judge["batch"]
    parameters, matrices = work["model"]["parameters"], work["model"]["matrices"]

    def answers(launch: float) -> dict:
        read = rate([2 * matrices / half], launch)
        one, many = (launch + max(2 * parameters / memory, 2 * parameters * rows / half) for rows in (1, batch))
        return {"read": read, "read batch": read, "step": rate([one]), "step batch": rate([many])}

    launch = rates["base"]["step"]["seconds"]
    products = 6 if plan.values["sft"]["gradient_checkpointing"] else 4  # forward, gradients, and forward again
    each = rate([2 * parameters / half], launch + 2 * parameters / memory)
    made = {
        "base": answers(launch), "lora": answers(rates["lora"]["step"]["seconds"]),
        "read": rate([2 * matrices / single], launch),
        "train": rate([products * matrices / half], rates["train"]["of_a_pass"]),
        "sample": dict.fromkeys(rates["sample"], each),
    }  # fmt: skip
    if "clara" in rates:

        def elsewhere(kind: str, one: dict) -> dict:
            again = kind in KINDS and plan.values[KINDS[kind]]["gradient_checkpointing"]
            passes = 2 if kind == "read" else 6 if again else 4
            return rate([passes * matrices / half], one["of_a_pass"])

        made["clara"] = rates["clara"] | {kind: elsewhere(kind, rates["clara"][kind]) for kind in (*KINDS, "read")}
    return {"int4": made["base"]} | rates | made


# --- stages -------------------------------------------------------------------------------------------------

THERE, HERE, FORECAST = "there already", "as it took here", "forecast"


def forecast(args, plan: Plan, work: dict, rates: dict, price: float | None, everything: bool) -> list[dict]:
    """The stages of the goal, each with what it will take or, where Make would not run it, took. A stage whose script
    estimates nothing is listed once it has run."""
    from lib.budget import memory
    from lib.model import directory

    config = directory.load_config(directory.open_directory(plan.model))
    targets = plan.values["sft"]["lora_targets"]
    targets = targets if targets == "all-linear" else targets.split(",")
    lora, stages = {"r": plan.values["sft"]["lora_r"], "target_modules": targets}, []
    to_come = {stage.output for stage in list_stages(args.goal, args.values, only_stale=True)}
    for stage, given in plan.stages:
        job = Job(given, *plan.describe_model(stage), plan.method, config, lora, work, rates)
        cost = getattr(importlib.import_module(stage.script), "estimate_cost", lambda job: None)(job)
        there = (stage.output / artifact.METADATA).is_file()
        if there and (cost is None or (not everything and stage.output not in to_come)):
            meta, status = artifact.read_metadata(stage.output), HERE if everything else THERE
            cost = Cost(meta["seconds"], {"peak": meta["peak_memory_bytes"]}, meta["size_bytes"])
        elif cost is None:
            continue
        else:
            status = FORECAST
        stages.append({
            "stage": name_stage(stage.output), "artifact": str(stage.output), "status": status,
            "seconds": cost.seconds, "bytes": int(cost.bytes), "peak_memory_bytes": int(memory.total(cost.memory)),
            "cost": None if price is None else cost.seconds / 3600 * price,
            "arguments": {k: v for k, v in vars(given).items() if is_compared(k, v)} if status == FORECAST else {},
        })  # fmt: skip
    return stages


def name_stage(output: Path) -> str:
    """models/x-lora of any root."""
    return "/".join(output.parts[-3 if output.parts[-3:-2] == ("data",) else -2 :])


def is_compared(name: str, value) -> bool:
    """Whether a report holds this argument against that of the artifact. A 0 of --learning-rate stands for another."""
    return (
        isinstance(value, bool | int | float | str)
        and name not in NOT_COMPARED
        and (name, value) != ("learning_rate", 0)
    )


# --- words --------------------------------------------------------------------------------------------------


def assumptions(args, plan: Plan, work: dict, peak: dict | None, price: float | None) -> list[str]:
    method, gguf = plan.method, bool(plan.method and plan.method.startswith("gguf-"))
    if "clara" in work:
        said = [
            f"How long answers will be is not known: {work['clara']['evaluation']['mean']:.1f} tokens, as the accepted "
            "ones have. What MiniLM and the reasoner find is taken to be as long as what BM25 finds."
        ]
    else:
        answers = work["evaluation"]
        as_accepted = f"; {answers['tuned']['mean']:.1f} of the others, as the accepted answers have"
        said = [
            f"How long answers will be is not known: {answers['untuned']['mean']:.0f} tokens, the most that is allowed"
            + (", of all models." if plan.writes_rows else f", of models that were not fine-tuned{as_accepted}.")
        ]
    said.append(
        "Not counted: the installation, the report (about a second), and what is done again after an interruption."
    )
    if "dpo" in plan.values:
        said += workload.assumed(plan)
    if not weight_files(plan.model):
        said.append(f"{plan.model} holds no weights: steps were timed on random ones of its shape.")
    if gguf and (timed := timed_quantisation(method)) != method.removeprefix("gguf-"):
        said.append(f"llama.cpp was timed on a file in {timed}, which is written faster and runs about as fast.")
    if method and plan.values["quantize"]["distil_samples"]:
        said.append("Not counted either: the scales' learning (--distil-samples).")
    if not peak:
        return said
    said += [
        f"Rough: nothing was measured on a {peak['gpu']}. A pass takes its arithmetic at "
        f"{args.compute_efficiency:.0%} of {peak['tflops_16bit']:g} TFLOP/s (of {peak['tflops_32bit']:g} in fp32), a "
        f"written token at least the reading of all weights at {args.bandwidth_efficiency:.0%} of "
        f"{peak['gigabytes_per_second']:g} GB/s ({peak['peaks_source']}, {peak['peaks_date']}), and each of them what "
        "launching it takes on this machine's CPU.",
        f"What runs on a CPU (starting, loading, merging{', rounding, llama.cpp' * gguf}) and fetching take as long as "
        f"here{f'; {method} computes as fast as 16 bit' * bool(method and not gguf)}"
        f"{', and MiniLM is taken to' * ('clara' in work)}.",
    ]
    if args.price_per_hour is not None:
        said.append(f"An hour costs ${price:g}, as given.")
    elif price is None:
        said.append(f"There is no list price of a {peak['gpu']}; --price-per-hour gives one.")
    else:
        said.append(f"An hour costs ${price:g}: {peak['price_source']}, {peak['price_date']}.")
    return said


def as_text(found: dict) -> str:
    def line(name: str, one: dict, status: str = "") -> list[str]:
        cost = "–" if one["cost"] is None else f"${one['cost']:.3f}" if one["cost"] else "nothing"
        size = f"{megabytes(one['bytes'])} MB" if one["bytes"] else "–"
        peak = f"{one['peak_memory_bytes'] / 1e9:.1f} GB"
        return [name, duration(one["seconds"]), peak, size, cost, status]

    rows = [["stage", "time", "peak memory", "disk", "cost", ""]]
    rows += [line(stage["stage"], stage, stage["status"]) for stage in found["stages"]]
    rows.append(line("total to come", found))
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*table, "", *(f"- {line}" for line in found["assumptions"])])


if __name__ == "__main__":
    cli.run(main, make_parser)
