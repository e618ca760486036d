"""Estimate time, disk and cost of each stage of a pipeline before it runs.

    python scripts/estimate.py --model models/smollm2-135m-base --data data/factbook/raw --samples 200 \\
        --output reports/smollm2-135m-estimate

Takes the data and a base model; config.json and the tokenizer are enough, since missing weights are replaced by random
ones. Counts the tokens of the examples that the stages will read, and times a few steps of each kind on this machine.
For a GPU in another machine, for instance with --profile t4, times follow from the published peaks in
configs/prices.yaml and are rough. Texts that a model has yet to write (--goal align) are assumed to be as long as those
of the default model. Leaves estimate.json: the stages, the measured rates with their repeats, and the assumptions. The
report of the finished pipeline compares the estimate with the actual figures.
"""

import json
import shlex
import time
from contextlib import nullcontext
from pathlib import Path

from lib.core import artifact, cli, hardware
from lib.core.cli import InputError
from lib.core.wording import duration, megabytes
from lib.forecast import workload
from lib.forecast.costs import PIPELINES, estimate_peak
from lib.forecast.timing import KINDS, PARSER_DEFAULTS, measure, rate, timed_quantisation, weight_files

# {what make calls a script's flags: the script}: its defaults and the profile say what the stages do.
SCRIPTS = {
    "sft": "sft", "quantize": "quantize", "evaluate": "evaluate", "magpie": "generate_data", "filter": "filter_data",
    "preferences": "generate_preferences", "dpo": "dpo", "forgetting": "forgetting", "stage1": "train_stage1",
    "stage2": "train_stage2", "stage3": "train_stage3", "evaluate_clara": "evaluate_clara",
}  # fmt: skip
COUNTS = {  # what work is counted by
    "sft": ("samples", "batch", "accumulation", "max_length"),
    "evaluate": ("samples", "batch", "max_new_tokens", "repeats", "speed_tokens"),
    "quantize": ("samples",), "merge_lora": ("samples",), "dpo": ("samples", "batch", "accumulation"),
    "generate_data": ("samples", "batch", "max_instruction_tokens", "max_response_tokens"),
    "generate_preferences": ("samples", "batch", "responses", "max_new_tokens"),
    "forgetting": ("samples", "batch", "max_new_tokens"),
    "train_stage1": (
        "samples", "batch", "accumulation", "max_length", "watched", "watch_steps", "compress_rate", "doc_max_tokens",
        "lora_r", "short_words",
    ),
    "train_stage2": ("samples", "batch", "accumulation", "max_length", "watched", "watch_steps"),
    "train_stage3": ("samples", "batch", "accumulation", "max_length", "watched", "watch_steps", "candidates", "k"),
    "evaluate_clara": ("samples", "k", "batch", "max_new_tokens", "timed"),
}  # fmt: skip
SHARES = {
    "train_stage1": ("epochs", "rebuild", "short_share"), "train_stage2": ("epochs",),
    "train_stage3": ("epochs", "contrast"),
}  # fmt: skip


def make_parser():
    parser = cli.parser(__doc__, __file__, also=(*SCRIPTS.values(), "merge_lora"))
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--goal", choices=PIPELINES, help="pipeline to estimate, by the name of its make target")
    files.add_argument("--model", type=Path, required=True, help="base model directory; other models are beside it")
    files.add_argument("--data", type=Path, required=True, help="data artifact, or a file of examples")
    files.add_argument(
        "--clara-data", type=Path, help="--goal clara: CLaRa data artifact made from --data (default: none)"
    )
    files.add_argument("--output", type=Path, required=True, help="directory to write; other reports are beside it")
    files.add_argument("--anew", action=cli.OnOff, default=False, help="include the stages that are already finished")
    stages = parser.add_argument_group("settings of the stages")
    stages.add_argument("--samples", type=cli.integer(1), help="training examples")
    stages.add_argument("--epochs", type=cli.number(0.01), help="passes over the training examples")
    stages.add_argument("--eval-samples", type=cli.integer(1), help="test examples per evaluation")
    stages.add_argument("--method", help="quantisation method, as in quantize.py")
    stages.add_argument("--seed", type=cli.integer(0), help="random seed for the examples' choice")
    stages.add_argument(
        "--align-data", help="--goal align: training data; magpie, or anything else for the examples of --data"
    )
    stages.add_argument("--raw", type=cli.integer(3), help="examples that Magpie writes before filtering")
    stages.add_argument("--pairs", type=cli.integer(1), help="preference pairs for training")
    stages.add_argument("--held-out-pairs", type=cli.integer(0), help="preference pairs for validation")
    for name, script in SCRIPTS.items():
        words = f"more flags for {script}.py, as one quoted string (default: none)"
        stages.add_argument(f"--{name.replace('_', '-')}-flags", type=flags_of, default="", metavar="FLAGS", help=words)
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


def main(args):
    # --- check, count the work -------------------------------------------------------------------------
    peak = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml").get(args.profile)
    if args.profile == hardware.recognise_profile()[0]:
        peak = None  # it is here, and can be timed
    values = stage_values(args, bool(peak))
    if args.goal == "clara" and not args.clara_data:
        raise InputError("--goal clara: give the rows by --clara-data, as `make estimate GOAL=clara` does")
    digest = artifact.identify(args.model)["digest"]
    if not (args.model / "config.json").is_file():
        raise InputError(f"{args.model}: expected a base model directory, with a config.json; `make base` makes one")
    started = time.perf_counter()
    from lib.core import compute
    from lib.model import directory

    compute.use_threads(args.threads)
    tokenizer = directory.load_tokenizer(args.model)
    imports = time.perf_counter() - started
    work, timed = workload.count(args, values, tokenizer)

    # --- time a few steps of each kind -----------------------------------------------------------------
    training = ("batch", "lora_r", "lora_targets", *PARSER_DEFAULTS)
    asked = {
        "model": digest, "machine": [hardware.machine()[key] for key in ("cpu", "cores", "gpu")],
        "--threads": args.threads, "kind of profile": "elsewhere" if peak else "here",
        "--goal": args.goal, "--method": values["quantize"]["method"],
        "--calibration-samples": bool(values["quantize"]["calibration_samples"]),
        "drawing": [values[script]["batch"] for script in ("generate_data", "generate_preferences")],
        "evaluation": {key: (PARSER_DEFAULTS | values["evaluate"])[key] for key in ("batch", "load")},
        "training": {key: (PARSER_DEFAULTS | values["sft"])[key] for key in training},
    }  # fmt: skip
    if args.goal == "clara":
        keys = ("batch", *PARSER_DEFAULTS, *workload.SHAPE)
        asked["clara"] = [{key: (PARSER_DEFAULTS | values[stage]).get(key) for key in keys} for stage in KINDS.values()]
    rates = read_rates(args.rates, asked) if args.rates else measure(args, values, timed, bool(peak), imports)
    used = published(args, values, work, rates, peak) if peak else rates

    # --- forecast, write -------------------------------------------------------------------------------
    price = 0.0 if not peak else peak.get("dollars_per_hour")
    price = price if args.price_per_hour is None else args.price_per_hour
    with hardware.simulate(card_of(peak)) if peak else nullcontext():
        stages = forecast(args, values, work, used, price, everything=args.anew or bool(peak))
    coming = [stage for stage in stages if stage["status"] != THERE]
    found = {
        "goal": args.goal, "profile": args.profile, "rough": bool(peak), "price_per_hour": price, "stages": stages,
        "seconds": sum(stage["seconds"] for stage in coming), "bytes": sum(stage["bytes"] for stage in coming),
        "peak_memory_bytes": max((stage["peak_memory_bytes"] for stage in coming), default=0),
        "assumptions": assumptions(args, values, work, peak, price),
    }  # fmt: skip
    found["cost"] = None if price is None else found["seconds"] / 3600 * price
    inputs = {"model": args.model, "data": args.data} | ({"clara data": args.clara_data} if args.clara_data else {})
    with artifact.write_artifact(args.output, "estimate", args, inputs) as build:
        details = {"timed_on": asked, "work": work, "rates": rates, "rates_used": used}
        artifact.write_json(build.path / "estimate.json", found | details)
        build.metrics = found
    print(as_text(found))
    print(args.output)


def card_of(peak: dict) -> hardware.GPU:
    return hardware.GPU(peak["gpu"], tuple(peak["capability"]), int(peak["gigabytes"] * 1e9))


def stage_values(args, elsewhere: bool) -> dict[str, dict]:
    """{script: its arguments, as make will give them}: YAML layers, then make's values, then its *_FLAGS."""
    from lib.gguf import packing

    made = {
        script: cli.yaml_defaults(script, args.profile) | {"seed": args.seed}
        for script in (*SCRIPTS.values(), "merge_lora")
    }
    made["sft"] |= {"samples": args.samples, "epochs": args.epochs}
    made["evaluate"] |= {"samples": args.eval_samples}
    made["quantize"] |= {"method": args.method}
    made["generate_data"] |= {"source": "magpie", "samples": args.raw}
    made["generate_preferences"] |= {"samples": args.pairs, "validation_samples": args.held_out_pairs}
    made["dpo"] |= {"samples": args.pairs}
    made["train_stage1"] |= {"samples": args.samples}
    made["evaluate_clara"] |= {"samples": args.eval_samples}
    for name, script in SCRIPTS.items():
        made[script] |= vars(args)[f"{name}_flags"]
    if not made["sft"]["learning_rate"]:
        del made["sft"]["learning_rate"]  # sft.py's own, by method
    for script, key in [(script, key) for script, keys in COUNTS.items() for key in keys]:
        if not isinstance(value := made[script][key], int) or value < 1:
            raise InputError(f"{script}.py: {key}: expected a whole number of at least 1, found {value!r}")
    for script, key in [(script, key) for script, keys in SHARES.items() for key in keys]:
        least = 0.01 if key == "epochs" else 0
        if not isinstance(value := made[script][key], int | float) or value < least:
            raise InputError(f"{script}.py: {key}: expected a number of at least {least:g}, found {value!r}")
    if args.goal == "clara":  # answers are timed as its own evaluation asks for them
        own = made["evaluate_clara"]
        made["evaluate"] |= {key: own[key] for key in ("batch", "max_new_tokens", "load") if key in own}
    method = made["quantize"]["method"]
    if method == "auto":
        method = "nf4" if elsewhere or hardware.device() == "cuda" else "gguf-iq4_nl"
    if method not in (known := ("nf4", "int8", *(f"gguf-{quantisation}" for quantisation in packing.QUANTISATIONS))):
        raise InputError(f"--method {method}: expected auto, {', '.join(known)}")
    if method.removeprefix("gguf-") not in packing.CALIBRATED:
        made["quantize"]["calibration_samples"] = 0
    made["quantize"]["method"] = method
    return made


def flags_of(text: str) -> dict:
    """{lora_r: 16} of "--lora-r 16". What is wrong with a flag, its script will say."""
    found, name = {}, ""

    def read(value: str):
        try:
            return json.loads(value)
        except ValueError:
            return value

    for word in shlex.split(text):
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            name = flag.removeprefix("no-").replace("-", "_")
            found[name] = read(value) if value else not flag.startswith("no-")
        else:
            known = found.get(name, True)
            found[name] = (
                read(word)
                if isinstance(known, bool)
                else [*(known if isinstance(known, list) else [known]), read(word)]
            )
    return found


# --- rates --------------------------------------------------------------------------------------------------


def read_rates(path: Path, asked: dict) -> dict:
    """The rates of an earlier estimate; InputError where they were timed on something else."""
    artifact.read(path, "estimate")
    stored = json.loads((path / "estimate.json").read_text(encoding="utf-8"))
    if other := [key for key, value in asked.items() if stored["timed_on"].get(key) != value]:
        raise InputError(f"--rates {path}: was timed with another {', '.join(other)}; leave --rates out to time anew")
    return stored["rates"]


def published(args, values: dict, work: dict, rates: dict, peak: dict) -> dict:
    """The rates of a GPU that is not here: of its peaks the shares that are asked for, and the launch of each pass."""
    half, single = (peak[f"tflops_{bits}bit"] * 1e12 * args.compute_efficiency for bits in (16, 32))
    memory, batch = peak["gigabytes_per_second"] * 1e9 * args.bandwidth_efficiency, values["evaluate"]["batch"]
    parameters, matrices = work["model"]["parameters"], work["model"]["matrices"]

    def answers(launch: float) -> dict:
        read = rate([2 * matrices / half], launch)
        one, many = (launch + max(2 * parameters / memory, 2 * parameters * rows / half) for rows in (1, batch))
        return {"read": read, "read batch": read, "step": rate([one]), "step batch": rate([many])}

    launch = rates["base"]["step"]["seconds"]
    products = 6 if values["sft"].get("gradient_checkpointing") else 4  # forward, gradients, and forward again
    each = rate([2 * parameters / half], launch + 2 * parameters / memory)
    made = {
        "base": answers(launch), "lora": answers(rates["lora"]["step"]["seconds"]),
        "read": rate([2 * matrices / single], launch),
        "train": rate([products * matrices / half], rates["train"]["of_a_pass"]),
        "sample": dict.fromkeys(rates["sample"], each),
    }  # fmt: skip
    if "clara" in rates:

        def elsewhere(kind: str, one: dict) -> dict:
            given = values[KINDS[kind]] if kind in KINDS else {}
            passes = 2 if kind == "read" else 6 if given.get("gradient_checkpointing") else 4
            return rate([passes * matrices / half], one["of_a_pass"])

        made["clara"] = rates["clara"] | {kind: elsewhere(kind, rates["clara"][kind]) for kind in (*KINDS, "read")}
    return {"int4": made["base"]} | rates | made


# --- stages -------------------------------------------------------------------------------------------------

THERE, HERE, FORECAST = "there already", "as it took here", "forecast"


def forecast(args, values: dict, work: dict, rates: dict, price: float | None, everything: bool) -> list[dict]:
    """The goal's stages; those that are there already, made with the same values, with the seconds that they took."""
    from lib.model import directory

    stages, fresh, config = [], set(), directory.load_config(args.model)
    beside = {"models": args.model.parent, "reports": args.output.parent, "data": args.data.parent.parent}
    names = {"tag": args.output.name.removesuffix("-estimate"), "model": args.model.name.removesuffix("-base")}

    def add(name: str, place: Path, status: str, seconds: float, size: float, peak: int, given: dict):
        stages.append({
            "stage": name, "artifact": str(place), "status": status, "seconds": seconds, "bytes": int(size),
            "peak_memory_bytes": peak, "cost": None if price is None else seconds / 3600 * price, "arguments": given,
        })  # fmt: skip

    there = [("base", args.model), ("data", args.data)]
    there += [("clara data", args.clara_data)] if args.goal == "clara" else []
    for name, place in there:
        meta = artifact.read_metadata(place) if (place / artifact.METADATA).is_file() else {}
        add(name, place, HERE if everything else THERE, *taken(meta), {})
    for stage in PIPELINES[args.goal]:
        if stage.name == "magpie" and not workload.writes_its_own(args):
            continue
        kind, _, name = stage.artifact.format(**names).partition("/")
        place, given = beside[kind] / name, values[stage.script]
        meta = artifact.read_metadata(place) if (place / artifact.METADATA).is_file() else None
        same = meta and all(meta["arguments"].get(key) == value for key, value in given.items())
        if same and not artifact.changed_inputs(meta) and not everything and not fresh & {*stage.needs}:
            add(stage.name, place, THERE, *taken(meta), given)
        else:
            fresh.add(stage.name)
            peak = estimate_peak(stage, config, values, work, rates)
            add(stage.name, place, FORECAST, *stage.forecast(work, rates), peak, given)
    return stages


def taken(meta: dict) -> tuple[float, int, int]:
    return meta.get("seconds", 0), meta.get("size_bytes", 0), meta.get("peak_memory_bytes", 0)


# --- words --------------------------------------------------------------------------------------------------


def assumptions(args, values: dict, work: dict, peak: dict | None, price: float | None) -> list[str]:
    method, answers = values["quantize"]["method"], work["evaluation"]
    gguf, own = args.goal == "all" and method.startswith("gguf-"), workload.writes_its_own(args)
    as_accepted = f"; {answers['tuned']['mean']:.1f} of the others, as the accepted answers have"
    said = [
        f"How long answers will be is not known: {answers['untuned']['mean']:.0f} tokens, the most that is allowed"
        + (", of all models." if own else f", of models that were not fine-tuned{as_accepted}."),
        "Not counted: the installation, the report (about a second), and what is done again after an interruption.",
    ]
    if args.goal == "align":
        said += workload.assumed(values, own)
    if args.goal == "clara":
        said[0] = (
            f"How long answers will be is not known: {work['clara']['evaluation']['mean']:.1f} tokens, as the accepted "
            "ones have. What MiniLM and the reasoner find is taken to be as long as what BM25 finds."
        )
    if not weight_files(args.model):
        said.append(f"{args.model} holds no weights: steps were timed on random ones of its shape.")
    if gguf and (timed := timed_quantisation(method)) != method.removeprefix("gguf-"):
        said.append(f"llama.cpp was timed on a file in {timed}, which is written faster and runs about as fast.")
    if args.goal == "all" and values["quantize"].get("distil_samples"):
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
        f"here{f'; {method} computes as fast as 16 bit' * (args.goal == 'all' and not gguf)}"
        f"{', and MiniLM is taken to' * (args.goal == 'clara')}.",
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
