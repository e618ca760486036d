"""An Ollama Modelfile for a GGUF file: its chat template, which is Jinja, translated to Go's text/template.

For any template, the text around each turn is found by rendering marks in place of the turns' texts. These pieces, put
together again, must give what Jinja gives: a template that does anything else with a text (trims it, treats the last
turn differently) is refused, since a model whose prompts differ from those in training answers worse, silently.

Ollama: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx; how it reads one: parser/parser.go there.
"""

import re
from itertools import takewhile
from typing import NamedTuple

from lib.core.cli import InputError
from lib.model import chat as chats
from lib.model.chat import MARK


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """Alternate user and assistant turns, after a system turn or none."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


LONGER = [  # chats that are longer than chats.PROBES
    turns("Name a river.", " The Nile.\n", "And\nanother?", "The Amazon.", "\tA third? "),
    turns("Name a river.", "The Nile.", "Another?", "The Amazon. ", "A third?", system=" Answer briefly.\n"),
    turns("", "", "", "", ""),
    turns("", "", "", system=""),
    turns("2 + 2?", "<think>\nTwo and two.\n</think>\n\n4", "Sure?"),  # which some templates take out of earlier turns
]


class Pieces(NamedTuple):
    before: str  # the text before the first turn if that is no system turn: often a system turn of the template's own
    around: dict[str, tuple[str, str]]  # for each role that the template supports: the text before and after a turn's
    answer: str  # the text that opens the answer


def write_modelfile(gguf_name: str, tokenizer, ends: set[int], context: int) -> str:
    """The Modelfile to write beside a GGUF file. An answer ends at the tokens `ends`, prompt and answer have `context`
    tokens, and decoding is greedy, as it was when the model was measured.

    InputError if the chat template cannot be put in one.
    """
    pieces = split_template(tokenizer)
    longer = [chat for chat in LONGER if chat[0]["role"] in pieces.around]
    for chat in [*chats.probes(tokenizer), *longer]:
        ours, expected = render(pieces, chat), render_prompt(tokenizer, chat)
        if ours != expected:
            at = len(common_prefix(ours, expected))
            raise template_error(f"it renders {expected[at : at + 40]!r} where its parts render {ours[at : at + 40]!r}")
    stops = [tokenizer.decode([end]) for end in sorted(ends) if tokenizer.convert_ids_to_tokens(end) is not None]
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{go_template(pieces)}"""',
        *[f'PARAMETER stop "{stop}"' for stop in stops],
        f"PARAMETER num_ctx {context}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",  # Ollama's default was 1.1, with which greedy decoding differs
    ]
    return "\n".join(lines) + "\n"


def split_template(tokenizer) -> Pieces:
    """The template in pieces; InputError if the texts of user and assistant cannot be found in what it renders."""
    if chats.reads_clock(tokenizer.get_chat_template()):
        raise template_error("it inserts the date, and a Modelfile would keep the same date for ever")
    start, to_assistant, to_user, to_answer = texts_between(tokenizer, "user", "assistant", "user")
    try:
        system, from_system = texts_between(tokenizer, "system", "user")[:2]
    except InputError:
        system = from_system = None
    # Within a chat it makes no difference to which of two turns the piece between them belongs; at the beginning and
    # the end of a chat it does. There, the template without an opened answer shows where a turn ends, unless it ends
    # chats in a way of its own.
    user_end = texts_between(tokenizer, "user", prompt=False)[-1]
    user_end = user_end if to_assistant.startswith(user_end) and to_answer.startswith(user_end) else ""
    assistant_end = texts_between(tokenizer, "user", "assistant", prompt=False)[-1]
    befores = [to_user.removeprefix(assistant_end), start, *([] if system is None else [from_system])]
    user = common_prefix(*[text[::-1] for text in befores])[::-1]
    around = {
        "user": (user, user_end),
        "assistant": (to_assistant.removeprefix(user_end), to_user.removesuffix(user)),
    }
    if system is not None:
        around = {"system": (system, from_system.removesuffix(user))} | around
    return Pieces(start.removesuffix(user), around, to_answer.removeprefix(user_end))


def texts_between(tokenizer, *roles: str, prompt: bool = True) -> list[str]:
    """The text before, between and after the texts of such turns; InputError unless each of these appears once and in
    order."""
    marks = [f"{MARK}{n}" for n in range(len(roles))]
    text = render_prompt(tokenizer, [{"role": role, "content": mark} for role, mark in zip(roles, marks)], prompt)
    if re.findall(rf"{MARK}\d", text) != marks:
        raise template_error(f"it does not contain the texts of {', '.join(roles)} once and in order: {text[:200]!r}")
    return re.split(rf"{MARK}\d", text)


def render_prompt(tokenizer, chat: list[dict], prompt: bool = True) -> str:
    """The prompt to give to the runner: the chat, without the BOS if the runner adds one by itself."""
    bos = tokenizer.bos_token
    text = chats.prompt_text(tokenizer, chat) if prompt else chats.render(tokenizer, chat, prompt)
    if bos is None or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return text
    if not text.startswith(bos):
        raise template_error(f"it does not begin with {bos!r}, which the tokenizer puts before every text")
    return text.removeprefix(bos)


def common_prefix(*texts: str) -> str:
    return "".join(characters[0] for characters in takewhile(lambda characters: len(set(characters)) == 1, zip(*texts)))


def template_error(reason: str) -> InputError:
    return InputError(
        f"this model's chat template cannot be put in an Ollama Modelfile: {reason}; expected a template that puts "
        "fixed text around each turn and leaves the turns unchanged. Use llama.cpp's server instead, which reads the "
        "template in the GGUF file"
    )


def render(pieces: Pieces, chat: list[dict]) -> str:
    """A chat as the result of `go_template` renders it."""
    supported = [turn for turn in chat if turn["role"] in pieces.around]
    bodies = [turn["content"].join(pieces.around[turn["role"]]) for turn in supported]
    own_system = "system" in pieces.around and chat[0]["role"] == "system"
    return "".join(["" if own_system else pieces.before, *bodies, pieces.answer])


def go_template(pieces: Pieces) -> str:
    """A template over .Messages, in which Ollama puts the Modelfile's SYSTEM, or the chat's own, first.

    System turns are left out if the Jinja template refuses or ignores them: Go's templates cannot refuse, and text that
    the model never saw in training would do harm.
    """
    before = literal(pieces.before)
    if "system" in pieces.around and before:  # by role: .System is empty, too, where the system turn is
        loop = '{{ range $i, $_ := .Messages }}{{ if and (eq $i 0) (ne .Role "system") }}' + before + "{{ end }}"
    else:
        loop = before + "{{ range .Messages }}"
    bodies = [
        f'if eq .Role "{role}" }}}}{literal(opened)}{{{{ .Content }}}}{literal(closed)}'
        for role, (opened, closed) in pieces.around.items()
    ]
    return loop + "{{ " + "{{ else ".join(bodies) + "{{ end }}{{ end }}" + literal(pieces.answer)


def literal(text: str) -> str:
    """Text escaped so that it is rendered unchanged: a brace could open one of Go's actions, three quotes end the
    TEMPLATE, and Ollama drops unprintable characters when it reads a Modelfile."""

    def plain(character: str) -> bool:
        return character == "\n" or (character.isprintable() and character not in '{"')

    return "".join(character if plain(character) else f'{{{{ "\\U{ord(character):08x}" }}}}' for character in text)
