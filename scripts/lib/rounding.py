"""Calibrated rounding: codes and scales of Q4_0 blocks that keep what a layer answers, not what it weighs.

A matrix W [out, in] meets inputs x on calibration rows. What should stay is W·x, so the error that counts is
tr((W - Q) H (W - Q)^T) with H = Σ x·x^T. Columns are rounded one after the other, and what a column got wrong is
made up for by the columns to its right: GPTQ (arXiv 2210.17323), here with llama.cpp's blocks of 32 columns, whose
scale is chosen when the block is reached, from the weights as they are by then. The file's format is unchanged.
"""

import torch

from lib import chat
from lib.gguf import BLOCK, pack_q4_0

# Tried for each scale, times the largest weight / 8, with either sign: -8 is one step further out than 7.
FACTORS = (0.72, 0.78, 0.84, 0.88, 0.92, 0.96, 1.0, 1.06)
DAMPING = 0.01  # of the mean diagonal of H, added to it (GPTQ's own choice)


def calibrated_blocks(model, tokenizer, rows: list[dict], ends: set[int]):
    """{name: packed Q4_0 rows} for every linear layer and the embedding of a model in fp32, from the rows' prompts and
    answers. The model's weights are replaced by the rounded ones on the way.

    Raises ValueError where a width is no multiple of 32 or weights are not finite.
    """
    ids = [torch.tensor([chat.encode(tokenizer, row, ends)["input_ids"]]) for row in rows]
    body = {f"{name}.weight": m for name, m in model.model.named_modules(prefix="model") if is_linear(m)}
    blocks = {}
    moments = second_moments(model.model, list(body.values()), ids)
    for name, layer in body.items():
        blocks[name] = round_layer(name, layer, moments.pop(layer))
    # The output matrix last, on hidden states that the rounded body gives. Where it is tied, it is the embedding.
    with torch.inference_mode():
        states = (model.model(one, use_cache=False).last_hidden_state[0] for one in ids)
        moment = sum(x.T @ x for x in states)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    blocks["model.embed_tokens.weight" if tied else "lm_head.weight"] = round_layer("lm_head", model.lm_head, moment)
    return blocks


def is_linear(module) -> bool:
    return isinstance(module, torch.nn.Linear)


def second_moments(model, layers: list, ids: list) -> dict:
    """H = Σ x·x^T [in, in] of each layer's inputs. Layers that read the same input share one H."""
    moments, last = {}, {}

    def add(layer, inputs):
        x = inputs[0]
        if last.get("x") is not x:
            flat = x.flatten(0, -2)
            last.update(x=x, moment=flat.T @ flat)
        moments[layer] = moments.get(layer, 0) + last["moment"]

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    with torch.inference_mode():
        for one in ids:
            model(one, use_cache=False)
            last.clear()
    for hook in hooks:
        hook.remove()
    return moments


def round_layer(name: str, layer, moment):
    weight = layer.weight.data
    if weight.shape[1] % BLOCK:
        raise ValueError(f"{name}: its width {weight.shape[1]} is no multiple of {BLOCK}")
    if not weight.isfinite().all():
        raise ValueError(f"{name}: holds weights that are not finite")
    scales, codes = calibrated(weight, moment)
    weight.copy_((codes - 8) * scales.repeat_interleave(BLOCK, 1))  # in place: a tied embedding follows
    return pack_q4_0(scales.numpy(), codes.to(torch.uint8).numpy())


def calibrated(weight, moment):
    """scales [out, in / 32] and codes 0…15 [out, in] of weight [out, in] under H [in, in], in fp32."""
    weight, moment = weight.clone(), moment.clone()
    width = weight.shape[1]
    silent = moment.diagonal() == 0  # inputs that were never seen: nothing to learn about them
    moment[silent, silent] = 1
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    scales, codes = torch.empty(len(weight), width // BLOCK), torch.empty_like(weight)
    for start in range(0, width, BLOCK):
        end = start + BLOCK
        block, factor = weight[:, start:end], inverse[start:end, start:end]
        d = best_scales(block, factor.diagonal() ** -2)
        errors = torch.empty_like(block)
        for n in range(BLOCK):
            codes[:, start + n] = code_of(block[:, n], d)
            errors[:, n] = (block[:, n] - d * (codes[:, start + n] - 8)) / factor[n, n]
            block[:, n + 1 :] -= errors[:, n, None] * factor[n, n + 1 :]
        weight[:, end:] -= errors @ inverse[start:end, end:]
        scales[:, start // BLOCK] = d
    return scales, codes


def best_scales(block, importance):
    """For each row of a block [rows, 32] the scale, as fp16 can hold it, with the least weighted squared error."""
    extreme = block.gather(1, block.abs().argmax(1, keepdim=True))  # with its sign
    least, best = torch.full((len(block),), float("inf")), torch.zeros(len(block))
    for factor in (*FACTORS, *(-f for f in FACTORS)):
        d = (extreme * (-factor / 8)).half().float()
        error = ((block - d * (code_of(block, d) - 8)).square() * importance).sum(1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, d[:, 0], best)
    return best


def code_of(weight, scale):
    return torch.where(scale == 0, 0, weight / scale).round_().add_(8).clamp_(0, 15)
