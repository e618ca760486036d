"""Texts drawn at random from a model of transformers: rows that are done leave the batch, others take their place.

Answers of one batch differ in length by ten times; padded until the last is done, most of the work would be for
nothing. Each row draws from random numbers of its own, so that it does not depend on who else is in the batch.
"""

import random
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lib.sampling import EngineError, Settings


class Row:
    """A prompt that is being continued: its name, its random numbers, its new ids."""

    def __init__(self, key: object, prompt: list[int], seed: int):
        self.key, self.prompt, self.random, self.ids = key, prompt, random.Random(seed), []


class State(NamedTuple):
    """Of rows in a batch: their keys and values, which columns of those are no padding, what may come next."""

    cache: object  # DynamicCache; layers' keys and values are [rows, heads, columns, size]
    mask: torch.Tensor  # int64 [rows, columns]
    logits: torch.Tensor  # [rows, vocabulary]


def continued(model, jobs: dict, batch: int, pad: int, ends: set[int], settings: Settings) -> Iterator[Row]:
    """The rows of {key: (prompt ids, seed)}, as they are done; at most `batch` are in the model at once."""
    waiting, rows, state = deque(jobs.items()), [], None
    while waiting or rows:
        free = min(batch - len(rows), len(waiting))
        if free and (free >= batch // 8 or not rows):  # reading prompts takes a pass of its own: for some at once
            new = [Row(key, *job) for key, job in (waiting.popleft() for _ in range(free))]
            state, rows = joined(state, read(model, [row.prompt for row in new], pad)), rows + new
        tokens = drawn(state.logits, [row.random for row in rows], settings.temperature, settings.top_p)
        for row, token in zip(rows, tokens):
            row.ids.append(token)
        left = [n for n, row in enumerate(rows) if row.ids[-1] not in ends and len(row.ids) < settings.max_new_tokens]
        yield from (row for n, row in enumerate(rows) if n not in left)
        rows = [rows[n] for n in left]
        state = step(model, selected(state, left), [row.ids[-1] for row in rows]) if rows else None


@torch.inference_mode()
def read(model, prompts: list[list[int]], pad: int) -> State:
    from transformers import DynamicCache

    place = {p: n for n, p in enumerate(dict.fromkeys(map(tuple, prompts)))}  # equal prompts are read once
    longest, device = max(map(len, place)), model.device
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in place], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in place], device=device)
    cache = DynamicCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    return selected(State(cache, mask, out.logits[:, -1]), [place[tuple(p)] for p in prompts])


@torch.inference_mode()
def step(model, state: State, tokens: list[int]) -> State:
    mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], 1)
    ids = mask.new_tensor(tokens)[:, None]
    positions = mask.sum(1, keepdim=True) - 1
    out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=state.cache)
    return State(state.cache, mask, out.logits[:, -1])


@torch.inference_mode()
def selected(state: State, rows: list[int]) -> State:
    """These rows alone, as often as they are named, without the columns that only others had used."""
    if rows == list(range(len(state.mask))):
        return state
    mask = state.mask[rows]
    first = int(mask.any(0).int().argmax())
    for layer in state.cache.layers:
        layer.keys, layer.values = layer.keys[rows, :, first:], layer.values[rows, :, first:]
    return State(state.cache, mask[:, first:], state.logits[rows])


@torch.inference_mode()
def joined(one: State | None, other: State) -> State:
    if one is None:
        return other
    columns = max(one.mask.shape[1], other.mask.shape[1])

    def both(a, b, dim):
        return torch.cat(
            [torch.nn.functional.pad(t, (0,) * (2 * dim) + (columns - t.shape[-1 - dim], 0)) for t in (a, b)]
        )

    for a, b in zip(one.cache.layers, other.cache.layers):
        a.keys, a.values = both(a.keys, b.keys, 1), both(a.values, b.values, 1)
    return State(one.cache, both(one.mask, other.mask, 0), torch.cat([one.logits, other.logits]))


@torch.inference_mode()
def drawn(logits: torch.Tensor, randoms: list[random.Random], temperature: float, top_p: float) -> list[int]:
    """A token a row of [rows, vocabulary].

    It is drawn from all tokens, and again unless it lies in the nucleus: unless those that are likelier have less than
    top_p together. That is as exact as sorting 49,152 probabilities, which takes as long as the model.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits.float() / temperature).softmax(-1)
    summed = probabilities.cumsum(-1)
    if not summed[:, -1].isfinite().all():  # nothing would ever be drawn
        raise EngineError("the model gives no probabilities but NaN; its values may be too large for fp16: --load fp32")
    found, open_rows = [None] * len(randoms), list(range(len(randoms)))
    while open_rows:
        some = slice(None) if len(open_rows) == len(randoms) else open_rows
        p, total = probabilities[some], summed[some]
        points = torch.tensor([[randoms[n].random()] for n in open_rows], device=p.device) * total[:, -1:]
        tokens = torch.searchsorted(total, points, right=True).clamp(max=p.shape[1] - 1)
        likelier = (p * (p > p.gather(1, tokens))).sum(-1)
        for n, token, mass in zip(open_rows, tokens[:, 0].tolist(), likelier.tolist()):
            if mass < top_p:
                found[n] = token
        open_rows = [n for n in open_rows if found[n] is None]
    return found
