"""What the stages of a pipeline take: seconds and bytes, from the work that was counted and the rates that were timed.

Work is estimate.py's, {what: counts of rows, tokens, passes …}; rates are those of lib/probe.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from lib.probe import UNSAID, products


def took(rate: dict, units: float = 1, passes: float = 0) -> float:
    return units * rate["seconds"] + passes * rate["pass"]


def start(rates: dict, *more: str) -> float:
    return sum(took(rates[name]) for name in ("start", "load", "rows", *more))


def training(work: dict, rates: dict) -> tuple[float, float]:
    w = work["training"]
    passes = took(rates["train"], w["tokens"], w["passes"]) + took(rates["update"], w["updates"])
    return start(rates, "adapter start", "training start") + passes, work["model"]["adapter_bytes"]


def drawing(work: dict, rates: dict, kinds: tuple[str, ...], adapter: bool) -> tuple[float, float]:
    """Texts by lib/batching.py, call after call; an adapter is merged before."""
    seconds = start(rates, *["adapter start"] * adapter)
    for kind in kinds:
        for w in work["drawn"][kind]:
            seconds += took(rates["sample"][kind], w["tokens"] - w["steps"], w["steps"])
            seconds += took(rates["base"]["read batch"], w["prompt_tokens"])
    return seconds, 0


def filtering(work: dict, rates: dict) -> tuple[float, float]:
    return took(rates["rows"]), 0


def preferring(work: dict, rates: dict) -> tuple[float, float]:
    """DPO. Of a training pass of LoRA, half is the forward pass: weights that are frozen get no gradient."""
    w = work["preferring"]
    seconds = took(rates["train"], w["tokens"], w["passes"]) + took(rates["update"], w["updates"])
    seconds += took(rates["train"], w["forward_tokens"]) / 2
    return start(rates, "adapter start", "training start") + seconds, work["model"]["adapter_bytes"]


def weighing(work: dict, rates: dict, variant: str) -> tuple[float, float]:
    """Options, then answers that are as long as they may be."""
    w, made = work["weighing"], rates[variant]
    seconds = start(rates, *["adapter start"] * (variant == "lora")) + took(made["read"], w["tokens"], w["passes"])
    seconds += took(made["read batch"], w["prompt_tokens"]) + took(made["step batch"], w["steps"])
    return seconds, 0


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


def compressing(work: dict, rates: dict, stage: str) -> tuple[float, float]:
    """A stage of CLaRa."""
    w, made = work["clara"][stage], rates["clara"]
    seconds = sum(took(one) for one in (rates["start"], rates["load"], made["start"], made["rows"][stage]))
    for kind, one in w["learnt"].items():
        seconds += took(made[kind], products(one, work["model"]), one["passes"])
    seconds += took(made["read"], products(w["read"], work["model"]), w["read"]["passes"])
    seconds += took(made["update"], w["steps"])
    return seconds + (took(made["search start"]) if stage == "train_stage3" else 0), w["bytes"]


def judging(work: dict, rates: dict) -> tuple[float, float]:
    """evaluate_clara.py: every way through transformers. Documents are compressed beside adapters, which are merged
    before answers are asked for; the two models are opened one after another."""
    w, made = work["clara"]["evaluation"], rates["base"]
    opened = start(rates, "adapter start", "load", "adapter start") + took(rates["clara"]["start"])
    seconds = took(rates["embedding start"]) + took(rates["embedding"], w["characters"])
    seconds += took(rates["lora"]["read batch"], w["compressed"]["tokens"], w["compressed"]["passes"])
    seconds += took(made["read batch"], w["padded_tokens"], w["passes"]) + took(made["step batch"], w["steps"])
    return opened + seconds + took(made["read"], w["timed"]["tokens"], w["timed"]["passes"]), 0


class Stage(NamedTuple):
    name: str
    script: str
    artifact: str  # models lie beside the base, reports beside the output, data beside --data
    needs: tuple[str, ...]
    forecast: Callable[[dict, dict], tuple[float, float]]  # of work and rates: seconds, and bytes that it leaves
    variant: str = ""  # what is evaluated


def judged(variant: str, name: str = "") -> Stage:
    """The evaluation of a variant, under a name of its own where it has one."""
    name = name or variant
    needs = () if name == "base" else (name,)
    place = f"reports/eval-{{tag}}-{name}"
    return Stage(f"evaluate {name}", "evaluate", place, needs, partial(evaluation, variant=variant), variant)


def remembered(variant: str, name: str, tag: str = "{tag}") -> Stage:
    needs = () if name == "base" else (name,)
    place = f"reports/forgetting-{tag}-{name}"
    return Stage(f"forgetting {name}", "forgetting", place, needs, partial(weighing, variant=variant), variant)


# {make goal: its stages, inputs first}. The base and the data are made before a forecast; {tag} is the report's, and
# {model} the base's.
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
    ),
    "align": (
        Stage("magpie", "generate_data", "data/{tag}/raw", (),
              partial(drawing, kinds=("instructions", "responses"), adapter=False)),
        Stage("filtered", "filter_data", "data/{tag}/filtered", ("magpie",), filtering),
        Stage("sft", "sft", "models/{tag}-sft", ("filtered",), training),
        Stage("preferences", "generate_preferences", "data/{tag}/preferences", ("filtered", "sft"),
              partial(drawing, kinds=("preferences",), adapter=True)),
        Stage("dpo", "dpo", "models/{tag}-dpo", ("sft", "preferences"), preferring),
        judged("base"), judged("lora", "sft"), judged("lora", "dpo"),
        remembered("base", "base", "{model}"), remembered("lora", "sft"), remembered("lora", "dpo"),
    ),
    "clara": (
        Stage("clara-stage1", "train_stage1", "models/{tag}-stage1", (), partial(compressing, stage="train_stage1")),
        Stage("clara-stage2", "train_stage2", "models/{tag}-stage2", ("clara-stage1",),
              partial(compressing, stage="train_stage2")),
        Stage("clara", "train_stage3", "models/{tag}", ("clara-stage2",), partial(compressing, stage="train_stage3")),
        Stage("lora", "sft", "models/{model}-lora", (), training),
        Stage("evaluate clara", "evaluate_clara", "reports/{tag}", ("clara", "lora"), judging, "lora"),
    ),
}  # fmt: skip


def memory(stage: Stage, config, values: dict, work: dict, rates: dict) -> int:
    """The peak that a stage is expected to have, in bytes: a GPU's where it computes on one."""
    from lib import budget

    most, given, sft = work["most"], UNSAID | values[stage.script], values["sft"]
    targets = sft["lora_targets"]
    lora = {"r": sft["lora_r"], "target_modules": targets if targets == "all-linear" else targets.split(",")}
    adapter = lora if stage.variant == "lora" else None
    if stage.script in ("sft", "dpo"):
        rows = min(given["batch"], work["training"]["rows"])
        sizes = rows, most["length" if stage.script == "sft" else "pair"], given["gradient_checkpointing"]
        parts = budget.training(config, lora, given["load"], *sizes)
    elif stage.script in most.get("clara", {}):
        rows, learning, tokens, labels = most["clara"][stage.script]
        sizes = rows, tokens, given["gradient_checkpointing"], labels
        parts = budget.training(config, learning, given["load"], *sizes)
    elif stage.script in ("generate_data", "generate_preferences"):
        parts = budget.sampling(config, lora if stage.needs else None, given["load"], *most["drawn"][stage.name])
    elif stage.script == "filter_data":
        parts = {}
    elif stage.script == "forgetting":
        parts = budget.answering(config, adapter, given["load"], 1, most["question"], 1)
        sizes = given["batch"], most["chat"], given["max_new_tokens"]
        parts = max(parts, budget.answering(config, adapter, given["load"], *sizes), key=budget.total)
    elif stage.script == "merge_lora":
        parts = budget.merging(config, most["positions"])
    elif stage.script == "quantize" and work["calibration"]["rows"]:
        parts = budget.calibrating(config, most["calibration"], bool(given["distil_samples"]))
    elif stage.script == "quantize":
        parts = budget.comparing(config, most["positions"])
    elif "int4" in stage.variant and "bytes" in rates["int4"]:
        size, streams = rates["int4"]["bytes"], given["batch"]
        parts = budget.answering_in_llamacpp(size, budget.key_values(config), streams, most["context"])
    else:
        how = values["quantize"]["method"] if "int4" in stage.variant else given["load"]
        parts = budget.answering(config, adapter, how, given["batch"], most["prompt"], given["max_new_tokens"])
    return int(budget.total(parts))
