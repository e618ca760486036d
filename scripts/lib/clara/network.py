"""CLaRa: a language model that reads documents as a few vectors in the place of their text (arXiv 2511.18659).

One frozen chat model carries three LoRA adapters. The `compressor` turns a document into memory vectors; the
`generator` reads those where embeddings of the text would stand, and answers; the `reasoner` turns a question into
vectors of the same kind, to look for documents with. A few parameters are learnt beside them.

A piece is a document of at most doc_max_tokens, or so much of a longer one.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lib.core import artifact, cli, compute
from lib.core.cli import InputError
from lib.data import records
from lib.model import chat
from lib.model.directory import ModelDirectory, open_directory

ADAPTERS = ("compressor", "generator", "reasoner")
BESIDE = {"compressor": ("memory", "separator", "projection"), "generator": (), "reasoner": ("seeking", "places")}
CONFIG, MEMORY = "clara.json", "memory.safetensors"
LEAST_RARE = 0.3  # of a token that every document has
DOCUMENT = "\x1a"  # a document's place in a prompt that is rendered: a control character, which no text needs


@dataclass(frozen=True)
class ClaraConfig:
    """What a trained model cannot do without."""

    compress_rate: int
    doc_max_tokens: int
    lora_r: int
    lora_alpha: float
    lora_targets: str
    k: int = 5  # pieces that are read of those that are found

    @property
    def vectors(self) -> int:
        """Of a piece, however short it is."""
        return max(1, self.doc_max_tokens // self.compress_rate)

    @property
    def targets(self) -> str | list[str]:
        return self.lora_targets if self.lora_targets == "all-linear" else self.lora_targets.split(",")


@dataclass(frozen=True)  # no tuple: the Trainer would take it apart
class Example:
    """A prompt about documents, and what is to follow it. Lists of token ids, where nothing else is said."""

    pieces: list[list[int]]  # of the documents, one after another
    counts: list[int]  # how many pieces each document has
    before: list[list[int]]  # what stands before each document
    after: list[int]  # what stands behind the last one: the question, its answer, further questions and answers
    labels: list[int]  # of `after`; -100: no loss
    weights: list[float]  # in the loss, of the labels that have one


class Clara(torch.nn.Module):
    """On a frozen causal model, which it changes: adapters are put into its layers."""

    def __init__(self, lm, shape: ClaraConfig):
        from peft import LoraConfig

        super().__init__()
        self.lm, self.shape = lm, shape
        for name in ADAPTERS:
            given = dict(r=shape.lora_r, lora_alpha=shape.lora_alpha, target_modules=shape.targets)
            with warnings.catch_warnings(action="ignore"):  # PEFT's, that there is another adapter
                lm.add_adapter(LoraConfig(**given), adapter_name=name)
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        embeddings = lm.get_input_embeddings().weight.detach().float()
        mean = embeddings.mean(0)
        # What the compressor is given in the place of each vector, beside the tokens of the vector's own stretch of the
        # text. One for all: their order is known by their positions.
        self.memory = torch.nn.Parameter(mean.clone())
        self.separator = torch.nn.Parameter(mean.clone())  # what the generator reads between two documents
        # A vector begins as its own stretch of the text, which the generator can read before any training; what the
        # compressor adds grows from zero. Last hidden states, scaled to an embedding's norm and added as they are, hide
        # it: 9.0 nats an answer token instead of 2.4 (SmolLM2-135M, 128 vectors for 150 tokens, untrained).
        self.projection = torch.nn.Parameter(torch.zeros(len(mean), len(mean)))
        self.register_buffer("norm", embeddings.norm(dim=1).mean())
        self.register_buffer("usual", mean)
        self.register_buffer("rarity", torch.ones(len(embeddings)))
        # For searching: what compressed pieces have in common, and what lets all that they differ in count alike; where
        # a question looks for what it says, and how much each vector counts.
        self.register_buffer("centre", mean.expand(shape.vectors, -1).clone())
        self.register_buffer("whitening", torch.eye(len(mean)))
        self.seeking = torch.nn.Parameter(torch.eye(len(mean)))
        self.places = torch.nn.Parameter(torch.ones(shape.vectors, 1))

    def know(self, pieces: list[list[int]]) -> None:
        """Take from the documents to train on what a text's tokens tell: how rare each of them is, by the logarithm of
        the share of documents that have it, and what all have in common, their mean embedding."""
        count = len(self.rarity)
        having = torch.bincount(torch.tensor([n for one in pieces for n in {*one}]), minlength=count)
        often = torch.bincount(torch.tensor([n for one in pieces for n in one]), minlength=count).float()
        embeddings = self.lm.get_input_embeddings().weight.detach().float()
        self.rarity.copy_(torch.log((len(pieces) + 1) / (having + 1)) + LEAST_RARE)
        self.usual.copy_(often.to(embeddings.device) @ embeddings / often.sum())

    # --- adapters -------------------------------------------------------------------------------------------

    def activate(self, adapter: str) -> None:
        """Turn to an adapter. PEFT freezes the others with that, and their gradients would be lost in silence."""
        learning = {parameter: parameter.requires_grad for parameter in self.lm.parameters()}
        self.lm.set_adapter(adapter)
        for parameter, learns in learning.items():
            parameter.requires_grad_(learns)

    def train_only(self, *adapters: str) -> None:
        """Let these adapters learn, and the parameters beside them that are theirs. All else is frozen."""
        beside = [name for adapter in adapters for name in BESIDE[adapter]]
        for name, parameter in self.named_parameters():
            learns = any(f".{a}." in name for a in adapters) if name.startswith("lm.") else name in beside
            parameter.requires_grad_(learns)

    def state_beside(self) -> dict[str, torch.Tensor]:
        """What it has beside the adapters and the model that they are on."""
        mine = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor for name, tensor in mine if not name.startswith("lm.")}

    def forget(self, adapter: str) -> None:
        """Begin an adapter anew."""
        from peft.tuners.lora import LoraLayer

        for module in self.lm.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(adapter, True)

    def learn_to_search(self, compressed: torch.Tensor) -> None:
        """Begin the reasoner as a copy of the compressor, to search among `compressed`, [pieces, vectors, width]."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        copied = get_peft_model_state_dict(self.lm, adapter_name="compressor")
        set_peft_model_state_dict(self.lm, copied, adapter_name="reasoner")
        self.centre.copy_(compressed.mean(0, dtype=torch.float32))
        covariance = torch.zeros_like(self.whitening)
        for some in compressed.split(256):
            apart = (some.to(self.centre.device).float() - self.centre).flatten(0, 1)
            covariance += apart.T @ apart / (len(compressed) * self.shape.vectors)
        # Shrunk towards their mean, as small ones are known least (Ledoit and Wolf, 2004).
        variances, axes = torch.linalg.eigh(covariance)
        scales = (variances.clamp(min=0) + variances.mean()).clamp(min=torch.finfo().tiny).rsqrt()
        self.whitening.copy_(axes * scales @ axes.T)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **how) -> None:
        """As the Trainer asks for it. Not the reentrant kind, which would leave the compressor without gradients: what
        goes into it needs none."""
        given = (activation_checkpointing_kwargs or {}) | {"use_reentrant": False}
        self.lm.activation_checkpointing_enable(activation_checkpointing_kwargs=given, **how)

    # --- documents to vectors ---------------------------------------------------------------------------------

    def compress(self, pieces: list[list[int]], adapter: str = "compressor") -> tuple[torch.Tensor, torch.Tensor]:
        """Memory vectors of pieces, float32 [pieces, vectors, width]; and how far apart the mean hidden states over a
        piece's text and over its memory are, mean squared. By the reasoner those of questions, whose words may stand
        anywhere in a document: each vector begins as the whole question."""
        self.activate(adapter)
        embed, device, vectors = self.lm.get_input_embeddings(), self.memory.device, self.shape.vectors
        longest = max(map(len, pieces))
        # Left-padded by the first token, so that memory follows the text.
        ids = torch.tensor([[p[0]] * (longest - len(p)) + p for p in pieces], device=device)
        lengths = torch.tensor([*map(len, pieces)], device=device)
        text, mask = embed(ids), torch.arange(longest, device=device) >= longest - lengths[:, None]
        weights = split_evenly(self.rarity[ids], lengths, 1 if adapter == "reasoner" else vectors)
        own = (self.usual + weights @ (text.float() - self.usual)).expand(-1, vectors, -1)
        seen = torch.nn.functional.pad(mask, (0, vectors), value=True).long()
        inputs = torch.cat([text, (self.memory + own).to(text.dtype)], 1)
        read, memory = self.hidden(inputs, seen).float().split([longest, vectors], 1)
        mean = (read * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        apart = torch.nn.functional.mse_loss(memory.mean(1), mean)
        added = self.norm * torch.nn.functional.normalize(memory, dim=-1) @ self.projection.T
        return Switch.apply(own + added, self, adapter), apart

    @torch.no_grad()
    def compressed(self, pieces: list[list[int]], batch: int) -> torch.Tensor:
        """The vectors of many pieces, float16 [pieces, vectors, width] on the CPU, in batches of like length."""
        order = sorted(range(len(pieces)), key=lambda n: -len(pieces[n]))  # the largest first: freed, it holds the rest
        made = torch.empty(len(pieces), self.shape.vectors, len(self.memory), dtype=torch.float16)
        for start in tqdm(range(0, len(order), batch), unit="batch", desc="compressing", disable=len(order) <= batch):
            some = order[start : start + batch]
            made[some] = self.compress([pieces[n] for n in some])[0].half().cpu()
        return made

    def directions(self, vectors: torch.Tensor) -> torch.Tensor:
        """What cosines are taken of, float32 [pieces, vectors × width], of length 1: a piece's vectors one after
        another, without what all texts have in common, and whitened. A few directions have nearly all of an embedding's
        variance: by the plain vectors of an untrained compressor 2 % of the questions have their document among the
        first 5 of 663, by these 52 % (SmolLM2-135M)."""
        return torch.nn.functional.normalize(((vectors.float() - self.centre) @ self.whitening).flatten(1), dim=-1)

    def query_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Of questions' vectors, [questions, vectors, width], what their cosines with `directions` are taken of."""
        found = (vectors.float() - self.usual) @ self.whitening @ self.seeking.T * self.places
        return torch.nn.functional.normalize(found.flatten(1), dim=-1)

    def hidden(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given = dict(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
        return self.lm.base_model(**given).last_hidden_state

    # --- vectors to answers -------------------------------------------------------------------------------------

    def forward(self, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """`loss` of the examples with their own documents, and `compress`'s second value."""
        read, apart = self.compress([piece for one in examples for piece in one.pieces])
        return self.loss(examples, read), apart

    def loss(self, examples: list[Example], vectors: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats, summed over the labels by their weights, with the vectors of all examples' pieces."""
        self.activate("generator")
        rows, device = self.embed_inputs(examples, vectors), vectors.device
        labels = [torch.tensor([-100] * (len(row) - len(one.labels)) + one.labels) for row, one in zip(rows, examples)]
        inputs, targets = (
            torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=fill).to(device)
            for some, fill in ((rows, 0), (labels, -100))
        )
        lengths = torch.tensor([*map(len, rows)], device=device)
        mask = (torch.arange(inputs.shape[1], device=device) < lengths[:, None]).long()
        counts = targets[:, 1:] != -100  # only there the vocabulary is looked at
        logits = self.lm.get_output_embeddings()(self.hidden(inputs, mask)[:, :-1][counts])
        losses = torch.nn.functional.cross_entropy(logits.float(), targets[:, 1:][counts], reduction="none")
        weights = torch.tensor([weight for one in examples for weight in one.weights], device=device)
        return (losses * weights).sum()  # a product of vectors would be taken in 16 bit

    def embed_inputs(self, examples: list[Example], vectors: torch.Tensor) -> list[torch.Tensor]:
        """Of each example the embeddings that the generator reads: text, a document's vectors, separator … text."""
        embed, left, made = self.lm.get_input_embeddings(), iter(vectors), []
        for one in examples:
            parts = []
            for ids, count in zip(one.before, one.counts):
                parts.append(embed(torch.tensor(ids, dtype=torch.long, device=vectors.device)))
                parts += [next(left).to(parts[0].dtype) for _ in range(count)]
                parts.append(self.separator[None].to(parts[0].dtype))
            made.append(torch.cat([*parts, embed(torch.tensor(one.after, device=vectors.device))]))
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
        ctx.clara.activate(ctx.adapter)
        return gradient, None, None


def split_evenly(rarity: torch.Tensor, lengths: torch.Tensor, vectors: int) -> torch.Tensor:
    """Weights, float32 [pieces, vectors, longest], with which tokens count for the vector of their own stretch of a
    left-padded text: the text cut into `vectors` of like length, of at least one token.

    A vector's weights have the norm 1, so that a sum of unlike embeddings is as long as one of them, and a stretch of
    one token is that token's embedding. With plain means in their place the answers' tokens cost 7.2 nats instead of
    3.2, 16 vectors for 150 tokens (SmolLM2-135M, untrained).
    """
    longest, number = rarity.shape[1], torch.arange(vectors, device=lengths.device)
    start = number * lengths[:, None] // vectors
    end = torch.maximum((number + 1) * lengths[:, None] // vectors, start + 1)
    place = torch.arange(longest, device=lengths.device) - (longest - lengths[:, None, None])
    inside = (place >= start[..., None]) & (place < end[..., None])
    return torch.nn.functional.normalize(inside * rarity[:, None], dim=-1)


def choose_straight_through(scores: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """Which candidates a question chooses, one after another, [picks, candidates] of scores [candidates]: ones and
    zeros, whose gradient is that of a softmax at `temperature` over the candidates that are left. There are k picks, or
    as many as there are candidates.

    Straight-through (arXiv 1308.3432). What was picked is masked by -inf; a penalty of log(1e-8) would be 0.37 at a
    temperature of 0.02, less than cosines may differ.
    """
    picks, left = [], scores / temperature
    for _ in range(min(k, len(scores))):
        soft = left.softmax(-1)
        hard = torch.nn.functional.one_hot(left.argmax(-1), len(scores))
        picks.append(hard + (soft - soft.detach()))
        left = left.masked_fill(hard.bool(), -torch.inf)
    return torch.stack(picks)


# --- files -----------------------------------------------------------------------------------------------------


def save_adapters(clara: Clara, folder: Path, adapters: Sequence[str], base: Path) -> None:
    """What is learnt, and of which base: never its weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    for name in adapters:
        held = get_peft_model_state_dict(clara.lm, adapter_name=name)
        save_file(
            {key: t.detach().float().cpu().contiguous() for key, t in held.items()}, folder / f"{name}.safetensors"
        )
    save_file({name: t.detach().cpu().contiguous() for name, t in clara.state_beside().items()}, folder / MEMORY)
    known = {"base": artifact.identify(base.resolve()), "adapters": list(adapters)}
    artifact.write_json(folder / CONFIG, known | asdict(clara.shape))


def load_clara(folder: Path, lm, k: int = 0) -> Clara:
    """What `save` wrote, on a model of the same base; with another `k` where one is given. InputError where something
    is missing or does not fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    said, shape = cli.read_json(folder / CONFIG), read_config(folder)
    try:
        clara = Clara(lm, replace(shape, k=k or shape.k))
        for name in said["adapters"]:
            stored = load_file(folder / f"{name}.safetensors")
            if stored.keys() != get_peft_model_state_dict(lm, adapter_name=name).keys():
                raise InputError(f"{folder}/{name}.safetensors: does not belong to this base: the layers differ")
            set_peft_model_state_dict(lm, stored, adapter_name=name)
        stored = load_file(folder / MEMORY)
        with torch.no_grad():
            for name, held in clara.state_beside().items():
                held.copy_(stored[name])
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded: {compute.first_line(error)}") from None
    return clara


def is_clara(folder: Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def has_reasoner(folder: Path) -> bool:
    """Whether it has been trained to."""
    return "reasoner" in cli.read_json(Path(folder) / CONFIG)["adapters"]


def read_config(folder: Path) -> ClaraConfig:
    """InputError where the directory is none of CLaRa's."""
    if not is_clara(folder):
        raise InputError(f"{folder}: contains no clara.json; expected a model from train_stage1.py or a later stage")
    said = cli.read_json(Path(folder) / CONFIG)
    try:
        return ClaraConfig(**{key: said[key] for key in ClaraConfig.__dataclass_fields__})
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}/{CONFIG}: {error} is missing; train the model again") from None


def open_base(folder: Path, elsewhere: Path | None = None) -> ModelDirectory:
    """The base model's directory: `elsewhere`, or where it lay. InputError where it is not there, or another model."""
    read_config(folder)  # refuses what is none of CLaRa's
    said = cli.read_json(Path(folder) / CONFIG)["base"]
    base = Path(elsewhere or said["path"])
    if not base.exists():
        raise InputError(f"{folder}: its base model {base} does not exist; give its path with --base")
    if artifact.identify(base)["digest"] != said["digest"]:
        raise InputError(f"{base}: is not the base that {folder} was trained on (its digest differs)")
    return open_directory(base)


# --- texts to ids ---------------------------------------------------------------------------------------------


def split_document(tokenizer, document: str, most: int) -> list[list[int]]:
    """A document's ids, cut into pieces of like length where there are more than `most`. With the space that stands
    before it in a prompt: without, its first word has other ids than wherever else it is named."""
    ids = token_ids(tokenizer, f" {document}")
    count = max(1, -(-len(ids) // most))
    return [ids[n * len(ids) // count : (n + 1) * len(ids) // count] for n in range(count)]


def encode_example(tokenizer, documents: list[str], turns: list[tuple], ends: set[int], shape: ClaraConfig) -> Example:
    """An example of documents and what is asked about them: (question, answer, the weight of the answer's tokens), one
    or several, turn after turn."""
    cut = [split_document(tokenizer, document, shape.doc_max_tokens) for document in documents]
    said, told, after, labels, before, weights = [], "", [], [], [], []
    for n, (question, answer, weight) in enumerate(turns):
        said += question_chat(question, 0 if n else len(documents))
        prompt = chat.render(tokenizer, said)
        if not prompt.startswith(told):
            raise InputError("the model's chat template renders a chat differently when another turn follows it")
        *parts, asked = [token_ids(tokenizer, part) for part in prompt[len(told) :].split(f" {DOCUMENT}")]
        answered = chat.answer_ids(tokenizer, said, records.message("assistant", answer), ends)
        said += records.message("assistant", answer)
        told = chat.render(tokenizer, said, prompt=False)
        rest = token_ids(tokenizer, told[len(prompt) :])[len(answered) :] if n + 1 < len(turns) else []
        before += parts
        after += asked + answered + rest
        labels += [-100] * len(asked) + answered + [-100] * len(rest)
        weights += [weight] * len(answered)
    return Example([piece for one in cut for piece in one], [*map(len, cut)], before, after, labels, weights)


def question_chat(question: str, documents: int) -> list[dict]:
    """The user's turn, with places for so many documents."""
    return records.message("user", records.question_with_documents(question, [DOCUMENT] * documents))


def encode_question(tokenizer, text: str, counts: list[int]) -> Example:
    """A question about documents of so many pieces each, to be answered."""
    prompt = chat.render(tokenizer, question_chat(text, len(counts)))
    *before, after = [token_ids(tokenizer, part) for part in prompt.split(f" {DOCUMENT}")]
    return Example([], counts, before, after, [], [])


def token_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
