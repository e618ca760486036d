"""Rows of training and test data: one form inside, many forms accepted, errors with file:line.

Inside, a row is TRL's conversational prompt-completion form and a little more:

    {"id": str, "source": str, "group": str, "prompt": [{"role", "content"}…], "completion": [{"role", "content"}],
     "documents": [str…], "gold": [str…]}

`gold` lists the accepted answers (its first is the completion's text unless the file says otherwise);
rows of one `group` always fall into the same split. A preference pair has `chosen` and `rejected`, one assistant turn
each, where a row has its `completion`.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from lib.core import artifact
from lib.core.cli import InputError

SPLITS = ("train", "validation", "test")
FORMS = (
    'prompt + completion, messages [{"role", "content"}], instruction + output (Alpaca), '
    "instruction + response (Dolly), conversations [{from, value}] (ShareGPT), or question + documents + gold"
)
PAIR_FORMS = (
    "prompt + chosen + rejected, as texts or as turns, or chosen and rejected as complete chats (UltraFeedback) that "
    "differ in their last answer"
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
MOST_ERRORS = 5  # a file with one mistake per line need not fill the screen


class RowError(ValueError):
    """What is wrong with one row; the caller adds the place."""


def question_with_documents(question: str, documents: list[str]) -> str:
    """The prompt of a question about texts, the same in training, evaluation and use."""
    return "\n\n".join([*(f"Document: {d}" for d in documents), f"Question: {question}", "Answer:"])


def question_alone(prompt: str, documents: list[str]) -> str:
    """The question of `question_with_documents`; a prompt of any other form as it is."""
    before, _, after = question_with_documents("\0", documents).partition("\0")
    framed = prompt.startswith(before) and prompt.endswith(after)
    return prompt.removeprefix(before).removesuffix(after) if framed else prompt


def read_text(row: dict, key: str, needed: bool = True) -> str:
    value = row.get(key)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise RowError(f"field {key!r}: expected a text, found {type(value).__name__}")
    if needed and not value.strip():
        raise RowError(f"field {key!r}: is empty")
    return value


def read_texts(row: dict, key: str) -> list[str]:
    value = row.get(key) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise RowError(f"field {key!r}: expected a list of non-empty texts")
    return value


def read_turns(value: object, key: str, role: str = "role", content: str = "content") -> list[dict]:
    """Check a list of chat turns and name their fields role and content."""
    if not isinstance(value, list) or not value:
        raise RowError(f"field {key!r}: expected a non-empty list of turns")
    turns = []
    for n, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RowError(f"field {key!r}[{n}]: expected an object with {role!r} and {content!r}")
        name = turn.get(role)
        if not isinstance(name, str) or name not in SHAREGPT_ROLES:
            raise RowError(f"field {key!r}[{n}].{role}: {name!r} is none of {', '.join(SHAREGPT_ROLES)}")
        if not isinstance(turn.get(content), str) or not turn[content].strip():
            raise RowError(f"field {key!r}[{n}].{content}: expected a non-empty text")
        turns.append({"role": SHAREGPT_ROLES[name], "content": turn[content]})
    return turns


def split_last_answer(chat: list[dict], key: str) -> tuple[list[dict], list[dict]]:
    if chat[-1]["role"] != "assistant":
        chat = chat[:-1]  # a dangling last question teaches nothing
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise RowError(f"field {key!r}: expected a user turn and an assistant turn after it")
    return chat[:-1], chat[-1:]


def read_prompt(row: dict) -> list[dict]:
    """The field `prompt`, a text or turns that end with a user's."""
    if isinstance(row.get("prompt"), str):
        return message("user", read_text(row, "prompt"))
    prompt = read_turns(row.get("prompt"), "prompt")
    if prompt[-1]["role"] != "user":
        raise RowError(f"field 'prompt': its last turn is {prompt[-1]['role']!r}, expected 'user'")
    return prompt


def message(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


def check_unicode(value: object, key: str) -> None:
    """RowError for half an emoji ("\\ud83d", from a tool that cut a text): it is JSON, but files and tokenizers reject
    it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"field {key!r}: character {error.start + 1} is half a surrogate pair, expected whole characters"
            ) from None
    elif isinstance(value, (list, dict)):
        for item in value if isinstance(value, list) else [*value, *value.values()]:
            check_unicode(item, key)


def check_object(row: object) -> None:
    if not isinstance(row, dict):
        raise RowError(f"expected an object, found {type(row).__name__}")
    for key, value in row.items():
        check_unicode(value, str(key))


def normalise(row: object) -> dict:
    """A row of any accepted form, converted to the form inside, without id, source and group. Raises RowError."""
    check_object(row)
    documents = read_texts(row, "documents")
    if "completion" in row:
        prompt = read_prompt(row)
        if isinstance(row["prompt"], str):
            completion = message("assistant", read_text(row, "completion"))
        else:
            completion = read_turns(row["completion"], "completion")
            if [turn["role"] for turn in completion] != ["assistant"]:
                raise RowError("field 'completion': expected one assistant turn")
    elif "messages" in row:
        prompt, completion = split_last_answer(read_turns(row["messages"], "messages"), "messages")
    elif "conversations" in row:
        chat = read_turns(row["conversations"], "conversations", "from", "value")
        prompt, completion = split_last_answer(chat, "conversations")
    elif "instruction" in row:
        answer = next((key for key in ("output", "response") if key in row), None)
        if answer is None:
            raise RowError("has the field 'instruction', but neither 'output' (Alpaca) nor 'response' (Dolly)")
        extra = read_text(row, "input" if answer == "output" else "context", needed=False)
        question = read_text(row, "instruction")
        prompt = message("user", f"{question}\n\n{extra}" if extra.strip() else question)
        completion = message("assistant", read_text(row, answer))
    elif "question" in row:
        gold = read_texts(row, "gold") or read_texts(row, "answer")
        if not gold:
            raise RowError("field 'gold': expected a list of reference answers to 'question'")
        prompt = message("user", question_with_documents(read_text(row, "question"), documents))
        completion = message("assistant", gold[0])
    else:
        raise RowError(f"has the fields {', '.join(map(str, row)) or '(none)'}; expected {FORMS}")
    gold = read_texts(row, "gold") or [completion[0]["content"]]
    return {"prompt": prompt, "completion": completion, "documents": documents, "gold": gold}


def normalise_pair(row: object) -> dict:
    """A preference pair of any accepted form, converted to the form inside, without id, source and group. Raises
    RowError."""
    check_object(row)
    if not {"chosen", "rejected"} <= row.keys():
        raise RowError(f"has the fields {', '.join(map(str, row)) or '(none)'}; expected {PAIR_FORMS}")
    (prompt, chosen), (rejected_prompt, rejected) = (prompt_and_answer(row, key) for key in ("chosen", "rejected"))
    if prompt != rejected_prompt:
        raise RowError("fields 'chosen' and 'rejected': expected the same chat up to the last answer")
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        raise RowError("fields 'chosen' and 'rejected': are the same answer; expected two different ones")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "documents": read_texts(row, "documents")}


def prompt_and_answer(row: dict, key: str) -> tuple[list[dict], list[dict]]:
    """The prompt of one answer of a pair, and that answer. If `key` holds a whole chat, the answer is its last turn,
    and the field `prompt`, which only repeats the first turn, is ignored."""
    if isinstance(row[key], str):
        answer = message("assistant", read_text(row, key))
    else:
        answer = read_turns(row[key], key)
        if len(answer) > 1:
            return split_last_answer(answer, key)
        if answer[0]["role"] != "assistant":
            raise RowError(f"field {key!r}: its turn is {answer[0]['role']!r}, expected 'assistant'")
    return read_prompt(row), answer


def parse_rows(
    placed_rows: Iterable[tuple[str, object]],
    source: str,
    origin: object = None,
    normalise=normalise,
    forms: str = FORMS,
) -> list[dict]:
    """Rows in the form inside, from (place, raw row) pairs. InputError lists the first bad places.

    `origin` names all the rows together in an error message: their file, for instance.
    """
    places = {}

    def parse_row(n: int, place: str, raw: object) -> dict:
        row = normalise(raw)
        name = f"{source}-{n:06d}" if raw.get("id") in (None, "") else str(raw["id"])
        if name in places:
            raise RowError(f"field 'id': {name!r} is already used at {places[name]}; ids must be unique")
        places[name] = place
        group = str(raw.get("group") or row["prompt"][-1]["content"])
        return {"id": name, "source": str(raw.get("source") or source), "group": group, **row}

    return list(parse_stream(placed_rows, parse_row, origin or source, forms))


def parse_stream(placed_rows: Iterable[tuple[str, object]], parse, origin: object, forms: str) -> Iterator:
    """The results of parse(number, place, raw row), row by row, up to the first bad one. InputError then lists the
    first bad places."""
    errors, rows = [], 0
    for n, (place, raw) in enumerate(placed_rows):
        try:
            row = parse(n, place, raw)
        except RowError as error:
            errors.append(f"{place}: {error}")
            if len(errors) == MOST_ERRORS:
                break
        else:
            if not errors:
                rows += 1
                yield row
    if errors:
        raise InputError("\n  ".join([*errors, "fix or remove these rows, then repeat the command"]))
    if not rows:
        raise InputError(f"{origin}: contains no rows; expected at least one, in one of these formats: {forms}")


def read_file(path: Path | str, normalise=normalise, forms: str = FORMS) -> list[dict]:
    """The checked rows of a JSONL, JSON, CSV or Parquet file."""
    path = Path(path)
    return parse_rows(raw_rows(path), path.stem, path, normalise, forms)


def raw_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(place, raw row) of a JSONL, JSON, CSV or Parquet file; of JSONL and CSV line by line."""
    readers = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv,
               ".parquet": read_parquet}  # fmt: skip
    if not path.is_file():
        raise InputError(f"{path}: " + ("is a directory, expected a file" if path.is_dir() else "does not exist"))
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: expected a file that ends in {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for n, raw in enumerate(file, 1):
            try:
                yield n, raw.decode("utf-8-sig" if n == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{n}: byte {error.start + 1} is not UTF-8; convert the file, for instance with "
                    f"`iconv -f latin1 -t utf-8`"
                ) from None


def read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    for n, line in read_lines(path):
        if line.strip():
            try:
                yield f"{path}:{n}", json.loads(line)
            except ValueError as error:
                what = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{path}:{n}: not JSON ({what}); expected one object per line") from None


def read_json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        value = json.loads("".join(line for _, line in read_lines(path)))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); expected a list of objects") from None
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a list of objects, found {type(value).__name__}")
    return ((f"{path}: item {n}", row) for n, row in enumerate(value, 1))


def read_csv(path: Path) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader((line for _, line in read_lines(path)), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{path}:{reader.line_num}: expected {len(reader.fieldnames)} fields as in the header")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num or 1}: not CSV: {error}") from None


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    from pyarrow.parquet import read_table

    try:
        table = read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    return ((f"{path}: row {n}", row) for n, row in enumerate(table.to_pylist(), 1))


def load_split(path: Path | str, split: str) -> list[dict]:
    """The rows of one split of a data artifact, or all rows of a file of the user's."""
    path = Path(path)
    if path.is_file():
        return read_file(path)
    artifact.read(path, "data")
    return read_file(path / f"{split}.jsonl")


def load_pairs(path: Path | str, split: str) -> list[dict]:
    """The preference pairs of one split of a preference artifact. A file of the user's belongs to the training split as
    a whole, and an artifact may have no held-out pairs."""
    path = Path(path)
    if path.is_file():
        return read_file(path, normalise_pair, PAIR_FORMS) if split == "train" else []
    artifact.read(path, "preferences")
    file = path / f"{split}.jsonl"
    held_out = file.is_file() and file.stat().st_size
    return read_file(file, normalise_pair, PAIR_FORMS) if split == "train" or held_out else []


def write(path: Path, rows: Iterable[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def digest(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def shuffle_key(seed: int, name: str) -> str:
    """A key to shuffle by. It depends on the seed and the name alone, so other rows do not move this one."""
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def sample_rows(rows: list[dict], samples: int, seed: int) -> list[dict]:
    """`samples` rows in a seeded order, or all of them, with a notice, if there are fewer.

    A larger sample extends a smaller one: the first 100 of 200 are the sample of 100.
    """
    if samples > len(rows):
        print(f"{samples:,} examples requested, only {len(rows):,} available; using all {len(rows):,}")
    return sorted(rows, key=lambda row: shuffle_key(seed, row["id"]))[:samples]


def split_by_group(rows: list[dict], seed: int, shares=(0.8, 0.1, 0.1)) -> dict[str, list[dict]]:
    """Split so that no group is torn apart; every split gets at least one group."""
    groups = sorted({row["group"] for row in rows}, key=lambda group: shuffle_key(seed, group))
    if len(groups) < len(SPLITS):
        raise InputError(
            f"{len(rows)} rows with {len(groups)} different prompts cannot be split into {', '.join(SPLITS)}; "
            "expected at least 3 different prompts"
        )
    sizes = [max(1, round(share * len(groups))) for share in shares[1:]]
    cuts = {
        SPLITS[2]: groups[: sizes[1]],
        SPLITS[1]: groups[sizes[1] : sum(sizes)],
        SPLITS[0]: groups[sum(sizes) :],
    }
    split_of = {group: split for split, members in cuts.items() for group in members}
    return {split: [row for row in rows if split_of[row["group"]] == split] for split in SPLITS}
