"""What trainers share: the run log, checkpoints marked as whole, batches of like length, memory that runs out."""

import copy
import json
import random
import sys
import time
from pathlib import Path

import torch
from accelerate import DistributedType
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import TrainerCallback

from lib import artifact, budget, hardware, models
from lib.cli import OutOfMemory
from lib.runlog import WHOLE, Run, append_event

MICRO_BATCH = "micro_batch.json"  # beside the runs: what fitted, by machine and work
METRICS = ("_metrics", "_total_train_tokens")  # what a trainer counts at each forward pass, by TRL's names


def settings(args, dtype, run: Run) -> dict:
    """What the trainers share of transformers' TrainingArguments. Defaults of TRL that cost a small machine dearly are
    set here: bf16 regardless of the hardware, gradient checkpointing."""
    return dict(
        output_dir=str(run.path), seed=args.seed, data_seed=args.seed,
        num_train_epochs=args.epochs, per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulation, learning_rate=args.learning_rate,
        warmup_steps=args.warmup, lr_scheduler_type="cosine", weight_decay=0.0,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, activation_checkpointing=args.gradient_checkpointing,
        save_strategy="steps", save_steps=args.checkpoint_steps, save_total_limit=2,
        logging_steps=1, logging_first_step=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def score_answers_only() -> None:
    """Let TRL project onto the vocabulary only where there is a label, on a CPU as well.

    TRL 1.16 scores every position where there is no Triton, since other shapes in every batch would be compiled anew on
    some accelerators. A CPU compiles nothing, and prompts are most of a row.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True  # asked there for nothing else; the kernels ask their own


def check_memory(config, adapter: dict, lengths: list[int], rows: int, args, labels: int = 0) -> int | None:
    """Say what training will take of memory and disk, and return the former in bytes; OutOfMemory where there is
    clearly less. Texts have `lengths` tokens; `rows` of them go through the model at once. For `labels` see
    budget.training."""
    rows, lengths = min(rows, len(lengths)), sorted(lengths)

    def need(rows=rows, length=lengths[-1], how=args.load, checkpointing=args.gradient_checkpointing):
        return budget.training(config, adapter, how, rows, length, checkpointing, labels)

    def batches(extra="", **more):
        smaller = [rows >> n for n in range(1, rows.bit_length())]
        effective = args.batch * args.accumulation
        return [(f"--batch {n} --accumulation {-(-effective // n)}{extra}", {"rows": n, **more}) for n in smaller]

    changes = [batches(), [("--gradient-checkpointing", {"checkpointing": True})]]
    changes += [batches(" --gradient-checkpointing", checkpointing=True)]
    if hardware.device() == "cuda" and args.load not in ("int8", "nf4"):
        changes += [[("--load nf4", {"how": "nf4"})]]
    shorter = [length for length in (2048, 1024, 512, 256, 128) if lengths[0] <= length < lengths[-1]]
    changes += [[(f"--max-length {length}, which leaves longer rows out", {"length": length}) for length in shorter]]
    checkpoint = 12 * budget.trained(config, adapter)  # in fp32, and Adam's two moments
    budget.check_disk(args.output, 3 * checkpoint)
    return budget.check(need, changes, hardware.free_memory(spread=args.device_map != "none"))


class RunLog(TrainerCallback):
    """Writes the run log, shows the progress, and marks checkpoints as whole. `also` names more of the trainer's logs
    that belong into an event."""

    def __init__(self, run: Run, tokens_of_step, micro_batch: "MicroBatch", also: tuple[str, ...] = ()):
        self.run, self.tokens_of_step, self.micro_batch, self.also = run, tokens_of_step, micro_batch, also

    def on_train_begin(self, args, state, control, **_):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="training")

    def on_train_end(self, args, state, control, **_):
        self.bar.close()

    def on_step_end(self, args, state, control, **_):
        self.bar.update()
        self.micro_batch.return_freed_memory()

    def on_substep_end(self, args, state, control, **_):
        self.micro_batch.return_freed_memory()

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
                **{name: logs[name] for name in self.also},
                "micro_batch": self.micro_batch.rows,
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
        known = self.known().get(self.key)
        if isinstance(known, int) and 0 < known < batch:
            self.rows = known
            print(
                f"{known} rows at once instead of {batch}, accumulation {self.passes(known)} instead of "
                f"{accumulation}: more ran out of memory here before; remove {self.file} to try {batch} again",
                file=sys.stderr,
            )

    def known(self) -> dict:
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
        tqdm.write(
            f"out of memory with {rows} rows at once: continuing with {self.rows}, accumulation "
            f"{self.passes(self.rows)} instead of {before}; the effective batch stays {self.batch * self.accumulation}",
            file=sys.stderr,
        )
        scratch = self.file.with_suffix(".tmp")
        artifact.write_json(scratch, self.known() | {self.key: self.rows})
        scratch.replace(self.file)


def memory_work(stage: str, base: dict, args) -> str:
    """A MicroBatch's `work`: what it is that is trained, and what decides how much memory that takes."""
    names = ("max_length", "load", "attention", "device_map", "gradient_checkpointing")
    return f"{stage} of {base['digest'][:12]}, " + ", ".join(f"{name} {getattr(args, name)}" for name in names)


def newest_checkpoint(run: Run) -> Path | None:
    """Where to continue, said; the log forgets the steps that will be done again."""
    checkpoint = run.checkpoint()
    run.rewind(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    if checkpoint:
        print(f"continuing from {checkpoint}")
    return checkpoint


def micro_batches(history: list[dict]) -> list[dict]:
    """From which step on how many rows went through the model at once, out of a run's log."""
    found = []
    for event in history:
        if not found or event.get("micro_batch") != found[-1]["rows"]:
            found.append({"from_step": event["step"], "rows": event.get("micro_batch")})
    return found


class BackOff:
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
            loss, reason = models.tried(self.in_pieces, model, inputs, num_items_in_batch, rows)
            if not reason:
                return loss
            if rows == 1:
                self.give_up(reason)
            self.restore(before)
            self.micro_batch.halve(rows)

    def in_pieces(self, model, inputs, num_items_in_batch, rows: int):
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
        kept = f"Steps up to {step} are kept in {folder}, where the same command continues" if step else "Try again"
        also = "" if self.args.activation_checkpointing else ", or with --gradient-checkpointing"
        raise OutOfMemory(
            f"out of memory in step {step + 1} with a single row ({reason}). {kept}: with more memory free{also}. A "
            "shorter --max-length or a smaller --model need less, too, and begin anew"
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
