"""Filter training data: examples that break a rule are set aside, each with all its reasons.

    python scripts/filter_data.py --data data/magpie/raw --evaluation data/factbook/raw --output data/magpie/filtered
    python scripts/filter_data.py --data my-rows.jsonl --scorer embedding --output data/mine/filtered

Takes a data artifact, whose splits are filtered separately and stay as they are, or a file of examples in any format
that generate_data.py accepts, which is split after filtering. Leaves a data artifact with two more files:
rejected.jsonl and rejections.svg. The same examples and thresholds give the same bytes.
"""

import re
from collections import Counter
from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import InputError
from lib.data import evaluation_sets, records, words
from lib.engines import scorers

# {rule: what it rejects}, in the order in which reasons are listed. Thresholds are flags.
RULES = {
    "instruction": "too few or too many words (numbers count, documents do not; a Chinese, Japanese, Korean or Thai\n"
                   "character is a word)",
    "response": "too few or too many words (code and short answers need --min-response-words 1)",
    "language": "the instruction or the response is in another language; texts too short to tell pass, and code",
    "repetition": "too many 4-grams of the instruction or the response have occurred before in it",
    "refusal": "the response begins by declining, in English: the rule knows no other language",
    "ending": "the response breaks off (not tested in Thai, Lao, Khmer and Burmese, which have no full stop);\n"
              'with --language en also: the response or the instruction ends in a word like "the"',
    "symbols": "the instruction or the response is mostly symbols, or contains broken characters (code blocks pass;\n"
               "other code and HTML need --max-symbols 0.6)",
    "template": "a turn contains a chat template's special token or its bare role",
    "statement": "the instruction asks for nothing; applies with --language en only",
    "score": "--scorer rates the response too low",
    "overlap": "13 consecutive words are also in an evaluation set, or a shorter question is, as a whole sentence or\n"
               "line or with one of its options beside it",
    "duplicate": "the instruction is nearly that of an example already accepted, about the same documents",
}  # fmt: skip
ALWAYS = "overlap"  # the one rule that --skip cannot leave out
# The flags that loosen a rule, for messages. "language" and "overlap" have advice of their own.
FLAGS = {
    "instruction": "--min-instruction-words or --max-instruction-words", "repetition": "--max-repetition",
    "response": "--min-response-words or --max-response-words", "symbols": "--max-symbols", "score": "--min-score",
    "duplicate": "--near-duplicate",
}  # fmt: skip
LETTER = rf"[[\p{{L}}\p{{N}}]--{words.SPACELESS}]"
WORD = rf"{words.SPACELESS}{words.MARK}*|{LETTER}(?:{LETTER}|{words.MARK})*"
# Symbols without which texts are equal that are not: C++ and C#, 12 - 5 and 12 + 5, 1.5 and 15, two emoji. All other
# punctuation is left out, since other quotes, dashes or marks of emphasis make no other text.
OPERAND = r"(?:\p{N}|\b\p{L}\b)"
SYMBOL = (
    r"[+<=>]+|!=+|[\p{So}[\p{Sm}--[|~]]]|(?<=\p{L})#|(?<=\p{N} ?)[%\p{Sc}]|\p{Sc}(?= ?\p{N})|(?<=\p{N})[.,:](?=\p{N})"
    rf"|(?<!\w)-(?=\p{{N}})|(?<=(?:{OPERAND}|\))\s*)[-*/^&]+(?=\s*(?:{OPERAND}|\())"
    rf"|\((?=\s*{OPERAND})|(?<={OPERAND}\s*)\)"
)
TOKEN = rf"{WORD}|(?=[^\w\s])(?:{SYMBOL})"
DASH = r"[\p{Pd}\u2212]"


def make_parser():
    indent = f"\n{'':18}"
    table = "\n".join(f"    {name:13} {reason.replace(chr(10), indent)}" for name, reason in RULES.items())
    parser = cli.parser(f"{__doc__}\nThe rules, and what each rejects:\n\n{table}\n", __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--data", type=Path, required=True, help="directory of generate_data.py, or a file (see README)")
    files.add_argument(
        "--evaluation", type=Path, nargs="+", action="extend", default=[],
        help="more evaluation sets that training data must not overlap with: data artifacts (their test split) or "
             "files of examples (default: none)",
    )  # fmt: skip
    files.add_argument(
        "--bundled", action=cli.OnOff, default=True,
        help=f"reject overlap with the bundled sets {', '.join(evaluation_sets.FILES)}; downloads 22 MB once",
    )  # fmt: skip
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    rules = parser.add_argument_group("rules")
    for text in ("instruction", "response"):
        rules.add_argument(f"--min-{text}-words", type=cli.integer(0), help=f"minimum words per {text}")
        rules.add_argument(f"--max-{text}-words", type=cli.integer(1), help=f"maximum words per {text}")
    rules.add_argument("--language", help="ISO 639-1 code of the language to keep; any: all languages")
    rules.add_argument(
        "--max-repetition", type=cli.number(0, 1), help="maximum fraction of 4-grams that occurred before in the text"
    )
    rules.add_argument(
        "--max-symbols", type=cli.number(0, 1), help="maximum fraction of characters that are neither letter nor digit"
    )
    rules.add_argument(
        "--near-duplicate", type=cli.number(0.5, 1),
        help="Jaccard index of word 3-grams at which an instruction counts as a duplicate",
    )  # fmt: skip
    rules.add_argument(
        "--scorer", type=scorers.check_name, help="response scorer: embedding, or reward:<model> (default: none)"
    )
    rules.add_argument("--min-score", type=cli.number(-1e9), help="minimum score, on the scorer's own scale")
    rules.add_argument(
        "--skip", nargs="+", action="extend", default=[], metavar="RULE",
        choices=[rule for rule in RULES if rule != ALWAYS],
        help=f"rules to leave out; {ALWAYS} always applies (default: none)",
    )  # fmt: skip
    rules.add_argument("--seed", type=cli.integer(0), help="random seed for splitting a file")
    return parser


def main(args):
    # --- read and check -------------------------------------------------------------------------------
    check_flags(args)
    paths = {"data": args.data} | {f"evaluation {n}": path for n, path in enumerate(args.evaluation, 1)}
    paths |= {name: evaluation_sets.find_file(name) for name in evaluation_sets.FILES if args.bundled}
    inputs = artifact.identify_inputs(paths) | (scorers.identify_reward_model(args.scorer) if has_scores(args) else {})
    splits = read_splits(args.data)
    forbidden = Forbidden(read_evaluation_texts(args))
    language = open_language_model(args.language)

    # --- judge: each row by itself, then against the rows that were kept --------------------------------
    # Held-out splits come first, so that of two near-duplicates the training row is rejected.
    examples = [(split, row) for split in reversed(splits) for row in splits[split]]
    rows = [row for _, row in examples]
    scores = score_rows(args, rows)
    reasons = [find_reasons(row, score, language, forbidden, args) for row, score in zip(rows, scores)]
    if "duplicate" not in args.skip:
        find_duplicates(examples, reasons, args.near_duplicate)
    rejections = count_rejections(reasons)
    print_counts(rejections, len(rows))
    print_warnings(args, rejections, rows, reasons)
    kept = {
        split: [row for (name, row), row_reasons in zip(examples, reasons) if name == split and not row_reasons]
        for split in splits
    }
    check_something_is_left(args, kept, rows, reasons, rejections)
    if list(kept) != list(records.SPLITS):
        kept = records.split_by_group(kept["all"], args.seed)

    # --- write ------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "data", args, inputs) as build:
        for split, split_rows in kept.items():
            records.write(build.path / f"{split}.jsonl", split_rows)
        documents = write_documents(args.data, build.path / "documents.jsonl", kept)
        rejected = [
            {**row, "split": split, "reasons": row_reasons}
            for (split, row), row_reasons in zip(examples, reasons)
            if row_reasons
        ]
        records.write(build.path / "rejected.jsonl", rejected)
        (build.path / "rejections.svg").write_text(draw_rejections(rejections, len(rows)), encoding="utf-8")
        counts = {split: len(split_rows) for split, split_rows in kept.items()} | {"documents": documents}
        build.metrics = counts | {"rows": len(rows), "rejected": len(rejected), "rules": rejections}
    print(", ".join(f"{number:,} {name}" for name, number in counts.items()))
    print(args.output)


# --- reading -----------------------------------------------------------------------------------------------


def check_flags(args) -> None:
    for text in ("instruction", "response"):
        minimum, maximum = (getattr(args, f"{which}_{text}_words") for which in ("min", "max"))
        if minimum > maximum:
            raise InputError(
                f"--min-{text}-words {minimum} exceeds --max-{text}-words {maximum}, so no row could pass; lower the "
                "minimum or raise the maximum"
            )
    if any(path.resolve() == args.data.resolve() for path in args.evaluation):
        raise InputError(
            f"--evaluation {args.data}: is --data itself, so every test example would overlap with itself; give other "
            "sets (near-duplicates of held-out examples within --data are removed from training anyway)"
        )


def read_splits(path: Path) -> dict[str, list[dict]]:
    """{split: rows} of an artifact, {"all": rows} of a file."""
    if path.is_dir() or not path.suffix:
        artifact.read(path, "data")
        # A split that an earlier filter left empty is no error here.
        files = {split: path / f"{split}.jsonl" for split in records.SPLITS}
        return {split: records.read_file(file) if file.stat().st_size else [] for split, file in files.items()}
    return {"all": records.read_file(path)}


def instruction(row: dict) -> str:
    """What the user says, without the documents."""
    texts = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
    return "\n\n".join(records.question_alone(text, row["documents"]) for text in texts)


def fold_words(text: str) -> str:
    return re.sub("['’]", "", words.fold(text))


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers without punctuation; a character of a script without spaces is one."""
    return words.find_all(WORD, fold_words(text))


def split_exactly(text: str) -> list[str]:
    """What two texts are compared by: their words, and the symbols that change what is asked."""
    return find_tokens(TOKEN, text)


def find_tokens(pattern: str, text: str) -> list[str]:
    import regex

    return words.find_all(pattern, regex.sub(DASH, "-", fold_words(re.sub(LIST_MARK, "", text, flags=re.M))))


def characters_per_word(text: str) -> int:
    """How many of `split_words` make up a word: about 2 in scripts without spaces, else 1."""
    if text.isascii():
        return 1
    spaceless = len(words.find_all(rf"{words.SPACELESS}{words.MARK}*", text))
    return 2 if 2 * spaceless > len(split_words(text)) else 1


def n_grams(tokens: list[str], n: int) -> list[str]:
    return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def has_scores(args) -> bool:
    return bool(args.scorer) and "score" not in args.skip


def score_rows(args, rows: list[dict]) -> list[float | None]:
    if not has_scores(args):
        return [None] * len(rows)
    from lib.core import compute

    compute.use_threads(args.threads)
    score = scorers.open_scorer(args.scorer)
    return score(rows, [row["completion"][0]["content"] for row in rows])


# --- the rules, a row by itself ------------------------------------------------------------------------------


def find_reasons(row: dict, score: float | None, language, forbidden: "Forbidden", args) -> list[dict]:
    """Every reason against a row: [{"rule", "why"}], in the order of RULES; duplicates are found later."""
    request, answer = instruction(row), row["completion"][0]["content"]
    texts = {"instruction": request, "response": answer}
    turns = [turn["content"] for turn in row["prompt"] + row["completion"]]
    english = args.language == "en"
    objections = {
        "instruction": check_length(request, args.min_instruction_words, args.max_instruction_words),
        "response": check_length(answer, args.min_response_words, args.max_response_words),
        "language": check_each(texts, lambda text: check_language(text, args.language, language)) if language else None,
        "repetition": check_each(texts, lambda text: check_repetition(text, args.max_repetition)),
        "refusal": check_refusal(answer),
        "ending": check_ending(answer, english) or (check_instruction_end(request) if english else None),
        "symbols": check_each(texts, lambda text: check_symbols(text, args.max_symbols)),
        "template": check_template(turns),
        "statement": check_request(request) if english else None,
        "score": check_score(score, args.min_score),
        "overlap": forbidden.where(turns + [text for text in row["documents"] if not any(text in t for t in turns)]),
    }
    return [{"rule": rule, "why": why} for rule, why in objections.items() if why and rule not in args.skip]


def check_each(texts: dict[str, str], rule) -> str | None:
    objections = [f"{name}: {why}" for name, text in texts.items() if (why := rule(text))]
    return "; ".join(objections) or None


def check_length(text: str, minimum: int, maximum: int) -> str | None:
    count = len(split_words(text))
    return None if minimum <= count <= maximum else f"{count} words, expected {minimum} to {maximum}"


def check_score(score: float | None, minimum: float) -> str | None:
    return None if score is None or score >= minimum else f"{score:.3f}, expected at least {minimum:g}"


# A text counts as foreign if the probability of the expected language is below this. For English, py3langid gives
# English sentences of five or more words above 0.01, unless they are lists of names, and French, German or Indonesian
# ones below 0.001.
LEAST_PROBABILITY = 1e-3
NO_LANGUAGE = "zxx"  # numbers, markup and the like
TELLING_WORDS = 5  # shorter texts pass: names and single words belong to no language
# The share of symbols above which a text is taken for code, which has no language. From the 5th to the 95th percentile,
# passages of the Factbook have 0.05 to 0.14, and functions of this project 0.14 to 0.30.
CODE_SYMBOLS = 0.2
CODE_BLOCK = re.compile(r"^[ \t]*```.*?^[ \t]*```", re.M | re.S)


def open_language_model(code: str):
    """A function: text -> {language: probability}; None where all languages pass."""
    if code == "any":
        return None
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    codes = sorted(set(identifier.nb_classes) - {NO_LANGUAGE})
    if code not in codes:
        raise InputError(f"--language {code}: expected any, or one of {', '.join(codes)}")
    return lambda text: dict(identifier.rank(text))


def check_language(text: str, code: str, language) -> str | None:
    text = CODE_BLOCK.sub("", text)
    if len(split_words(text)) < TELLING_WORDS or symbol_share(text) > CODE_SYMBOLS:
        return None
    probabilities = language(text)
    likeliest = max(probabilities, key=probabilities.get)
    if probabilities[code] >= LEAST_PROBABILITY or likeliest == NO_LANGUAGE:
        return None
    return f"language {likeliest}, expected {code}"


# The number or bullet of a list item. It is removed before n-grams are counted: it would hide that items repeat.
LIST_MARK = r"^[ \t]*(?:[-*•]|\d+[.)])(?:[ \t]+|$)"


def check_repetition(text: str, limit: float) -> str | None:
    """seq-rep-n of Welleck et al. (arXiv 1908.04319), 1 - distinct n-grams / n-grams, on four words."""
    n = 4 * characters_per_word(text)
    grams = n_grams(split_words(re.sub(LIST_MARK, "", text, flags=re.M)), n)
    share = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return f"{share:.2f} of its {n}-grams are repeated (limit {limit:g})" if share > limit else None


# English. Matched only at the beginning, and only with a verb that is declined: "I can't believe it!" begins a story.
MODEL = r"an? (?:ai|artificial intelligence|(?:large )?language model|(?:ai )?assistant|chatbot)\b"
DECLINED = (
    "access|answer|assist|browse|comply|create|discuss|do that|engage|fulfil|generate|give|help|produce|provide|support"
    "|write"
)
REFUSAL = re.compile(
    r"\W*(?:(?:i'm|i am|we're)? ?(?:very |so |really |truly )?(?:sorry|apologi[sz]e|afraid|unfortunately)\b"
    r"[^.!?\n]{0,40}?\W+)?(?:but )?(?:"
    rf"as {MODEL}[^.!?\n]{{0,120}}? (?:i|my)\b"
    rf"|i(?:'m| am) (?:just |only )?{MODEL}[^.!?\n]*\b(?:not|cannot|unable|don't|can't)\b"
    rf"|i (?:can ?not|can't|won't be able to|will not|won't|(?:am )?(?:not able|unable) to) (?:\w+ly )?(?:{DECLINED})"
    rf"|i'm (?:not able|unable) to (?:\w+ly )?(?:{DECLINED})"
    r"|i (?:do not|don't) have (?:the (?:ability|capability|information)|access|personal|enough|any information)"
    r")",
    re.I,
)


def check_refusal(response: str) -> str | None:
    match = REFUSAL.match(response.replace("’", "'"))
    return f"begins with {match[0].strip()!r}" if match else None


# Words after which a sentence goes on, in English only: a German sentence may end in "an" or "was".
DANGLING = re.compile(
    r"\b(?:an?|the|and|or|but|nor|of|to|in|on|at|by|for|with|from|as|into|about|is|are|was|were|be|been|will|would|can"
    r"|could|should|may|might|must|has|have|had|its|their|his|her|your|our|my|this|these|those|that|which|who|than"
    r"|because|if|when|while|such)$"
)
SHORT_WORDS = 10  # a shorter answer is a phrase and needs no full stop; so is a single line that begins in lower case
SIGNATURE = r",\s*\n\s*(?:\p{Lu}[\w.'-]*+\s*){1,4}\Z"  # "Best regards,", and a name below
GOES_ON = ",:;-–—([{/&=、，：；（،؛「『《【"  # characters after which a text goes on
# ... unless they end a URL or a path, base64, a comment in C, a grade or a smiley.
WHOLE = r"\S*/\S+/$|[A-Za-z0-9+/_-]{8,}={1,2}$|\*/$|\b[A-F]-$|[:;]-?[(/\[{]$"
# Code: an assignment, a tag, SQL, a command with an option; an indented line, where it does not belong to a list.
CODE_LINE = (
    r"^\s*(?:\w+\s+)?[\w.]+\s*[-+*/]?=\s*\S|^\s*<|^\s*(?:SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|WITH)\b"
    r"|\s--?[A-Za-z]"
)
INDENTED = r"^(?: {2,}|\t)\s*\S+(?:\s+\S+){0,8}$"
# An answer at the end: after a label, as in MetaMathQA ("The answer is: 72"), a number on a line of its own, as in
# GSM8K ("#### 72"), or a URL.
RESULT = r"[:=：][ \t]+(?:\S+[ \t]+){0,2}\S+$|^#+\s*\W*\d\S*(?:\s+\S+)?$|^[^\p{L}]+$|\w://\S+$"


def check_ending(response: str, english: bool) -> str | None:
    """Reject a response that ends in an open code block, in a list item without words, or in the middle of a
    sentence."""
    if len(re.findall(r"^[ \t]*```", response, re.M)) % 2:
        return "a code block is not closed"
    *before, last = response.strip().splitlines()
    if before and is_bare_mark(last, before):
        return f"its last line is {last.strip()!r}"
    items = [line.rstrip() for line in before if re.match(LIST_MARK, line)]
    code = bool(words.find_all(CODE_LINE, last) or (not items and words.find_all(INDENTED, last)))
    if last[-1] in GOES_ON and not words.find_all(WHOLE, last) and not (last[-1] == ";" and is_statement(last, before)):
        return f"ends with {last.split()[-1]!r}"
    if english and not code and DANGLING.search(last):
        return f"ends with {last.split()[-1]!r}"
    short = SHORT_WORDS * characters_per_word(response)
    phrase = len(split_words(response)) < short or (not before and response.lstrip()[0].islower())
    if code or phrase or not words.find_all(r"[[\p{L}\p{M}\p{N}]--\p{LB=SA}]$", last):
        return None
    if words.find_all(SIGNATURE, response) or words.find_all(RESULT, last):
        return None
    if items and re.match(LIST_MARK, last) and all(item[-1].isalnum() for item in items):
        return None  # a list whose items are phrases
    if before and len(split_words(last)) < short and words.find_all(r"^(?!#).*[\p{L}\p{M}\p{N},;)}\]>]$", before[-1]):
        return None  # a short line after one that has no full stop either: verses, commands, a table
    return f"no closing punctuation after {' '.join(last.split()[-3:])!r}"


def is_statement(last: str, before: list[str]) -> bool:
    """Whether a line that ends in ";" is code, or a question in Greek."""
    code = re.search(r"[(){}\[\]<>=_]|^\s*(?:select|insert|update|delete|create|alter|drop|with)\b", last, re.I)
    after_code = any(line.rstrip().endswith((";", "{", "}")) for line in before[-1:])
    return bool(code or after_code or len(last.split()) < TELLING_WORDS or words.find_all(r"\p{Greek};$", last))


def is_bare_mark(last: str, before: list[str]) -> bool:
    """Whether the last line is a list item or a heading without words. A number alone is one if it goes on counting."""
    number = re.fullmatch(r"\s*(\d{1,9})\s*", last)
    if number:
        return any(re.match(rf"\s*{int(number[1]) - 1}[.)]", line) for line in before)
    return bool(re.fullmatch(r"\s*(?:[-*•]|\d+[.)]|#+)[\s*_.…]*", last))


def check_instruction_end(text: str) -> str | None:
    return f"the instruction ends with {text.split()[-1]!r}" if DANGLING.search(text.rstrip()) else None


LEAST_CHARACTERS = 20  # in shorter texts the share of symbols means nothing: "-5 %" is an answer
BROKEN = r"\uFFFD|\p{Co}|\p{Noncharacter_Code_Point}|[\p{Cc}--[\n\r\t]]"


def check_symbols(text: str, limit: float) -> str | None:
    """Control and replacement characters are always rejected."""
    if broken := words.find_all(BROKEN, text):
        return f"contains U+{ord(broken[0]):04X}"
    share = symbol_share(CODE_BLOCK.sub("", text))
    return f"{share:.2f} of its characters are symbols (limit {limit:g})" if share > limit else None


def symbol_share(text: str) -> float:
    """Symbols are neither letter, mark, digit nor space, nor a character that Unicode has yet to assign."""
    characters = len(words.find_all(r"\S", text))
    symbols = len(words.find_all(r"[^\p{L}\p{M}\p{N}\p{Cf}\p{Cn}\s]", text))
    return symbols / characters if characters >= LEAST_CHARACTERS else 0.0


# ChatML, Llama 2 and 3, Mistral, Gemma, Phi-3, Zephyr, DeepSeek (with its full-width bar), Alpaca and Vicuna; and what
# is left of ChatML when special tokens are dropped in decoding: a role alone on its line.
TEMPLATE = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|^### ?(?:Instruction|Response|Input|Human|Assistant):|^(?:USER|ASSISTANT):|^(?:system|user|assistant)$",
    re.M,
)


# <s> and </s> are the ends of a text for Llama 2 and Mistral, and strike words through in HTML: there they are a pair
# within a text, or are spoken of, as in "the <s> tag".
STRUCK = re.compile(r"<s>(?:(?!</?s>).)+</s>", re.S)
TEXT_END = re.compile(r"(?<![`'\"“‘])</?s>(?![`'\"”’]|\s+(?:tag|element)s?\b)")


def check_template(turns: list[str]) -> str | None:
    match = next((match for turn in turns if (match := TEMPLATE.search(turn) or find_text_end(turn))), None)
    return f"contains {match[0][:40]!r}" if match else None


def find_text_end(turn: str) -> re.Match | None:
    without = STRUCK.sub(" ", turn)
    return TEXT_END.search(without if without.strip() else turn)


# Small models that should write an instruction sometimes write the beginning of an article. A text is rejected only if
# it cannot be a request: each sentence begins like a statement about something, and no word asks or addresses anybody.
SUBJECT = re.compile(
    r"(?:the|an?|this|that|these|those|it|its|there|he|she|they|his|her|their|in|on|at|as|by|one|some|many|most)\b",
    re.I,
)
ADDRESSED = re.compile(
    r"\b(?:i|me|my|mine|we|us|our|you|your|please|whose|following|below)\b|[?_]|\.\.\.|:\s*$"
    r"|, (?:write|make|create|implement|show|give|list|name|find|explain|describe|define|compute|calculate|convert)\b",
    re.I,
)


def check_request(text: str) -> str | None:
    sentences = [part.strip() for part in re.split(r"(?<=[.!])\s+|\n+", text) if part.strip()]
    about = all(SUBJECT.match(sentence) for sentence in sentences) and not ADDRESSED.search(text)
    return "asks for nothing" if about and len(split_words(text)) >= TELLING_WORDS else None


# --- the rules, against other rows ----------------------------------------------------------------------------

GRAM = 13  # words; as in GPT-3's appendix C (arXiv 2005.14165)
LEAST_GRAM = 5  # words; a shorter question, such as "Neural networks:" of MMLU, must be a whole sentence or line
# A gram that stands in more questions with options belongs to their form: MMLU asks 50 times "For which of these two
# scenarios does the main character ... do something clearly morally wrong, according to ...".
MOST_QUESTIONS = 10
# "Which of the following statements is true?" is a question only with its options.
STEM = re.compile(r"\b(?:which|what|all|one|none) of (?:the following|these)\b")
SENTENCE_END = r"[\p{STerm}:;\n]"


def read_evaluation_texts(args):
    """(set, text, whether it counts if it is shorter than GRAM) of each text that training data must not contain. The
    options of a question stand in the third place, if it has some."""
    for name in evaluation_sets.FILES if args.bundled else ():
        for row in evaluation_sets.load_set(name):
            options = row["options"] if "options" in row and name != "boolq" else True  # "no" stands beside anything
            yield from ((name, text, options) for text in row.get("turns") or [row["question"]])
            yield from ((name, text, False) for text in [row.get("passage", ""), *row.get("options", [])])
    for path in args.evaluation:
        for row in records.load_split(path, "test"):
            yield str(path), instruction(row), True
            yield from ((str(path), text, False) for text in [*row["documents"], *row["gold"]])


class Forbidden:
    """An index of the evaluation sets' texts: `where` names the set that a row overlaps with.

    A long text counts by each of its 13-grams. A shorter one counts where it is one or several whole sentences or
    lines, and within a sentence if one of its options stands in the same row.
    """

    def __init__(self, texts):
        self.grams, self.lines, self.sizes, frequent = {}, {}, {GRAM}, Counter()
        for name, text, short_counts in texts:
            tokens, size = split_exactly(text), GRAM * characters_per_word(text)
            if len(tokens) >= size:
                grams = {*n_grams(tokens, size)}
                for gram in grams:
                    self.grams.setdefault(gram, name)
                self.sizes.add(size)
                frequent.update(grams if isinstance(short_counts, list) else ())
            elif short_counts and tokens:
                options = map(split_exactly, short_counts if isinstance(short_counts, list) else [])
                self.lines.setdefault(" ".join(tokens), []).append((name, [option for option in options if option]))
        for gram in (gram for gram, count in frequent.items() if count > MOST_QUESTIONS):
            del self.grams[gram]
        self.line_sizes = {line.count(" ") + 1 for line in self.lines}

    def where(self, turns: list[str]) -> str | None:
        split_turns = [split_sentences(turn) for turn in turns]
        row = " \n ".join(["", *(" ".join(tokens) for tokens, _ in split_turns), ""])
        for tokens, ends in split_turns:
            for gram in (gram for size in sorted(self.sizes) for gram in n_grams(tokens, size)):
                if gram in self.grams:
                    return f"{self.grams[gram]}: {gram!r}"
            for size in sorted(self.line_sizes):
                for start, line in enumerate(n_grams(tokens, size)):
                    for name, options in self.lines.get(line, ()):
                        whole = {start, start + size} <= ends and not (options and STEM.search(line))
                        beside = size >= LEAST_GRAM and any(f" {' '.join(option)} " in row for option in options)
                        if whole or beside:
                            return f"{name}: {line!r}"
        return None


def split_sentences(text: str) -> tuple[list[str], set[int]]:
    """The tokens of split_exactly, and where among them sentences and lines begin and end."""
    tokens, ends = [], {0}
    for token in find_tokens(rf"({TOKEN})|{SENTENCE_END}", text):
        if token:
            tokens.append(token)
        else:
            ends.add(len(tokens))
    return tokens, {*ends, len(tokens)}


PERMUTATIONS, BANDS = 128, 32  # P(a pair is a candidate): 0.9998 with a Jaccard index of 0.7, 0.87 with 0.5


def find_duplicates(examples: list[tuple[str, dict]], reasons: list[list[dict]], threshold: float) -> None:
    """Add a reason to each row whose instruction is a near-duplicate of an earlier row's (MinHash, Broder 1997).
    Candidates are compared exactly. They are the rows that pass, and all held-out rows: a model may be evaluated on the
    unfiltered splits."""
    from rensa import RMinHash, RMinHashLSH

    index, kept_shingles = RMinHashLSH(threshold, PERMUTATIONS, BANDS), {}
    for n, ((split, row), row_reasons) in enumerate(zip(examples, reasons)):
        tokens = split_exactly(instruction(row))
        shingles = set(n_grams(["", "", *tokens, "", ""], 3))  # padded: each token is in three, wherever it stands
        sketch = RMinHash(PERMUTATIONS, 0)
        sketch.update(sorted(shingles))
        for candidate in sorted(index.query(sketch)):
            other = examples[candidate][1]
            if other["documents"] != row["documents"]:
                continue
            candidate_shingles = kept_shingles[candidate]
            similarity = len(shingles & candidate_shingles) / len(shingles | candidate_shingles)
            if similarity >= threshold:
                why = f"near-duplicate of {other['id']} (Jaccard index {similarity:.2f})"
                row_reasons.append({"rule": "duplicate", "why": why})
                break
        if not row_reasons or split in ("validation", "test"):
            index.insert(n, sketch)
            kept_shingles[n] = shingles


# --- output -----------------------------------------------------------------------------------------------------


def count_rejections(reasons: list[list[dict]]) -> dict[str, dict[str, int]]:
    """{rule: {"rows": how many rows it rejects, "alone": how many of them no other rule rejects}}."""
    totals = Counter(reason["rule"] for row_reasons in reasons for reason in row_reasons)
    alone = Counter(row_reasons[0]["rule"] for row_reasons in reasons if len(row_reasons) == 1)
    return {rule: {"rows": totals[rule], "alone": alone[rule]} for rule in RULES}


def print_counts(rejections: dict, total: int) -> None:
    print(f"{'rule':12} {'rejected':>8} {'share':>7} {'alone':>8}")
    for rule, counts in rejections.items():
        print(f"{rule:12} {counts['rows']:8,} {counts['rows'] / total:7.1%} {counts['alone']:8,}")


def print_warnings(args, rejections: dict, rows: list[dict], reasons: list[list[dict]]) -> None:
    """The rules that say little about another language, and those that reject most rows: such a rule may not be meant
    for these examples."""
    if args.language != "en":
        print(
            f"note: with --language {args.language}, the rule 'statement' and the dangling words of 'ending' are left "
            "out, and 'refusal' knows English only"
        )
    for rule in (rule for rule, counts in rejections.items() if 2 * counts["rows"] > len(rows)):
        found = find_whys(rule, rows, reasons)
        print(f"warning: the rule {rule!r} rejects {len(found):,} of {len(rows):,} examples, for instance")
        for row_id, why in found[:3]:
            print(f"    {row_id}: {why}")
        print(f"  {advise(args, rule, found)}")


def find_whys(rule: str, rows: list[dict], reasons: list[list[dict]]) -> list[tuple[str, str]]:
    """(row's id, why) of each row that a rule rejects."""
    return [
        (row["id"], reason["why"])
        for row, row_reasons in zip(rows, reasons)
        for reason in row_reasons
        if reason["rule"] == rule
    ]


def advise(args, rule: str, found: list[tuple[str, str]]) -> str:
    """What to do about a rule that rejects too much."""
    if rule == "language":
        codes = Counter(code for _, why in found for code in set(re.findall(r"language (\w+), expected", why)))
        likeliest = [code for code, _ in codes.most_common(5)]
        return (
            f"--language is {args.language}, and these look like {', '.join(likeliest)}: give --language "
            f"{likeliest[0]} to keep that language, or --language any to keep all"
        )
    if rule == ALWAYS:
        return "They must not be trained on: use other examples, or give up that evaluation set"
    loosen = f"Loosen it with {FLAGS[rule]}, leave" if rule in FLAGS else "Leave"
    return f"{loosen} it out with --skip {rule}, or use better examples"


def check_something_is_left(args, kept: dict, rows: list[dict], reasons: list, rejections: dict) -> None:
    needed = "train" if "train" in kept else "all"
    prompts = len({row["group"] for row in kept[needed]})
    least = len(records.SPLITS) if needed == "all" and any(reasons) else 1
    if prompts < least:
        rule = max(rejections, key=lambda rule: rejections[rule]["rows"])
        found = find_whys(rule, rows, reasons)
        passing = f"no {'training ' * (needed == 'train')}example passes"
        if prompts:
            passing = (
                f"only {len(kept[needed])} of {len(rows):,} examples pass, with {prompts} different prompts, too few "
                f"to split into {', '.join(records.SPLITS)}"
            )
        raise InputError(
            f"{args.data}: {passing}; the rule {rule!r} rejected most, {len(found):,} of {len(rows):,} examples, for "
            f"instance {': '.join(found[0])}. {advise(args, rule, found)}"
        )
    for split in (split for split in kept if not kept[split]):
        print(f"warning: no {split} examples are left; steps that need the {split} split will fail")


def write_documents(source: Path, path: Path, kept: dict) -> int:
    """Write the documents and count them. An artifact keeps all of its own, since retrieval chooses among them."""
    if source.is_dir():
        path.write_bytes((source / "documents.jsonl").read_bytes())
        return path.read_bytes().count(b"\n")
    texts = dict.fromkeys(text for split_rows in kept.values() for row in split_rows for text in row["documents"])
    records.write(path, [{"id": f"document-{n:06d}", "text": text} for n, text in enumerate(texts)])
    return len(texts)


def draw_rejections(rejections: dict, total: int) -> str:
    """A bar per rule: the rows that it rejects, and filled, those that no other rule rejects."""
    from lib.report.page import COLOURS, INK, load_matplotlib, make_standalone, new_canvas, render_svg

    with load_matplotlib():
        figure, axes = new_canvas(
            0.7 + 0.3 * len(rejections), f"Rejected examples of {total:,} (filled: by this rule alone)"
        )
        positions = range(len(rejections), 0, -1)
        axes.barh(
            positions, [counts["rows"] for counts in rejections.values()], 0.7, color="none", edgecolor=COLOURS[2]
        )
        axes.barh(
            positions, [counts["alone"] for counts in rejections.values()], 0.7, color=COLOURS[2], edgecolor=COLOURS[2]
        )
        for y, counts in zip(positions, rejections.values()):
            axes.annotate(f"{counts['rows']:,}", (counts["rows"], y), (4, 0), textcoords="offset points", va="center",
                          fontsize=8, color=INK)  # fmt: skip
        axes.set_yticks(positions, list(rejections))
        axes.set_xticks([])
        axes.margins(x=0.1)
        return make_standalone(render_svg(figure, "rejections"))


def estimate_cost(job):
    from lib.forecast.costs import Cost, rate_seconds

    return Cost(rate_seconds(job.rates["rows"]), {})


if __name__ == "__main__":
    cli.run(main, make_parser)
