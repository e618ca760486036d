"""The end of a training whose numbers are no longer finite: from then on every step would give NaN."""

import math

import torch

from lib.core.cli import InputError

# The steps in a row that a GradScaler may skip. Each halves the scale, so they take it from its first value, 65,536,
# below 1, where a gradient that still overflows fp16 is itself too large.
SKIPS_IN_A_ROW = 20


def check_event(event: dict, trainer, run) -> None:
    """InputError unless a step's logged values, and the weights that it has left, are finite."""
    name = next((key for key, value in event.items() if isinstance(value, float) and not math.isfinite(value)), None)
    if not name and are_weights_finite(trainer.model):
        return
    problem = f"{name} is {event[name]}" if name else "a trained weight became NaN or infinite"
    checkpoint = run.checkpoint()
    kept = f", and the checkpoint before it is kept: {checkpoint}" if checkpoint else ""
    is_first = name and event["step"] == 1
    raise InputError(
        f"step {event['step']}: {problem}, so training ends. No artifact was written{kept}. The same command would end "
        f"in the same step. {advise(trainer.args, is_first)}"
    )


def are_weights_finite(model) -> bool:
    with torch.no_grad():
        largest = torch.nn.utils.get_total_norm([p for p in model.parameters() if p.requires_grad], math.inf)
    return bool(largest.isfinite())


def refuse_skips(steps: int, settings) -> None:
    raise InputError(
        f"the last {steps} steps were skipped, because their gradients overflowed in fp16 at every scale: nothing is "
        f"learnt. {advise(settings)}"
    )


def advise(settings, is_first: bool = False) -> str:
    """What to change in a training with these TrainingArguments. `is_first`: no step has changed the model yet."""
    wider = {"fp16": "bf16 or fp32", "bf16": "fp32"}
    now = next((name for name in wider if getattr(settings, name)), None)
    precision = f", or use --precision {wider[now]} (it is {now})" if now else ""
    if is_first:
        return f"Nothing was learnt before: check the weights that it started from (`make base` does){precision}"
    return f"Lower --learning-rate (it is {settings.learning_rate:g}){precision}"
