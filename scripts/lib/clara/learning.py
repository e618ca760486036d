"""Training of CLaRa's stages by transformers' Trainer, on examples that lib/clara/network.py has encoded.

Whether the vectors carry anything shows in one comparison: the loss with the right documents, and with other documents.
Both are measured on held-out examples during training, and logged as `right` and `shuffled`.
"""

from collections.abc import Iterable
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
    """As loop.check_memory, for two trained adapters."""
    adapter, tokens, labels = memory_sizes(shape, examples)
    return loop.check_memory(base, adapter, tokens, args.batch_size, args, labels)


def memory_sizes(shape: network.ClaraConfig, examples: list) -> tuple[dict, list[int], int]:
    """(the trained adapters as one adapter, the tokens of each example, the most labels of an example)."""
    tokens = [example_length(example) + shape.vectors * len(example.pieces) for example in examples]
    adapter = {"r": 2 * shape.lora_r, "target_modules": shape.targets}
    return adapter, tokens, max(len(example.weights) for example in examples)


def check_ids(base: ModelDirectory, tokenizer, examples: list, pieces: Iterable[list[int]] = ()) -> None:
    """InputError if an example, or one of further pieces of documents, has an id without a row in the embedding."""
    texts = [ids for example in examples for ids in (*example.pieces, *example.before, example.after)]
    directory.check_ids(base.path, directory.count_embedding_rows(base), tokenizer, [*texts, *pieces])


def load_base(base: ModelDirectory, args):
    """(the frozen base, the dtype of its matrix products). On a CPU the activations between layers are float32, as in
    sft.py."""
    if base.kind != "plain":
        raise InputError(f"{base.path}: expected a 16-bit base model")
    loop.check_precision(args.precision)
    dtype = loading.torch_dtype(args.precision)
    on_cpu = args.precision == "auto" and hardware.device() == "cpu"
    lm = loading.load_model(
        base, "fp32" if on_cpu else args.precision, **loading.placement_arguments(args)
    ).requires_grad_(False)
    network.check_reads_embeddings(lm, base.path)
    if on_cpu:
        loading.cast_frozen_linears(lm, dtype)
    return lm, dtype


def autocast_to(dtype, model: network.Clara):
    """The context of a forward pass that the Trainer does not run itself."""
    return torch.autocast(model.memory.device.type, dtype) if dtype != torch.float32 else nullcontext()


def encode_passage(
    row, tokenizer, ends: set[int], shape: network.ClaraConfig, rebuild: float = 0.0, max_length: int = 0
) -> network.Example:
    """The example of a row of stage 1 (passages.Passage): its questions, and with `rebuild` the passage itself, if it
    fits into `max_length`."""
    turns = [(question or PARAPHRASE, answer, 1.0) for question, answer in row.pairs]
    example = network.encode_example(tokenizer, [row.document], turns, ends, shape)
    if not rebuild or len(example.after) + sum(map(len, example.pieces)) + 64 > max_length:
        return example
    # It comes last, so that no answer can be copied from it. All its tokens together weigh `rebuild` times as much as
    # the answers' tokens.
    weight = rebuild * len(example.weights) / sum(map(len, example.pieces))
    return network.encode_example(tokenizer, [row.document], [*turns, (REBUILD, row.document, weight)], ends, shape)


def encode_documents(row, tokenizer, ends: set[int], shape: network.ClaraConfig) -> network.Example:
    """The example of a row of stage 2 (passages.Question)."""
    return network.encode_example(tokenizer, row.documents, [(row.question, row.answer, 1.0)], ends, shape)


def total_weight(examples: list[network.Example]) -> float:
    """The sum of all labels' weights, by which a loss is divided."""
    return sum(weight for example in examples for weight in example.weights)


def example_length(example: network.Example) -> int:
    return len(example.after) + sum(map(len, example.pieces))


def swap_documents(examples: list) -> list:
    """Each example with the documents of the next example that has as many."""
    mismatched = []
    for n, example in enumerate(examples):
        donors = (donor for donor in examples[n + 1 :] + examples[:n] if len(donor.counts) == len(example.counts))
        donor = next(donors, example)
        mismatched.append(
            replace(example, **{name: getattr(donor, name) for name in ABOUT_DOCUMENTS if hasattr(example, name)})
        )
    return mismatched


class ClaraTrainer(loop.LoopMixin, Trainer):
    """Loss: cross entropy per label, and `mse_weight` times the distance between memory and text."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the whole step
    watches, also = ("right", "shuffled"), ("right", "shuffled", "apart")

    def __init__(self, *args, examples, watched, eval_steps, dtype, mse_weight=0.0, **kwargs):
        self.watched, self.eval_steps, self.others = watched, eval_steps, swap_documents(watched)
        self.dtype, self.examples, self.mse_weight = dtype, examples, mse_weight
        self.rows, self.found, self.apart = 0, {}, []
        kwargs |= {"lengths": [*map(example_length, examples)], "also": self.also}
        super().__init__(*args, train_dataset=examples, data_collator=lambda batch: {"examples": batch}, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        batches, _ = super().get_batch_samples(*args, **kwargs)
        examples = [example for batch in batches for example in batch["examples"]]
        self.rows = len(examples)
        return batches, total_weight(examples)

    def count_tokens(self, batch) -> int:
        return sum(map(example_length, batch["examples"]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, distance = model(inputs["examples"])
        self.apart.append(distance.detach())
        share = len(inputs["examples"]) / self.rows
        return loss / num_items_in_batch + self.mse_weight * share * distance

    def count(self, inputs) -> int:
        return len(inputs["examples"])

    def piece(self, inputs, count: int, span: slice) -> dict:
        return {"examples": inputs["examples"][span]}

    def watch(self) -> dict[str, float]:
        """Loss per label on the held-out examples, in nats: with their own documents and with those of others."""
        return {name: self.nats(examples) for name, examples in (("right", self.watched), ("shuffled", self.others))}

    def nats(self, examples: list) -> float:
        with autocast_to(self.dtype, self.model):
            total = self.sum_in_pieces(lambda batch: self.model(batch)[0].item(), examples)
        return total / total_weight(examples)

    def log(self, logs, *args):
        if "loss" in logs:
            step = self.state.global_step
            if step % self.eval_steps == 0 or step in (1, self.state.max_steps):
                self.model.eval()
                with torch.no_grad():
                    self.found = self.watch()
                self.model.train()
            elif not self.found:  # a resumed run logs the last values until it measures again
                self.found = {name: self.state.log_history[-1][name] for name in self.watches}
            distance = torch.stack(self.apart).mean().item() if self.apart else None
            logs |= self.found | {"apart": distance}
            self.apart.clear()
        super().log(logs, *args)

    def _save(self, output_dir=None, state_dict=None):
        """Save the trained parameters in the place of the whole model."""
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
    """A question, and the pieces among which the reasoner searches. The example's own documents are empty slots for the
    pieces that it chooses."""

    asked: list[int]  # ids of the question alone
    candidates: list[int]  # rows of the table of compressed pieces
    gold: list[int]  # positions in `candidates`; empty if they are unknown


class CandidateTable:
    """The pieces of all candidates, each once."""

    def __init__(self, tokenizer, shape: network.ClaraConfig):
        self.tokenizer, self.shape, self.rows = tokenizer, shape, {}

    def search(self, row, ends: set[int]) -> SearchExample:
        """The example of a row of stage 2 or 3 (passages.Question). Its pieces are added to the table."""
        candidates, gold = [], []
        for n, document in enumerate(row.documents):
            for piece in network.split_document(self.tokenizer, document, self.shape.doc_max_tokens):
                gold += [len(candidates)] if n in row.positions else []
                candidates.append(self.rows.setdefault(tuple(piece), len(self.rows)))
        slots = [""] * min(self.shape.k, len(candidates))
        example = network.encode_example(self.tokenizer, slots, [(row.question, row.answer, 1.0)], ends, self.shape)
        question_ids = network.token_ids(self.tokenizer, f" {row.question}")
        fields = vars(example) | {"pieces": [[] for _ in slots]}  # compressed already
        return SearchExample(**fields, asked=question_ids, candidates=candidates, gold=gold)

    def compressed(self, model: network.Clara, batch: int, dtype) -> torch.Tensor:
        """float16 [pieces, vectors, width], on the CPU."""
        with autocast_to(dtype, model):
            return model.compressed([*map(list, self.rows)], batch)


class SearchTrainer(ClaraTrainer):
    """Loss: cross entropy per label, with the pieces that the reasoner has chosen among a question's candidates.

    In the first `retrieval_share` of the steps the generator reads nothing, and the loss is the cross entropy of the
    right pieces among all pieces of the table, by their cosines (InfoNCE, arXiv 1807.03748): pieces that are found by
    chance teach little about searching. `table` holds the compressed pieces, float16 [pieces, vectors, width].
    """

    watches, also = ("right", "shuffled", "recall"), ("right", "shuffled", "recall")

    def __init__(self, *args, table, retrieval_share: float, temperature: float, **kwargs):
        self.table, self.retrieval_share, self.temperature = table, retrieval_share, temperature
        super().__init__(*args, **kwargs)
        self.directions = self.model.directions(self.read(slice(None)))

    def read(self, rows) -> torch.Tensor:
        return self.table[rows].to(self.model.memory.device).float()

    def scores(self, examples: list[SearchExample]) -> torch.Tensor:
        """Cosines of the questions with every piece of the table, float32 [questions, pieces]."""
        with autocast_to(self.dtype, self.model):
            vectors, _ = self.model.compress([example.asked for example in examples], "reasoner")
        return self.model.query_vectors(vectors) @ self.directions.T

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        examples = inputs["examples"]
        scores = self.scores(examples)
        if self.state.global_step >= self.retrieval_share * self.state.max_steps:
            return self.answer_loss(examples, scores) / num_items_in_batch
        logprobs = (scores / self.temperature).log_softmax(-1)
        gold_rows = [[example.candidates[n] for n in example.gold] for example in examples]
        return -sum(row[ids].logsumexp(0) for row, ids in zip(logprobs, gold_rows)) / self.rows

    def answer_loss(self, examples: list[SearchExample], scores: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats, summed over the labels."""
        vectors = []
        for example, row in zip(examples, scores):
            weights = network.choose_straight_through(row[example.candidates], len(example.counts), self.temperature)
            vectors.append(torch.einsum("kn,nvw->kvw", weights, self.read(example.candidates)))
        with autocast_to(self.dtype, self.model):
            return self.model.loss(examples, torch.cat(vectors))

    def watch(self) -> dict[str, float]:
        """The losses of the other stages, with the chosen pieces; and the share of the right pieces among them."""
        known = [example for example in self.watched if example.gold]
        recalls = self.sum_in_pieces(lambda batch: sum(map(self.recall, batch)), known)
        return super().watch() | {"recall": recalls / max(1, len(known))}

    def recall(self, example: SearchExample) -> float:
        best = self.scores([example])[0][example.candidates].topk(len(example.counts)).indices.tolist()
        return len({*best} & {*example.gold}) / len(example.gold)

    def nats(self, examples: list[SearchExample]) -> float:
        total = self.sum_in_pieces(lambda batch: self.answer_loss(batch, self.scores(batch)).item(), examples)
        return total / total_weight(examples)


def train_stage(
    args, stage: str, trainer_class, model, dtype, rows: list, held_out: list, base: dict, expected, **options
) -> tuple:
    """(the run, its metrics). Trains on `rows`, from the newest checkpoint on. `base` is the identity of the model that
    is trained, `expected` the bytes of memory that this is expected to take."""
    inputs = {"rows": records.digest([repr(row) for row in rows])}
    run, micro_batch = loop.open_run(args, "clara", base, inputs, work=stage)
    micro_batch.expected_bytes = expected
    settings = TrainingArguments(**loop.trainer_settings(args, dtype, run), remove_unused_columns=False)
    trainer = trainer_class(
        model=model, args=settings, run=run, micro_batch=micro_batch, examples=rows, watched=held_out,
        eval_steps=args.eval_steps, dtype=dtype, **options,
    )  # fmt: skip
    metrics = loop.fit(trainer, run)
    last_values = {name: metrics["history"][-1][name] for name in trainer.watches}
    return run, metrics | {"rows": len(rows), "expected_memory_bytes": expected, "watched": last_values}


def fits(example: network.Example, max_length: int) -> bool:
    return len(example.after) <= max_length


def keep_fitting(examples: list, max_length: int) -> list:
    fitting = [example for example in examples if fits(example, max_length)]
    if not fitting:
        shortest = min(len(example.after) for example in examples)
        raise InputError(
            f"the questions and answers of all {len(examples):,} examples are longer than --max-length {max_length} "
            f"(the shortest have {shortest} tokens)"
        )
    return fitting


def audit_examples(examples: list, tokenizer, max_length: int, shape: network.ClaraConfig) -> tuple[list, dict]:
    """(the examples that are short enough, counts of what is supervised). Prints the counts before the first step.
    Raises InputError if no example fits."""
    kept = keep_fitting(examples, max_length)
    tokens = sum(len(piece) for example in kept for piece in example.pieces)
    vectors, labels = (
        shape.vectors * sum(len(example.pieces) for example in kept),
        sum(len(example.weights) for example in kept),
    )
    answer_ids = [label for label in kept[0].labels if label != -100]
    print(f"{len(kept):,} examples, loss on {labels:,} tokens; ", end="")
    print(f"{len(examples) - len(kept):,} dropped (longer than {max_length} tokens)")
    if tokens:  # 0 in stage 3, where the pieces are in the table
        print(f"documents: {tokens:,} tokens in {vectors:,} vectors, {tokens / vectors:.1f} tokens per vector")
    print(f"loss on:    {tokenizer.decode(answer_ids)[:200]!r}")
    return kept, {
        "labels": labels, "document_tokens": tokens, "vectors": vectors, "rows_left_out": len(examples) - len(kept),
        "longest_tokens": max(len(example.after) for example in kept),
    }  # fmt: skip


def print_verdict(metrics: dict) -> None:
    """Print whether the vectors carry anything."""
    right, shuffled = metrics["watched"]["right"], metrics["watched"]["shuffled"]
    print(f"validation loss, nats per token: {right:.3f} with the right documents, {shuffled:.3f} with others")
