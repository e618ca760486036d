"""Training that goes on with fewer rows per forward pass when memory runs out."""

import copy
import json
import sys
from pathlib import Path

import torch
from accelerate import DistributedType
from tqdm import tqdm
from transformers import TrainerCallback

from lib.core import artifact, compute, hardware
from lib.core.cli import OutOfMemory
from lib.core.ranks import is_main_process
from lib.core.runlog import WHOLE, Run
from lib.train.progress import RunLog

MICRO_BATCH = "micro_batch.json"  # beside the runs: what fitted, by machine and work
METRICS = ("_metrics", "_total_train_tokens")  # what a trainer counts at each forward pass, by TRL's names


class MicroBatch:
    """How many rows go through the model at once. Halved when memory runs out; the next run starts with the half.

    `work` says in words what else decides how much memory a row takes: what is trained, its model, the longest row.
    `expected_bytes` is what all of it should take, where that is known.
    """

    expected_bytes: int | None = None

    def __init__(self, run: Run, batch: int, accumulation: int, work: str):
        self.file = run.path.parent / MICRO_BATCH
        self.batch, self.accumulation, self.rows = batch, accumulation, batch
        self.key = f"{work}; {hardware.device_name()}, {hardware.memory_bytes() / 1e9:.1f} GB"
        known = self.read_known().get(self.key)
        if isinstance(known, int) and 0 < known < batch:
            self.rows = known
            if is_main_process():
                print(
                    f"using micro-batch {known} with {self.passes(known)} accumulation steps, because a larger one ran "
                    f"out of memory here before; delete {self.file} to try {batch} with {accumulation} again",
                    file=sys.stderr,
                )

    def read_known(self) -> dict:
        try:
            known = json.loads(self.file.read_bytes())
        except (OSError, ValueError):  # a broken file costs one more back-off, which writes it anew
            return {}
        return known if isinstance(known, dict) else {}

    def passes(self, rows: int) -> int:
        """Forward passes a step."""
        return -(-self.batch // rows) * self.accumulation

    def return_freed_memory(self) -> None:
        """After a pass or a step, where it is more than was expected: after each it would cost a sixth of the speed."""
        hardware.return_freed_memory(above=self.expected_bytes or 0)

    def halve(self, rows: int) -> None:
        """So many rows at once ran out of memory."""
        before, self.rows = self.passes(self.rows), (rows + 1) // 2
        if not is_main_process():
            return
        tqdm.write(
            f"out of memory at micro-batch {rows} with {before} accumulation steps; continuing with {self.rows} and "
            f"{self.passes(self.rows)}. The effective batch size remains {self.batch * self.accumulation}",
            file=sys.stderr,
        )
        scratch = self.file.with_suffix(".tmp")
        artifact.write_json(scratch, self.read_known() | {self.key: self.rows})
        scratch.replace(self.file)


def describe_work(stage: str, base: dict, args) -> str:
    """A MicroBatch's `work`: what it is that is trained, and what decides how much memory that takes."""
    names = ("max_length", "precision", "attention", "device_map", "gradient_checkpointing")
    return f"{stage} of {base['digest'][:12]}, " + ", ".join(f"{name} {getattr(args, name)}" for name in names)


def summarise_micro_batches(history: list[dict]) -> list[dict]:
    """From which step on how many rows went through the model at once, out of a run's log."""
    found = []
    for event in history:
        if not found or event.get("micro_batch") != found[-1]["rows"]:
            found.append({"from_step": event["step"], "rows": event.get("micro_batch")})
    return found


class RetrySmaller:
    """Put before a Trainer's class: each micro batch goes through the model in pieces that fit into memory.

    A micro batch that runs out of memory is repeated in pieces of half as many rows, from the gradients and the random
    numbers that it had begun with. The pieces' gradients add up to its own, so steps, order of rows and effective
    batch stay, and so does the loss: it is that of a run that began with the smaller pieces.
    """

    texts_a_row = 1  # 2 where a batch holds the chosen texts and, below them, the rejected ones

    def __init__(self, *given, micro_batch: MicroBatch, **named):
        super().__init__(*given, **named)
        self.micro_batch = micro_batch
        self.add_callback(AfterStep(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.accelerator.distributed_type != DistributedType.NO:  # no process can cut its batch for itself
            return super().training_step(model, inputs, num_items_in_batch)
        while True:
            rows = min(self.micro_batch.rows, self.count(inputs))
            before = self.snapshot() if rows > 1 else None  # a single row is not repeated
            loss, reason = compute.call_catching_oom(self.run_in_pieces, model, inputs, num_items_in_batch, rows)
            if not reason:
                return loss
            if rows == 1:
                self.give_up(reason)
            self.restore(before)
            self.micro_batch.halve(rows)

    def run_in_pieces(self, model, inputs, num_items_in_batch, rows: int):
        count = self.count(inputs)
        passes, loss = self.current_gradient_accumulation_steps, 0
        try:
            for start in range(0, count, rows):
                some = slice(start, min(start + rows, count))
                # A sum over tokens divided by num_items_in_batch adds up as it is. A mean over the rows is divided by
                # this number: made larger, it lets each piece count by its share of the rows.
                self.current_gradient_accumulation_steps = passes * count / (some.stop - start)
                loss += super().training_step(model, self.piece(inputs, count, some), num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = passes
        return loss

    def count(self, inputs) -> int:
        """Rows of a batch."""
        return len(inputs["input_ids"]) // self.texts_a_row

    def piece(self, inputs, count: int, some: slice) -> dict:
        """Some of a batch's `count` rows, padded to the longest of them."""
        cut = {name: value.unflatten(0, (-1, count))[:, some].flatten(0, 1) for name, value in inputs.items()}
        mask = cut["attention_mask"]
        used = mask.any(0)
        return {name: value[:, used] if value.shape == mask.shape else value for name, value in cut.items()}

    def snapshot(self) -> tuple:
        """What a forward and backward pass change: gradients (some of them, if it fails half way), random numbers,
        its metrics. Gradients are small with an adapter."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [(p, None if p.grad is None else p.grad.clone()) for p in trained]
        counted = {name: copy.deepcopy(vars(self)[name]) for name in METRICS if name in vars(self)}
        return gradients, random_state(), counted

    def restore(self, before: tuple) -> None:
        gradients, randomness, counted = before
        for parameter, gradient in gradients:
            parameter.grad = gradient
        set_random_state(randomness)
        vars(self).update(counted)

    def give_up(self, reason: str) -> None:
        """A single row does not fit: keep the steps that are done, and nothing of the one that is not."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        self.model.zero_grad()
        if step and not (folder / WHOLE).is_file():
            self.current_flos = 0
            set_random_state(self.random_state)
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if log := self.pop_callback(RunLog):
            log.bar.close()  # else the error would stand in its line
        saved = f"Steps up to {step} are saved in {folder}" if step else "No step is finished yet"
        also = "" if self.args.activation_checkpointing else ", if you like with --gradient-checkpointing"
        raise OutOfMemory(
            f"out of memory in step {step + 1} with a single example ({reason}). {saved}. Free some memory and repeat "
            f"the command{also}. A shorter --max-length or a smaller --model also needs less memory, but starts over"
        )


class AfterStep(TrainerCallback):
    """Notes the random state after each step: a checkpoint saved in the middle of the next one has to hold it."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **_):
        self.trainer.random_state = random_state()


def random_state() -> tuple:
    """Of torch's random numbers, which dropout draws."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
