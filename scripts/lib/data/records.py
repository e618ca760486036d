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
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from lib.core import artifact
from lib.core.cli import InputError
from lib.data.fields import JUDGEMENTS, RowError, Unlearnable, check_field, check_unused, is_missing, repeats

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
MOST_LEFT_OUT = 0.01  # of the rows: more that teach nothing are a mistake in the file
MOST_ERRORS = 5  # and places of each: a file with one mistake per line need not fill the screen


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
    if is_missing(value) and not needed:
        return ""
    if not isinstance(value, str):
        kind = "NaN" if value != value else type(value).__name__
        raise RowError(f"field {key!r}: expected a text, found {kind}")
    if needed and not value.strip():
        raise RowError(f"field {key!r}: is empty")
    return value


def read_answer(row: dict, key: str) -> str:
    """The text of a field that is to be learnt."""
    try:
        return read_text(row, key)
    except RowError as error:
        raise (Unlearnable if is_missing(row.get(key)) else RowError)(str(error)) from None


def read_texts(row: dict, key: str) -> list[str]:
    value = [] if is_missing(row.get(key)) else row[key]
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        raise RowError(f"field {key!r}: expected a list of non-empty texts")
    return value


def is_blank(value: object) -> bool:
    """Whether a field holds no text at all: nothing, or a list of nothing."""
    return all(map(is_missing, value)) if isinstance(value, list) else is_missing(value)


def read_turns(value: object, key: str, notes: Counter, role: str = "role", content: str = "content") -> list[dict]:
    """Check a list of chat turns and name their fields role and content."""
    if not isinstance(value, list) or not value:
        raise RowError(f"field {key!r}: expected a non-empty list of turns")
    for n, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise RowError(f"field {key!r}[{n}]: expected an object with {role!r} and {content!r}")
    turns, last_answer = (
        [],
        max((n for n, turn in enumerate(value) if turn.get(role) in ("assistant", "gpt")), default=0),
    )
    for n, turn in enumerate(value):
        name = turn.get(role)
        if not isinstance(name, str) or name not in SHAREGPT_ROLES:
            raise RowError(f"field {key!r}[{n}].{role}: {name!r} is none of {', '.join(SHAREGPT_ROLES)}")
        for field in turn.keys() - {role, content, *(() if n == last_answer else JUDGEMENTS)}:
            if not is_missing(turn[field]):
                check_field(field, turn[field], f"{key!r}[{n}].{field}", "turns", notes)
        if not isinstance(turn.get(content), str) or not turn[content].strip():
            is_empty_answer = n == last_answer and SHAREGPT_ROLES[name] == "assistant" and is_missing(turn.get(content))
            kind = Unlearnable if is_empty_answer else RowError
            raise kind(f"field {key!r}[{n}].{content}: expected a non-empty text")
        turns.append({"role": SHAREGPT_ROLES[name], "content": turn[content]})
    return turns


def split_last_answer(chat: list[dict], key: str, notes: Counter) -> tuple[list[dict], list[dict]]:
    if chat[-1]["role"] != "assistant":
        chat = chat[:-1]
        notes["last turns that are left out, since no answer follows"] += 1
    if len(chat) < 2 or chat[-1]["role"] != "assistant":
        raise RowError(f"field {key!r}: expected a user turn and an assistant turn after it")
    if earlier := sum(turn["role"] == "assistant" for turn in chat[:-1]):
        notes["answers before the last one of their chat, which are read but not learnt"] += earlier
    return chat[:-1], chat[-1:]


def read_prompt(row: dict, notes: Counter) -> list[dict]:
    """The field `prompt`, a text or turns that end with a user's."""
    if isinstance(row.get("prompt"), str):
        return message("user", read_text(row, "prompt"))
    prompt = read_turns(row.get("prompt"), "prompt", notes)
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


def normalise(row: object, notes: Counter) -> dict:
    """A row of any accepted form, converted to the form inside, without id, source and group. `notes` counts what is
    left out. Raises RowError."""
    check_object(row)
    documents, used = read_texts(row, "documents"), {"id", "source", "group", "documents", "gold"}
    if "completion" in row:
        used |= {"prompt", "completion"}
        prompt = read_prompt(row, notes)
        if isinstance(row["prompt"], str):
            completion = message("assistant", read_answer(row, "completion"))
        else:
            completion = read_turns(row["completion"], "completion", notes)
            if [turn["role"] for turn in completion] != ["assistant"]:
                raise RowError("field 'completion': expected one assistant turn")
    elif "messages" in row:
        used.add("messages")
        prompt, completion = split_last_answer(read_turns(row["messages"], "messages", notes), "messages", notes)
    elif "conversations" in row:
        used.add("conversations")
        chat = read_turns(row["conversations"], "conversations", notes, "from", "value")
        prompt, completion = split_last_answer(chat, "conversations", notes)
    elif "instruction" in row:
        answer = next((key for key in ("output", "response") if key in row), None)
        if answer is None:
            raise RowError("has the field 'instruction', but neither 'output' (Alpaca) nor 'response' (Dolly)")
        used |= {"instruction", "input", "context", answer}
        question = read_text(row, "instruction")
        extra = [text for key in ("input", "context") if (text := read_text(row, key, needed=False)).strip()]
        prompt = message("user", "\n\n".join([question, *extra]))
        completion = message("assistant", read_answer(row, answer))
    elif "question" in row:
        gold, answers = ([] if is_blank(row.get(key)) else read_texts(row, key) for key in ("gold", "answer"))
        if not (gold or answers):
            raise Unlearnable("field 'gold': expected a list of reference answers to 'question'")
        if gold and not {*answers} <= {*gold}:
            raise RowError("field 'answer': is not in 'gold'; put the answer to learn first in 'gold'")
        used |= {"question", "answer"}
        prompt = message("user", question_with_documents(read_text(row, "question"), documents))
        completion = message("assistant", (gold or answers)[0])
    else:
        raise RowError(f"has the fields {', '.join(map(str, row)) or '(none)'}; expected {FORMS}")
    check_unused(row, used, prompt + completion, notes)
    if not all(any(text in turn["content"] for turn in prompt) for text in documents):
        notes["rows whose 'documents' are not in the prompt, so that only retrieval and CLaRa read them"] += 1
    gold = [] if is_blank(row.get("gold")) else read_texts(row, "gold")
    gold = gold or [completion[0]["content"]]
    return {"prompt": prompt, "completion": completion, "documents": documents, "gold": gold}


def normalise_pair(row: object, notes: Counter) -> dict:
    """A preference pair of any accepted form, converted to the form inside, without id, source and group. `notes`
    counts what is left out. Raises RowError."""
    check_object(row)
    if not {"chosen", "rejected"} <= row.keys():
        raise RowError(f"has the fields {', '.join(map(str, row)) or '(none)'}; expected {PAIR_FORMS}")
    prompt, chosen = prompt_and_answer(row, "chosen", notes)
    rejected_prompt, rejected = prompt_and_answer(row, "rejected", Counter())  # the same notes once more
    if prompt != rejected_prompt:
        raise RowError("fields 'chosen' and 'rejected': expected the same chat up to the last answer")
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        raise Unlearnable("fields 'chosen' and 'rejected': are the same answer; expected two different ones")
    check_unused(row, {"id", "source", "group", "prompt", "chosen", "rejected", "documents"}, prompt + chosen, notes)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "documents": read_texts(row, "documents")}


def prompt_and_answer(row: dict, key: str, notes: Counter) -> tuple[list[dict], list[dict]]:
    """The prompt of one answer of a pair, and that answer. If `key` holds a whole chat, the answer is its last turn,
    and the field `prompt` may only repeat its beginning."""
    if isinstance(row[key], str) or is_missing(row[key]):
        answer = message("assistant", read_answer(row, key))
    else:
        answer = read_turns(row[key], key, notes)
        if len(answer) > 1:
            if not is_missing(row.get("prompt")) and not repeats(row["prompt"], answer):
                raise RowError(
                    f"field 'prompt': is not in the chat of {key!r}, which has {len(answer)} turns; expected the whole "
                    f"chat in {key!r}, or one assistant turn after 'prompt'"
                )
            return split_last_answer(answer, key, notes)
        if answer[0]["role"] != "assistant":
            raise RowError(f"field {key!r}: its turn is {answer[0]['role']!r}, expected 'assistant'")
    return read_prompt(row, notes), answer


def parse_rows(
    placed_rows: Iterable[tuple[str, object]],
    source: str,
    origin: object = None,
    normalise=normalise,
    forms: str = FORMS,
    notes: Counter | None = None,
) -> list[dict]:
    """Rows in the form inside, from (place, raw row) pairs. InputError lists the first bad places.

    `origin` names all the rows together in an error message: their file, for instance. `notes` takes the numbers of
    what is left out, which are printed without it.
    """
    places, ungrouped = {}, []

    def parse_row(n: int, place: str, raw: object, notes: Counter) -> dict:
        row = normalise(raw, notes)
        name = f"{source}-{n:06d}" if is_missing(raw.get("id")) else str(raw["id"])
        if name in places:
            raise RowError(f"field 'id': {name!r} is already used at {places[name]}; ids must be unique")
        places[name] = place
        source_name = source if is_missing(raw.get("source")) else str(raw["source"])
        row = {"id": name, "source": source_name, "group": str(raw.get("group")), **row}
        if is_missing(raw.get("group")):
            ungrouped.append(row)
        return row

    rows = list(parse_stream(placed_rows, parse_row, origin or source, forms, notes))
    assign_groups(ungrouped)
    return rows


def parse_stream(
    placed_rows: Iterable[tuple[str, object]], parse, origin: object, forms: str, notes: Counter | None = None
) -> Iterator:
    """The results of parse(number, place, raw row, notes), row by row, up to the first bad one. InputError then lists
    the first bad places. A few rows that teach nothing are left out, with a note."""
    places, left_out, is_bad = defaultdict(list), 0, False
    rows, counts = 0, Counter() if notes is None else notes
    for n, (place, raw) in enumerate(placed_rows):
        try:
            row = parse(n, place, raw, found := Counter())
        except RowError as error:
            places[str(error)].append(place)
            left_out += isinstance(error, Unlearnable)
            is_bad |= not isinstance(error, Unlearnable)
        else:
            if not is_bad:
                rows += 1
                counts.update(found)
                yield row
    if is_bad or left_out > MOST_LEFT_OUT * (rows + left_out):
        raise InputError("\n  ".join([*list_errors(places), "fix or remove these rows, then repeat the command"]))
    for error, (first, *others) in places.items():
        counts[f"rows that are left out, the first at {first}, because of {error}"] = 1 + len(others)
    if not rows:
        raise InputError(f"{origin}: contains no rows; expected at least one, in one of these formats: {forms}")
    if notes is None:
        print_notes(origin, counts)


def print_notes(origin: object, notes: Counter) -> None:
    for what, count in notes.items():
        print(f"note: {origin}: {what}: {count:,}")


def list_errors(places: dict[str, list[str]]) -> list[str]:
    """A line per error, of {error: the places where it is made}, with the first places; of many errors, the first."""
    lines = []
    for error, (first, *others) in islice(places.items(), MOST_ERRORS):
        prefix = first.rstrip("0123456789")  # the file
        shown = ", ".join(place.removeprefix(prefix) for place in others[:MOST_ERRORS])
        more = f" and {len(others) - MOST_ERRORS:,} more" if len(others) > MOST_ERRORS else ""
        lines.append(f"{first}: {error}" + f" (also {shown}{more})" * bool(others))
    hidden = sum(map(len, islice(places.values(), MOST_ERRORS, None)))
    return lines + [f"{hidden:,} more rows with other errors"] * bool(hidden)


def assign_groups(rows: list[dict]) -> None:
    """Set the group of each row: rows that ask the same question, or ask about the same single document, share one.
    Questions are compared without regard to case, spaces and Unicode forms; of a chat, its first question counts.

    Where most rows would then be in one group, because they all begin with "Summarise this." for instance, rows with a
    document are grouped by the document alone, and the others by their whole prompt. Where too few groups for three
    splits are left, because all rows are about one document for instance, all are grouped by their whole prompt.
    """

    def fold(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).split())

    def read_keys(row: dict) -> list[tuple]:
        first = next((turn for turn in row["prompt"] if turn["role"] == "user"), row["prompt"][0])
        keys = [("question", fold(question_alone(first["content"], row["documents"])))]
        return keys + [("document", fold(text)) for text in row["documents"] if len(row["documents"]) == 1]

    def read_prompt_key(row: dict) -> list[tuple]:
        return [("prompt", *(fold(turn["content"]) for turn in row["prompt"]), *map(fold, row["documents"]))]

    groups = join_by_keys([read_keys(row) for row in rows])
    if groups and max(Counter(groups).values()) > len(rows) / 2:
        groups = join_by_keys([read_keys(row)[1:] or read_prompt_key(row) for row in rows])
    if len({*groups}) < len(SPLITS):
        groups = join_by_keys([read_prompt_key(row) for row in rows])
    members = defaultdict(list)
    for row, group in zip(rows, groups):
        members[group].append(row)
    names = {group: min(row["prompt"][-1]["content"] for row in group_rows) for group, group_rows in members.items()}
    uses = Counter(names.values())
    for group, group_rows in members.items():
        if uses[names[group]] > 1:  # "Please go on." ends chats of several groups
            texts = ([turn["content"] for turn in row["prompt"]] + row["documents"] for row in group_rows)
            names[group] = min("\n\n".join(row_texts) for row_texts in texts)
        for row in group_rows:
            row["group"] = names[group]


def join_by_keys(key_lists: list[list]) -> list[int]:
    """A number per list; lists that share a key, directly or through others, have the same one."""
    parents, owners = list(range(len(key_lists))), {}

    def find_root(n: int) -> int:
        while parents[n] != n:
            parents[n] = parents[parents[n]]
            n = parents[n]
        return n

    for n, keys in enumerate(key_lists):
        for key in keys:
            parents[find_root(n)] = find_root(owners.setdefault(key, n))
    return [find_root(n) for n in range(len(key_lists))]


def read_file(path: Path | str, normalise=normalise, forms: str = FORMS, notes: Counter | None = None) -> list[dict]:
    """The checked rows of a JSONL, JSON, CSV or Parquet file."""
    path = Path(path)
    return parse_rows(raw_rows(path), path.stem, path, normalise, forms, notes)


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
                yield f"{path}:{n}", json.loads(line, object_pairs_hook=check_keys)
            except RecursionError:
                raise InputError(f"{path}:{n}: too many nested lists or objects; expected one flat object") from None
            except ValueError as error:
                what = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{path}:{n}: not JSON ({what}); expected one object per line") from None


def read_json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        value = json.loads("".join(line for _, line in read_lines(path)), object_pairs_hook=check_keys)
    except RecursionError:
        raise InputError(f"{path}: too many nested lists or objects; expected a list of flat objects") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); expected a list of objects") from None
    if not isinstance(value, list):
        raise InputError(f"{path}: expected a list of objects, found {type(value).__name__}")
    return ((f"{path}: item {n}", row) for n, row in enumerate(value, 1))


def check_keys(pairs: list[tuple]) -> dict:
    """An object of JSON. ValueError for a key that occurs twice, of which Python would take the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} occurs more than once in an object")
    return fields


def read_csv(path: Path) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader((line for _, line in read_lines(path)), strict=True)
    try:
        names = reader.fieldnames or []
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"{path}:1: the column {twice[0]!r} occurs more than once; rename or remove one")
        # A column without a name, such as the index that pandas writes, is an unread field like any other.
        reader.fieldnames = [name or f"column {n}" for n, name in enumerate(names, 1)]
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
    return read_file(path / f"{split}.jsonl", notes=Counter())  # generate_data.py has said what it left out


def load_pairs(path: Path | str, split: str) -> list[dict]:
    """The preference pairs of one split of a preference artifact. A file of the user's belongs to the training split as
    a whole, and an artifact may have no held-out pairs."""
    path = Path(path)
    if path.is_file():
        return read_file(path, normalise_pair, PAIR_FORMS) if split == "train" else []
    artifact.read(path, "preferences")
    file = path / f"{split}.jsonl"
    held_out = file.is_file() and file.stat().st_size
    return read_file(file, normalise_pair, PAIR_FORMS, Counter()) if split == "train" or held_out else []


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


def draw_training_rows(rows: list[dict], samples: int, seed: int) -> list[dict]:
    """`sample_rows`, with a notice that the others are not learnt."""
    if samples < len(rows):
        print(f"training on {samples:,} of {len(rows):,} examples, drawn at random; --samples sets how many")
    return sample_rows(rows, samples, seed)


def split_by_group(rows: list[dict], seed: int, shares=(0.8, 0.1, 0.1)) -> dict[str, list[dict]]:
    """Split so that no group is torn apart; every split gets at least one group."""
    groups = sorted({row["group"] for row in rows}, key=lambda group: shuffle_key(seed, group))
    if len(groups) < len(SPLITS):
        raise InputError(
            f"{len(rows)} rows in {len(groups)} groups (rows with the same question or document) cannot be split into "
            f"{', '.join(SPLITS)}; expected at least 3 groups; a field `group` divides the rows otherwise"
        )
    sizes = [max(1, round(share * len(groups))) for share in shares[1:]]
    cuts = {
        SPLITS[2]: groups[: sizes[1]],
        SPLITS[1]: groups[sizes[1] : sum(sizes)],
        SPLITS[0]: groups[sum(sizes) :],
    }
    split_of = {group: split for split, members in cuts.items() for group in members}
    return {split: [row for row in rows if split_of[row["group"]] == split] for split in SPLITS}
