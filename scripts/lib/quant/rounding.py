"""Calibrated rounding: codes and scales of 4 and 5-bit blocks that keep what a model answers, not what it weighs.

A matrix W [out, in] meets inputs x on calibration rows. What should stay is W·x, so the error that counts is
tr((W - Q) H (W - Q)^T) with H = Σ s·x·x^T. Columns are rounded one after the other, and the columns to the right
compensate for a column's error: GPTQ (arXiv 2210.17323), here with llama.cpp's blocks of 32 columns, whose scale is
chosen when the block is reached, from the weights as they are by then. GPTQ weights all inputs alike, s = 1; here s
is how much the answer depends on the layer's output at that token (as in GuidedQuant, arXiv 2505.07004): most of a
prompt hardly matters, least of all in the last layers. The file's format is unchanged.
"""

from functools import cache
from typing import NamedTuple

import torch

from lib.core import hardware
from lib.gguf.packing import BLOCK, pack_codes

# What a code stands for, times the block's scale. IQ4_NL's levels lie closer around zero, where weights are dense
# (kvalues_iq4nl in ggml/src/ggml-common.h). The first level is the one furthest out.
LEVELS = {
    "q4_0": (-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7),
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "q5_0": tuple(range(-16, 16)),
}
# Tried for each scale, with either sign: 1 puts a block's largest weight on the first level.
FACTORS = (0.72, 0.78, 0.84, 0.88, 0.92, 0.96, 1.0, 1.06, 1.12)
DAMPING = 0.01  # of the mean diagonal of H, added to it (GPTQ's own choice)
FLOOR = 0.3  # of the mean sensitivity, added to each: a prompt's tokens that never mattered here may matter elsewhere


class Rounded(NamedTuple):
    """A matrix in blocks: fp32 scales [out, in / 32] that fp16 can hold, uint8 codes [out, in], and their levels."""

    scales: torch.Tensor
    codes: torch.Tensor
    levels: tuple[int, ...]

    def values(self, factors=1):
        """The weights [out, in] that it encodes; its scales may be multiplied by factors [out, in / 32]."""
        return dequantise(self.codes, (self.scales * factors).repeat_interleave(BLOCK, 1), self.levels)

    def packed(self):
        bits = len(self.levels).bit_length() - 1
        return pack_codes(self.scales.cpu().numpy(), self.codes.cpu().numpy(), bits)


def calibrate(model, encoded: list[dict], kinds: dict[str, str], seed: int = 0) -> dict[str, Rounded]:
    """The matrices named in `kinds` ({Hugging Face name: one of LEVELS}) of a model in fp32, rounded for encoded
    rows (chat.encode_row). The model's weights are replaced by the rounded ones on the way. An embedding is left out
    unless it is also the output matrix: no layer's output tells what its errors cost.

    Raises ValueError where a width is no multiple of 32 or weights are not finite.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{name}: contains weights that are not finite")
    head = model.get_output_embeddings()
    head_name = "model.embed_tokens.weight" if head.weight is model.get_input_embeddings().weight else "lm_head.weight"
    layers = {f"{name}.weight": m for name, m in model.named_modules() if is_linear(m) and m is not head}
    layers = {name: layer for name, layer in layers.items() if name in kinds}
    rounded = {}
    moments = second_moments(model, head, list(layers.values()), encoded, seed)
    for name, layer in layers.items():
        rounded[name] = round_layer(name, layer, moments.pop(layer), LEVELS[kinds[name]])
    if head_name in kinds:  # if it is tied, it is also the embedding, and the output's needs come first
        rounded[head_name] = round_layer(head_name, head, moments.pop(head), LEVELS[kinds[head_name]])
    return rounded


def is_linear(module) -> bool:
    return isinstance(module, torch.nn.Linear)


def second_moments(model, head, layers: list, encoded: list[dict], seed: int) -> dict:
    """H = Σ s·x·x^T [in, in] of each layer's inputs x. s is the squared gradient, at the layer's output for that
    token, of the answers' likelihood, the answers being drawn from the model itself: the diagonal of its Fisher
    information, so that H measures the KL divergence that an error causes.
    """
    generator = torch.Generator().manual_seed(seed)
    moments, inputs = dict.fromkeys([*layers, head], 0), {}

    def keep_input(layer, args):
        inputs[layer] = args[0].detach().flatten(0, -2).float()

    def add(layer, _, gradients):
        x, s = inputs.pop(layer), gradients[0].flatten(0, -2).float().square().sum(-1)
        moments[layer] += (x * (s / s.mean().clamp(min=1e-30) + FLOOR)[:, None]).T @ x

    hooks = [layer.register_forward_pre_hook(keep_input) for layer in layers]
    hooks += [layer.register_full_backward_hook(add) for layer in layers]
    hooks += [model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_())]
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for row in encoded:
        mask = torch.tensor(row["labels"]).ne(-100).roll(-1)  # the positions that predict the answer
        with hardware.autocast():
            states = model.model(torch.tensor([row["input_ids"]], device=model.device), use_cache=False)[0][0]
            logits = head(states[mask]).float()
        tokens = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
        logits.log_softmax(-1).gather(1, tokens.to(logits.device)).sum().backward()
        x = states.detach().float()
        moments[head] += (x * (mask + FLOOR)[:, None]).T @ x
    for hook in hooks:
        hook.remove()
    for parameter, flag in trainable.items():
        parameter.requires_grad_(flag)
    return moments


def round_layer(name: str, layer, moment, levels: tuple[int, ...]) -> Rounded:
    weight = layer.weight.data
    if weight.shape[1] % BLOCK:
        raise ValueError(f"{name}: its width {weight.shape[1]} is not a multiple of {BLOCK}")
    rounded = Rounded(*round_calibrated(weight, moment, levels), levels)
    weight.copy_(rounded.values())  # in place: a tied embedding follows
    return rounded


def round_calibrated(weight, moment, levels: tuple[int, ...]):
    """scales [out, in / 32] and codes [out, in] of weight [out, in] under H [in, in], in fp32."""
    weight, moment = weight.clone(), moment.clone()
    width = weight.shape[1]
    silent = moment.diagonal() == 0  # inputs that were never seen: nothing to learn about them
    moment[silent, silent] = 1
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    scales = weight.new_empty(len(weight), width // BLOCK)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for start in range(0, width, BLOCK):
        end = start + BLOCK
        block, factor = weight[:, start:end], inverse[start:end, start:end]
        d = best_scales(block, factor.diagonal() ** -2, levels)
        errors = torch.empty_like(block)
        for n in range(BLOCK):
            codes[:, start + n] = nearest_codes(block[:, n], d, levels)
            errors[:, n] = (block[:, n] - dequantise(codes[:, start + n], d, levels)) / factor[n, n]
            block[:, n + 1 :] -= errors[:, n, None] * factor[n, n + 1 :]
        weight[:, end:] -= errors @ inverse[start:end, end:]
        scales[:, start // BLOCK] = d
    return scales, codes


def best_scales(block, importance, levels: tuple[int, ...]):
    """For each row of a block [rows, 32] the scale, as fp16 can hold it, with the least weighted squared error."""
    extreme = block.gather(1, block.abs().argmax(1, keepdim=True))  # with its sign
    best_error, best_scale = block.new_full((len(block),), float("inf")), block.new_zeros(len(block))
    for factor in (*FACTORS, *(-f for f in FACTORS)):
        d = (extreme * (factor / levels[0])).half().float()
        error = ((block - dequantise(nearest_codes(block, d, levels), d, levels)).square() * importance).sum(1)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, d[:, 0], best_scale)
    return best_scale


def nearest_codes(weight, scale, levels: tuple[int, ...]):
    """The code of the nearest level, uint8: looked up by the weight in half steps (the borders between levels lie on
    them), which takes a tenth of the time of a search."""
    halves = torch.where(scale == 0, 0, weight / scale).mul_(2).floor_().clamp_(2 * levels[0], -2 * levels[0])
    return codes_by_halves(levels, weight.device)[halves.sub_(2 * levels[0]).int()]


@cache
def codes_by_halves(levels: tuple[int, ...], device):
    middle = torch.arange(2 * levels[0], -2 * levels[0] + 1, device=device) / 2 + 0.25  # of each half step
    values = torch.tensor(levels, dtype=torch.float32, device=device)
    return (middle[:, None] - values).abs().argmin(1).to(torch.uint8)


def dequantise(codes, scale, levels: tuple[int, ...]):
    return torch.tensor(levels, dtype=torch.float32, device=codes.device)[codes.int()] * scale
