"""The cost of a stage, from counted work (workload.py) and measured rates (timing.py).

Each stage's formula is in its script: `estimate_cost` takes a Job and returns a Cost.
"""

from argparse import Namespace
from typing import Any, NamedTuple


class Job(NamedTuple):
    args: Namespace  # the stage's arguments, as its own parser reads them
    model: str  # kind of the stage's model: "base" (16 bit), "lora" (an adapter) or "int4" (quantised)
    tuned: bool  # whether that model was fine-tuned, and so answers about as long as the reference answers
    method: str  # quantisation method, never "auto"
    config: Any  # the base model's transformers config
    lora: dict  # r and target_modules of the adapter that the pipeline trains
    work: dict  # {kind of work: counts of examples, tokens, passes …}
    rates: dict

    @property
    def adapter(self) -> dict | None:
        return self.lora if self.model == "lora" else None


class Cost(NamedTuple):
    seconds: float
    memory: dict[str, int]  # parts of the peak in bytes; GPU memory if the stage computes on a GPU
    bytes: int = 0  # size of the artifact, if it is worth mentioning


def rate_seconds(rate: dict, units: float = 1, passes: float = 0) -> float:
    return units * rate["seconds"] + passes * rate["pass"]


def start_seconds(rates: dict, *names: str) -> float:
    return sum(rate_seconds(rates[name]) for name in ("start", "load", "rows", *names))


def sampling_seconds(job: Job, kinds: tuple[str, ...]) -> float:
    """Seconds of sampling with lib/engines/batching.py, including the merge of an adapter."""
    rates, seconds = job.rates, start_seconds(job.rates, *["adapter start"] * (job.model == "lora"))
    for kind in kinds:
        for call in job.work["sampling"][kind]:
            seconds += rate_seconds(rates["sample"][kind], call["tokens"] - call["steps"], call["steps"])
            seconds += rate_seconds(rates["base"]["read batch"], call["prompt_tokens"])
    return seconds


def divergence_seconds(job: Job, rows: str, others: int) -> float:
    """Seconds of a divergence check: the reference reads examples and general texts, `others` models the examples."""
    examples, general, rate = job.work[rows], job.work["general"], job.rates["read"]
    seconds = rate_seconds(rate, examples["tokens"] + general["tokens"], examples["rows"] + general["rows"])
    return seconds + others * rate_seconds(rate, examples["tokens"], examples["rows"])


def clara_stage_cost(job: Job, stage: str) -> Cost:
    """The cost of a training stage of CLaRa."""
    from lib.budget import memory
    from lib.forecast.timing import matmul_tokens

    work, model, rates = job.work["clara"][stage], job.work["model"], job.rates["clara"]
    starts = job.rates["start"], job.rates["load"], rates["start"], rates["rows"][stage]
    seconds = sum(map(rate_seconds, starts))
    for kind, passes in work["learnt"].items():
        seconds += rate_seconds(rates[kind], matmul_tokens(passes, model), passes["passes"])
    seconds += rate_seconds(rates["read"], matmul_tokens(work["read"], model), work["read"]["passes"])
    seconds += rate_seconds(rates["update"], work["steps"])
    rows, adapters, tokens, labels = job.work["most"]["clara"][stage]
    sizes = rows, tokens, job.args.gradient_checkpointing, labels
    return Cost(seconds, memory.estimate_training(job.config, adapters, job.args.precision, *sizes), work["bytes"])
