"""Scores of answers to rows' prompts, higher is better: `open_scorer` gives a function (rows, answers) -> floats.

`embedding`: the cosine of the instruction's and the answer's embeddings by all-MiniLM-L6-v2 (bundled), -1 to 1: whether
they speak of the same things. The instruction is what the user asks, the last turn first and without the documents:
the embedding sees 256 tokens, which documents would fill. Of a longer text it sees both ends. `reward:<directory or Hub
id>`: the single output of a sequence-classification model, on that model's own scale.
"""

from collections.abc import Callable
from pathlib import Path

from lib.core import artifact, cli, compute, hardware
from lib.core.cli import InputError
from lib.data import embedding, records
from lib.model import chat


def check_name(text: str, *names: str) -> str:
    """An argparse type: embedding, reward:<model>, or one of `names`."""
    import argparse

    if text == "reward:":
        raise argparse.ArgumentTypeError("expected reward:MODEL, where MODEL is a directory or a Hub id")
    if text not in ("embedding", *names) and not text.startswith("reward:"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join([*names, 'embedding', 'reward:<model>'])}")
    return text


def open_scorer(name: str) -> Callable[[list[dict], list[str]], list[float]]:
    """`name` is "embedding" or "reward:<model>"; a row is one of lib/data/records.py."""
    return embedding_scorer() if name == "embedding" else reward_scorer(name.removeprefix("reward:"))


def identify_reward_model(name: str) -> dict[str, dict]:
    """{"reward model": its identity} for "reward:<model>", {} for other scorers."""
    if not name.startswith("reward:"):
        return {}
    folder = name.removeprefix("reward:")
    if Path(folder).is_dir():
        return {"reward model": artifact.identify(folder)}
    cli.go_online()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        commit = Path(hf_hub_download(folder, "config.json")).parent.name
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{name}: transformers cannot load it: {compute.first_line(error)}") from None
    return {"reward model": artifact.identify_hub("models", folder, commit)}


def embedding_scorer():
    embed = embedding.open_embedding(both_ends=True)

    def score(rows, answers):
        return (embed([*map(write_instruction, rows)]) * embed(answers)).sum(1).tolist()

    return score


def write_instruction(row: dict) -> str:
    asked = (turn["content"] for turn in reversed(row["prompt"]) if turn["role"] == "user")
    return "\n\n".join(records.question_alone(text, row["documents"]) for text in asked)


def reward_scorer(name: str):
    """Rows are scored one at a time: if pad and EOS are the same token, padding shifts the position where the reward is
    read. A row that is longer than the model's context gets -inf, since half an answer is not the answer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not Path(name).is_dir():
        cli.go_online()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=hardware.compute_dtype(), output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"reward:{name}: transformers cannot load it: {compute.first_line(error)}") from None
    if model.config.num_labels != 1:
        raise InputError(
            f"reward:{name}: has {model.config.num_labels} outputs, expected one; give a reward model, not a classifier"
        )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise InputError(f"reward:{name}: has no weights for {missing}; give a model that was trained to score answers")
    chat.use_default_template(tokenizer, f"reward:{name}")
    model = model.to(hardware.device()).eval()
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    def score(rows, answers):
        scores = []
        for prompt, answer in zip((row["prompt"] for row in rows), answers):
            if tokenizer.chat_template:
                turns = [*prompt, {"role": "assistant", "content": answer}]
                inputs = dict(text=chat.render(tokenizer, turns, prompt=False), add_special_tokens=False)
            else:
                inputs = dict(text="\n\n".join(turn["content"] for turn in prompt), text_pair=answer)
            ids = tokenizer(**inputs, return_tensors="pt").to(model.device)
            if ids["input_ids"].shape[1] > longest:
                scores.append(float("-inf"))
                continue
            with torch.inference_mode():
                scores.append(model(**ids).logits[0, 0].float().item())
        return scores

    return score
