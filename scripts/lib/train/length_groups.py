"""Batches of rows of similar length."""

import random

from torch.utils.data import Sampler


class LengthGroupedBatches(Sampler):
    """Indices in batches of like length, the batches in random order, anew each epoch.

    `batch` is the effective one: however it is cut into forward passes, each step sees the same rows.

    Padding to the longest row is a third of all tokens in random batches of eight (rows of 107 to 555 tokens);
    sorting everything would train from long rows to short ones. So: shuffle, sort within windows of
    eight batches, deal out batches, shuffle those. The rows left over come last.

    The first `before` indices come before all others.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int, before: int = 0):
        self.lengths, self.batch, self.seed, self.before, self.epoch = lengths, batch, seed, before, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        made, left, window = [], [], 8 * self.batch
        for part in (range(self.before), range(self.before, len(self.lengths))):
            order = rng.sample(part, len(part))
            whole = len(order) // self.batch * self.batch
            batches = []
            for start in range(0, whole, window):
                rows = sorted(order[start : min(start + window, whole)], key=lambda n: self.lengths[n])
                batches += [rows[n : n + self.batch] for n in range(0, len(rows), self.batch)]
            rng.shuffle(batches)
            made += [n for batch in batches for n in batch]
            left += order[whole:]
        return iter(made + left)
