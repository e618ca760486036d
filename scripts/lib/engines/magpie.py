"""Magpie (arXiv 2406.08464): a chat model that gets its template up to the start of the user's text writes that text,
an instruction; then it answers the instruction like any other."""

from itertools import takewhile
from typing import NamedTuple

from lib.core.cli import InputError
from lib.data import records
from lib.engines.sampling import Sample
from lib.model import chat as chats
from lib.model.chat import MARK, token_ids

PROBES = ("What is the capital of Peru?", "write a poem", "3 + 4 =", "¿Qué?")


class PreQuery(NamedTuple):
    """What precedes a user's text in the template, and what ends it."""

    text: str  # for a server, which adds a BOS itself
    ids: list[int]
    end: int | None  # None where the template ends a user's text with plain text
    end_text: str


def build_pre_query(tokenizer, system: str | None = None) -> PreQuery:
    """The pre-query of a tokenizer's chat template, which is rendered around a mark. Raises InputError if the template
    hides where the user's text is, or if the tokens before that text depend on it."""
    system_turns = [] if system is None else records.message("system", system)

    def turns(text: str) -> list[dict]:
        return system_turns + records.message("user", text)

    text, mark, after = chats.render(tokenizer, turns(MARK)).partition(MARK)
    if not mark or MARK in after or not text.strip() or not after.strip():
        raise InputError(
            "--source magpie: the chat template does not mark where a user's text begins and ends: expected the text "
            f"once, with tokens before and after it; found {text[-60:]!r}, then {(mark + after)[:60]!r}"
        )
    text = text.rstrip(" ")  # a space is a part of the first word's token
    ids = token_ids(tokenizer, text)
    for probe in PROBES:
        if chats.prompt_ids(tokenizer, turns(probe))[: len(ids)] != ids:
            raise InputError(
                f"--source magpie: the tokens before a user's text depend on that text ({text[-60:]!r} before "
                f"{probe!r}), so this tokenizer cannot be used for Magpie"
            )
    bos = tokenizer.bos_token or ""
    doubled = bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    ends, special = token_ids(tokenizer, after.lstrip()), chats.special_ids(tokenizer)
    plain = tokenizer.decode([*takewhile(lambda token: token not in special, ends)]).strip()
    end, end_text = (None, plain.splitlines()[0]) if plain else (ends[0], tokenizer.decode(ends[0]))
    return PreQuery(text.removeprefix(bos) if doubled else text, ids, end, end_text)


def parse_instruction(sample: Sample, query: PreQuery, tokenizer) -> tuple[str, str]:
    """(the instruction, ""), or ("", the reason why the sample is not an instruction). Where the template ends a user's
    text in plain words, the model goes on after them: with an answer, and that with EOS."""
    ids = [token for token in (*sample.ids, sample.end) if token is not None]
    inside, end, _ = tokenizer.decode(ids).partition(query.end_text)  # with special tokens, which sample.text lacks
    text = inside
    if query.end is None or not ids:
        text, end, _ = sample.text.partition(query.end_text)
    if not end and (ids or not sample.stopped):  # a server takes the end off the text and reports no ids
        return "", "without an end of turn"
    if any(token in inside + text for token in tokenizer.convert_ids_to_tokens([*chats.special_ids(tokenizer)])):
        return "", "with template tokens inside"
    return (text.strip(), "") if text.strip() else ("", "empty")
