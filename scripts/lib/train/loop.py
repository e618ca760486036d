"""The code that trainers share: continuing runs, batches of similar length, a log line per step, running out of memory.

Call `open_run` before the model is loaded, put `LoopMixin` before the library's Trainer, and call `fit` to train.
"""

import math
import sys
from pathlib import Path

import torch
from transformers import PrinterCallback

from lib.budget import memory
from lib.core import hardware
from lib.core.cli import InputError
from lib.core.runlog import Run
from lib.model import directory, loading
from lib.model.directory import ModelDirectory
from lib.train import back_off, finite, length_groups, progress

# Arguments that do not change the result, or whose content's digest is in the identity.
NOT_IN_RUN_ID = ("model", "base", "adapter", "data", "output", "run_dir", "threads", "profile",
                 "gradient_checkpointing")  # fmt: skip


def open_run(args, stage: str, base: dict, inputs: dict, work: str = "") -> tuple[Run, back_off.MicroBatch]:
    """The run that these arguments begin or continue, and its micro-batch. `base` is the identity of the trained model,
    `inputs` is what else the result depends on; `work` distinguishes stages of the same name."""
    check_precision(args.precision)
    run = Run(
        args.run_dir or Path("runs") / f"{stage}-{args.output.name}",
        {"base": base["digest"]} | inputs | {k: v for k, v in vars(args).items() if k not in NOT_IN_RUN_ID},
    )
    work = back_off.describe_work(work or stage, base, args)
    return run, back_off.MicroBatch(run, args.batch_size, args.accumulation_steps, work)


def check_precision(precision: str) -> None:
    """InputError for fp16 on a CPU, where accelerate neither scales the loss nor keeps sums in fp32: gradients that are
    too small for fp16 become 0, and large ones NaN."""
    if precision == "fp16" and hardware.device() == "cpu":
        raise InputError(
            "--precision fp16: only a GPU can train in fp16, since on a CPU nothing scales the loss and small "
            "gradients become 0; use --precision auto, fp32 or bf16"
        )


def trainer_settings(args, dtype, run: Run) -> dict:
    """The arguments of transformers' TrainingArguments that the trainers share. They override TRL's defaults that slow
    down a small machine: bf16 on any hardware, gradient checkpointing."""
    return dict(
        output_dir=str(run.path), seed=args.seed, data_seed=args.seed,
        num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation_steps, learning_rate=args.learning_rate,
        warmup_steps=min(args.warmup_ratio, math.nextafter(1, 0)),  # 1 would mean one step; this, all of them
        lr_scheduler_type="cosine", weight_decay=0.0,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, activation_checkpointing=args.gradient_checkpointing,
        save_strategy="steps", save_steps=args.checkpoint_steps, save_total_limit=2,
        logging_steps=1, logging_first_step=True, logging_nan_inf_filter=False, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def project_labels_only() -> None:
    """Let TRL project only positions with a label onto the vocabulary, on a CPU as well.

    Without Triton, TRL 1.16 scores every position, because some accelerators would compile the code again for each new
    shape. A CPU compiles nothing, and prompts are most of a row.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True  # used for nothing else there; the kernels have their own check


def check_memory(
    base: ModelDirectory, adapter: dict, lengths: list[int], rows: int, args, labels: int = 0
) -> int | None:
    """Print the memory that training takes and return it in bytes; OutOfMemory if clearly less memory, or too little
    disk, is free. Texts have `lengths` tokens; `rows` of them go through the model at once. For `labels` see
    memory.estimate_training."""
    config, stored = directory.load_config(base), directory.stored_precision(base, args.precision)
    rows, lengths = min(rows, len(lengths)), sorted(lengths)

    def need(rows=rows, length=lengths[-1], precision=stored, checkpointing=args.gradient_checkpointing):
        return memory.estimate_training(config, adapter, precision, rows, length, checkpointing, labels)

    def batches(flags="", **settings):
        sizes = [rows >> n for n in range(1, rows.bit_length())]
        effective = args.batch_size * args.accumulation_steps
        return [
            (f"--batch-size {n} --accumulation-steps {-(-effective // n)}{flags}", {"rows": n, **settings})
            for n in sizes
        ]

    changes = [batches(), [("--gradient-checkpointing", {"checkpointing": True})]]
    changes += [batches(" --gradient-checkpointing", checkpointing=True)]
    if hardware.device() == "cuda" and base.kind == "plain" and stored not in memory.QUANTISED:
        changes += [[("--precision nf4", {"precision": "nf4"})]]
    shorter = [length for length in (2048, 1024, 512, 256, 128) if lengths[0] <= length < lengths[-1]]
    changes += [[(f"--max-length {length}, which drops longer examples", {"length": length}) for length in shorter]]
    checkpoint = 12 * memory.count_trained(config, adapter)  # weights and Adam's two moments in fp32
    memory.check_disk(args.output, 3 * checkpoint)
    return memory.check_fits(need, changes, hardware.free_memory(spread=args.device_map != "none"))


def use_one_gpu(settings, model) -> None:
    """Keep transformers from splitting each batch among all visible GPUs (DataParallel), which TRL refuses and CLaRa's
    batches do not allow. `_n_gpu` is where transformers itself keeps their number, and sets it to 1."""
    spread = len({*(getattr(model, "hf_device_map", None) or {}).values()}) > 1  # its layers, by --device-map
    if settings.n_gpu > 1 and not spread:
        print(
            f"{settings.n_gpu} GPUs are visible; this one process does not split batches among them. Choose one with "
            "CUDA_VISIBLE_DEVICES",
            file=sys.stderr,
        )
        settings._n_gpu = 1


class LoopMixin(back_off.RetrySmaller):
    """A mixin to put before a Trainer's class: the rows of a step have similar lengths, and each step is logged.

    `lengths` are the rows' numbers of tokens. The first `before` rows are trained before the others. `also` names
    further values of the trainer's logs for the run's log.
    """

    tokens = 0  # of the step

    def __init__(
        self, *arguments, run: Run, lengths: list[int], before: int = 0, also: tuple[str, ...] = (), **keywords
    ):
        use_one_gpu(keywords["args"], arguments[0] if arguments else keywords["model"])
        super().__init__(*arguments, **keywords)
        # TRL casts an adapter on a quantised base to bf16. In fp16, GradScaler cannot unscale such gradients, and a
        # resumed run would train in fp32, in which PEFT loads a checkpoint.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.lengths, self.before = lengths, before
        self.remove_callback(PrinterCallback)  # RunLog shows the progress
        self.add_callback(progress.RunLog(run, self, also))

    def _get_train_sampler(self, *_):
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return length_groups.LengthGroupedBatches(self.lengths, batch, self.args.seed, self.before)

    def create_scheduler(self, num_training_steps: int, *arguments, **keywords):
        if num_training_steps == 1 and self.args.warmup_steps:  # warm-up starts at 0, and nothing would be learnt
            self.args.warmup_steps = 0
            print("training has a single step: it has the full learning rate, without warm-up")
        return super().create_scheduler(num_training_steps, *arguments, **keywords)

    def get_batch_samples(self, *arguments, **keywords):
        if self.state.global_step >= self.state.max_steps:  # resumed in the middle of an epoch, after the last step
            return [], None
        batches, items = super().get_batch_samples(*arguments, **keywords)
        self.tokens = sum(map(self.count_tokens, batches))
        return batches, items

    def count_tokens(self, batch) -> int:
        return int(batch["attention_mask"].sum())


def fit(trainer, run: Run) -> dict:
    """Train from the newest checkpoint on, and return the run's metrics."""
    parameters = loading.count_parameters(trainer.model)
    with trainer.accelerator.main_process_first():  # it may have deleted an old run or checkpoints
        checkpoint = resume_point(run)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()  # for the last line of the log
    history = run.history()
    skipped_steps = sum(event.get("skipped", False) for event in history)
    if 0 < skipped_steps == len(history):
        finite.refuse_skips(skipped_steps, trainer.args)
    return parameters | {
        "steps": trainer.state.global_step,
        "skipped_steps": skipped_steps,
        "final_loss": history[-1]["loss"],
        "micro_batch": back_off.summarise_micro_batches(history),
        "history": history,
    }


def resume_point(run: Run) -> Path | None:
    """The checkpoint to continue from, or None. The log's later steps are deleted, since they will be repeated."""
    checkpoint = run.checkpoint()
    run.rewind(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    if checkpoint:
        print(f"resuming from {checkpoint}")
    return checkpoint
