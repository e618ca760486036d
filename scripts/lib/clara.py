"""CLaRa: a language model that reads documents as a few vectors in the place of their text (arXiv 2511.18659).

One frozen chat model carries three LoRA adapters. The `compressor` turns a document into memory vectors; the
`generator` reads those where embeddings of the text would stand, and answers; the `reasoner` turns a question into
vectors of the same kind, to look for documents with. A few parameters are learnt beside them.

A piece is a document of at most doc_max_tokens, or so much of a longer one.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lib import artifact, chat, models, records
from lib.cli import InputError

ADAPTERS = ("compressor", "generator", "reasoner")
CONFIG, MEMORY = "clara.json", "memory.safetensors"
DOCUMENT = "\x1a"  # a document's place in a prompt that is rendered: a control character, which no text needs


@dataclass(frozen=True)
class Shape:
    """What a trained model cannot do without."""

    compress_rate: int
    doc_max_tokens: int
    lora_r: int
    lora_alpha: float
    lora_targets: str

    @property
    def vectors(self) -> int:
        """Of a piece, however short it is."""
        return max(1, self.doc_max_tokens // self.compress_rate)

    @property
    def targets(self) -> str | list[str]:
        return self.lora_targets if self.lora_targets == "all-linear" else self.lora_targets.split(",")


@dataclass(frozen=True)  # no tuple: the Trainer would take it apart
class Example:
    """A prompt about documents, and what is to follow it. All but `counts` are token ids."""

    pieces: list[list[int]]  # of the documents, one after another
    counts: list[int]  # pieces of each document
    before: list[list[int]]  # what stands before each document
    after: list[int]  # what stands behind the last one: the question, its answer, further questions and answers
    labels: list[int]  # of `after`; -100: no loss


class Clara(torch.nn.Module):
    """On a frozen causal model, which it changes: adapters are put into its layers."""

    def __init__(self, lm, shape: Shape):
        from peft import LoraConfig

        super().__init__()
        self.lm, self.shape = lm, shape
        for name in ADAPTERS:
            given = dict(r=shape.lora_r, lora_alpha=shape.lora_alpha, target_modules=shape.targets)
            lm.add_adapter(LoraConfig(**given), adapter_name=name)
        mean = lm.get_input_embeddings().weight.detach().float().mean(0)
        # What the compressor is given in the place of each vector, beside the mean embedding of the vector's own
        # stretch of the text. One for all: their order is known by their positions, and any number can be asked for.
        self.memory = torch.nn.Parameter(mean.clone())
        self.separator = torch.nn.Parameter(mean.clone())  # what the generator reads between two documents
        # A vector begins as that mean embedding alone, which the generator half reads where there are many; what the
        # compressor adds grows from zero. Last hidden states, scaled to an embedding's norm and added as they are, hide
        # it: 9.0 nats an answer token instead of 2.4 (SmolLM2-135M, 128 vectors for 150 tokens, untrained).
        self.projection = torch.nn.Parameter(torch.zeros(len(mean), len(mean)))
        self.register_buffer("norm", lm.get_input_embeddings().weight.detach().float().norm(dim=1).mean())

    # --- adapters -------------------------------------------------------------------------------------------

    def use(self, adapter: str) -> None:
        """Turn to an adapter. PEFT freezes the others with that, and their gradients would be lost in silence."""
        learning = {parameter: parameter.requires_grad for parameter in self.lm.parameters()}
        self.lm.set_adapter(adapter)
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)

    def train_only(self, *adapters: str, memory: bool) -> None:
        """Let these adapters learn, and the parameters beside them or not; all else is frozen."""
        for name, parameter in self.named_parameters():
            learns = any(f".{a}." in name for a in adapters) if name.startswith("lm.") else memory
            parameter.requires_grad_(learns)

    def beside(self) -> dict[str, torch.nn.Parameter]:
        """What is learnt beside the adapters."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("lm.")}

    # --- documents to vectors ---------------------------------------------------------------------------------

    def compress(
        self, pieces: list[list[int]], adapter: str = "compressor", vectors: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory vectors of pieces, float32 [pieces, vectors, width], by default as many as the shape says; and how far
        apart the mean hidden states over a piece's text and over its memory are, mean squared, which training is to
        keep small."""
        self.use(adapter)
        embed, device, vectors = self.lm.get_input_embeddings(), self.memory.device, vectors or self.shape.vectors
        longest = max(map(len, pieces))
        # Left-padded by the first token, so that memory follows the text.
        ids = torch.tensor([[p[0]] * (longest - len(p)) + p for p in pieces], device=device)
        lengths = torch.tensor([*map(len, pieces)], device=device)
        text, mask = embed(ids), torch.arange(longest, device=device) >= longest - lengths[:, None]
        own = stretches(lengths, vectors, longest) @ text.float()
        seen = torch.nn.functional.pad(mask, (0, vectors), value=True).long()
        inputs = torch.cat([text, (self.memory + own).to(text.dtype)], 1)
        read, memory = self.hidden(inputs, seen).float().split([longest, vectors], 1)
        mean = (read * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        apart = torch.nn.functional.mse_loss(memory.mean(1), mean)
        added = self.norm * torch.nn.functional.normalize(memory, dim=-1) @ self.projection.T
        return Switch.apply(own + added, self, adapter), apart

    def hidden(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given = dict(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
        return self.lm.base_model(**given).last_hidden_state

    # --- vectors to answers -------------------------------------------------------------------------------------

    def forward(self, examples: list[Example], vectors: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy in nats summed over the labels, and `compress`'s second value."""
        read, apart = self.compress([piece for one in examples for piece in one.pieces], vectors=vectors)
        return self.loss(examples, read), apart

    def loss(self, examples: list[Example], vectors: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats summed over the labels, with the vectors of all examples' pieces."""
        self.use("generator")
        prompts = self.prompts(examples, vectors)
        embed, device = self.lm.get_input_embeddings(), vectors.device
        rows = [torch.cat([p, embed(torch.tensor(one.after, device=device))]) for p, one in zip(prompts, examples)]
        labels = [torch.tensor([-100] * len(p) + one.labels, device=device) for p, one in zip(prompts, examples)]
        inputs, targets = (
            torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=fill)
            for some, fill in ((rows, 0), (labels, -100))
        )
        lengths = torch.tensor([*map(len, rows)], device=device)
        mask = (torch.arange(inputs.shape[1], device=device) < lengths[:, None]).long()
        counts = targets[:, 1:] != -100  # only there the vocabulary is looked at
        logits = self.lm.get_output_embeddings()(self.hidden(inputs, mask)[:, :-1][counts])
        return torch.nn.functional.cross_entropy(logits.float(), targets[:, 1:][counts], reduction="sum")

    def prompts(self, examples: list[Example], vectors: torch.Tensor) -> list[torch.Tensor]:
        """Of each example the embeddings of what stands before its question: text, a document's vectors, separator …"""
        embed, left, made = self.lm.get_input_embeddings(), iter(vectors), []
        for one in examples:
            parts = []
            for ids, count in zip(one.before, one.counts):
                parts.append(embed(torch.tensor(ids, dtype=torch.long, device=vectors.device)))
                parts += [next(left).to(parts[0].dtype) for _ in range(count)]
                parts.append(self.separator[None].to(parts[0].dtype))
            made.append(torch.cat(parts))
        return made


class Switch(torch.autograd.Function):
    """The identity. A backward pass that comes here goes on in another adapter's part of the graph, and gradient
    checkpointing runs that part again: with the adapter that it was run with."""

    @staticmethod
    def forward(ctx, vectors, clara, adapter):
        ctx.clara, ctx.adapter = clara, adapter
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx, gradient):
        ctx.clara.use(ctx.adapter)
        return gradient, None, None


def stretches(lengths: torch.Tensor, vectors: int, longest: int) -> torch.Tensor:
    """Weights, float32 [pieces, vectors, longest], of the mean over each vector's own stretch of a left-padded text:
    the text cut into `vectors` of like length, of at least one token."""
    number = torch.arange(vectors, device=lengths.device)
    start = number * lengths[:, None] // vectors
    end = torch.maximum((number + 1) * lengths[:, None] // vectors, start + 1)
    place = torch.arange(longest, device=lengths.device) - (longest - lengths[:, None, None])
    inside = (place >= start[..., None]) & (place < end[..., None])
    return inside / (end - start)[..., None]


# --- files -----------------------------------------------------------------------------------------------------


def save(clara: Clara, folder: Path, adapters: list[str], base: Path) -> None:
    """What is learnt, and of which base: never its weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    for name in adapters:
        held = get_peft_model_state_dict(clara.lm, adapter_name=name)
        save_file(
            {key: t.detach().float().cpu().contiguous() for key, t in held.items()}, folder / f"{name}.safetensors"
        )
    save_file({name: p.detach().cpu().contiguous() for name, p in clara.beside().items()}, folder / MEMORY)
    known = {"base": artifact.identify(base), "adapters": adapters}
    artifact.write_json(folder / CONFIG, known | asdict(clara.shape))


def load(folder: Path, lm) -> Clara:
    """What `save` wrote, on a model of the same base. InputError where something is missing or does not fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    said = models.read_json(folder / CONFIG)
    try:
        clara = Clara(lm, Shape(**{key: said[key] for key in Shape.__dataclass_fields__}))
        for name in said["adapters"]:
            stored = load_file(folder / f"{name}.safetensors")
            if stored.keys() != get_peft_model_state_dict(lm, adapter_name=name).keys():
                raise InputError(f"{folder}/{name}.safetensors: is not of this base: other layers")
            set_peft_model_state_dict(lm, stored, adapter_name=name)
        stored = load_file(folder / MEMORY)
        with torch.no_grad():
            for name, parameter in clara.beside().items():
                parameter.copy_(stored[name])
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded: {models.first_line(error)}") from None
    return clara


# --- texts to ids ---------------------------------------------------------------------------------------------


def pieces(tokenizer, document: str, most: int) -> list[list[int]]:
    """A document's ids, cut into pieces of like length where there are more than `most`."""
    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    count = max(1, -(-len(ids) // most))
    return [ids[n * len(ids) // count : (n + 1) * len(ids) // count] for n in range(count)]


def encode(tokenizer, documents: list[str], pairs: list[tuple[str, str]], ends: set[int], shape: Shape) -> Example:
    """An example of documents and one or several questions about them with their answers, turn after turn."""
    cut = [pieces(tokenizer, document, shape.doc_max_tokens) for document in documents]
    turns, told, after, labels, before = [], "", [], [], []
    for n, (question, answer) in enumerate(pairs):
        content = records.question_with_documents(question, [] if n else [DOCUMENT] * len(documents))
        turns += records.said("user", content)
        prompt = chat.render(tokenizer, turns)
        if not prompt.startswith(told):
            raise InputError("the model's chat template renders a chat differently when another turn follows it")
        *parts, last = prompt[len(told) :].split(DOCUMENT)
        before += [ids_of(tokenizer, part) for part in parts]
        asked = ids_of(tokenizer, last)
        answered = chat.answer_ids(tokenizer, turns, records.said("assistant", answer), ends)
        turns += records.said("assistant", answer)
        told = chat.render(tokenizer, turns, prompt=False)
        rest = ids_of(tokenizer, told[len(prompt) :])[len(answered) :] if n + 1 < len(pairs) else []
        after += asked + answered + rest
        labels += [-100] * len(asked) + answered + [-100] * len(rest)
    return Example([piece for one in cut for piece in one], [*map(len, cut)], before, after, labels)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
