"""The progress bar and the log of a training run, and the marks of its complete checkpoints."""

import time
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from transformers import TrainerCallback

from lib.core import artifact, hardware
from lib.core.cli import InputError
from lib.core.ranks import is_main_process
from lib.core.runlog import WHOLE, Run, append_event
from lib.train import finite


class RunLog(TrainerCallback):
    """Writes the run log, shows the progress, and marks checkpoints as complete. `also` names further values of the
    trainer's logs for an event. The trainer (loop.LoopMixin) knows its micro-batch and the tokens of a step."""

    def __init__(self, run: Run, trainer, also: tuple[str, ...] = ()):
        self.run, self.trainer, self.also = run, trainer, also
        self.skips = 0  # steps in a row

    def on_train_begin(self, args, state, control, **_):
        options = dict(unit="step", desc="training", disable=not is_main_process())
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, **options)

    def on_train_end(self, args, state, control, **_):
        self.bar.close()

    def on_step_end(self, args, state, control, **_):
        self.bar.update()
        self.trainer.micro_batch.return_freed_memory()

    def on_substep_end(self, args, state, control, **_):
        self.trainer.micro_batch.return_freed_memory()

    def on_step_begin(self, args, state, control, **_):
        self.began = time.perf_counter()
        self.scale = self.read_scale()

    def read_scale(self) -> float:
        """The factor on the loss in fp16. GradScaler lowers it when a gradient overflows, and only then; it also skips
        the update. accelerate knows of a skipped update only if the optimiser is not fused, as it is by default."""
        scaler = self.trainer.accelerator.scaler
        return scaler.get_scale() if scaler else 1.0

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
        seconds = time.perf_counter() - self.began
        skipped = self.read_scale() < self.scale
        event = {
            "step": state.global_step,
            "epoch": logs.get("epoch"),
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": None if skipped else logs.get("grad_norm"),
            **{name: logs[name] for name in self.also},
            "skipped": skipped,
            "micro_batch": self.trainer.micro_batch.rows,
            "tokens_per_second": round(self.trainer.tokens / seconds, 2),
            "rss_bytes": hardware.rss_bytes(),
            "gpu_bytes": hardware.gpu_bytes(),
            "time": round(time.time(), 3),
        }
        self.skips = self.skips + 1 if skipped else 0
        try:  # before the step's checkpoint is saved
            finite.check_event(event, self.trainer, self.run)
            if self.skips == finite.SKIPS_IN_A_ROW:
                finite.refuse_skips(self.skips, args)
        except InputError:
            self.bar.close()  # else the error would appear in the bar's line
            raise
        append_event(self.run.log, event)

    def on_save(self, args, state, control, **_):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        PartialState().wait_for_everyone()  # each process writes its own random state into the checkpoint
        if not is_main_process():
            return
        for file in folder.rglob("*"):
            artifact.fsync(file)
        artifact.write_json(folder / WHOLE, {"step": state.global_step})
