"""Chats as token ids: prompts as the model will meet them, answers that end with EOS.

Prompt and answer are tokenised apart, so the prompt's ids in training are those at inference (a merge
across the border would differ), and the answer's labels start exactly where generation starts: at the answer's text.
"""

import string
from datetime import datetime
from functools import lru_cache

from lib.core.cli import InputError

# The day in all prompts of a template that writes today's date. With the real one, a model would be asked other prompts
# tomorrow than it was trained on today, and a run that is continued after midnight would mix both. Llama 3's templates
# write this day where they cannot read the clock.
DATE = datetime(2024, 7, 26)

MARK = "quartetmark"  # stands for a turn's text: one plain word, which templates neither strip nor escape

# Fixed chats on which models and tokenizers are compared: where tokenizers and templates are known to part ways.
PROBES = [
    [{"role": "user", "content": text}]
    for text in (
        "The capital of France is",
        "What is 1234567 + 89, 3.14 % of  42, or x  2?",
        "def f(x):\n\treturn {'a': x**2}  # it's 10% off\n\n\nprint(f(3))",
        "Grüße aus Zürich, naïve café; Привет, мир; 你好，世界; مرحبا; ½ ² Ⅷ ٣",
        "👩‍👩‍👧 🇫🇷 ❤️ 🤖!",
        "  two spaces, a tab\tand\r\nnew lines \n \n at the end \n",
        "They'll say IT'S fine; we've DON'T'd, 'tis <b>bold</b> & \"quoted\" \\n",
        "a <|im_end|> inside, and <|not_a_token|>",
        "x",
    )
]
PROBES += [
    [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Area of Peru in km²?"}],
    [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Nile.\n"},
        {"role": "user", "content": " And another?"},
    ],
]


def use_default_template(tokenizer, name: object) -> None:
    """Let `default` be the only chat template of a tokenizer with several, of which others are for tools or retrieval:
    what reads the template, from GGUF files to TRL, expects one. InputError, which names `name`, if none has that name.
    """
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        return
    if not templates.get("default"):
        raise InputError(
            f"{name}: its tokenizer has the chat templates {', '.join(sorted(templates)) or '(none)'}, and no "
            "`default` among them; set chat_template in its tokenizer_config.json to the one to use"
        )
    tokenizer.chat_template = templates["default"]


def render(tokenizer, chat: list[dict], prompt: bool = True) -> str:
    """The chat as text; InputError where the template refuses it (many have no system turns)."""
    from jinja2 import TemplateError

    template = fix_date(tokenizer.get_chat_template())
    try:
        return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in chat)
        raise InputError(f"the model's chat template rejects the turns {roles}: {error}") from None


def reads_clock(template: str) -> bool:
    return "strftime_now" in template


@lru_cache
def fix_date(template: str) -> str:
    """The template with DATE as today. A macro takes the place of the function by which templates read the clock, since
    transformers passes no functions to them."""
    if not reads_clock(template):
        return template
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
    filters = "".join(f"|replace({directive!r}, {DATE.strftime(directive)!r})" for directive in directives)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


def probes(tokenizer) -> list[list[dict]]:
    """The fixed chats that this tokenizer's template can render."""

    def accepted(chat: list[dict]) -> bool:
        try:
            return bool(render(tokenizer, chat))
        except InputError:
            return False

    return [chat for chat in PROBES if accepted(chat)]


def find_lead(tokenizer, chat: list[dict], opening: str) -> str:
    """What the template puts between the end of the prompt `opening` and the text of any answer: in Qwen3's, an empty
    block of thoughts; "" in most. It is "" too where the prompt is not how answers begin, which `answer_ids` refuses.
    """
    try:
        text = render(tokenizer, [*chat, {"role": "assistant", "content": MARK}], prompt=False)
    except InputError:
        return ""
    lead, mark, _ = text.removeprefix(opening).partition(MARK)
    return lead if mark and text.startswith(opening) else ""


def prompt_text(tokenizer, chat: list[dict]) -> str:
    """The text after which the model answers, in training and at inference. What the template puts before any answer
    belongs to it: an answer that had to begin with that would be scored by it, and its likelihood taken before it.
    Spaces stay with the answer, since a space is a part of the first word's token."""
    opening = render(tokenizer, chat)
    return opening + find_lead(tokenizer, chat, opening).rstrip(" ")


def answer_space(tokenizer) -> str:
    """The spaces that the template puts before an answer's text, as Llama 2's does."""
    chat = PROBES[0]
    lead = find_lead(tokenizer, chat, render(tokenizer, chat))
    return lead[len(lead.rstrip(" ")) :]


def prompt_ids(tokenizer, chat: list[dict]) -> list[int]:
    """The ids of the prompt, after which the model answers. The template adds the BOS if the model needs one."""
    return token_ids(tokenizer, prompt_text(tokenizer, chat))


def token_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def special_ids(tokenizer) -> set[int]:
    """The ids of tokens that belong to no text. Not every added token is one: Gemma adds line ends, Qwen <think>."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def eos_token_ids(config) -> set[int]:
    """The ids that end an answer, from a generation config."""
    ids = config.eos_token_id
    return set(ids if isinstance(ids, list) else [ids])


def answer_ids(tokenizer, prompt: list[dict], completion: list[dict], ends: set[int]) -> list[int]:
    """The ids of the answer up to and with its first EOS; one is added where the template has none.

    Raises InputError when the template writes the prompt differently once an answer follows.
    """
    full = render(tokenizer, prompt + completion, prompt=False)
    text = prompt_text(tokenizer, prompt)
    if not full.startswith(text):
        opening = render(tokenizer, prompt)
        if full.startswith(opening):
            raise InputError(
                f"the model's chat template begins this answer with {full[len(opening) :][:60]!r}, but all prompts end "
                f"with {text[len(opening) :]!r}, which it puts before other answers; remove the block that the answer "
                "has in its place, or give the model a template without one"
            )
        raise InputError(
            "the model's chat template renders the prompt differently when an answer follows it, so training and "
            "inference would use different prompts; give the model a template that renders both alike"
        )
    ids = token_ids(tokenizer, full[len(text) :])
    end = next((n for n, token in enumerate(ids) if token in ends), None)
    return [*ids, min(ends)] if end is None else ids[: end + 1]


def encode_row(tokenizer, row: dict, ends: set[int]) -> dict:
    """{input_ids, labels} of a row: labels are -100 (no loss) except on the answer and its EOS."""
    prompt = prompt_ids(tokenizer, row["prompt"])
    answer = answer_ids(tokenizer, row["prompt"], row["completion"], ends)
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
