"""Filter training data: examples that break a rule are set aside, each with all its reasons.

    python scripts/filter_data.py --data data/magpie/raw --evaluation data/factbook/raw --output data/magpie/filtered
    python scripts/filter_data.py --data my-rows.jsonl --scorer embedding --output data/mine/filtered

Takes a data artifact, whose splits are filtered separately and stay as they are, or a file of examples in any format
that generate_data.py accepts, which is split after filtering. Leaves a data artifact with two more files:
rejected.jsonl and rejections.svg. The same examples and thresholds give the same bytes.
"""

import re
import unicodedata
from collections import Counter
from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import InputError
from lib.data import evaluation_sets, records
from lib.engines import scorers

# {rule: what it rejects}, in the order in which reasons are listed. Thresholds are flags.
RULES = {
    "instruction": "too few or too many words (numbers count, documents do not; a CJK character is a word)",
    "response": "too few or too many words",
    "language": "the instruction or the response is in another language; texts too short to tell pass",
    "repetition": "too many 4-grams of the instruction or the response have occurred before in it",
    "refusal": "the response begins by declining",
    "ending": 'the response breaks off, or the instruction does after a word like "the"',
    "symbols": "the instruction or the response is mostly symbols, or contains broken characters",
    "template": "a turn contains a chat template's special token or its bare role",
    "statement": "the instruction asks for nothing",
    "score": "--scorer rates the response too low",
    "overlap": "13 consecutive words, or a whole shorter question, are also in an evaluation set",
    "duplicate": "the instruction is nearly that of an example already accepted, about the same documents",
}
ALWAYS = "overlap"  # the one rule that --skip cannot leave out
CJK = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
WORD = re.compile(rf"{CJK}|(?:(?!{CJK})[^\W_])+")


def make_parser():
    table = "\n".join(f"    {name:13} {reason}" for name, reason in RULES.items())
    parser = cli.parser(f"{__doc__}\nThe rules, and what each rejects:\n\n{table}\n", __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--data", type=Path, required=True, help="directory of generate_data.py, or a file of rows")
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
    splits = read_splits(args.data)
    forbidden = Forbidden(read_evaluation_texts(args))
    language = open_language_model(args.language)
    inputs = {"data": args.data} | {f"evaluation {n}": path for n, path in enumerate(args.evaluation, 1)}
    inputs |= {name: evaluation_sets.find_file(name) for name in evaluation_sets.FILES if args.bundled}

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
    kept = {
        split: [row for (name, row), row_reasons in zip(examples, reasons) if name == split and not row_reasons]
        for split in splits
    }
    check_something_is_left(args, kept, examples, reasons, rejections)
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


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers without punctuation; a Chinese, Japanese or Korean character is one."""
    return WORD.findall(re.sub("['’]", "", text.casefold()))


def n_grams(words: list[str], n: int) -> list[str]:
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def score_rows(args, rows: list[dict]) -> list[float | None]:
    if not args.scorer or "score" in args.skip:
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
    objections = {
        "instruction": check_length(request, args.min_instruction_words, args.max_instruction_words),
        "response": check_length(answer, args.min_response_words, args.max_response_words),
        "language": check_each(texts, lambda text: check_language(text, args.language, language)) if language else None,
        "repetition": check_each(texts, lambda text: check_repetition(text, args.max_repetition)),
        "refusal": check_refusal(answer),
        "ending": check_ending(answer) or check_instruction_end(request),
        "symbols": check_each(texts, lambda text: check_symbols(text, args.max_symbols)),
        "template": check_template(turns),
        "statement": check_request(request),
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
    if len(split_words(text)) < TELLING_WORDS:
        return None
    probabilities = language(text)
    likeliest = max(probabilities, key=probabilities.get)
    if probabilities[code] >= LEAST_PROBABILITY or likeliest == NO_LANGUAGE:
        return None
    return f"language {likeliest}, expected {code}"


# The number or bullet of a list item. It is removed before n-grams are counted: it would hide that items repeat.
LIST_MARK = r"^[ \t]*(?:[-*•]|\d+[.)])(?:[ \t]+|$)"


def check_repetition(text: str, limit: float, n: int = 4) -> str | None:
    """seq-rep-n of Welleck et al. (arXiv 1908.04319), 1 - distinct n-grams / n-grams, on words."""
    grams = n_grams(split_words(re.sub(LIST_MARK, "", text, flags=re.M)), n)
    share = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return f"{share:.2f} of its {n}-grams are repeated (limit {limit:g})" if share > limit else None


# Matched only at the beginning, and only with a verb that is declined: "I can't believe it!" begins a story.
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


# Words after which a sentence goes on.
DANGLING = re.compile(
    r"\b(?:an?|the|and|or|but|nor|of|to|in|on|at|by|for|with|from|as|into|about|is|are|was|were|be|been|will|would|can"
    r"|could|should|may|might|must|has|have|had|its|their|his|her|your|our|my|this|these|those|that|which|who|than"
    r"|because|if|when|while|such)$"
)
SHORT_WORDS = 10  # a shorter answer is a phrase and needs no full stop; so is a single line that begins in lower case
SIGNATURE = re.compile(r",\s*\n\s*(?:[A-Z][\w.'-]*\s*){1,4}$")  # "Best regards,", and a name below


def check_ending(response: str) -> str | None:
    """Reject a response that ends in an open code block, in a list item without words, or in the middle of a
    sentence."""
    if len(re.findall(r"^[ \t]*```", response, re.M)) % 2:
        return "a code block is not closed"
    *before, last = response.strip().splitlines()
    if before and re.fullmatch(r"\s*(?:[-*•]|\d+[.)]?|#+)\W*", last):
        return f"its last line is {last.strip()!r}"
    if last[-1] in ",:;-–—([{/&=" or DANGLING.search(last):
        return f"ends with {last.split()[-1]!r}"
    phrase = len(split_words(response)) < SHORT_WORDS or (not before and response.lstrip()[0].islower())
    if not last[-1].isalnum() or phrase or SIGNATURE.search(response):
        return None
    items = [line.rstrip() for line in before if re.match(LIST_MARK, line)]
    if items and re.match(LIST_MARK, last) and all(item[-1].isalnum() for item in items):
        return None  # a list whose items are phrases
    return f"no closing punctuation after {' '.join(last.split()[-3:])!r}"


def check_instruction_end(text: str) -> str | None:
    return f"the instruction ends with {text.split()[-1]!r}" if DANGLING.search(text.rstrip()) else None


LEAST_CHARACTERS = 20  # in shorter texts the share of symbols means nothing: "-5 %" is an answer


def check_symbols(text: str, limit: float) -> str | None:
    """Symbols are neither letter, mark, digit nor space. Control and replacement characters are always rejected."""
    broken = [c for c in text if c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Co", "Cn") and c not in "\n\r\t")]
    if broken:
        return f"contains U+{ord(broken[0]):04X}"
    alphanumeric = [unicodedata.category(c)[0] in "LMN" for c in text if not c.isspace()]
    share = 1 - sum(alphanumeric) / len(alphanumeric) if len(alphanumeric) >= LEAST_CHARACTERS else 0.0
    return f"{share:.2f} of its characters are symbols (limit {limit:g})" if share > limit else None


# ChatML, Llama 2 and 3, Mistral, Gemma, Phi-3, Zephyr, DeepSeek (with its full-width bar), Alpaca and Vicuna; and what
# is left of ChatML when special tokens are dropped in decoding: a role alone on its line.
TEMPLATE = re.compile(
    r"<[|｜][^<>|｜\s]{1,40}[|｜]>|\[/?INST\]|<</?SYS>>|\[/?(?:AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|</?s>"
    r"|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|^### ?(?:Instruction|Response|Input|Human|Assistant):|^(?:USER|ASSISTANT):|^(?:system|user|assistant)$",
    re.M,
)


def check_template(turns: list[str]) -> str | None:
    match = next(filter(None, map(TEMPLATE.search, turns)), None)
    return f"contains {match[0][:40]!r}" if match else None


# Small models that should write an instruction sometimes write the beginning of an article. A text is rejected only if
# it cannot be a request: each sentence begins like a statement about something, and no word asks or addresses anybody.
SUBJECT = re.compile(
    r"(?:the|an?|this|that|these|those|it|its|there|he|she|they|his|her|their|in|on|at|as|by|one|some|many|most)\b",
    re.I,
)
ADDRESSED = re.compile(r"\b(?:i|me|my|mine|we|us|our|you|your|please|whose|following|below)\b|[?_]|\.\.\.|:\s*$", re.I)


def check_request(text: str) -> str | None:
    sentences = [part.strip() for part in re.split(r"(?<=[.!])\s+|\n+", text) if part.strip()]
    about = all(SUBJECT.match(sentence) for sentence in sentences) and not ADDRESSED.search(text)
    return "asks for nothing" if about and len(split_words(text)) >= TELLING_WORDS else None


# --- the rules, against other rows ----------------------------------------------------------------------------

GRAM = 13  # words; as in GPT-3's appendix C (arXiv 2005.14165)
LEAST_GRAM = 5  # words; shorter questions, such as "Neural networks:" of MMLU, must match a whole sentence or line


def read_evaluation_texts(args):
    """(set, text, whether it counts if it is shorter than GRAM) of each text that training data must not contain."""
    for name in evaluation_sets.FILES if args.bundled else ():
        for row in evaluation_sets.load_set(name):
            yield from ((name, text, True) for text in row.get("turns") or [row["question"]])
            yield from ((name, text, False) for text in [row.get("passage", ""), *row.get("options", [])])
    for path in args.evaluation:
        for row in records.load_split(path, "test"):
            yield str(path), instruction(row), True
            yield from ((str(path), text, False) for text in [*row["documents"], *row["gold"]])


class Forbidden:
    """An index of the evaluation sets' texts: `where` names the set that a row overlaps with."""

    def __init__(self, texts):
        self.grams, self.sentences, self.sizes = {}, {}, {GRAM}
        for name, text, short_counts in texts:
            words = split_words(text)
            if len(words) >= GRAM:
                self.grams |= {gram: name for gram in n_grams(words, GRAM) if gram not in self.grams}
            elif short_counts and len(words) >= LEAST_GRAM:
                self.grams.setdefault(" ".join(words), name)
                self.sizes.add(len(words))
            elif short_counts and words:
                self.sentences.setdefault(" ".join(words), name)

    def where(self, turns: list[str]) -> str | None:
        for turn in turns:
            words = split_words(turn)
            for gram in (gram for size in sorted(self.sizes) for gram in n_grams(words, size)):
                if gram in self.grams:
                    return f"{self.grams[gram]}: {gram!r}"
            for sentence in (" ".join(split_words(part)) for part in re.split(r"[.!?:\n]+", turn)):
                if sentence in self.sentences:
                    return f"{self.sentences[sentence]}: {sentence!r}"
        return None


PERMUTATIONS, BANDS = 128, 32  # P(a pair is a candidate): 0.9998 with a Jaccard index of 0.7, 0.87 with 0.5


def find_duplicates(examples: list[tuple[str, dict]], reasons: list[list[dict]], threshold: float) -> None:
    """Add a reason to each row whose instruction is a near-duplicate of an earlier row's (MinHash, Broder 1997).
    Candidates are compared exactly. They are the rows that pass, and all held-out rows: a model may be evaluated on the
    unfiltered splits."""
    from rensa import RMinHash, RMinHashLSH

    index, kept_shingles = RMinHashLSH(threshold, PERMUTATIONS, BANDS), {}
    for n, ((split, row), row_reasons) in enumerate(zip(examples, reasons)):
        words = split_words(instruction(row))
        shingles = set(n_grams(["", "", *words, "", ""], 3))  # padded: each word is in three, wherever it stands
        sketch = RMinHash(PERMUTATIONS, 0)
        sketch.update(sorted(shingles))
        for candidate in sorted(index.query(sketch)):
            candidate_shingles = kept_shingles[candidate]
            similarity = len(shingles & candidate_shingles) / len(shingles | candidate_shingles)
            other = examples[candidate][1]
            if similarity >= threshold and other["documents"] == row["documents"]:
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


def check_something_is_left(args, kept: dict, examples: list, reasons: list, rejections: dict) -> None:
    needed = "train" if "train" in kept else "all"
    if not kept[needed]:
        rule = max(rejections, key=lambda rule: rejections[rule]["rows"])
        named_reasons = (
            (row["id"], reason) for (_, row), row_reasons in zip(examples, reasons) for reason in row_reasons
        )
        example = next(f"{row_id}: {reason['why']}" for row_id, reason in named_reasons if reason["rule"] == rule)
        raise InputError(
            f"{args.data}: no {'training ' * (needed == 'train')}example passes; the rule {rule!r} rejected most, "
            f"{rejections[rule]['rows']:,} of {len(examples):,} examples, for instance {example}. Loosen its "
            f"threshold, leave it out with --skip {rule}, or use better examples"
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
