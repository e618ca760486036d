"""Forecast what a pipeline will take, before it runs: time, disk and cost of each stage.

    python scripts/estimate.py --model models/smollm2-135m-base --data data/factbook/raw --samples 200 \\
        --output reports/smollm2-135m-estimate

Takes a base model (config.json and tokenizer are enough: weights that are not there are made up) and the data. Counts
the tokens of the very rows that the stages will read, and times a few steps of each kind on this machine. For a GPU
that is not here (--profile t4, say), times follow from published peaks, configs/prices.yaml, and are rough. Leaves
estimate.json: the stages, the rates behind them with their repeats, and what was assumed. Once the pipeline has run,
report.py holds the forecast against what happened.
"""

import json
import shlex
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lib import artifact, cli, hardware
from lib.cli import InputError
from lib.page import duration, megabytes
from lib.probe import UNSAID, answer, length, measure, padded, rate, stand_in, weights_of

SCRIPTS = ("sft", "merge_lora", "quantize", "evaluate")  # their defaults and the profile say what the stages do
COUNTS = (  # what work is counted by
    ("sft", "samples"), ("sft", "batch"), ("sft", "accumulation"), ("sft", "max_length"), ("evaluate", "samples"),
    ("evaluate", "batch"), ("evaluate", "max_new_tokens"), ("evaluate", "repeats"), ("evaluate", "speed_tokens"),
    ("quantize", "samples"), ("merge_lora", "samples"),
)  # fmt: skip


def make_parser():
    parser = cli.parser(__doc__, __file__, also=SCRIPTS)
    what = parser.add_argument_group("what")
    what.add_argument("--goal", choices=PIPELINES, help="the pipeline, by the name of its make goal")
    what.add_argument("--model", type=Path, required=True, help="base model directory; other models lie beside it")
    what.add_argument("--data", type=Path, required=True, help="data artifact, or a file of rows")
    what.add_argument("--output", type=Path, required=True, help="directory to write; other reports lie beside it")
    what.add_argument(
        "--anew", action=cli.on_off(), default=False, help="count the stages that are there already, too (default: no)"
    )
    given = parser.add_argument_group("what the stages will be given")
    given.add_argument("--samples", type=cli.whole(1), help="training rows")
    given.add_argument("--epochs", type=cli.number(0.01), help="passes over the rows")
    given.add_argument("--eval-samples", type=cli.whole(1), help="test rows of each evaluation")
    given.add_argument("--method", help="quantize.py's --method")
    given.add_argument("--seed", type=cli.whole(0), help="seed of the rows' choice")
    for script in ("sft", "quantize", "evaluate"):
        given.add_argument(
            f"--{script}-flags",
            type=flags_of,
            default="",
            metavar="FLAGS",
            help=f"more flags of {script}.py, in one text",
        )
    how = parser.add_argument_group("how")
    how.add_argument("--rates", type=Path, help="an earlier estimate whose rates to use (default: time anew)")
    how.add_argument(
        "--price-per-hour", type=cli.number(0),
        help="dollars (default: a GPU's list price; nothing for this machine)",
    )  # fmt: skip
    for peak in ("compute", "bandwidth"):
        how.add_argument(f"--{peak}-efficiency", type=cli.number(0.01, 1), help="share of a GPU's peak that is reached")
    return parser


def main(args):
    # --- check, count the work -------------------------------------------------------------------------
    peak = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml").get(args.profile)
    if args.profile == hardware.recognise()[0]:
        peak = None  # it is here, and can be timed
    values = stage_values(args, bool(peak))
    digest = artifact.identify(args.model)["digest"]
    if not (args.model / "config.json").is_file():
        raise InputError(f"{args.model}: expected a base model directory, with a config.json; `make base` makes one")
    started = time.perf_counter()
    from lib import models

    models.use_threads(args.threads)
    tokenizer = models.tokenizer(args.model)
    imports = time.perf_counter() - started
    work, rows = count(args, values, tokenizer)

    # --- time a few steps of each kind -----------------------------------------------------------------
    asked = {
        "model": digest, "machine": [hardware.machine()[key] for key in ("cpu", "cores", "gpu")],
        "--threads": args.threads, "kind of profile": "elsewhere" if peak else "here",
        "--method": values["quantize"]["method"], "--calibration-samples": bool(work["calibration"]["tokens"]),
        "evaluation": {key: (UNSAID | values["evaluate"])[key] for key in ("batch", "load")},
        "training": {key: (UNSAID | values["sft"])[key] for key in ("batch", "lora_r", "lora_targets", *UNSAID)},
    }  # fmt: skip
    rates = read_rates(args.rates, asked) if args.rates else measure(args, values, rows, bool(peak), imports)
    used = published(args, values, work, rates, peak) if peak else rates

    # --- forecast, write -------------------------------------------------------------------------------
    price = 0.0 if not peak else peak.get("dollars_per_hour")
    price = price if args.price_per_hour is None else args.price_per_hour
    with hardware.as_if(card_of(peak)) if peak else nullcontext():
        stages = forecast(args, values, work, used, price, everything=args.anew or bool(peak))
    coming = [stage for stage in stages if stage["status"] != THERE]
    found = {
        "goal": args.goal, "profile": args.profile, "rough": bool(peak), "price_per_hour": price, "stages": stages,
        "seconds": sum(stage["seconds"] for stage in coming), "bytes": sum(stage["bytes"] for stage in coming),
        "peak_memory_bytes": max((stage["peak_memory_bytes"] for stage in coming), default=0),
        "assumptions": assumptions(args, values, work, peak, price),
    }  # fmt: skip
    found["cost"] = None if price is None else found["seconds"] / 3600 * price
    with artifact.building(args.output, "estimate", args, {"model": args.model, "data": args.data}) as build:
        details = {"timed_on": asked, "work": work, "rates": rates, "rates_used": used}
        artifact.write_json(build.path / "estimate.json", found | details)
        build.metrics = found
    print(as_text(found))
    print(args.output)


def card_of(peak: dict) -> hardware.GPU:
    return hardware.GPU(peak["gpu"], tuple(peak["capability"]), int(peak["gigabytes"] * 1e9))


def stage_values(args, elsewhere: bool) -> dict[str, dict]:
    """{script: its arguments, as make will give them}: YAML layers, then make's values, then its *_FLAGS."""
    from lib import gguf

    made = {script: cli.defaults(script, args.profile) | {"seed": args.seed} for script in SCRIPTS}
    made["sft"] |= {"samples": args.samples, "epochs": args.epochs} | args.sft_flags
    made["evaluate"] |= {"samples": args.eval_samples} | args.evaluate_flags
    made["quantize"] |= {"method": args.method} | args.quantize_flags
    for script, key in COUNTS:
        if not isinstance(value := made[script][key], int) or value < 1:
            raise InputError(f"{script}.py: {key}: expected a whole number of at least 1, found {value!r}")
    method = made["quantize"]["method"]
    if method == "auto":
        method = "nf4" if elsewhere or hardware.device() == "cuda" else "gguf-iq4_nl"
    if method not in (known := ("nf4", "int8", *(f"gguf-{quantisation}" for quantisation in gguf.QUANTISATIONS))):
        raise InputError(f"--method {method}: expected auto, {', '.join(known)}")
    if method.removeprefix("gguf-") not in gguf.CALIBRATED:
        made["quantize"]["calibration_samples"] = 0
    made["quantize"]["method"] = method
    return made


def flags_of(text: str) -> dict:
    """{lora_r: 16} of "--lora-r 16". What is wrong with a flag, its script will say."""
    found, name = {}, ""
    for word in shlex.split(text):
        value = word
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            name = flag.removeprefix("no-").replace("-", "_")
            value = value or ("false" if flag.startswith("no-") else "true")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


# --- the work: what stages will read and write --------------------------------------------------------------


def count(args, values: dict, tokenizer) -> tuple[dict, dict]:
    """The work in tokens, passes and bytes, and rows to time steps on."""
    from lib import certificate, chat, generation, records, training

    started = time.perf_counter()
    splits = {split: records.load(args.data, split) for split in records.SPLITS}
    loading = (time.perf_counter() - started) / len(splits)
    sft, judge, rounding = values["sft"], values["evaluate"], values["quantize"]
    ends = {tokenizer.eos_token_id}

    def take(split: str, samples: int) -> list[dict]:
        return [chat.encode(tokenizer, row, ends) for row in records.take(splits[split], samples, args.seed)]

    def read(encoded: list[dict]) -> dict:
        return {"rows": len(encoded), "tokens": sum(map(length, encoded)), "answers": sum(map(answer, encoded))}

    kept = [row for row in take("train", sft["samples"]) if length(row) <= sft["max_length"]]
    if not kept:
        raise InputError(f"{args.data}: all training rows are longer than --max-length {sft['max_length']}")
    order = list(training.LikeLengthSampler([*map(length, kept)], sft["batch"] * sft["accumulation"], sft["seed"]))
    passes = [[kept[n] for n in order[at : at + sft["batch"]]] for at in range(0, len(order), sft["batch"])]
    calibration = take("train", rounding["calibration_samples"]) if rounding["calibration_samples"] else []
    asked = take("test", judge["samples"])
    questions = records.take(splits["test"], judge["samples"], args.seed)
    checked = records.take(splits["validation"], rounding["samples"], args.seed)
    work = {
        "training": {
            "tokens": sum(map(padded, passes)) * sft["epochs"], "passes": len(passes) * sft["epochs"],
            "rows": len(kept), "updates": -(-len(passes) // sft["accumulation"]) * sft["epochs"],
        },
        "calibration": read(calibration), "certificate": read(take("validation", rounding["samples"])),
        "merge": read(take("validation", values["merge_lora"]["samples"])),
        "general": read([chat.encode(tokenizer, row, ends) for row in certificate.GENERAL]),
        "chats": sum(len(chat.prompt_ids(tokenizer, one)) for one in chat.probes(tokenizer)),
        "evaluation": evaluation_of([length(row) - answer(row) for row in asked], [*map(answer, asked)], judge),
        "model": model_of(args.model, sft, rounding["method"]),
        "most": {
            "length": max(map(length, kept)),
            "calibration": max(map(length, calibration), default=0),
            "prompt": max(length(row) - answer(row) for row in asked),
            "context": generation.context_for(questions, judge["max_new_tokens"]),
            "positions": certificate.positions(tokenizer, checked),
        },
    }  # fmt: skip
    return work, {"passes": passes, "calibration": calibration or kept[:3], "asked": asked, "loading": loading}


def evaluation_of(prompts: list[int], golds: list[int], judge: dict) -> dict:
    """What evaluate.py reads and writes, from the lengths of prompts and accepted answers."""
    batch, batches = judge["batch"], []
    for start in range(0, len(prompts), 4 * batch):  # as it goes: in chunks of four batches, each sorted by length
        order = sorted(range(start, min(start + 4 * batch, len(prompts))), key=lambda n: -prompts[n])
        batches += [order[at : at + batch] for at in range(0, len(order), batch)]
    many = (prompts * batch)[:batch]
    made = {
        "rows": len(prompts), "prompt_tokens": sum(prompts), "gold_tokens": sum(golds), "passes": len(batches),
        "padded_tokens": sum(len(some) * max(prompts[n] for n in some) for some in batches),
        "speed": {
            "repeats": judge["repeats"] + 1, "new_tokens": judge["speed_tokens"], "streams": batch,
            "prompt_tokens": prompts[0], "batch_tokens": sum(many), "padded_tokens": batch * max(many),
        },
    }  # fmt: skip
    most = judge["max_new_tokens"]
    for kind, lengths in (("untuned", [most] * len(golds)), ("tuned", [min(most, gold) for gold in golds])):
        steps = sum(max(lengths[n] for n in some) - 1 for some in batches)
        made[kind] = {"new_tokens": sum(lengths), "mean": statistics.mean(lengths), "steps": steps}
    return made


def model_of(model: Path, sft: dict, method: str) -> dict:
    """Parameters and bytes of the model, its adapter and its quantisation, from the config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head, targets = made.get_output_embeddings(), sft["lora_targets"].split(",")
    linear = {name: m for name, m in made.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    adapted = [m for name, m in linear.items() if targets == ["all-linear"] or name.split(".")[-1] in targets]
    parameters, matrices = made.num_parameters(), sum(m.weight.numel() for m in linear.values())
    adapter = sft["lora_r"] * sum(m.in_features + m.out_features for m in adapted)
    weights = sum(file.stat().st_size for file in weights_of(model))
    others = artifact.content_bytes(model) - weights
    rest = (parameters - matrices) * (2 if hardware.device() == "cuda" else 4)  # bitsandbytes leaves it as it is
    return {
        "parameters": parameters, "matrices": matrices, "rounded": matrices + head.weight.numel(),
        "bytes": (weights or 2 * parameters) + others, "adapter_bytes": 4 * adapter + others,
        "int4_bytes": int(matrices * {"int8": 1}.get(method, 0.516) + rest) + others,  # a GGUF's are those of a file
    }  # fmt: skip


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
    made = {
        "base": answers(launch), "lora": answers(rates["lora"]["step"]["seconds"]),
        "read": rate([2 * matrices / single], launch),
        "train": rate([products * matrices / half], rates["train"]["of_a_pass"]),
    }  # fmt: skip
    return {"int4": made["base"]} | rates | made


# --- stages -------------------------------------------------------------------------------------------------


def took(rate: dict, units: float = 1, passes: float = 0) -> float:
    return units * rate["seconds"] + passes * rate["pass"]


def start(rates: dict, *more: str) -> float:
    return sum(took(rates[name]) for name in ("start", "load", "rows", *more))


def training(work: dict, rates: dict) -> tuple[float, float]:
    w = work["training"]
    passes = took(rates["train"], w["tokens"], w["passes"]) + took(rates["update"], w["updates"])
    return start(rates, "adapter start", "training start") + passes, work["model"]["adapter_bytes"]


def merging(work: dict, rates: dict) -> tuple[float, float]:
    seconds = start(rates, "adapter start") + 4 * took(rates["load"])  # what was written, and a certificate
    seconds += took(rates["read on CPU"], 3 * work["chats"]) + certified(work, rates, "merge", others=2)
    return seconds, work["model"]["bytes"]


def quantisation(work: dict, rates: dict, base: bool) -> tuple[float, float]:
    seconds, made = 2 * start(rates) + base * took(rates["load"]), rates["int4"]  # it measures in a new process
    seconds += certified(work, rates, "certificate", others=base)
    read = {key: work["certificate"][key] + work["general"][key] for key in work["general"]}
    if "bytes" in made:
        seconds += (
            took(rates["write"])
            + 2 * took(made["start"])
            + took(made["read beside torch"], read["tokens"] - read["answers"])
        )
        seconds += took(made["distribution"], read["answers"])
    else:
        seconds += took(rates["load"]) + took(made["read"], read["tokens"], read["rows"])
    if "round" in rates:
        seconds += took(rates["gather"], work["calibration"]["tokens"]) + took(rates["round"], work["model"]["rounded"])
    return seconds, made.get("bytes", work["model"]["int4_bytes"])


def certified(work: dict, rates: dict, rows: str, others: int) -> float:
    """Reading by the model that is compared with, and the rows alone by others."""
    read, general = work[rows], work["general"]
    seconds = took(rates["read"], read["tokens"] + general["tokens"], read["rows"] + general["rows"])
    return seconds + others * took(rates["read"], read["tokens"], read["rows"])


def evaluation(work: dict, rates: dict, variant: str) -> tuple[float, float]:
    w, speed, made = work["evaluation"], work["evaluation"]["speed"], rates["int4" if "int4" in variant else variant]
    answers = w["tuned" if "lora" in variant else "untuned"]
    if "bytes" in made:  # llama.cpp
        seconds = took(made["start"]) + took(rates["rows"]) + took(made["read"], w["prompt_tokens"])
        seconds += took(made["write"], answers["new_tokens"] + w["gold_tokens"])
        repeat = took(made["read"], speed["prompt_tokens"] + speed["batch_tokens"])
        repeat += took(made["step"], speed["new_tokens"]) + took(made["write"], speed["streams"] * speed["new_tokens"])
    else:
        seconds = start(rates, *["adapter start"] * (variant == "lora"))
        seconds += took(made["read batch"], w["padded_tokens"], w["passes"]) + took(
            made["step batch"], answers["steps"]
        )
        seconds += took(made["read"], w["prompt_tokens"] + w["gold_tokens"], w["rows"])
        repeat = took(made["read"], speed["prompt_tokens"], 1) + took(made["read batch"], speed["padded_tokens"], 1)
        repeat += took(made["step"], speed["new_tokens"]) + took(made["step batch"], speed["new_tokens"])
    return seconds + speed["repeats"] * repeat, 0


class Stage(NamedTuple):
    name: str
    script: str
    artifact: str  # models lie beside the base, reports beside the output
    needs: tuple[str, ...]
    forecast: Callable[[dict, dict], tuple[float, float]]  # of work and rates: seconds, and bytes that it leaves
    variant: str = ""  # what is evaluated


def judged(variant: str) -> Stage:
    needs = () if variant == "base" else (variant,)
    place = f"reports/eval-{{tag}}-{variant}"
    return Stage(f"evaluate {variant}", "evaluate", place, needs, partial(evaluation, variant=variant), variant)


# {make goal: its stages, inputs first}. The base and the data are made before a forecast.
PIPELINES = {
    "all": (
        judged("base"),
        Stage("int4", "quantize", "models/{tag}-int4", (), partial(quantisation, base=False)),
        judged("int4"),
        Stage("lora", "sft", "models/{tag}-lora", (), training),
        judged("lora"),
        Stage("lora-merged", "merge_lora", "models/{tag}-lora-merged", ("lora",), merging),
        Stage("lora-int4", "quantize", "models/{tag}-lora-int4", ("lora-merged",), partial(quantisation, base=True)),
        judged("lora-int4"),
    )
}
THERE, HERE, FORECAST = "there already", "as it took here", "forecast"


def memory(stage: Stage, config, values: dict, work: dict, rates: dict) -> int:
    """The peak that a stage is expected to have, in bytes: a GPU's where it computes on one."""
    from lib import budget

    most, sft, judge, method = (
        work["most"],
        UNSAID | values["sft"],
        UNSAID | values["evaluate"],
        values["quantize"]["method"],
    )
    targets = sft["lora_targets"]
    lora = {"r": sft["lora_r"], "target_modules": targets if targets == "all-linear" else targets.split(",")}
    rows = min(sft["batch"], work["training"]["rows"])
    if stage.script == "sft":
        sizes = rows, most["length"], sft["gradient_checkpointing"]
        parts = budget.training(config, lora, sft["load"], *sizes)
    elif stage.script == "merge_lora":
        parts = budget.merging(config, most["positions"])
    elif stage.script == "quantize" and work["calibration"]["rows"]:
        distilled = bool(values["quantize"]["distil_samples"])
        parts = budget.calibrating(config, most["calibration"], distilled)
    elif stage.script == "quantize":
        parts = budget.comparing(config, most["positions"])
    elif "int4" in stage.variant and "bytes" in rates["int4"]:
        size, streams = rates["int4"]["bytes"], judge["batch"]
        parts = budget.answering_in_llamacpp(size, budget.key_values(config), streams, most["context"])
    else:
        how = method if "int4" in stage.variant else judge["load"]
        adapter = lora if stage.variant == "lora" else None
        parts = budget.answering(config, adapter, how, judge["batch"], most["prompt"], judge["max_new_tokens"])
    return int(budget.total(parts))


def forecast(args, values: dict, work: dict, rates: dict, price: float | None, everything: bool) -> list[dict]:
    """The goal's stages; those that are there already, made with the same values, with the seconds that they took."""
    from lib import models

    stages, fresh, tag = [], set(), args.output.name.removesuffix("-estimate")
    config = models.config(args.model)

    def add(name: str, place: Path, status: str, seconds: float, size: float, peak: int, given: dict):
        stages.append({
            "stage": name, "artifact": str(place), "status": status, "seconds": seconds, "bytes": int(size),
            "peak_memory_bytes": peak, "cost": None if price is None else seconds / 3600 * price, "arguments": given,
        })  # fmt: skip

    for name, place in (("base", args.model), ("data", args.data)):
        meta = artifact.read_metadata(place) if (place / artifact.METADATA).is_file() else {}
        add(name, place, HERE if everything else THERE, *taken(meta), {})
    for stage in PIPELINES[args.goal]:
        kind, _, name = stage.artifact.format(tag=tag).partition("/")
        place, given = (args.model if kind == "models" else args.output).with_name(name), values[stage.script]
        meta = artifact.read_metadata(place) if (place / artifact.METADATA).is_file() else None
        same = meta and all(meta["arguments"].get(key) == value for key, value in given.items())
        if same and not artifact.outdated(meta) and not everything and not fresh & {*stage.needs}:
            add(stage.name, place, THERE, *taken(meta), given)
        else:
            fresh.add(stage.name)
            peak = memory(stage, config, values, work, rates)
            add(stage.name, place, FORECAST, *stage.forecast(work, rates), peak, given)
    return stages


def taken(meta: dict) -> tuple[float, int, int]:
    return meta.get("seconds", 0), meta.get("size_bytes", 0), meta.get("peak_memory_bytes", 0)


# --- words --------------------------------------------------------------------------------------------------


def assumptions(args, values: dict, work: dict, peak: dict | None, price: float | None) -> list[str]:
    method, answers = values["quantize"]["method"], work["evaluation"]
    gguf = method.startswith("gguf-")
    said = [
        f"How long answers will be is not known: {answers['untuned']['mean']:.0f} tokens, the most that is allowed, of "
        f"models that were not fine-tuned; {answers['tuned']['mean']:.1f} of the others, as the accepted answers have.",
        "Not counted: the installation, the report (about a second), and what is done again after an interruption.",
    ]
    if not weights_of(args.model):
        said.append(f"{args.model} holds no weights: steps were timed on random ones of its shape.")
    if gguf and (timed := stand_in(method)) != method.removeprefix("gguf-"):
        said.append(f"llama.cpp was timed on a file in {timed}, which is written faster and runs about as fast.")
    if values["quantize"].get("distil_samples"):
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
        f"here{'' if gguf else f'; {method} computes as fast as 16 bit'}.",
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
