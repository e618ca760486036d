"""What the stages of a pipeline take: seconds and bytes, from the work that was counted and the rates that were timed.

Work is estimate.py's, {what: counts of rows, tokens, passes …}; rates are those of lib/forecast/timing.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lib.forecast.timing import PARSER_DEFAULTS, matmul_tokens


def rate_seconds(rate: dict, units: float = 1, passes: float = 0) -> float:
    return units * rate["seconds"] + passes * rate["pass"]


def start_seconds(rates: dict, *more: str) -> float:
    return sum(rate_seconds(rates[name]) for name in ("start", "load", "rows", *more))


def training_cost(work: dict, rates: dict) -> tuple[float, float]:
    w = work["training"]
    passes = rate_seconds(rates["train"], w["tokens"], w["passes"]) + rate_seconds(rates["update"], w["updates"])
    return start_seconds(rates, "adapter start", "training start") + passes, work["model"]["adapter_bytes"]


def sampling_cost(work: dict, rates: dict, kinds: tuple[str, ...], adapter: bool) -> tuple[float, float]:
    """Texts by lib/engines/batching.py, call after call; an adapter is merged before."""
    seconds = start_seconds(rates, *["adapter start"] * adapter)
    for kind in kinds:
        for w in work["drawn"][kind]:
            seconds += rate_seconds(rates["sample"][kind], w["tokens"] - w["steps"], w["steps"])
            seconds += rate_seconds(rates["base"]["read batch"], w["prompt_tokens"])
    return seconds, 0


def filtering_cost(work: dict, rates: dict) -> tuple[float, float]:
    return rate_seconds(rates["rows"]), 0


def dpo_cost(work: dict, rates: dict) -> tuple[float, float]:
    """DPO. Of a training pass of LoRA, half is the forward pass: weights that are frozen get no gradient."""
    w = work["preferring"]
    seconds = rate_seconds(rates["train"], w["tokens"], w["passes"]) + rate_seconds(rates["update"], w["updates"])
    seconds += rate_seconds(rates["train"], w["forward_tokens"]) / 2
    return start_seconds(rates, "adapter start", "training start") + seconds, work["model"]["adapter_bytes"]


def forgetting_cost(work: dict, rates: dict, variant: str) -> tuple[float, float]:
    """Options, then answers that are as long as they may be."""
    w, made = work["weighing"], rates[variant]
    seconds = start_seconds(rates, *["adapter start"] * (variant == "lora")) + rate_seconds(
        made["read"], w["tokens"], w["passes"]
    )
    seconds += rate_seconds(made["read batch"], w["prompt_tokens"]) + rate_seconds(made["step batch"], w["steps"])
    return seconds, 0


def merge_cost(work: dict, rates: dict) -> tuple[float, float]:
    seconds = start_seconds(rates, "adapter start") + 4 * rate_seconds(
        rates["load"]
    )  # what was written, and a certificate
    seconds += rate_seconds(rates["read on CPU"], 3 * work["chats"]) + divergence_cost(work, rates, "merge", others=2)
    return seconds, work["model"]["bytes"]


def quantisation_cost(work: dict, rates: dict, base: bool) -> tuple[float, float]:
    seconds, made = (
        2 * start_seconds(rates) + base * rate_seconds(rates["load"]),
        rates["int4"],
    )  # it measures in a new process
    seconds += divergence_cost(work, rates, "certificate", others=base)
    read = {key: work["certificate"][key] + work["general"][key] for key in work["general"]}
    if "bytes" in made:
        seconds += (
            rate_seconds(rates["write"])
            + 2 * rate_seconds(made["start"])
            + rate_seconds(made["read beside torch"], read["tokens"] - read["answers"])
        )
        seconds += rate_seconds(made["distribution"], read["answers"])
    else:
        seconds += rate_seconds(rates["load"]) + rate_seconds(made["read"], read["tokens"], read["rows"])
    if "round" in rates:
        seconds += rate_seconds(rates["gather"], work["calibration"]["tokens"]) + rate_seconds(
            rates["round"], work["model"]["rounded"]
        )
    return seconds, made.get("bytes", work["model"]["int4_bytes"])


def divergence_cost(work: dict, rates: dict, rows: str, others: int) -> float:
    """Reading by the model that is compared with, and the rows alone by others."""
    read, general = work[rows], work["general"]
    seconds = rate_seconds(rates["read"], read["tokens"] + general["tokens"], read["rows"] + general["rows"])
    return seconds + others * rate_seconds(rates["read"], read["tokens"], read["rows"])


def evaluation_cost(work: dict, rates: dict, variant: str) -> tuple[float, float]:
    w, speed, made = work["evaluation"], work["evaluation"]["speed"], rates["int4" if "int4" in variant else variant]
    answers = w["tuned" if "lora" in variant else "untuned"]
    if "bytes" in made:  # llama.cpp
        seconds = (
            rate_seconds(made["start"]) + rate_seconds(rates["rows"]) + rate_seconds(made["read"], w["prompt_tokens"])
        )
        seconds += rate_seconds(made["write"], answers["new_tokens"] + w["gold_tokens"])
        repeat = rate_seconds(made["read"], speed["prompt_tokens"] + speed["batch_tokens"])
        repeat += rate_seconds(made["step"], speed["new_tokens"]) + rate_seconds(
            made["write"], speed["streams"] * speed["new_tokens"]
        )
    else:
        seconds = start_seconds(rates, *["adapter start"] * (variant == "lora"))
        seconds += rate_seconds(made["read batch"], w["padded_tokens"], w["passes"]) + rate_seconds(
            made["step batch"], answers["steps"]
        )
        seconds += rate_seconds(made["read"], w["prompt_tokens"] + w["gold_tokens"], w["rows"])
        repeat = rate_seconds(made["read"], speed["prompt_tokens"], 1) + rate_seconds(
            made["read batch"], speed["padded_tokens"], 1
        )
        repeat += rate_seconds(made["step"], speed["new_tokens"]) + rate_seconds(
            made["step batch"], speed["new_tokens"]
        )
    return seconds + speed["repeats"] * repeat, 0


def clara_training_cost(work: dict, rates: dict, stage: str) -> tuple[float, float]:
    """A stage of CLaRa."""
    w, made = work["clara"][stage], rates["clara"]
    seconds = sum(rate_seconds(one) for one in (rates["start"], rates["load"], made["start"], made["rows"][stage]))
    for kind, one in w["learnt"].items():
        seconds += rate_seconds(made[kind], matmul_tokens(one, work["model"]), one["passes"])
    seconds += rate_seconds(made["read"], matmul_tokens(w["read"], work["model"]), w["read"]["passes"])
    seconds += rate_seconds(made["update"], w["steps"])
    return seconds + (rate_seconds(made["search start"]) if stage == "train_stage3" else 0), w["bytes"]


def clara_evaluation_cost(work: dict, rates: dict) -> tuple[float, float]:
    """evaluate_clara.py: every way through transformers. Documents are compressed beside adapters, which are merged
    before answers are asked for; the two models are opened one after another."""
    w, made = work["clara"]["evaluation"], rates["base"]
    opened = start_seconds(rates, "adapter start", "load", "adapter start") + rate_seconds(rates["clara"]["start"])
    seconds = rate_seconds(rates["embedding start"]) + rate_seconds(rates["embedding"], w["characters"])
    seconds += rate_seconds(rates["lora"]["read batch"], w["compressed"]["tokens"], w["compressed"]["passes"])
    seconds += rate_seconds(made["read batch"], w["padded_tokens"], w["passes"]) + rate_seconds(
        made["step batch"], w["steps"]
    )
    return opened + seconds + rate_seconds(made["read"], w["timed"]["tokens"], w["timed"]["passes"]), 0


class Stage(NamedTuple):
    name: str
    script: str
    artifact: str  # models lie beside the base, reports beside the output, data beside --data
    needs: tuple[str, ...]
    forecast: Callable[[dict, dict], tuple[float, float]]  # of work and rates: seconds, and bytes that it leaves
    variant: str = ""  # what is evaluated


def evaluate_stage(variant: str, name: str = "") -> Stage:
    """The evaluation of a variant, under a name of its own where it has one."""
    name = name or variant
    needs = () if name == "base" else (name,)
    place = f"reports/eval-{{tag}}-{name}"
    return Stage(f"evaluate {name}", "evaluate", place, needs, partial(evaluation_cost, variant=variant), variant)


def forgetting_stage(variant: str, name: str, tag: str = "{tag}") -> Stage:
    needs = () if name == "base" else (name,)
    place = f"reports/forgetting-{tag}-{name}"
    return Stage(f"forgetting {name}", "forgetting", place, needs, partial(forgetting_cost, variant=variant), variant)


# {make goal: its stages, inputs first}. The base and the data are made before a forecast; {tag} is the report's, and
# {model} the base's.
PIPELINES = {
    "all": (
        evaluate_stage("base"),
        Stage("int4", "quantize", "models/{tag}-int4", (), partial(quantisation_cost, base=False)),
        evaluate_stage("int4"),
        Stage("lora", "sft", "models/{tag}-lora", (), training_cost),
        evaluate_stage("lora"),
        Stage("lora-merged", "merge_lora", "models/{tag}-lora-merged", ("lora",), merge_cost),
        Stage("lora-int4", "quantize", "models/{tag}-lora-int4", ("lora-merged",),
              partial(quantisation_cost, base=True)),
        evaluate_stage("lora-int4"),
    ),
    "align": (
        Stage("magpie", "generate_data", "data/{tag}/raw", (),
              partial(sampling_cost, kinds=("instructions", "responses"), adapter=False)),
        Stage("filtered", "filter_data", "data/{tag}/filtered", ("magpie",), filtering_cost),
        Stage("sft", "sft", "models/{tag}-sft", ("filtered",), training_cost),
        Stage("preferences", "generate_preferences", "data/{tag}/preferences", ("filtered", "sft"),
              partial(sampling_cost, kinds=("preferences",), adapter=True)),
        Stage("dpo", "dpo", "models/{tag}-dpo", ("sft", "preferences"), dpo_cost),
        evaluate_stage("base"), evaluate_stage("lora", "sft"), evaluate_stage("lora", "dpo"),
        forgetting_stage("base", "base", "{model}"), forgetting_stage("lora", "sft"), forgetting_stage("lora", "dpo"),
    ),
    "clara": (
        Stage("clara-stage1", "train_stage1", "models/{tag}-stage1", (),
              partial(clara_training_cost, stage="train_stage1")),
        Stage("clara-stage2", "train_stage2", "models/{tag}-stage2", ("clara-stage1",),
              partial(clara_training_cost, stage="train_stage2")),
        Stage("clara", "train_stage3", "models/{tag}", ("clara-stage2",),
              partial(clara_training_cost, stage="train_stage3")),
        Stage("lora", "sft", "models/{model}-lora", (), training_cost),
        Stage("evaluate clara", "evaluate_clara", "reports/{tag}", ("clara", "lora"), clara_evaluation_cost, "lora"),
    ),
}  # fmt: skip


def estimate_peak(stage: Stage, config, values: dict, work: dict, rates: dict) -> int:
    """The peak that a stage is expected to have, in bytes: a GPU's where it computes on one."""
    from lib.budget import memory

    most, given, sft = work["most"], PARSER_DEFAULTS | values[stage.script], values["sft"]
    targets = sft["lora_targets"]
    lora = {"r": sft["lora_r"], "target_modules": targets if targets == "all-linear" else targets.split(",")}
    adapter = lora if stage.variant == "lora" else None
    if stage.script in ("sft", "dpo"):
        rows = min(given["batch"], work["training"]["rows"])
        sizes = rows, most["length" if stage.script == "sft" else "pair"], given["gradient_checkpointing"]
        parts = memory.estimate_training(config, lora, given["load"], *sizes)
    elif stage.script in most.get("clara", {}):
        rows, learning, tokens, labels = most["clara"][stage.script]
        sizes = rows, tokens, given["gradient_checkpointing"], labels
        parts = memory.estimate_training(config, learning, given["load"], *sizes)
    elif stage.script in ("generate_data", "generate_preferences"):
        parts = memory.estimate_sampling(
            config, lora if stage.needs else None, given["load"], *most["drawn"][stage.name]
        )
    elif stage.script == "filter_data":
        parts = {}
    elif stage.script == "forgetting":
        parts = memory.estimate_answering(config, adapter, given["load"], 1, most["question"], 1)
        sizes = given["batch"], most["chat"], given["max_new_tokens"]
        parts = max(parts, memory.estimate_answering(config, adapter, given["load"], *sizes), key=memory.total)
    elif stage.script == "merge_lora":
        parts = memory.estimate_merge(config, most["positions"])
    elif stage.script == "quantize" and work["calibration"]["rows"]:
        parts = memory.estimate_calibration(config, most["calibration"], bool(given["distil_samples"]))
    elif stage.script == "quantize":
        parts = memory.estimate_comparison(config, most["positions"])
    elif "int4" in stage.variant and "bytes" in rates["int4"]:
        size, streams = rates["int4"]["bytes"], given["batch"]
        parts = memory.estimate_llamacpp(size, memory.count_key_values(config), streams, most["context"])
    else:
        how = values["quantize"]["method"] if "int4" in stage.variant else given["load"]
        parts = memory.estimate_answering(config, adapter, how, given["batch"], most["prompt"], given["max_new_tokens"])
    return int(memory.total(parts))
