"""An Ollama Modelfile for a GGUF file: its chat template, which is Jinja, in the words of Go's text/template.

What stands around the texts of turns is found by rendering the template on marks, whatever the template. Put together
again it must give what Jinja gives: a template that does anything else with a text (trims it, treats the last turn in
a way of its own) is refused, since a model that is asked in other words than in training answers worse, silently.

Ollama: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx; how it reads one: parser/parser.go there.
"""

import re
from itertools import takewhile
from typing import NamedTuple

from lib.core.cli import InputError
from lib.model import chat as chats

MARK = "quartetmark"  # one plain word, which templates neither strip nor escape


def turns(*texts: str, system: str | None = None) -> list[dict]:
    """User and assistant in turns, after a system turn or none."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


LONGER = [  # than chats.PROBES
    turns("Name a river.", " The Nile.\n", "And\nanother?", "The Amazon.", "\tA third? "),
    turns("Name a river.", "The Nile.", "Another?", "The Amazon. ", "A third?", system=" Answer briefly.\n"),
    turns("", "", "", "", ""),
    turns("", "", "", system=""),
    turns("2 + 2?", "<think>\nTwo and two.\n</think>\n\n4", "Sure?"),  # which some templates take out of earlier turns
]


class Pieces(NamedTuple):
    before: str  # the first turn, where that is no system turn: often a system turn of the template's own
    around: dict[str, tuple[str, str]]  # the text of each role that the template knows
    answer: str  # what opens it


def write_modelfile(gguf_name: str, tokenizer, ends: set[int], context: int) -> str:
    """The Modelfile to stand beside a GGUF file. An answer ends at the tokens `ends`, prompt and answer have `context`
    tokens, and decoding is greedy, as it was when the model was measured.

    InputError where the chat template cannot be put in one.
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
    """The template in pieces; InputError where the texts of user and assistant cannot be told in what it renders."""
    if "strftime_now" in str(tokenizer.chat_template):
        raise template_error("it inserts the date, and a Modelfile would keep today's date for ever")
    start, to_assistant, to_user, to_answer = texts_between(tokenizer, "user", "assistant", "user")
    try:
        system, from_system = texts_between(tokenizer, "system", "user")[:2]
    except InputError:
        system = from_system = None
    # Which of two texts a piece between them goes with makes no difference within a chat; it does at its beginning
    # and end. There, the template without an opened answer says where a turn ends, unless it ends chats in a way of
    # its own.
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
    """What stands before, between and after the texts of such turns; InputError where they do not stand there once
    and in order."""
    marks = [f"{MARK}{n}" for n in range(len(roles))]
    text = render_prompt(tokenizer, [{"role": role, "content": mark} for role, mark in zip(roles, marks)], prompt)
    if re.findall(rf"{MARK}\d", text) != marks:
        raise template_error(f"it does not contain the texts of {', '.join(roles)} once and in order: {text[:200]!r}")
    return re.split(rf"{MARK}\d", text)


def render_prompt(tokenizer, chat: list[dict], prompt: bool = True) -> str:
    """What the runner is to be given: the chat without the BOS that it puts there by itself, where it does."""
    text, bos = chats.render(tokenizer, chat, prompt), tokenizer.bos_token
    if bos is None or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return text
    if not text.startswith(bos):
        raise template_error(f"it does not begin with {bos!r}, which the tokenizer puts before every text")
    return text.removeprefix(bos)


def common_prefix(*texts: str) -> str:
    return "".join(signs[0] for signs in takewhile(lambda signs: len(set(signs)) == 1, zip(*texts)))


def template_error(why: str) -> InputError:
    return InputError(
        f"this model's chat template cannot be put in an Ollama Modelfile: {why}; expected a template that puts fixed "
        "text around each turn and leaves the turns unchanged. Use llama.cpp's server instead, which reads the "
        "template in the GGUF file"
    )


def render(pieces: Pieces, chat: list[dict]) -> str:
    """What `go_template` gives."""
    known = [turn for turn in chat if turn["role"] in pieces.around]
    bodies = [turn["content"].join(pieces.around[turn["role"]]) for turn in known]
    own_system = "system" in pieces.around and chat[0]["role"] == "system"
    return "".join(["" if own_system else pieces.before, *bodies, pieces.answer])


def go_template(pieces: Pieces) -> str:
    """A template over .Messages, in which Ollama puts the Modelfile's SYSTEM, or the chat's own, first.

    System turns are left out where the Jinja template refuses or ignores them: Go's templates cannot refuse, and what
    the model never saw would do harm.
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
    """Text that comes out as it is: a brace could open one of Go's actions, three quotes end the TEMPLATE, and signs
    that cannot be printed are dropped when a Modelfile is read."""

    def plain(sign: str) -> bool:
        return sign == "\n" or (sign.isprintable() and sign not in '{"')

    return "".join(sign if plain(sign) else f'{{{{ "\\U{ord(sign):08x}" }}}}' for sign in text)
