"""A trained CLaRa model in use: documents are compressed once, kept in an index, searched and read.

An index is an artifact of kind `clara-index`: vectors.safetensors, float16 [pieces, vectors, width], and pieces.jsonl,
the text of each piece and the name of its document. It belongs to one model: another model cannot read its vectors.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from lib.clara import network
from lib.core import artifact
from lib.core.cli import InputError
from lib.data import records
from lib.engines import transformers_engine
from lib.model.directory import ModelDirectory

INDEX, VECTORS, PIECES = "clara-index", "vectors.safetensors", "pieces.jsonl"


class Index(NamedTuple):
    pieces: list[dict]  # {document, text}
    vectors: torch.Tensor  # float16 [pieces, vectors, width]


class ClaraEngine(transformers_engine.Transformers):
    """The engine of a CLaRa directory. Prompts are ids, or embeddings, [tokens, width], as `prompt` makes them."""

    name = "clara"

    def __init__(self, path: Path, base: ModelDirectory, **options):
        super().__init__(base, **options)
        self.clara = network.load_clara(path, self.model).eval()
        self.searches = network.has_reasoner(path)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:  # adapters in float32 would turn the activations into float32
                parameter.data = parameter.data.to(self.model.dtype)
        self.model.get_output_embeddings().requires_grad_(True)  # the adapters have frozen it again

    def cut(self, document: str) -> list[list[int]]:
        return network.split_document(self.tokenizer, document, self.clara.shape.doc_max_tokens)

    def count_vectors(self, document: str) -> int:
        return len(self.cut(document)) * self.clara.shape.vectors

    def compress(self, documents: list[str]) -> list[torch.Tensor]:
        """The vectors of each document: float16 [its pieces, vectors, width]."""
        document_pieces = [self.cut(document) for document in documents]
        vectors = self.clara.compressed([piece for pieces in document_pieces for piece in pieces], self.batch)
        return list(vectors.split([*map(len, document_pieces)]))

    def merge(self) -> None:
        """Merge the generator into the weights, for good: after that the engine answers, but cannot compress."""
        from peft.tuners.lora import LoraLayer

        if not getattr(self.model, "is_quantized", False):
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.merge(adapter_names=["generator"])

    @torch.inference_mode()
    def search(self, questions: list[str], vectors: torch.Tensor, k: int) -> torch.Tensor:
        """Of each question the k rows of `vectors`, [pieces, vectors, width], that fit it best, best first; int64
        [questions, k]."""
        pieces, rankings = self.clara.directions(vectors.to(self.model.device)), []
        for start in range(0, len(questions), self.batch):
            ids = [
                network.token_ids(self.tokenizer, f" {question}") for question in questions[start : start + self.batch]
            ]
            scores = self.clara.query_vectors(self.clara.compress(ids, "reasoner")[0]) @ pieces.T
            rankings.append(scores.argsort(dim=-1, descending=True, stable=True)[:, :k].cpu())
        return torch.cat(rankings)

    @torch.inference_mode()
    def prompt(self, question: str, documents: list[torch.Tensor]) -> torch.Tensor:
        """The embeddings of a question about compressed documents, each [its pieces, vectors, width]."""
        example = network.encode_question(self.tokenizer, question, [*map(len, documents)])
        width = self.clara.memory.shape[0]
        vectors = torch.cat([torch.empty(0, self.clara.shape.vectors, width), *documents])
        return self.clara.embed_inputs([example], vectors.to(self.model.device))[0].to(self.model.dtype)

    def inputs(self, prompts) -> tuple:
        self.clara.activate("generator")
        if not isinstance(prompts[0], torch.Tensor):
            return super().inputs(prompts)
        longest = max(map(len, prompts))
        pad = torch.nn.functional.pad
        rows = torch.stack([pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts])
        mask = torch.stack([pad(prompt.new_ones(len(prompt)), (longest - len(prompt), 0)) for prompt in prompts])
        return self.model, {"inputs_embeds": rows, "attention_mask": mask.long()}

    def close(self) -> None:
        self.clara = None  # it holds the model too
        super().close()


def write_index(reader: ClaraEngine, documents: dict[str, str], path: Path, args, inputs: dict[str, dict]) -> Index:
    """Compress `documents`, {name: text}, into an index artifact. `inputs` are the identities of the model and of
    the documents."""
    from safetensors.torch import save_file

    texts, vectors = list(documents.values()), reader.compress(list(documents.values()))
    pieces = [
        {"document": name, "text": reader.tokenizer.decode(piece).strip()}
        for name, text in zip(documents, texts)
        for piece in reader.cut(text)
    ]
    index = Index(pieces, torch.cat(vectors))
    with artifact.write_artifact(path, INDEX, args, inputs) as build:
        save_file({"vectors": index.vectors}, build.path / VECTORS)
        records.write(build.path / PIECES, pieces)
        build.metrics = {"documents": len(documents), "pieces": len(pieces), "vectors": reader.clara.shape.vectors}
    return index


def read_index(path: Path, model: Path) -> Index:
    """Raises InputError if the index is incomplete, or was built by another model."""
    from safetensors.torch import load_file

    made_by, identity = artifact.read(path, INDEX)["inputs"]["model"], artifact.identify(model)
    if made_by["digest"] != identity["digest"]:
        raise InputError(
            f"{path}: was made by another model ({made_by['path']}, {made_by['digest'][:12]}), not by {model} "
            f"({identity['digest'][:12]}); give --documents to rebuild it, or use that model"
        )
    pieces = [row for _, row in records.read_jsonl(path / PIECES)]
    return Index(pieces, load_file(path / VECTORS)["vectors"])
