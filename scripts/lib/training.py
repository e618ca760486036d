"""What trainers share: the run log, checkpoints marked as whole, batches of like length."""

import random
import time
from pathlib import Path

from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import TrainerCallback

from lib import artifact, hardware
from lib.runlog import WHOLE, Run, append_event


class RunLog(TrainerCallback):
    """Writes the run log, shows the progress, and marks checkpoints as whole."""

    def __init__(self, run: Run, tokens_of_step):
        self.run, self.tokens_of_step = run, tokens_of_step

    def on_train_begin(self, args, state, control, **_):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()

    def on_step_end(self, args, state, control, **_):
        self.bar.update()
        hardware.return_freed_memory()

    def on_step_begin(self, args, state, control, **_):
        self.began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
        seconds = time.perf_counter() - self.began
        append_event(
            self.run.log,
            {
                "step": state.global_step,
                "epoch": logs.get("epoch"),
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens_per_second": round(self.tokens_of_step() / seconds, 2),
                "rss_bytes": hardware.rss_bytes(),
                "gpu_bytes": hardware.gpu_bytes(),
                "time": round(time.time(), 3),
            },
        )

    def on_save(self, args, state, control, **_):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.rglob("*"):
            artifact.fsync(file)
        artifact.write_json(folder / WHOLE, {"step": state.global_step})


class LikeLengthSampler(Sampler):
    """Indices in batches of like length, the batches in random order, anew each epoch.

    `batch` is the effective one: however it is cut into forward passes, each step sees the same rows.

    Padding to the longest row is a third of all tokens in random batches of eight (rows of 107 to 555 tokens);
    sorting everything would train from long rows to short ones. So: shuffle, sort within windows of
    eight batches, deal out batches, shuffle those. The rows left over come last.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        window = 8 * self.batch
        whole = len(order) // self.batch * self.batch
        batches = []
        for start in range(0, whole, window):
            rows = sorted(order[start : min(start + window, whole)], key=lambda n: self.lengths[n])
            batches += [rows[n : n + self.batch] for n in range(0, len(rows), self.batch)]
        rng.shuffle(batches)
        return iter([n for batch in batches for n in batch] + order[whole:])
