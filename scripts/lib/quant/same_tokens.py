"""Whether llama.cpp makes the same token ids of a chat as a Hugging Face tokenizer."""

from collections.abc import Iterable
from pathlib import Path

# --- check -----------------------------------------------------------------------------------------------


def compare_token_ids(
    path: Path, hf_tokenizer, chats: list[list[dict]] | None = None, ends: Iterable[int] = ()
) -> list[str]:
    """Where llama.cpp and a Hugging Face tokenizer disagree on chats (default: the fixed ones); empty when nowhere.

    Once for the ids of the text that Hugging Face renders, once for what each puts around it by itself, once for the
    prompt of training and evaluation, and once for llama.cpp's own rendering of the chat template inside the file. That
    rendering leaves out a BOS which the tokenizer adds, and so hides one that it should not add: every program that
    renders the template itself would have two.
    An answer must also end at each of the ids `ends`.
    """
    from lib.engines.llamacpp import LlamaCpp
    from lib.model.chat import probes, prompt_ids, token_ids

    differences = []
    engine = LlamaCpp(path, context=512, parallel=1)
    try:
        for number, chat in enumerate(probes(hf_tokenizer) if chats is None else chats):
            # Not by lib/model/chat.py: llama.cpp's own rendering has today's date, where the template has one.
            text = hf_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            plain, with_special = token_ids(hf_tokenizer, text), hf_tokenizer(text)["input_ids"]
            prompt, rendered = prompt_ids(hf_tokenizer, chat), engine.rendered_ids(chat)
            for check, ids, expected in (
                ("ids", engine.tokenize(text), plain),
                ("BOS or EOS", engine.tokenize(text, add_special=True), with_special),
                ("prompt", engine.prompt_ids(chat), prompt),
                ("chat template", rendered, prompt if rendered == prompt else plain),  # it too may open the answer
            ):
                if ids != expected:
                    differences.append(f"chat {number}, {check}: {first_difference(ids, expected)}")
        differences += [f"an answer does not end at token {end}" for end in ends if not engine.stops_at(end)]
    finally:
        engine.close()
    return differences


def first_difference(ours: list[int], expected: list[int]) -> str:
    index = next((i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), None)
    index = min(len(ours), len(expected)) if index is None else index
    return f"from token {index}: llama.cpp {ours[index : index + 5]}, Hugging Face {expected[index : index + 5]}"
