"""What trainers share: a run that continues, batches of like length, a log line per step, memory that runs out.

`open_run` before the model is loaded, `LoopMixin` before the library's Trainer, `fit` to train.
"""

from pathlib import Path

import torch
from transformers import PrinterCallback

from lib.budget import memory
from lib.core import hardware
from lib.core.runlog import Run
from lib.model import loading
from lib.train import back_off, length_groups, progress

# Arguments that change nothing in the result, or are known by their content's digest.
NOT_IN_RUN_ID = ("model", "base", "adapter", "data", "output", "run_dir", "threads", "profile",
                 "gradient_checkpointing")  # fmt: skip


def open_run(args, stage: str, base: dict, inputs: dict, work: str = "") -> tuple[Run, back_off.MicroBatch]:
    """The run that these arguments begin or continue, and how many rows go through the model at once in it. `base` is
    the identity of what is trained, `inputs` what else its result depends on; `work` tells stages of one name apart."""
    run = Run(
        args.run_dir or Path("runs") / f"{stage}-{args.output.name}",
        {"base": base["digest"]} | inputs | {k: v for k, v in vars(args).items() if k not in NOT_IN_RUN_ID},
    )
    work = back_off.describe_work(work or stage, base, args)
    return run, back_off.MicroBatch(run, args.batch_size, args.accumulation_steps, work)


def trainer_settings(args, dtype, run: Run) -> dict:
    """What the trainers share of transformers' TrainingArguments. Defaults of TRL that cost a small machine dearly are
    set here: bf16 regardless of the hardware, gradient checkpointing."""
    return dict(
        output_dir=str(run.path), seed=args.seed, data_seed=args.seed,
        num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation_steps, learning_rate=args.learning_rate,
        warmup_steps=args.warmup_ratio, lr_scheduler_type="cosine", weight_decay=0.0,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, activation_checkpointing=args.gradient_checkpointing,
        save_strategy="steps", save_steps=args.checkpoint_steps, save_total_limit=2,
        logging_steps=1, logging_first_step=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def project_labels_only() -> None:
    """Let TRL project onto the vocabulary only where there is a label, on a CPU as well.

    TRL 1.16 scores every position where there is no Triton, since other shapes in every batch would be compiled anew on
    some accelerators. A CPU compiles nothing, and prompts are most of a row.
    """
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True  # asked there for nothing else; the kernels ask their own


def check_memory(config, adapter: dict, lengths: list[int], rows: int, args, labels: int = 0) -> int | None:
    """Say what training will take of memory and disk, and return the former in bytes; OutOfMemory where there is
    clearly less. Texts have `lengths` tokens; `rows` of them go through the model at once. For `labels` see
    memory.estimate_training."""
    rows, lengths = min(rows, len(lengths)), sorted(lengths)

    def need(rows=rows, length=lengths[-1], how=args.precision, checkpointing=args.gradient_checkpointing):
        return memory.estimate_training(config, adapter, how, rows, length, checkpointing, labels)

    def batches(extra="", **more):
        smaller = [rows >> n for n in range(1, rows.bit_length())]
        effective = args.batch_size * args.accumulation_steps
        return [
            (f"--batch-size {n} --accumulation-steps {-(-effective // n)}{extra}", {"rows": n, **more}) for n in smaller
        ]

    changes = [batches(), [("--gradient-checkpointing", {"checkpointing": True})]]
    changes += [batches(" --gradient-checkpointing", checkpointing=True)]
    if hardware.device() == "cuda" and args.precision not in ("int8", "nf4"):
        changes += [[("--precision nf4", {"how": "nf4"})]]
    shorter = [length for length in (2048, 1024, 512, 256, 128) if lengths[0] <= length < lengths[-1]]
    changes += [[(f"--max-length {length}, which drops longer examples", {"length": length}) for length in shorter]]
    checkpoint = 12 * memory.count_trained(config, adapter)  # in fp32, and Adam's two moments
    memory.check_disk(args.output, 3 * checkpoint)
    return memory.check_fits(need, changes, hardware.free_memory(spread=args.device_map != "none"))


class LoopMixin(back_off.RetrySmaller):
    """Put before a Trainer's class: its steps have rows of like length, and each has a line in the run's log.

    `lengths` are the rows' tokens. The first `before` rows are learnt before the others. `also` names what else the log
    holds.
    """

    tokens = 0  # of the step

    def __init__(self, *given, run: Run, lengths: list[int], before: int = 0, also: tuple[str, ...] = (), **named):
        super().__init__(*given, **named)
        self.lengths, self.before = lengths, before
        self.remove_callback(PrinterCallback)  # RunLog shows the progress
        self.add_callback(progress.RunLog(run, self, also))

    def _get_train_sampler(self, *_):
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return length_groups.LengthGroupedBatches(self.lengths, batch, self.args.seed, self.before)

    def get_batch_samples(self, *given, **named):
        batches, items = super().get_batch_samples(*given, **named)
        self.tokens = sum(map(self.count_tokens, batches))
        return batches, items

    def count_tokens(self, batch) -> int:
        return int(batch["attention_mask"].sum())


def fit(trainer, run: Run) -> dict:
    """Train, from the newest checkpoint on; what there is to tell of it."""
    parameters = loading.count_parameters(trainer.model)
    with trainer.accelerator.main_process_first():  # it may have begun the run anew, which the others then find
        checkpoint = resume_point(run)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()  # for the last line of the log
    history = run.history()
    return parameters | {
        "steps": trainer.state.global_step,
        "final_loss": history[-1]["loss"],
        "micro_batch": back_off.summarise_micro_batches(history),
        "history": history,
    }


def resume_point(run: Run) -> Path | None:
    """Where to continue, said; the log forgets the steps that will be done again."""
    checkpoint = run.checkpoint()
    run.rewind(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    if checkpoint:
        print(f"resuming from {checkpoint}")
    return checkpoint
