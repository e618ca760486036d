"""Self-distillation with the rounding in the loop: the model before it was rounded teaches the rounded one.

Codes stay, scales learn (as in PEQA, arXiv 2305.14152): a weight is level[code] times its block's scale, so the
gradient reaches the scale through the rounded weights that the file will hold. Moving the codes as well, straight
through the rounding, did harm in the few steps that a quantisation may take: see docs/quantisation.md.
"""

import math
import random
import sys

import torch
from tqdm import tqdm

from lib.core import hardware
from lib.gguf.packing import BLOCK
from lib.quant.rounding import Rounded

BATCH = 8  # rows per step
LEARNING_RATE = 1.5e-4  # of a scale, relative to it; 2e-3 undid the calibration before it could help
WARMUP = 0.1
BETAS = (0.9, 0.95)


def learn_scales(student, teacher, encoded: list[dict], rounded: dict[str, Rounded], seed: int = 0) -> None:
    """One pass over encoded rows (chat.encode_row) that replaces the scales in `rounded` and in the student by learned
    ones, as fp16 can hold them. The loss is KL(teacher ‖ student) on the positions that predict the answers; Adam,
    cosine to 0.
    """
    weights = {name: student.get_parameter(name) for name in rounded}
    student.requires_grad_(False)
    factors = {name: torch.nn.Parameter(torch.ones_like(matrix.scales)) for name, matrix in rounded.items()}
    optimiser = torch.optim.Adam(factors.values(), lr=LEARNING_RATE, betas=BETAS)
    steps = math.ceil(len(encoded) / BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule(step, steps))
    order = random.Random(seed).sample(encoded, len(encoded))
    for weight in weights.values():
        weight.requires_grad_(True)
    for step in tqdm(range(steps), desc="distilling", unit="step", file=sys.stderr):
        rows = order[step * BATCH : (step + 1) * BATCH]
        positions = sum(label != -100 for row in rows for label in row["labels"])
        for row in rows:
            (mean_kl(student, teacher, row) / positions).backward()
        with torch.no_grad():
            for name, weight in weights.items():
                # The weight is factor · old weight, and the factor is near 1: d loss / d factor = Σ gradient · weight.
                by_block = (weight.grad * weight / factors[name].repeat_interleave(BLOCK, 1)).unflatten(1, (-1, BLOCK))
                factors[name].grad, weight.grad = by_block.sum(-1), None
            optimiser.step()
            scheduler.step()
            for name, weight in weights.items():
                weight.copy_(rounded[name].values(factors[name]))
    student.requires_grad_(False)
    with torch.no_grad():
        for name, matrix in rounded.items():
            rounded[name] = matrix._replace(scales=(matrix.scales * factors[name]).half().float())
            weights[name].copy_(rounded[name].values())


def schedule(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of the highest: a short warm-up, then half a cosine."""
    return min(1, (step + 1) / max(1, WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def mean_kl(student, teacher, row: dict):
    """KL(teacher ‖ student) in nats, summed over the positions that predict a row's answer."""
    ids = torch.tensor([row["input_ids"]], device=student.device)
    answer_length = sum(label != -100 for label in row["labels"])
    options = dict(logits_to_keep=answer_length + 1, use_cache=False)
    with hardware.autocast():
        with torch.no_grad():
            teacher_logprobs = teacher(ids, **options).logits[0, :-1].float().log_softmax(-1)
        student_logprobs = student(ids, **options).logits[0, :-1].float().log_softmax(-1)
    return (teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)).sum()
