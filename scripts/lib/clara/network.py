"""CLaRa: a language model that reads documents as a few vectors in the place of their text (arXiv 2511.18659).

One frozen chat model carries three LoRA adapters. The `compressor` turns a document into memory vectors. The
`generator` reads them in the place of the text's embeddings, and answers. The `reasoner` turns a question into vectors
of the same kind, which documents are searched with. A few more parameters are trained beside the adapters.

A piece is a whole document of at most doc_max_tokens, or a part of a longer one.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lib.core import artifact, cli, compute
from lib.core.cli import InputError, OutOfMemory
from lib.data import records
from lib.model import chat
from lib.model.chat import token_ids
from lib.model.directory import ModelDirectory, open_directory

ADAPTERS = ("compressor", "generator", "reasoner")
BESIDE = {"compressor": ("memory", "separator", "projection"), "generator": (), "reasoner": ("seeking", "places")}
CONFIG, MEMORY = "clara.json", "memory.safetensors"
LEAST_RARE = 0.3  # of a token that every document has
DOCUMENT = "\x1a"  # stands for a document while a prompt is rendered: a control character, which no text needs


@dataclass(frozen=True)
class ClaraConfig:
    """The settings that a trained model depends on."""

    compress_rate: int
    doc_max_tokens: int
    lora_r: int
    lora_alpha: float
    lora_targets: str
    k: int = 5  # retrieved pieces to read

    @property
    def vectors(self) -> int:
        """Vectors per piece, however short it is."""
        return max(1, self.doc_max_tokens // self.compress_rate)

    @property
    def targets(self) -> str | list[str]:
        return self.lora_targets if self.lora_targets == "all-linear" else self.lora_targets.split(",")


@dataclass(frozen=True)  # no tuple: the Trainer would take it apart
class Example:
    """A prompt about documents, and the answers to learn. Lists hold token ids unless noted otherwise."""

    pieces: list[list[int]]  # of the documents, one after another
    counts: list[int]  # how many pieces each document has
    before: list[list[int]]  # what stands before each document
    after: list[int]  # what follows the last document: the question, its answer, further questions and answers
    labels: list[int]  # of `after`; -100: no loss
    weights: list[float]  # in the loss, of the labels that have one


class Clara(torch.nn.Module):
    """CLaRa on a frozen causal model `lm`. It modifies that model: the adapters are put into its layers."""

    def __init__(self, lm, shape: ClaraConfig):
        from peft import LoraConfig

        super().__init__()
        self.lm, self.shape = lm, shape
        for name in ADAPTERS:
            settings = dict(r=shape.lora_r, lora_alpha=shape.lora_alpha, target_modules=shape.targets)
            with warnings.catch_warnings(action="ignore"):  # PEFT warns that there is another adapter
                lm.add_adapter(LoraConfig(**settings), adapter_name=name)
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        embeddings = embed_vocabulary(lm)
        mean = embeddings.mean(0)
        # The compressor's input at the position of each vector, added to the tokens of the vector's own stretch of the
        # text. All vectors share it, since their positions tell them apart.
        self.memory = torch.nn.Parameter(mean.clone())
        self.separator = torch.nn.Parameter(mean.clone())  # what the generator reads between two documents
        # A vector starts as its own stretch of the text, which the generator can read before any training. What the
        # compressor adds grows from zero. Last hidden states that are scaled to an embedding's norm and added without a
        # projection hide the text: 9.0 nats per answer token instead of 2.4 (SmolLM2-135M, 128 vectors for 150 tokens,
        # untrained).
        self.projection = torch.nn.Parameter(torch.zeros(len(mean), len(mean)))
        self.register_buffer("norm", embeddings.norm(dim=1).mean())
        self.register_buffer("usual", mean)
        self.register_buffer("rarity", torch.ones(len(embeddings)))
        # For searching: the mean of the compressed pieces (centre), the whitening of their differences from it, a
        # projection of the questions (seeking), and a weight per vector (places).
        self.register_buffer("centre", mean.expand(shape.vectors, -1).clone())
        self.register_buffer("whitening", torch.eye(len(mean)))
        self.seeking = torch.nn.Parameter(torch.eye(len(mean)))
        self.places = torch.nn.Parameter(torch.ones(shape.vectors, 1))

    def know(self, pieces: list[list[int]]) -> None:
        """Take statistics from the training documents: how rare each token is, by the logarithm of the share of
        documents that contain it, and the mean embedding of all their tokens."""
        size = len(self.rarity)
        document_counts = torch.bincount(torch.tensor([n for piece in pieces for n in {*piece}]), minlength=size)
        token_counts = torch.bincount(torch.tensor([n for piece in pieces for n in piece]), minlength=size).float()
        embeddings = embed_vocabulary(self.lm)
        self.rarity.copy_(torch.log((len(pieces) + 1) / (document_counts + 1)) + LEAST_RARE)
        self.usual.copy_(token_counts.to(embeddings.device) @ embeddings / token_counts.sum())

    # --- adapters -------------------------------------------------------------------------------------------

    def activate(self, adapter: str) -> None:
        """Switch to an adapter. PEFT freezes the others when it does, which would silently drop their gradients; their
        requires_grad is restored."""
        trainable = {parameter: parameter.requires_grad for parameter in self.lm.parameters()}
        self.lm.set_adapter(adapter)
        for parameter, learns in trainable.items():
            parameter.requires_grad_(learns)

    def train_only(self, *adapters: str) -> None:
        """Make these adapters trainable, with the parameters beside them that belong to them. Freeze all others."""
        extra_names = [name for adapter in adapters for name in BESIDE[adapter]]
        for name, parameter in self.named_parameters():
            learns = any(f".{a}." in name for a in adapters) if name.startswith("lm.") else name in extra_names
            parameter.requires_grad_(learns)

    def state_beside(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers beside the adapters and the base model."""
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor for name, tensor in tensors if not name.startswith("lm.")}

    def forget(self, adapter: str) -> None:
        """Reset an adapter to its initial weights."""
        from peft.tuners.lora import LoraLayer

        for module in self.lm.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters(adapter, True)

    def learn_to_search(self, compressed: torch.Tensor) -> None:
        """Start the reasoner as a copy of the compressor, to search among `compressed`, [pieces, vectors, width]."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        weights = get_peft_model_state_dict(self.lm, adapter_name="compressor")
        set_peft_model_state_dict(self.lm, weights, adapter_name="reasoner")
        self.centre.copy_(compressed.mean(0, dtype=torch.float32))
        covariance = torch.zeros_like(self.whitening)
        for batch in compressed.split(256):
            deviations = (batch.to(self.centre.device).float() - self.centre).flatten(0, 1)
            covariance += deviations.T @ deviations / (len(compressed) * self.shape.vectors)
        # Variances are shrunk towards their mean, since small ones are estimated worst (Ledoit and Wolf, 2004).
        variances, axes = torch.linalg.eigh(covariance)
        scales = (variances.clamp(min=0) + variances.mean()).clamp(min=torch.finfo().tiny).rsqrt()
        self.whitening.copy_(axes * scales @ axes.T)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **options) -> None:
        """The method that the Trainer calls. Never the reentrant kind of checkpointing: it would leave the compressor
        without gradients, because its inputs need none."""
        kwargs = (activation_checkpointing_kwargs or {}) | {"use_reentrant": False}
        self.lm.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)

    # --- documents to vectors ---------------------------------------------------------------------------------

    def compress(self, pieces: list[list[int]], adapter: str = "compressor") -> tuple[torch.Tensor, torch.Tensor]:
        """(the memory vectors of pieces, float32 [pieces, vectors, width]; the mean squared distance between the mean
        hidden states over a piece's text and over its memory). The reasoner compresses questions, whose words may stand
        anywhere in a document: each vector starts as the whole question."""
        self.activate(adapter)
        embed, device, vectors = self.lm.get_input_embeddings(), self.memory.device, self.shape.vectors
        longest = max(map(len, pieces))
        # Left-padded by the first token, so that memory follows the text.
        ids = torch.tensor([[p[0]] * (longest - len(p)) + p for p in pieces], device=device)
        lengths = torch.tensor([*map(len, pieces)], device=device)
        text, mask = embed(ids), torch.arange(longest, device=device) >= longest - lengths[:, None]
        weights = split_evenly(self.rarity[ids], lengths, 1 if adapter == "reasoner" else vectors)
        start = (self.usual + weights @ (text.float() - self.usual)).expand(-1, vectors, -1)
        attention_mask = torch.nn.functional.pad(mask, (0, vectors), value=True).long()
        inputs = torch.cat([text, (self.memory + start).to(text.dtype)], 1)
        text_states, memory = self.hidden(inputs, attention_mask).float().split([longest, vectors], 1)
        mean = (text_states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        distance = torch.nn.functional.mse_loss(memory.mean(1), mean)
        update = self.norm * torch.nn.functional.normalize(memory, dim=-1) @ self.projection.T
        return Switch.apply(start + update, self, adapter), distance

    @torch.no_grad()
    def compressed(self, pieces: list[list[int]], batch: int) -> torch.Tensor:
        """The vectors of many pieces, float16 [pieces, vectors, width] on the CPU, in batches of similar length. One
        that runs out of memory is repeated in halves."""
        order = sorted(
            range(len(pieces)), key=lambda n: -len(pieces[n])
        )  # the largest first: its freed memory holds the rest
        vectors = torch.empty(len(pieces), self.shape.vectors, len(self.memory), dtype=torch.float16)
        start = 0
        with tqdm(total=len(order), unit="piece", desc="compressing", disable=len(order) <= batch) as bar:
            while start < len(order):
                indices = order[start : start + batch]
                result, reason = compute.call_catching_oom(self.compress, [pieces[n] for n in indices])
                if not reason:
                    vectors[indices] = result[0].half().cpu()
                    start += len(indices)
                    bar.update(len(indices))
                elif len(indices) > 1:
                    batch = (len(indices) + 1) // 2
                else:
                    raise OutOfMemory(f"out of memory while compressing a single document ({reason}); free some memory")
        return vectors

    def directions(self, vectors: torch.Tensor) -> torch.Tensor:
        """Unit vectors to compare with a question's, float32 [pieces, vectors × width]: a piece's vectors, centred,
        whitened and concatenated. A few directions have nearly all of an embedding's variance: by the plain vectors of
        an untrained compressor 2 % of the questions have their document among the first 5 of 663, by these 52 %
        (SmolLM2-135M)."""
        return torch.nn.functional.normalize(((vectors.float() - self.centre) @ self.whitening).flatten(1), dim=-1)

    def query_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Unit vectors to compare with `directions`, float32 [questions, vectors × width], of the questions' vectors,
        [questions, vectors, width]."""
        queries = (vectors.float() - self.usual) @ self.whitening @ self.seeking.T * self.places
        return torch.nn.functional.normalize(queries.flatten(1), dim=-1)

    def hidden(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.lm.base_model(**as_arguments(inputs, mask)).last_hidden_state

    def logits(self, inputs: torch.Tensor, mask: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """The model's logits at the `chosen` positions, [positions, vocabulary]. Its own forward pass computes them,
        for it may scale or cap them (Granite, Cohere, Gemma 2); its output matrix is given these positions only."""
        head = self.lm.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, states: (states[0][chosen],))
        try:
            return self.lm(**as_arguments(inputs, mask)).logits
        finally:
            hook.remove()

    # --- vectors to answers -------------------------------------------------------------------------------------

    def forward(self, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """(`loss` of the examples with their own documents, the distance that `compress` returns)."""
        vectors, distance = self.compress([piece for example in examples for piece in example.pieces])
        return self.loss(examples, vectors), distance

    def loss(self, examples: list[Example], vectors: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the labels' cross entropies in nats. `vectors` are those of all examples' pieces."""
        self.activate("generator")
        rows, device = self.embed_inputs(examples, vectors), vectors.device
        labels = [
            torch.tensor([-100] * (len(row) - len(example.labels)) + example.labels)
            for row, example in zip(rows, examples)
        ]
        inputs, targets = (
            torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill).to(device)
            for tensors, fill in ((rows, 0), (labels, -100))
        )
        lengths = torch.tensor([*map(len, rows)], device=device)
        mask = (torch.arange(inputs.shape[1], device=device) < lengths[:, None]).long()
        is_label = targets[:, 1:] != -100  # logits are computed only there
        logits = self.logits(inputs, mask, torch.nn.functional.pad(is_label, (0, 1)))
        losses = torch.nn.functional.cross_entropy(logits.float(), targets[:, 1:][is_label], reduction="none")
        weights = torch.tensor([weight for example in examples for weight in example.weights], device=device)
        return (losses * weights).sum()  # autocast would take a dot product in 16 bit

    def embed_inputs(self, examples: list[Example], vectors: torch.Tensor) -> list[torch.Tensor]:
        """The embeddings that the generator reads of each example: text, a document's vectors, separator … text."""
        embed, vector_iterator, sequences = self.lm.get_input_embeddings(), iter(vectors), []
        for example in examples:
            parts = []
            for ids, count in zip(example.before, example.counts):
                parts.append(embed(torch.tensor(ids, dtype=torch.long, device=vectors.device)))
                parts += [next(vector_iterator).to(parts[0].dtype) for _ in range(count)]
                parts.append(self.separator[None].to(parts[0].dtype))
            sequences.append(torch.cat([*parts, embed(torch.tensor(example.after, device=vectors.device))]))
        return sequences


class Switch(torch.autograd.Function):
    """The identity. Beyond it a backward pass enters the part of the graph that another adapter computed, and gradient
    checkpointing repeats that part's forward pass: backward switches to the adapter that it ran with."""

    @staticmethod
    def forward(ctx, vectors, clara, adapter):
        ctx.clara, ctx.adapter = clara, adapter
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx, gradient):
        ctx.clara.activate(ctx.adapter)
        return gradient, None, None


def as_arguments(inputs: torch.Tensor, mask: torch.Tensor) -> dict:
    """A model's arguments for embeddings that may be padded on either side."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return dict(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)


def embed_vocabulary(lm) -> torch.Tensor:
    """What a model reads for each token, float32 [vocabulary, width]: its weights, unless its embedding changes them,
    as Gemma's scales them."""
    embed = lm.get_input_embeddings()
    weight = embed.weight.detach()
    if type(embed).forward is not torch.nn.Embedding.forward:
        weight = embed(torch.arange(len(weight), device=weight.device)).detach()
    return weight.float()


@torch.no_grad()
def check_reads_embeddings(lm, path: Path) -> None:
    """InputError if a model computes something else from its tokens' embeddings than from the tokens: some scale only
    embeddings that they looked up themselves (Falcon-H1), others look tokens up again in each layer (Gemma 3n)."""
    ids = torch.arange(8, device=lm.device)[None]
    embeddings = lm.get_input_embeddings()(ids)
    try:
        expected, logits = (
            lm(use_cache=False, **given).logits for given in (dict(input_ids=ids), dict(inputs_embeds=embeddings))
        )
        alike = (logits - expected).abs().max() <= 0.01 * expected.abs().max()
    except (TypeError, ValueError):
        alike = False
    if not alike:
        raise InputError(
            f"{path}: {type(lm).__name__} computes something else from embeddings than from the tokens that they are "
            "of, so it cannot read vectors in their place; expected a model such as Llama, Qwen, Gemma 2 or Granite"
        )


def split_evenly(rarity: torch.Tensor, lengths: torch.Tensor, vectors: int) -> torch.Tensor:
    """The tokens' weights in each vector, float32 [pieces, vectors, longest]. A left-padded text is cut into `vectors`
    stretches of similar length, each of at least one token; a vector weighs the tokens of its own stretch.

    A vector's weights have the norm 1, so that a sum of unlike embeddings is as long as one of them, and a stretch of
    one token is that token's embedding. With plain means the answers' tokens cost 7.2 nats instead of 3.2, 16 vectors
    for 150 tokens (SmolLM2-135M, untrained).
    """
    longest, number = rarity.shape[1], torch.arange(vectors, device=lengths.device)
    start = number * lengths[:, None] // vectors
    end = torch.maximum((number + 1) * lengths[:, None] // vectors, start + 1)
    position = torch.arange(longest, device=lengths.device) - (longest - lengths[:, None, None])
    inside = (position >= start[..., None]) & (position < end[..., None])
    return torch.nn.functional.normalize(inside * rarity[:, None], dim=-1)


def choose_straight_through(scores: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """The candidates that a question picks one after another by its scores, [candidates]: one-hot rows [picks,
    candidates]. Their gradient is that of a softmax at `temperature` over the remaining candidates. There are k picks,
    or as many as there are candidates.

    Straight-through (arXiv 1308.3432). Picked candidates are masked by -inf; a penalty of log(1e-8) would be 0.37 at a
    temperature of 0.02, less than cosines may differ.
    """
    picks, logits = [], scores / temperature
    for _ in range(min(k, len(scores))):
        soft = logits.softmax(-1)
        hard = torch.nn.functional.one_hot(logits.argmax(-1), len(scores))
        picks.append(hard + (soft - soft.detach()))
        logits = logits.masked_fill(hard.bool(), -torch.inf)
    return torch.stack(picks)


# --- files -----------------------------------------------------------------------------------------------------


def save_adapters(clara: Clara, folder: Path, adapters: Sequence[str], base: Path) -> None:
    """Write what was trained, and which base it belongs to; never the base's weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    for name in adapters:
        weights = get_peft_model_state_dict(clara.lm, adapter_name=name)
        save_file(
            {key: t.detach().float().cpu().contiguous() for key, t in weights.items()}, folder / f"{name}.safetensors"
        )
    save_file({name: t.detach().cpu().contiguous() for name, t in clara.state_beside().items()}, folder / MEMORY)
    header = {"base": artifact.identify(base.resolve()), "adapters": list(adapters)}
    artifact.write_json(folder / CONFIG, header | asdict(clara.shape))


def load_clara(folder: Path, lm, k: int = 0) -> Clara:
    """Load what save_adapters wrote onto a model of the same base; `k`, unless 0, overrides the stored one. Raises
    InputError if something is missing or does not fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, shape = cli.read_json(folder / CONFIG), read_config(folder)
    try:
        clara = Clara(lm, replace(shape, k=k or shape.k))
        for name in config["adapters"]:
            weights = load_file(folder / f"{name}.safetensors")
            if weights.keys() != get_peft_model_state_dict(lm, adapter_name=name).keys():
                raise InputError(f"{folder}/{name}.safetensors: does not belong to this base: the layers differ")
            set_peft_model_state_dict(lm, weights, adapter_name=name)
        weights = load_file(folder / MEMORY)
        with torch.no_grad():
            for name, tensor in clara.state_beside().items():
                tensor.copy_(weights[name])
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded: {compute.first_line(error)}") from None
    return clara


def is_clara(folder: Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def has_reasoner(folder: Path) -> bool:
    """Whether the model has been trained to search."""
    return "reasoner" in cli.read_json(Path(folder) / CONFIG)["adapters"]


def read_config(folder: Path) -> ClaraConfig:
    """Raises InputError if the directory is not a CLaRa model."""
    if not is_clara(folder):
        raise InputError(f"{folder}: contains no clara.json; expected a model from train_stage1.py or a later stage")
    config = cli.read_json(Path(folder) / CONFIG)
    try:
        return ClaraConfig(**{key: config[key] for key in ClaraConfig.__dataclass_fields__})
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}/{CONFIG}: {error} is missing; train the model again") from None


def open_base(folder: Path, override: Path | None = None) -> ModelDirectory:
    """The base model's directory: `override`, or the recorded path. Raises InputError if it is missing, or is another
    model."""
    read_config(folder)  # refuses a directory that is not a CLaRa model
    identity = cli.read_json(Path(folder) / CONFIG)["base"]
    base = Path(override or identity["path"])
    if not base.exists():
        raise InputError(f"{folder}: its base model {base} does not exist; give its path with --base")
    if artifact.identify(base)["digest"] != identity["digest"]:
        raise InputError(f"{base}: is not the base that {folder} was trained on (its digest differs)")
    return open_directory(base)


# --- texts to ids ---------------------------------------------------------------------------------------------


def split_document(tokenizer, document: str, max_tokens: int) -> list[list[int]]:
    """A document's ids, cut into pieces of similar length if there are more than `max_tokens`. They include the space
    before the document in a prompt: without it, its first word would have other ids than elsewhere in the text."""
    ids = token_ids(tokenizer, f" {document}")
    count = max(1, -(-len(ids) // max_tokens))
    return [ids[n * len(ids) // count : (n + 1) * len(ids) // count] for n in range(count)]


def encode_example(tokenizer, documents: list[str], turns: list[tuple], ends: set[int], shape: ClaraConfig) -> Example:
    """An example of documents and questions about them. `turns` are (question, answer, weight of the answer's tokens),
    one after another in one chat."""
    groups = [split_document(tokenizer, document, shape.doc_max_tokens) for document in documents]
    messages, transcript, after, labels, before, weights = [], "", [], [], [], []
    for n, (question, answer, weight) in enumerate(turns):
        messages += question_chat(question, 0 if n else len(documents))
        prompt = chat.prompt_text(tokenizer, messages)
        if not prompt.startswith(transcript):
            raise InputError("the model's chat template renders a chat differently when another turn follows it")
        *parts, question_ids = [token_ids(tokenizer, part) for part in prompt[len(transcript) :].split(f" {DOCUMENT}")]
        answer_ids = chat.answer_ids(tokenizer, messages, records.message("assistant", answer), ends)
        messages += records.message("assistant", answer)
        transcript = chat.render(tokenizer, messages, prompt=False)
        suffix = token_ids(tokenizer, transcript[len(prompt) :])[len(answer_ids) :] if n + 1 < len(turns) else []
        before += parts
        after += question_ids + answer_ids + suffix
        labels += [-100] * len(question_ids) + answer_ids + [-100] * len(suffix)
        weights += [weight] * len(answer_ids)
    return Example(
        [piece for pieces in groups for piece in pieces], [*map(len, groups)], before, after, labels, weights
    )


def question_chat(question: str, documents: int) -> list[dict]:
    """The user's turn, with a placeholder per document; `documents` is their number."""
    return records.message("user", records.question_with_documents(question, [DOCUMENT] * documents))


def encode_question(tokenizer, text: str, counts: list[int]) -> Example:
    """A prompt with a question about documents; `counts` holds the number of pieces of each."""
    prompt = chat.prompt_text(tokenizer, question_chat(text, len(counts)))
    *before, after = [token_ids(tokenizer, part) for part in prompt.split(f" {DOCUMENT}")]
    return Example([], counts, before, after, [], [])
