"""What a stage takes, from work that was counted (workload.py) and rates that were timed (timing.py).

The formula of a stage stands beside the stage: `estimate_cost` of its script takes a Job and returns a Cost.
"""

from argparse import Namespace
from typing import Any, NamedTuple


class Job(NamedTuple):
    args: Namespace  # the stage's arguments, as its own parser reads them
    model: str  # what the stage's model is: "base" for any in 16 bit, "lora" for an adapter, "int4" for a quantised one
    tuned: bool  # whether that model was fine-tuned: its answers are then as long as the reference answers
    method: str  # of quantisation, never "auto"
    config: Any  # the base model's transformers config
    lora: dict  # r and target_modules of the adapter that the pipeline trains
    work: dict  # {what: counts of rows, tokens, passes …}
    rates: dict

    @property
    def adapter(self) -> dict | None:
        return self.lora if self.model == "lora" else None


class Cost(NamedTuple):
    seconds: float
    memory: dict[str, int]  # parts of the peak, in bytes: a GPU's where the stage computes on one
    bytes: int = 0  # of the artifact, where these are worth mentioning


def rate_seconds(rate: dict, units: float = 1, passes: float = 0) -> float:
    return units * rate["seconds"] + passes * rate["pass"]


def start_seconds(rates: dict, *more: str) -> float:
    return sum(rate_seconds(rates[name]) for name in ("start", "load", "rows", *more))


def sampling_seconds(job: Job, kinds: tuple[str, ...]) -> float:
    """Texts by lib/engines/batching.py, call after call; an adapter is merged before."""
    rates, seconds = job.rates, start_seconds(job.rates, *["adapter start"] * (job.model == "lora"))
    for kind in kinds:
        for w in job.work["drawn"][kind]:
            seconds += rate_seconds(rates["sample"][kind], w["tokens"] - w["steps"], w["steps"])
            seconds += rate_seconds(rates["base"]["read batch"], w["prompt_tokens"])
    return seconds


def divergence_seconds(job: Job, rows: str, others: int) -> float:
    """Reading by the model that is compared with, and the rows alone by others."""
    read, general, rate = job.work[rows], job.work["general"], job.rates["read"]
    seconds = rate_seconds(rate, read["tokens"] + general["tokens"], read["rows"] + general["rows"])
    return seconds + others * rate_seconds(rate, read["tokens"], read["rows"])


def clara_stage_cost(job: Job, stage: str) -> Cost:
    """A stage of CLaRa."""
    from lib.budget import memory
    from lib.forecast.timing import matmul_tokens

    w, rates, model = job.work["clara"][stage], job.rates, job.work["model"]
    made = rates["clara"]
    seconds = sum(rate_seconds(one) for one in (rates["start"], rates["load"], made["start"], made["rows"][stage]))
    for kind, learnt in w["learnt"].items():
        seconds += rate_seconds(made[kind], matmul_tokens(learnt, model), learnt["passes"])
    seconds += rate_seconds(made["read"], matmul_tokens(w["read"], model), w["read"]["passes"])
    seconds += rate_seconds(made["update"], w["steps"])
    rows, adapters, tokens, labels = job.work["most"]["clara"][stage]
    sizes = rows, tokens, job.args.gradient_checkpointing, labels
    return Cost(seconds, memory.estimate_training(job.config, adapters, job.args.load, *sizes), w["bytes"])
