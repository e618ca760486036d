"""Training that continues with fewer rows per forward pass when memory runs out."""

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

MICRO_BATCH = "micro_batch.json"  # beside the runs: {work and machine: rows that fitted}
METRICS = ("_metrics", "_total_train_tokens")  # TRL's attributes that a trainer updates in each forward pass


class MicroBatch:
    """The number of rows per forward pass. It is halved when memory runs out, and the next run starts with the half.

    `work` describes what else determines the memory per row: the stage, its model, the longest row. `expected_bytes` is
    the estimated memory of the whole training, if it is known.
    """

    expected_bytes: int | None = None

    def __init__(self, run: Run, batch: int, accumulation: int, work: str):
        self.file = run.path.parent / MICRO_BATCH
        self.batch, self.accumulation, self.rows = batch, accumulation, batch
        self.key = f"{work}; {hardware.device_name()}, {hardware.memory_bytes() / 1e9:.1f} GB"
        rows = self.read_known().get(self.key)
        if isinstance(rows, int) and 0 < rows < batch:
            self.rows = rows
            if is_main_process():
                print(
                    f"using micro-batch {rows} with {self.passes(rows)} accumulation steps, because a larger one ran "
                    f"out of memory here before; delete {self.file} to try {batch} with {accumulation} again",
                    file=sys.stderr,
                )

    def read_known(self) -> dict:
        try:
            entries = json.loads(self.file.read_bytes())
        except (OSError, ValueError):  # a broken file costs one more back-off, which writes it again
            return {}
        return entries if isinstance(entries, dict) else {}

    def passes(self, rows: int) -> int:
        """Forward passes per step."""
        return -(-self.batch // rows) * self.accumulation

    def return_freed_memory(self) -> None:
        """Return freed memory if the process holds more than expected. After every pass it would cost a sixth of the
        speed."""
        hardware.return_freed_memory(above=self.expected_bytes or 0)

    def halve(self, rows: int) -> None:
        """Halve the micro-batch after a pass with `rows` ran out of memory."""
        passes, self.rows = self.passes(self.rows), (rows + 1) // 2
        if not is_main_process():
            return
        tqdm.write(
            f"out of memory at micro-batch {rows} with {passes} accumulation steps; continuing with {self.rows} and "
            f"{self.passes(self.rows)}. The effective batch size remains {self.batch * self.accumulation}",
            file=sys.stderr,
        )
        scratch = self.file.with_suffix(".tmp")
        artifact.write_json(scratch, self.read_known() | {self.key: self.rows})
        scratch.replace(self.file)


def describe_work(stage: str, base: dict, args) -> str:
    """A MicroBatch's `work`: the stage, its model, and the settings that determine how much memory it takes."""
    names = ("max_length", "precision", "attention", "device_map", "gradient_checkpointing")
    return f"{stage} of {base['digest'][:12]}, " + ", ".join(f"{name} {getattr(args, name)}" for name in names)


def summarise_micro_batches(history: list[dict]) -> list[dict]:
    """The micro-batch of a run, from its log: [{from_step, rows}], one entry per change."""
    spans = []
    for event in history:
        if not spans or event.get("micro_batch") != spans[-1]["rows"]:
            spans.append({"from_step": event["step"], "rows": event.get("micro_batch")})
    return spans


class RetrySmaller:
    """A mixin to put before a Trainer's class: each micro-batch goes through the model in pieces that fit into memory.

    A micro-batch that runs out of memory is repeated in pieces of half as many rows, starting with the same gradients
    and random numbers. The pieces' gradients add up to those of the micro-batch. So steps, order of rows and effective
    batch stay the same, and the loss is that of a run that had begun with the smaller pieces.
    """

    texts_a_row = 1  # 2 if a batch holds the chosen texts and, below them, the rejected ones

    def __init__(self, *arguments, micro_batch: MicroBatch, **keywords):
        super().__init__(*arguments, **keywords)
        self.micro_batch = micro_batch
        self.add_callback(AfterStep(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.accelerator.distributed_type != DistributedType.NO:  # no process can split its batch on its own
            return super().training_step(model, inputs, num_items_in_batch)
        while True:
            rows = min(self.micro_batch.rows, self.count(inputs))
            state = self.snapshot() if rows > 1 else None  # a single row is not repeated
            loss, reason = compute.call_catching_oom(self.run_in_pieces, model, inputs, num_items_in_batch, rows)
            if not reason:
                return loss
            if rows == 1:
                self.give_up(reason)
            self.restore(state)
            self.micro_batch.halve(rows)

    def run_in_pieces(self, model, inputs, num_items_in_batch, rows: int):
        count = self.count(inputs)
        passes, loss = self.current_gradient_accumulation_steps, 0
        try:
            for start in range(0, count, rows):
                span = slice(start, min(start + rows, count))
                # A loss that is a sum over tokens divided by num_items_in_batch adds up as it is. A mean over the rows
                # is divided by the accumulation steps: increasing them weights each piece by its share of the rows.
                self.current_gradient_accumulation_steps = passes * count / (span.stop - start)
                loss += super().training_step(model, self.piece(inputs, count, span), num_items_in_batch)
        finally:
            self.current_gradient_accumulation_steps = passes
        return loss

    def count(self, inputs) -> int:
        """Rows of a batch."""
        return len(inputs["input_ids"]) // self.texts_a_row

    def piece(self, inputs, count: int, span: slice) -> dict:
        """The rows `span` of a batch's `count` rows, padded to the longest of them."""
        part = {name: value.unflatten(0, (-1, count))[:, span].flatten(0, 1) for name, value in inputs.items()}
        mask = part["attention_mask"]
        used_columns = mask.any(0)
        return {name: value[:, used_columns] if value.shape == mask.shape else value for name, value in part.items()}

    def snapshot(self) -> tuple:
        """The state that a forward and backward pass changes: gradients (some of them, if it fails half way), random
        numbers, metrics. With an adapter, the gradients are small."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [(p, None if p.grad is None else p.grad.clone()) for p in parameters]
        metrics = {name: copy.deepcopy(vars(self)[name]) for name in METRICS if name in vars(self)}
        return gradients, random_state(), metrics

    def restore(self, state: tuple) -> None:
        gradients, rng_state, metrics = state
        for parameter, gradient in gradients:
            parameter.grad = gradient
        set_random_state(rng_state)
        vars(self).update(metrics)

    def sum_in_pieces(self, work, rows: list) -> float:
        """The sum of work(piece) over rows outside of training, such as a validation's, in pieces that fit into memory:
        as many rows as a training step takes at once. After running out of memory, both take half."""
        total, start = 0.0, 0
        while start < len(rows):
            piece = rows[start : start + self.micro_batch.rows]
            result, reason = compute.call_catching_oom(work, piece)
            if not reason:
                total, start = total + result, start + len(piece)
            elif len(piece) > 1 and self.accelerator.distributed_type == DistributedType.NO:
                self.micro_batch.halve(len(piece))
            else:
                raise OutOfMemory(
                    f"out of memory while validating after step {self.state.global_step} ({reason}). Free some memory "
                    "and repeat the command: it resumes from the last checkpoint"
                )
        return total

    def give_up(self, reason: str) -> None:
        """A single row does not fit: save the finished steps, without the current one, and raise OutOfMemory."""
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        self.model.zero_grad()
        if step and not (folder / WHOLE).is_file():
            self.current_flos = 0
            set_random_state(self.random_state)
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if log := self.pop_callback(RunLog):
            log.bar.close()  # else the error would appear in the bar's line
        status = f"Steps up to {step} are saved in {folder}" if step else "No step is finished yet"
        hint = "" if self.args.activation_checkpointing else ", if you like with --gradient-checkpointing"
        raise OutOfMemory(
            f"out of memory in step {step + 1} with a single example ({reason}). {status}. Free some memory and repeat "
            f"the command{hint}. A shorter --max-length or a smaller --model also needs less memory, but starts over"
        )


class AfterStep(TrainerCallback):
    """Records the random state after each step, for a checkpoint that is saved in the middle of the next step."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **_):
        self.trainer.random_state = random_state()


def random_state() -> tuple:
    """The state of torch's random numbers, which dropout uses."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
