"""Training of CLaRa's stages by transformers' Trainer, on examples that lib/clara.py has encoded.

The one curve that tells whether vectors carry anything is the loss with the right documents against that with others.
It is taken on held-out examples as training goes on, and stands in the run log as `right` and `shuffled`.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from lib import clara, training
from lib.cli import InputError

WATCHED = ("right", "shuffled", "apart", "vectors")
TRAINED = "trained.safetensors"
BEGIN, END = 0.15, 0.75  # of the steps: where the rate begins to change, and where it has become the model's own


def labels_of(examples: list[clara.Example]) -> int:
    return sum(label != -100 for one in examples for label in one.labels)


def length(one: clara.Example) -> int:
    return len(one.after) + sum(map(len, one.pieces))


def with_others_documents(examples: list[clara.Example]) -> list[clara.Example]:
    """Each with the documents of the next one that has as many."""
    made = []
    for n, one in enumerate(examples):
        others = (other for other in examples[n + 1 :] + examples[:n] if len(other.counts) == len(one.counts))
        other = next(others, one)
        made.append(replace(one, pieces=other.pieces, counts=other.counts))
    return made


@torch.no_grad()
def nats(model: clara.Clara, examples: list[clara.Example], batch: int, dtype, vectors: int = 0) -> float:
    """Loss a label."""
    device = model.memory.device.type
    with torch.autocast(device, dtype) if dtype != torch.float32 else nullcontext():
        some = range(0, len(examples), batch)
        return sum(model.forward(examples[n : n + batch], vectors)[0].item() for n in some) / labels_of(examples)


class ClaraTrainer(training.BackOff, Trainer):
    """Loss: cross entropy a label, and `apart_weight` times how far memory and text are apart.

    Training begins with a vector for `first_rate` tokens, where the generator can read a document at once, and goes to
    the model's own rate step by step: begun there, it learns the form of answers and the vectors carry nothing.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the whole step

    def __init__(self, *given, examples, watched, watch_steps, apart_weight, first_rate, dtype, seed, **named):
        self.first_rate = first_rate
        self.watched, self.watch_steps, self.apart_weight = watched, watch_steps, apart_weight
        self.others, self.dtype, self.seed, self.examples = with_others_documents(watched), dtype, seed, examples
        self.tokens, self.rows, self.found, self.apart = 0, 0, {}, []
        super().__init__(*given, train_dataset=examples, data_collator=lambda some: {"examples": some}, **named)

    def _get_train_sampler(self, *_):
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return training.LikeLengthSampler([*map(length, self.examples)], step, self.seed)

    def get_batch_samples(self, *given, **named):
        batches, _ = super().get_batch_samples(*given, **named)
        some = [one for batch in batches for one in batch["examples"]]
        self.tokens, self.rows = sum(map(length, some)), len(some)
        return batches, labels_of(some)

    def vectors(self) -> int:
        """Of a piece, in this step."""
        shape = self.model.shape
        first, share = (
            max(shape.vectors, shape.doc_max_tokens // self.first_rate),
            self.state.global_step / self.state.max_steps,
        )
        done = min(1, max(0, share - BEGIN) / (END - BEGIN))
        return round(first * (shape.vectors / first) ** done)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        answer, apart = model(inputs["examples"], self.vectors())
        self.apart.append(apart.detach())
        share = len(inputs["examples"]) / self.rows
        return answer / num_items_in_batch + self.apart_weight * share * apart

    def count(self, inputs) -> int:
        return len(inputs["examples"])

    def piece(self, inputs, count: int, some: slice) -> dict:
        return {"examples": inputs["examples"][some]}

    def log(self, logs, *given):
        if self.apart:
            step = self.state.global_step
            if step % self.watch_steps == 0 or step in (1, self.state.max_steps):
                of = {"right": self.watched, "shuffled": self.others}
                batch = self.args.per_device_train_batch_size
                self.model.eval()
                how = (batch, self.dtype, self.vectors())
                self.found = {name: nats(self.model, some, *how) for name, some in of.items()}
                self.model.train()
            logs |= self.found | {"apart": torch.stack(self.apart).mean().item(), "vectors": self.vectors()}
            self.apart.clear()
        super().log(logs, *given)

    def _save(self, output_dir=None, state_dict=None):
        """What is trained, in the place of a whole model."""
        from safetensors.torch import save_file

        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach() for name, p in self.learning().items()}, Path(output_dir) / TRAINED)

    def _load_from_checkpoint(self, checkpoint, model=None):
        from safetensors.torch import load_file

        stored, learning = load_file(Path(checkpoint) / TRAINED), self.learning()
        if stored.keys() != learning.keys():
            raise ValueError(f"{checkpoint}: holds other parameters than are trained")
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(stored[name])

    def learning(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def make_trainer(model, examples, watched, args, dtype, run, micro_batch) -> ClaraTrainer:
    settings = TrainingArguments(**training.settings(args, dtype, run), remove_unused_columns=False)
    trainer = ClaraTrainer(
        model=model, args=settings, micro_batch=micro_batch, examples=examples, watched=watched,
        watch_steps=args.watch_steps, apart_weight=args.apart_weight, first_rate=args.first_rate, dtype=dtype,
        seed=args.seed,
    )  # fmt: skip
    for last in run.history()[-1:]:  # of a run that continues, until it looks again
        trainer.found = {name: last[name] for name in ("right", "shuffled")}
    trainer.remove_callback(PrinterCallback)  # RunLog shows the progress
    trainer.add_callback(training.RunLog(run, lambda: trainer.tokens, micro_batch, WATCHED))
    return trainer


def audit(examples: list, kept: list, tokenizer, max_length: int, shape: clara.Shape) -> dict:
    """What is supervised, said before the first step. InputError when no example fits."""
    if not kept:
        shortest = min(len(one.after) for one in examples)
        raise InputError(
            f"the questions and answers of all {len(examples):,} rows are longer than --max-length {max_length} (the "
            f"shortest have {shortest} tokens)"
        )
    text = sum(len(piece) for one in kept for piece in one.pieces)
    vectors, labels = shape.vectors * sum(len(one.pieces) for one in kept), labels_of(kept)
    first = [label for label in kept[0].labels if label != -100]
    print(f"labels: {len(kept):,} rows, {labels:,} tokens of answers; ", end="")
    print(f"{len(examples) - len(kept):,} left out as longer than {max_length} tokens")
    print(f"documents: {text:,} tokens in {vectors:,} vectors, {text / vectors:.1f} a vector")
    print(f"loss on:    {tokenizer.decode(first)[:200]!r}")
    return {
        "labels": labels, "document_tokens": text, "vectors": vectors, "rows_left_out": len(examples) - len(kept),
        "longest_tokens": max(len(one.after) for one in kept),
    }  # fmt: skip
