"""Texts sampled from a model of transformers in continuous batches: finished rows leave, others take their place.

The answers of a batch differ in length by ten times; if all were padded to the longest, most of the work would be
wasted. Each row has its own random numbers, so that it does not depend on the other rows of the batch.
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
    """The rows of {key: (prompt ids, seed)} as they finish. At most `batch` are in the model at once."""
    waiting, rows = deque(jobs.items()), [None] * min(batch, len(jobs))
    model_batch = Batch(model, len(rows))
    while waiting or any(rows):
        free = rows.count(None)
        if (
            free and free >= len(rows) // 8
        ):  # new prompts take a pass, fewer rows a copy of all: done for several rows at once
            if waiting:
                slots = [n for n, row in enumerate(rows) if row is None][: len(waiting)]
                for n in slots:
                    key, job = waiting.popleft()
                    rows[n] = Row(key, *job)
                model_batch.read(slots, [rows[n].prompt for n in slots], pad)
            else:
                model_batch.keep([n for n, row in enumerate(rows) if row])
                rows = [row for row in rows if row]
        live = [n for n, row in enumerate(rows) if row]
        randoms = [rows[n].random for n in live]
        for n, token in zip(live, draw_tokens(model_batch.logits[live], randoms, settings.temperature, settings.top_p)):
            rows[n].ids.append(token)
        done = [n for n in live if rows[n].ids[-1] in ends or len(rows[n].ids) == settings.max_new_tokens]
        yield from (rows[n] for n in done)
        for n in done:
            rows[n] = None
        model_batch.leave(done)
        if any(rows):
            model_batch.step([row.ids[-1] if row else pad for row in rows])


class Room(DynamicLayer):
    """Preallocated keys and values of a layer, [rows, heads, columns, size]. The columns from `first` to `end` are in
    use. transformers' own layer copies all of them for each new token."""

    def __init__(self, tensors: list[torch.Tensor], first: int, end: int):
        super().__init__()
        self.held, self.first, self.end = tensors, first, end

    def update(self, *columns, **_):
        for tensor, column in zip(self.held, columns):
            tensor[:, :, self.end : self.end + 1] = column
        self.end += 1
        return tuple(tensor[:, :, self.first : self.end] for tensor in self.held)

    def get_seq_length(self) -> int:
        return self.end - self.first


class Batch:
    """Left-padded rows that end in the same column, and the `logits` of their next tokens, [rows, vocabulary]. A row
    that has left keeps its place, and takes part in each step, until another row takes it."""

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
        columns, sources = slice(self.end - longest, self.end), [place[tuple(p)] for p in prompts]
        for (keys, values), layer in zip(self.layers, cache.layers):
            keys[rows, :, columns], values[rows, :, columns] = layer.keys[sources], layer.values[sources]
        self.mask[rows] = 0  # steps since the last texts left have marked their columns
        self.mask[rows, columns], self.logits[rows] = mask[sources], out.logits[sources, -1]

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> None:
        """Add a token to each row."""
        if self.end == self.mask.shape[1]:
            self.move(slice(None))
        # One column of padding stays: without padding transformers drops the mask, and without a mask torch's attention
        # with grouped heads takes seven times as long on a CPU (64 rows of 465 tokens in bf16).
        first = self.first() - 1
        cache = Cache(layers=[Room(layer, first, self.end) for layer in self.layers])
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
    def move(self, rows: list[int] | slice, min_columns: int = 0) -> None:
        """Copy these rows into new tensors: a column of padding, their columns (at least `min_columns`), and a free
        block."""
        start, width = self.first(), self.end - self.first()
        padding = 1 + max(0, min_columns - width)
        self.mask = padded(self.mask[rows, start : self.end], (padding, CACHE_BLOCK))
        for layer in self.layers:
            layer[:] = [padded(t[rows, :, start : self.end], (0, 0, padding, CACHE_BLOCK)) for t in layer]
        self.end = padding + width

    def first(self) -> int:
        """The first column that any row uses."""
        used = self.mask.any(0)
        return int(used.int().argmax()) if used.any() else self.end


@torch.inference_mode()
def draw_tokens(logits: torch.Tensor, randoms: list[random.Random], temperature: float, top_p: float) -> list[int]:
    """One token per row of `logits`, [rows, vocabulary].

    A token is drawn from the whole vocabulary until it is in the nucleus, that is, until the likelier tokens have less
    than top_p together. This is as exact as sorting 49,152 probabilities, which takes as long as the model.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits.float() / temperature).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if not cumulative[:, -1].isfinite().all():  # nothing would ever be drawn
        raise EngineError(
            "the model's probabilities are NaN; its values may be too large for fp16. Try --precision fp32"
        )
    draws, open_rows = [None] * len(randoms), list(range(len(randoms)))
    while open_rows:
        rows = slice(None) if len(open_rows) == len(randoms) else open_rows
        p, total = probabilities[rows], cumulative[rows]
        points = torch.tensor([[randoms[n].random()] for n in open_rows], device=p.device) * total[:, -1:]
        tokens = torch.searchsorted(total, points, right=True).clamp(max=p.shape[1] - 1)
        likelier = p.masked_fill(p <= p.gather(1, tokens), 0).sum(-1)
        for n, token, mass in zip(open_rows, tokens[:, 0].tolist(), likelier.tolist()):
            if mass < top_p:
                draws[n] = token
        open_rows = [n for n in open_rows if draws[n] is None]
    return draws
