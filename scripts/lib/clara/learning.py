"""Training of CLaRa's stages by transformers' Trainer, on examples that lib/clara/network.py has encoded.

The one curve that tells whether vectors carry anything is the loss with the right documents against that with others.
It is taken on held-out examples as training goes on, and stands in the run log as `right` and `shuffled`.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from lib.clara import network
from lib.core import hardware
from lib.core.cli import InputError
from lib.data import records
from lib.model import directory, loading
from lib.model.directory import ModelDirectory
from lib.train import loop

ABOUT_DOCUMENTS = ("pieces", "counts", "candidates", "gold")  # fields of an example
TRAINED = "trained.safetensors"
PARAPHRASE, REBUILD = "What does the document say, in other words?", "What does the document say, word for word?"


def check_memory(base: ModelDirectory, shape: network.ClaraConfig, examples: list, args) -> int | None:
    """As loop.check_memory, for two adapters that learn."""
    learning, tokens, labels = memory_sizes(shape, examples)
    return loop.check_memory(directory.load_config(base), learning, tokens, args.batch_size, args, labels)


def memory_sizes(shape: network.ClaraConfig, examples: list) -> tuple[dict, list[int], int]:
    """(what learns, as one adapter; the tokens of each example; the labels of a row at most)."""
    tokens = [example_length(one) + shape.vectors * len(one.pieces) for one in examples]
    learning = {"r": 2 * shape.lora_r, "target_modules": shape.targets}
    return learning, tokens, max(len(one.weights) for one in examples)


def load_base(base: ModelDirectory, args):
    """(the base, frozen, and the dtype that is computed in). On a CPU what runs from layer to layer is wide, as in
    sft.py, and only the products are in that dtype."""
    if base.kind != "plain":
        raise InputError(f"{base.path}: expected a 16-bit base model")
    dtype = loading.torch_dtype(args.precision)
    on_cpu = args.precision == "auto" and hardware.device() == "cpu"
    lm = loading.load_model(
        base, "fp32" if on_cpu else args.precision, **loading.placement_arguments(args)
    ).requires_grad_(False)
    if on_cpu:
        loading.cast_frozen_linears(lm, dtype)
    return lm, dtype


def autocast_to(dtype, model: network.Clara):
    """The context of a forward pass that the Trainer does not make itself."""
    return torch.autocast(model.memory.device.type, dtype) if dtype != torch.float32 else nullcontext()


def encode_passage(
    row, tokenizer, ends: set[int], shape: network.ClaraConfig, rebuild: float = 0.0, max_length: int = 0
) -> network.Example:
    """The example of a row of stage 1 (clara_rows.Passage): its questions, and with `rebuild` the passage itself where
    that fits into `max_length`."""
    turns = [(question or PARAPHRASE, answer, 1.0) for question, answer in row.pairs]
    one = network.encode_example(tokenizer, [row.document], turns, ends, shape)
    if not rebuild or len(one.after) + sum(map(len, one.pieces)) + 64 > max_length:
        return one
    # Last, so that no answer is read off there. Its tokens together count `rebuild` times as much as the answers'.
    weight = rebuild * len(one.weights) / sum(map(len, one.pieces))
    return network.encode_example(tokenizer, [row.document], [*turns, (REBUILD, row.document, weight)], ends, shape)


def encode_documents(row, tokenizer, ends: set[int], shape: network.ClaraConfig) -> network.Example:
    """The example of a row of stage 2 (clara_rows.Question)."""
    return network.encode_example(tokenizer, row.documents, [(row.question, row.answer, 1.0)], ends, shape)


def total_weight(examples: list[network.Example]) -> float:
    """By their weights: what a loss is divided by."""
    return sum(weight for one in examples for weight in one.weights)


def example_length(one: network.Example) -> int:
    return len(one.after) + sum(map(len, one.pieces))


def swap_documents(examples: list) -> list:
    """Each with the documents of the next one that has as many."""
    made = []
    for n, one in enumerate(examples):
        others = (other for other in examples[n + 1 :] + examples[:n] if len(other.counts) == len(one.counts))
        other = next(others, one)
        made.append(replace(one, **{name: getattr(other, name) for name in ABOUT_DOCUMENTS if hasattr(one, name)}))
    return made


class ClaraTrainer(loop.LoopMixin, Trainer):
    """Loss: cross entropy a label, and `apart_weight` times how far memory and text are apart."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the whole step
    watches, also = ("right", "shuffled"), ("right", "shuffled", "apart")

    def __init__(self, *given, examples, watched, eval_steps, dtype, mse_weight=0.0, **named):
        self.watched, self.eval_steps, self.others = watched, eval_steps, swap_documents(watched)
        self.dtype, self.examples, self.mse_weight = dtype, examples, mse_weight
        self.rows, self.found, self.apart = 0, {}, []
        named |= {"lengths": [*map(example_length, examples)], "also": self.also}
        super().__init__(*given, train_dataset=examples, data_collator=lambda some: {"examples": some}, **named)

    def get_batch_samples(self, *given, **named):
        batches, _ = super().get_batch_samples(*given, **named)
        some = [one for batch in batches for one in batch["examples"]]
        self.rows = len(some)
        return batches, total_weight(some)

    def count_tokens(self, batch) -> int:
        return sum(map(example_length, batch["examples"]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        answer, apart = model(inputs["examples"])
        self.apart.append(apart.detach())
        share = len(inputs["examples"]) / self.rows
        return answer / num_items_in_batch + self.mse_weight * share * apart

    def count(self, inputs) -> int:
        return len(inputs["examples"])

    def piece(self, inputs, count: int, some: slice) -> dict:
        return {"examples": inputs["examples"][some]}

    def watch(self) -> dict[str, float]:
        """Loss a label on the held-out rows, in nats, with their documents and with those of others."""
        return {name: self.nats(some) for name, some in (("right", self.watched), ("shuffled", self.others))}

    def nats(self, examples: list) -> float:
        with autocast_to(self.dtype, self.model):
            total = sum(self.model(some)[0].item() for some in self.batches(examples))
        return total / total_weight(examples)

    def batches(self, examples: list) -> list[list]:
        batch = self.args.per_device_train_batch_size
        return [examples[n : n + batch] for n in range(0, len(examples), batch)]

    def log(self, logs, *given):
        if "loss" in logs:
            step = self.state.global_step
            if step % self.eval_steps == 0 or step in (1, self.state.max_steps):
                self.model.eval()
                with torch.no_grad():
                    self.found = self.watch()
                self.model.train()
            elif not self.found:  # of a run that continues, until it looks again
                self.found = {name: self.state.log_history[-1][name] for name in self.watches}
            apart = torch.stack(self.apart).mean().item() if self.apart else None
            logs |= self.found | {"apart": apart}
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
            raise ValueError(f"{checkpoint}: contains other parameters than this training")
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(stored[name])

    def learning(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class SearchExample(network.Example):
    """A question, and the pieces among which the reasoner is to find those that it is about. The example's own
    documents are places for those it chooses."""

    asked: list[int]  # ids of the question alone
    candidates: list[int]  # rows of the table of compressed pieces
    gold: list[int]  # places in `candidates`; empty where they are not known


class CandidateTable:
    """The pieces of all candidates, each once."""

    def __init__(self, tokenizer, shape: network.ClaraConfig):
        self.tokenizer, self.shape, self.rows = tokenizer, shape, {}

    def search(self, row, ends: set[int]) -> SearchExample:
        """The example of a row of stage 2 or 3 (clara_rows.Question); its pieces are put into the table."""
        candidates, gold = [], []
        for n, document in enumerate(row.documents):
            for piece in network.split_document(self.tokenizer, document, self.shape.doc_max_tokens):
                gold += [len(candidates)] if n in row.positions else []
                candidates.append(self.rows.setdefault(tuple(piece), len(self.rows)))
        places = [""] * min(self.shape.k, len(candidates))
        one = network.encode_example(self.tokenizer, places, [(row.question, row.answer, 1.0)], ends, self.shape)
        asked = network.token_ids(self.tokenizer, f" {row.question}")
        known = vars(one) | {"pieces": [[] for _ in places]}  # compressed already
        return SearchExample(**known, asked=asked, candidates=candidates, gold=gold)

    def compressed(self, model: network.Clara, batch: int, dtype) -> torch.Tensor:
        """float16 [pieces, vectors, width], on the CPU."""
        with autocast_to(dtype, model):
            return model.compressed([*map(list, self.rows)], batch)


class SearchTrainer(ClaraTrainer):
    """Loss: cross entropy a label, with the pieces that the reasoner has chosen among a question's candidates.

    In the first `contrast` of the steps, before the generator reads anything, that of the right pieces among all in the
    table by their cosines (InfoNCE, arXiv 1807.03748): what is found by chance teaches little about searching. `table`
    holds the compressed pieces, float16 [pieces, vectors, width].
    """

    watches, also = ("right", "shuffled", "recall"), ("right", "shuffled", "recall")

    def __init__(self, *given, table, retrieval_share: float, temperature: float, **named):
        self.table, self.retrieval_share, self.temperature = table, retrieval_share, temperature
        super().__init__(*given, **named)
        self.directions = self.model.directions(self.read(slice(None)))

    def read(self, rows) -> torch.Tensor:
        return self.table[rows].to(self.model.memory.device).float()

    def scores(self, examples: list[SearchExample]) -> torch.Tensor:
        """Cosines of the questions with every piece of the table, float32 [questions, pieces]."""
        with autocast_to(self.dtype, self.model):
            asked, _ = self.model.compress([one.asked for one in examples], "reasoner")
        return self.model.query_vectors(asked) @ self.directions.T

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        examples = inputs["examples"]
        scores = self.scores(examples)
        if self.state.global_step >= self.retrieval_share * self.state.max_steps:
            return self.answer_loss(examples, scores) / num_items_in_batch
        logs = (scores / self.temperature).log_softmax(-1)
        right = [[one.candidates[n] for n in one.gold] for one in examples]
        return -sum(row[ids].logsumexp(0) for row, ids in zip(logs, right)) / self.rows

    def answer_loss(self, examples: list[SearchExample], scores: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats, summed over the labels."""
        read = []
        for one, row in zip(examples, scores):
            weights = network.choose_straight_through(row[one.candidates], len(one.counts), self.temperature)
            read.append(torch.einsum("kn,nvw->kvw", weights, self.read(one.candidates)))
        with autocast_to(self.dtype, self.model):
            return self.model.loss(examples, torch.cat(read))

    def watch(self) -> dict[str, float]:
        """As in the other stages, with the pieces that were chosen; and the share of the right ones that were."""
        recalls = []
        for one in self.watched:
            best = self.scores([one])[0][one.candidates].topk(len(one.counts)).indices.tolist()
            recalls += [len({*best} & {*one.gold}) / len(one.gold)] if one.gold else []
        return super().watch() | {"recall": sum(recalls) / max(1, len(recalls))}

    def nats(self, examples: list[SearchExample]) -> float:
        total = sum(self.answer_loss(some, self.scores(some)).item() for some in self.batches(examples))
        return total / total_weight(examples)


def train_stage(
    args, stage: str, trainer_class, model, dtype, rows: list, held_out: list, base: dict, expected, **how
) -> tuple:
    """(the run, what was measured). Trains on `rows`, continuing from the newest checkpoint; `base` is the identity of
    what is trained, `expected` what it is expected to take of memory."""
    inputs = {"rows": records.digest([repr(row) for row in rows])}
    run, micro_batch = loop.open_run(args, "clara", base, inputs, work=stage)
    micro_batch.expected_bytes = expected
    settings = TrainingArguments(**loop.trainer_settings(args, dtype, run), remove_unused_columns=False)
    trainer = trainer_class(
        model=model, args=settings, run=run, micro_batch=micro_batch, examples=rows, watched=held_out,
        eval_steps=args.eval_steps, dtype=dtype, **how,
    )  # fmt: skip
    metrics = loop.fit(trainer, run)
    watched = {name: metrics["history"][-1][name] for name in trainer.watches}
    return run, metrics | {"rows": len(rows), "expected_memory_bytes": expected, "watched": watched}


def fits(one: network.Example, max_length: int) -> bool:
    return len(one.after) <= max_length


def keep_fitting(examples: list, max_length: int) -> list:
    kept = [one for one in examples if fits(one, max_length)]
    if not kept:
        shortest = min(len(one.after) for one in examples)
        raise InputError(
            f"the questions and answers of all {len(examples):,} examples are longer than --max-length {max_length} "
            f"(the shortest have {shortest} tokens)"
        )
    return kept


def audit_examples(examples: list, tokenizer, max_length: int, shape: network.ClaraConfig) -> tuple[list, dict]:
    """(the examples that are short enough, what is supervised), said before the first step. InputError when no example
    fits."""
    kept = keep_fitting(examples, max_length)
    text = sum(len(piece) for one in kept for piece in one.pieces)
    vectors, labels = shape.vectors * sum(len(one.pieces) for one in kept), sum(len(one.weights) for one in kept)
    first = [label for label in kept[0].labels if label != -100]
    print(f"{len(kept):,} examples, loss on {labels:,} tokens; ", end="")
    print(f"{len(examples) - len(kept):,} dropped (longer than {max_length} tokens)")
    if text:  # in stage 3 it stands in the table
        print(f"documents: {text:,} tokens in {vectors:,} vectors, {text / vectors:.1f} tokens per vector")
    print(f"loss on:    {tokenizer.decode(first)[:200]!r}")
    return kept, {
        "labels": labels, "document_tokens": text, "vectors": vectors, "rows_left_out": len(examples) - len(kept),
        "longest_tokens": max(len(one.after) for one in kept),
    }  # fmt: skip


def print_verdict(metrics: dict) -> None:
    """Whether the vectors carry anything."""
    right, other = metrics["watched"]["right"], metrics["watched"]["shuffled"]
    print(f"validation loss, nats per token: {right:.3f} with the right documents, {other:.3f} with others")
