"""Batches of rows of similar length."""

import random

from torch.utils.data import Sampler


class LengthGroupedBatches(Sampler):
    """Indices in batches of similar length. The batches are in random order, which changes with each epoch.

    `batch` is the effective batch size: each step sees the same rows, however they are split into forward passes.

    In random batches of eight, padding to the longest row is a third of all tokens (rows of 107 to 555 tokens). Sorting
    all rows would order the whole training by length. So the rows are shuffled, sorted within windows of eight batches,
    and split into batches, which are shuffled in turn. Leftover rows come last.

    transformers' LengthGroupedSampler keeps the order from long to short within each window. Of 200 such rows, 10 % are
    padding there and 8 % here; of 1,200 rows, 2 % there and 7 % here.

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
        indices, leftover, window = [], [], 8 * self.batch
        for part in (range(self.before), range(self.before, len(self.lengths))):
            order = rng.sample(part, len(part))
            whole = len(order) // self.batch * self.batch
            batches = []
            for start in range(0, whole, window):
                rows = sorted(order[start : min(start + window, whole)], key=lambda n: self.lengths[n])
                batches += [rows[n : n + self.batch] for n in range(0, len(rows), self.batch)]
            rng.shuffle(batches)
            indices += [n for batch in batches for n in batch]
            leftover += order[whole:]
        return iter(indices + leftover)
