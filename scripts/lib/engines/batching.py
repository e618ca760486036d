"""Texts drawn at random from a model of transformers: rows that are done leave the batch, others take their place.

Answers of one batch differ in length by ten times; padded until the last is done, most of the work would be for
nothing. Each row draws from random numbers of its own, so that it does not depend on who else is in the batch.
"""

import random
from collections import deque
from collections.abc import Iterator

import torch
from torch.nn.functional import pad as padded
from transformers import Cache, DynamicCache, DynamicLayer

from lib.budget.memory import CACHE_BLOCK
from lib.engines.sampling import EngineError, Settings


class Row:
    """A prompt that is being continued: its name, its random numbers, its new ids."""

    def __init__(self, key: object, prompt: list[int], seed: int):
        self.key, self.prompt, self.random, self.ids = key, prompt, random.Random(seed), []


def sample_continuously(model, jobs: dict, batch: int, pad: int, ends: set[int], settings: Settings) -> Iterator[Row]:
    """The rows of {key: (prompt ids, seed)}, as they are done; at most `batch` are in the model at once."""
    waiting, rows = deque(jobs.items()), [None] * min(batch, len(jobs))
    held = Batch(model, len(rows))
    while waiting or any(rows):
        free = rows.count(None)
        if free and free >= len(rows) // 8:  # a pass for the prompts, or a copy of all rows: for some at once
            if waiting:
                coming = [n for n, row in enumerate(rows) if row is None][: len(waiting)]
                for n in coming:
                    key, job = waiting.popleft()
                    rows[n] = Row(key, *job)
                held.read(coming, [rows[n].prompt for n in coming], pad)
            else:
                held.keep([n for n, row in enumerate(rows) if row])
                rows = [row for row in rows if row]
        live = [n for n, row in enumerate(rows) if row]
        randoms = [rows[n].random for n in live]
        for n, token in zip(live, draw_tokens(held.logits[live], randoms, settings.temperature, settings.top_p)):
            rows[n].ids.append(token)
        done = [n for n in live if rows[n].ids[-1] in ends or len(rows[n].ids) == settings.max_new_tokens]
        yield from (rows[n] for n in done)
        for n in done:
            rows[n] = None
        held.leave(done)
        if any(rows):
            held.step([row.ids[-1] if row else pad for row in rows])


class Room(DynamicLayer):
    """Keys and values of a layer, [rows, heads, columns, size], of which those from `first` to `end` are in use.
    transformers' own layer copies all of them for each token that is added."""

    def __init__(self, held: list[torch.Tensor], first: int, end: int):
        super().__init__()
        self.held, self.first, self.end = held, first, end

    def update(self, *added, **_):
        for held, new in zip(self.held, added):
            held[:, :, self.end : self.end + 1] = new
        self.end += 1
        return tuple(held[:, :, self.first : self.end] for held in self.held)

    def get_seq_length(self) -> int:
        return self.end - self.first


class Batch:
    """Rows of a model that end in the same column, padded on their left, and in `logits`, [rows, vocabulary], what may
    come next. A row that has left keeps its place, and takes part in each step, until another comes."""

    def __init__(self, model, rows: int):
        self.model, self.layers, self.logits = model, [], None  # layers: keys and values, as in Room
        self.mask, self.end = torch.zeros(rows, 0, dtype=torch.long, device=model.device), 0

    @torch.inference_mode()
    def read(self, rows: list[int], prompts: list[list[int]], pad: int) -> None:
        """Put prompts into these rows."""
        place = {p: n for n, p in enumerate(dict.fromkeys(map(tuple, prompts)))}  # equal prompts are read once
        longest, device = max(map(len, place)), self.model.device
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in place], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in place], device=device)
        cache, positions = DynamicCache(), (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        if not self.layers:
            all_rows = (len(self.mask), -1, -1, -1)
            self.layers = [[t[:1, :, :0].expand(all_rows) for t in (c.keys, c.values)] for c in cache.layers]
            self.logits = out.logits.new_zeros(len(self.mask), out.logits.shape[-1])
        if longest >= self.end:
            self.move(slice(None), longest)
        here, which = slice(self.end - longest, self.end), [place[tuple(p)] for p in prompts]
        for (keys, values), read in zip(self.layers, cache.layers):
            keys[rows, :, here], values[rows, :, here] = read.keys[which], read.values[which]
        self.mask[rows, here], self.logits[rows] = mask[which], out.logits[which, -1]

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> None:
        """Add a token to each row."""
        if self.end == self.mask.shape[1]:
            self.move(slice(None))
        # A column of padding stays: without one transformers drops the mask, and without a mask torch's attention of
        # grouped heads takes seven times as long on a CPU (64 rows of 465 tokens in bf16).
        first = self.first() - 1
        cache = Cache(layers=[Room(held, first, self.end) for held in self.layers])
        self.mask[:, self.end], self.end = 1, self.end + 1
        mask, ids = self.mask[:, first : self.end], self.mask.new_tensor(tokens)[:, None]
        positions = mask.sum(1, keepdim=True) - 1
        out = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        self.logits = out.logits[:, -1]

    @torch.inference_mode()
    def leave(self, rows: list[int]) -> None:
        self.mask[rows] = 0

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        self.move(rows)
        self.logits = self.logits[rows]

    @torch.inference_mode()
    def move(self, rows: list[int] | slice, least: int = 0) -> None:
        """These rows into new room: after a column of padding what they have, or `least` columns, and a block more."""
        start, used = self.first(), self.end - self.first()
        before = 1 + max(0, least - used)
        self.mask = padded(self.mask[rows, start : self.end], (before, CACHE_BLOCK))
        for held in self.layers:
            held[:] = [padded(t[rows, :, start : self.end], (0, 0, before, CACHE_BLOCK)) for t in held]
        self.end = before + used

    def first(self) -> int:
        """The first column that any row is in."""
        used = self.mask.any(0)
        return int(used.int().argmax()) if used.any() else self.end


@torch.inference_mode()
def draw_tokens(logits: torch.Tensor, randoms: list[random.Random], temperature: float, top_p: float) -> list[int]:
    """A token a row of [rows, vocabulary].

    It is drawn from all tokens, and again unless it lies in the nucleus: unless those that are likelier have less than
    top_p together. That is as exact as sorting 49,152 probabilities, which takes as long as the model.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits.float() / temperature).softmax(-1)
    summed = probabilities.cumsum(-1)
    if not summed[:, -1].isfinite().all():  # nothing would ever be drawn
        raise EngineError(
            "the model's probabilities are NaN; its values may be too large for fp16. Try --precision fp32"
        )
    found, open_rows = [None] * len(randoms), list(range(len(randoms)))
    while open_rows:
        some = slice(None) if len(open_rows) == len(randoms) else open_rows
        p, total = probabilities[some], summed[some]
        points = torch.tensor([[randoms[n].random()] for n in open_rows], device=p.device) * total[:, -1:]
        tokens = torch.searchsorted(total, points, right=True).clamp(max=p.shape[1] - 1)
        likelier = p.masked_fill(p <= p.gather(1, tokens), 0).sum(-1)
        for n, token, mass in zip(open_rows, tokens[:, 0].tolist(), likelier.tolist()):
            if mass < top_p:
                found[n] = token
        open_rows = [n for n in open_rows if found[n] is None]
    return found
