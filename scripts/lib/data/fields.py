"""Fields of a row that its form does not read. Where the task would be another one without a field, it is an error that
says what the field would have meant; where not, it is counted in a note. No field is lost without a word."""

from collections import Counter
from collections.abc import Iterable


class RowError(ValueError):
    """What is wrong with one row; the caller adds the place."""


class Unlearnable(RowError):
    """One row teaches nothing, as without an answer. Exports of large sets have a few, which are left out."""


MEANINGS = {
    name: meaning
    for meaning, names in {
        "is a system prompt; make it a turn with the role 'system' in 'messages'": (
            "system system_prompt system_message sys_prompt"
        ),
        "is the beginning of the chat; put all turns into 'messages'": (
            "history chat_history conversation_history dialogue_history previous_messages"
        ),
        "is a text that the question is about; put it into the question, or into 'documents' beside 'question'": (
            "input inputs context contexts ctxs passage passages paragraph paragraphs document docs article background "
            "evidence knowledge excerpt table schema premise hypothesis hint prefix suffix"
        ),
        "lists the possible answers; put them into the question": "choices options endings answer_choices candidates",
        "is a picture, video or sound, which a text model cannot read; remove such rows": (
            "image images image_path image_url picture pictures video videos audio audios"
        ),
        "contains tools or their calls, which are not supported; remove such rows": (
            "tools functions tool_calls function_call function_calls"
        ),
        "is what the model thinks before it answers; put it into the answer": "reasoning_content thinking",
        "belongs to another form; leave the fields of one form": (
            "prompt completion messages conversations instruction question output response"
        ),
    }.items()
    for name in names.split()
}
WEIGHTS = ("weight", "loss_weight", "sample_weight")
JUDGEMENTS = ("label", "desirable", "is_correct", "accepted", "train", *WEIGHTS)
# How spreadsheets and JSON write a judgement.
YES, NO = ("true", "1", "1.0", "yes"), ("false", "0", "0.0", "no")


def is_missing(value: object) -> bool:
    """Whether a field is empty. pandas writes NaN for an empty cell."""
    empty = isinstance(value, (str, list, dict)) and not (value.strip() if isinstance(value, str) else value)
    return value is None or empty or value != value


def check_unused(row: dict, used: Iterable[str], chat: list[dict], notes: Counter) -> None:
    """Hold the fields that are not `used` against what they mean. A field that repeats a turn of `chat`, as
    UltraFeedback's `prompt` does, says nothing new. RowError if the task would be another one without a field."""
    for key, value in row.items():
        if key not in used and not is_missing(value) and not repeats(value, chat):
            check_field(str(key), value, repr(key), "rows", notes)


def check_field(name: str, value: object, place: str, unit: str, notes: Counter) -> None:
    """RowError for a field that changes the task; otherwise a note, counted in rows or turns, the `unit`."""
    field, word = name.lower(), str(value).strip().lower()
    if field in JUDGEMENTS and word in NO:
        raise RowError(
            f"field {place}: {value!r} marks an answer that must not be learnt; remove such rows, "
            "or delete the field if it means something else"
        )
    if field in JUDGEMENTS and word in YES:
        return
    if field in WEIGHTS:
        raise RowError(f"field {place}: {value!r} is a weight of the row, which is not supported; delete this field")
    if field in MEANINGS:
        raise RowError(f"field {place}: {MEANINGS[field]}, or delete the field if the task is complete without it")
    notes[f"{unit} whose field {name!r} is not used"] += 1


def repeats(value: object, chat: list[dict]) -> bool:
    """Whether a text, or each turn of a list, is word for word a turn of the chat."""
    contents = {turn["content"].strip() for turn in chat}
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        texts = [turn.get("content", turn.get("value")) for turn in value]
    else:
        texts = [value]
    return all(isinstance(text, str) and text.strip() in contents for text in texts)
