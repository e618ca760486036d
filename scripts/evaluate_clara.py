"""Evaluate CLaRa's compression: answers from compressed documents, compared with answers from text and from nothing.

    python scripts/evaluate_clara.py --models models/smollm2-135m-clara --text-model models/smollm2-135m-lora \\
        --data data/factbook/clara --output reports/smollm2-135m-clara

Takes one or more models from the train_stage scripts (for instance of different rates), a text model as the baseline
(--text-model: the same base, fine-tuned), and the test split of a data artifact from `generate_data.py --source clara`.
The same questions are answered from different inputs: no document; the text of the right documents, in full or cut to
as many tokens as there are vectors; their vectors; the vectors of another question's documents; and the k documents
that BM25, MiniLM or the model itself retrieves from all of them. Leaves predictions.jsonl, comparison.json, report.md
and index.html. Finished answers are saved in --run-dir. If the run is killed, the same command resumes it.
"""

import sys
from pathlib import Path

from lib.core import artifact, cli, compute
from lib.core.cli import InputError
from lib.model import directory, loading
from lib.model.directory import ModelDirectory

# Results are stored under these keys; the values are the labels for people. A key that belongs to one model is followed
# by the model's name: gold-compressed/16x.
WORDS = {
    # ways to answer: what is read
    "closed-book": "closed book",
    "text-cut": "truncated text",
    "text-full": "full text",
    "bm25-text": "top {k} of BM25, as text",
    "minilm-text": "top {k} of MiniLM, as text",
    "gold-compressed": "{model} compressed",
    "other-compressed": "{model} compressed, for another question",
    "minilm-compressed": "top {k} of MiniLM, {model} compressed",
    "reasoner-compressed": "top {k} of the reasoner, {model} compressed",
    # what finds documents
    "bm25": "BM25",
    "minilm": "MiniLM",
    "reasoner": "{model} reasoner",
    # which documents the first token is timed with
    "gold-first": "the right documents",
    "minilm-first": "top {k} of MiniLM",
    # targets
    "f1-text-full": "token F1 with the right documents, relative to full text",
    "f1-closed-book": "token F1 with the right documents, relative to closed book",
    "f1-text-cut": "token F1 with the right documents, relative to truncated text",
    "recall-minilm": "recall@5 of the reasoner, relative to MiniLM",
    "prompt-length": "prompt with {k} documents: times shorter than text",
    "first-token": "first token with {k} documents: times faster than text",
}
FOUND = ("minilm-", "bm25-", "reasoner-")  # ways whose documents were searched for, k of them
RECALLS, SHOWN = (1, 3, 5), 12
SCORES = ("token_f1", "exact_match", "contained")


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--models", type=Path, nargs="+", required=True, help="model directories from train_stage scripts"
    )
    files.add_argument(
        "--text-model", type=Path, required=True, help="text model to compare with: the same base, fine-tuned"
    )
    files.add_argument("--base", type=Path, help="base model directory (default: as recorded in the model)")
    files.add_argument("--data", type=Path, required=True, help="data artifact from generate_data.py --source clara")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument(
        "--run-dir", type=Path, help="directory for finished answers and logs (default: runs/<name of the output>)"
    )
    files.add_argument(
        "--against", type=Path, help="comparison.json of another evaluation, shown beside this one (default: none)"
    )
    files.add_argument("--estimate", type=Path, help="estimate (estimate.py) to compare with (default: none)")
    options = parser.add_argument_group("options")
    options.add_argument("--samples", type=cli.integer(1), help="test questions; all if there are fewer")
    options.add_argument("--k", type=cli.integer(1), help="retrieved documents to read")
    options.add_argument("--max-new-tokens", type=cli.integer(1), help="maximum tokens per answer")
    options.add_argument("--batch-size", type=cli.integer(1), help="questions answered at once")
    options.add_argument(
        "--timed", type=cli.integer(3), help="questions timed one by one to the first token, at least 3"
    )
    options.add_argument(
        "--seed", type=cli.integer(0), help="random seed for the questions' choice and for the bootstrap"
    )
    loading.add_load_flags(options)
    return parser


def main(args):
    # --- check the inputs before a model is loaded ----------------------------------------------------
    from lib.clara import network, passages
    from lib.core import runlog, wording
    from lib.data import records, retrieval
    from lib.report import lineage, page

    names = {path: name_model(path, network.read_config(path), args.models) for path in args.models}
    given = {f"model {n}": path for n, path in enumerate(args.models)} | {
        "text model": args.text_model,
        "data": args.data,
    }
    identity = {name: artifact.identify(path)["digest"] for name, path in given.items()}
    rows, golds, documents = passages.test_questions(args.data, args.samples, args.seed)
    base, text_reader = (
        network.open_base(args.models[0], args.base),
        directory.open_directory(args.text_model, args.base),
    )
    about = {"base": artifact.identify(base.path)["digest"], "documents_digest": records.digest(documents)}
    stored = read_comparison(args.against) if args.against else None
    if args.estimate:
        artifact.read(args.estimate, "estimate")
    run = runlog.Run(
        args.run_dir or Path("runs") / args.output.name,
        identity | {key: getattr(args, key) for key in ("samples", "k", "max_new_tokens", "seed", "precision")},
    )
    answers = Answers(run.path / "predictions.jsonl", rows)

    # --- which documents each question is about, by words and by meaning ---------------------------------
    compute.use_threads(args.threads)  # before torch's first product, which MiniLM makes
    asked, place = [row.question for row in rows], {document: n for n, document in enumerate(documents)}
    right = [[place[one] for one in gold] for gold in golds]
    found = {
        name: retrieval.open_retriever(name, documents)(asked, max(args.k, *RECALLS)).tolist()
        for name in retrieval.RETRIEVERS
    }

    expected = check_memory(base, text_reader, args, asked, documents)

    # --- answers, way by way --------------------------------------------------------------------------------
    measured, vectors, in_turns = {}, 0, {}
    for path, name in names.items():
        reader = open_reader(path, args)
        vectors = max(vectors, reader.clara.shape.vectors)
        ways = compressed_ways(name, reader, rows, right, documents, found, args.k)
        reader.merge()
        measured |= measure(reader, ways, answers, args)
        for which, read in (("gold", right), ("minilm", [some[: args.k] for some in found["minilm"]])):
            texts = as_text(reader, rows, lambda n, read=read: [documents[m] for m in read[n]])
            in_turns[name, f"{which}-first"] = first_tokens(reader, texts, ways[f"{which}-compressed/{name}"], args)
        reader.close()
    reader = open_text(text_reader, args)
    reader.merge()
    measured = (
        measure(reader, text_ways(reader, rows, golds, documents, found, vectors, args.k), answers, args) | measured
    )
    reader.close()

    # --- write ------------------------------------------------------------------------------------------------
    models = [*names.values()]
    compared = compare(args, models, measured, in_turns, answers, found, right, len(documents)) | about
    if stored:
        compared["against"] = compare_with_stored(args.against, stored, compared)
    stages, gaps = {}, []
    for path in given.values():
        lineage.collect(path, stages, gaps)
    stages[args.output.resolve()] = artifact.run_metadata("clara-evaluation", args)
    compared |= lineage.summarise(stages, gaps, args.estimate)
    with artifact.write_artifact(args.output, "clara-evaluation", args, given | {"base": base.path}) as build:
        records.write(build.path / "predictions.jsonl", [one for way in measured for one in answers.of(way)])
        artifact.write_json(build.path / "comparison.json", compared)
        blocks = build_blocks(compared, answers)
        (build.path / "report.md").write_text(page.as_markdown(blocks), encoding="utf-8")
        (build.path / "index.html").write_text(page.as_html(blocks, {}), encoding="utf-8")
        build.metrics = {name: value for name, value in compared.items() if name != "stages"}
        build.notes["expected_memory_bytes"] = expected
    run.finish()
    for line in [one["said"] for one in compared["verdicts"]]:
        print(line)
    for name, one in compared["ways"].items():
        print(f"{describe_key(name, args.k):48} token F1 {wording.interval(one['token_f1'])}")
    print(lineage.as_text(compared))
    print(args.output)


def read_comparison(path: Path) -> dict:
    stored = cli.read_json(path)
    if missing := [key for key in ("base", "documents_digest", "questions", "k", "ways") if key not in stored]:
        raise InputError(f"{path}: {missing[0]} is missing; expected a comparison.json of evaluate_clara.py")
    return stored


def check_memory(
    base: ModelDirectory, text_reader: ModelDirectory, args, questions: list[str], documents: list[str]
) -> int | None:
    """Say what the longest prompts will take, those of k documents as text; OutOfMemory where there is clearly less."""
    from lib.budget import memory
    from lib.data import records
    from lib.engines import opening

    texts = sorted(documents, key=len)[-args.k :]
    asked = records.question_with_documents(max(questions, key=len), texts)
    prompt, adapter = (
        opening.longest_prompt(base, [records.message("user", asked)]),
        directory.read_adapter_shape(text_reader),
    )

    def need(config, _, how, batch, new):
        return memory.estimate_answering(config, adapter, how, batch, prompt, new)

    return opening.check_memory(base, args, need, prompt + args.max_new_tokens, args.max_new_tokens)


def name_model(path: Path, shape, paths: list[Path]) -> str:
    """A model's name in keys and in the report: its rate, and its directory where there are several."""
    return f"{shape.compress_rate}x" + (f" {path.name}" if len(paths) > 1 else "")


def describe_key(key: str, k: int) -> str:
    kind, _, model = key.partition("/")
    return WORDS[kind].format(k=k, model=model)


# --- answering ---------------------------------------------------------------------------------------------


class Answers:
    """The answers so far, in a file that a kill cuts at most within a line."""

    def __init__(self, file: Path, rows: list):
        from lib.core.kept import Kept

        self.rows = rows
        self.known = Kept(file, "way", "n", belongs=lambda one: one["n"] < len(rows))
        self.known.print_count("answers")

    def add(self, way: str, engine, prompts: list, args) -> None:
        """Answer the questions that this way has not answered."""
        from tqdm import tqdm

        from lib.data import metrics

        left = [n for n in range(len(self.rows)) if (way, n) not in self.known]
        with tqdm(total=len(left), unit="row", desc=describe_key(way, args.k), file=sys.stderr) as bar:
            for start in range(0, len(left), 4 * args.batch_size):
                some = left[start : start + 4 * args.batch_size]
                made = engine.generate([prompts[n] for n in some], args.max_new_tokens)
                scored = []
                for n, answer in zip(some, made):
                    row, text = self.rows[n], answer.text.strip()
                    scored.append({
                        "way": way, "n": n, "question": row.question, "gold": row.golds, "answer": text,
                        "prompt_tokens": answer.prompt_tokens, **metrics.score_answer(text, row.golds),
                    })  # fmt: skip
                self.known.add(scored)
                bar.update(len(some))

    def of(self, way: str) -> list[dict]:
        return [self.known[way, n] for n in range(len(self.rows))]


def measure(engine, ways: dict[str, list], answers: Answers, args) -> dict[str, dict]:
    """Answer by each way."""
    measured = {}
    for way, prompts in ways.items():
        answers.add(way, engine, prompts, args)
        measured[way] = {"prompt_tokens": sum(map(len, prompts)) / len(prompts)}
    return measured


def first_tokens(engine, texts: list, vectors: list, args) -> dict:
    """Seconds to the first token of an answer, from text and from vectors: by one model, question by question in turns.
    The first question is not counted."""
    from lib.data import metrics

    pairs = [*zip(texts, vectors)][: args.timed + 1]
    seconds = [[engine.generate([prompt], 1)[0].prompt_seconds for prompt in pair] for pair in pairs]
    text, read = zip(*(seconds[1:] or seconds))
    ratio = metrics.ratio(text, read, args.seed)
    return {"text": metrics.spread(text), "vectors": metrics.spread(read), "ratio": ratio}


def open_reader(path: Path, args):
    from lib.clara import network
    from lib.clara.clara_engine import ClaraEngine

    how = dict(load=args.precision, threads=args.threads, batch=args.batch_size, **loading.placement_arguments(args))
    return ClaraEngine(path, network.open_base(path, args.base), **how)


def open_text(text_reader: ModelDirectory, args):
    from lib.engines import transformers_engine

    how = dict(load=args.precision, threads=args.threads, batch=args.batch_size, **loading.placement_arguments(args))
    return transformers_engine.Transformers(text_reader, **how)


def text_ways(engine, rows, golds, documents, found, vectors: int, k: int) -> dict[str, list]:
    """Prompts of the ways that read text; a text that is cut keeps as many tokens as a piece has `vectors`."""
    from lib.data import retrieval

    def cut(text: str) -> str:
        return engine.tokenizer.decode(engine.answer_ids(text)[:vectors])

    ways = {
        "closed-book": as_text(engine, rows, lambda n: []),
        "text-cut": as_text(engine, rows, lambda n: [*map(cut, golds[n])]),
        "text-full": as_text(engine, rows, golds.__getitem__),
    }
    for name in retrieval.RETRIEVERS:
        ways[f"{name}-text"] = as_text(engine, rows, lambda n, name=name: [documents[m] for m in found[name][n][:k]])
    return ways


def as_text(engine, rows, of) -> list:
    """Prompts of all questions about the documents of(n)."""
    from lib.data import records

    contents = [records.question_with_documents(row.question, of(n)) for n, row in enumerate(rows)]
    return [engine.prompt_ids(records.message("user", content)) for content in contents]


def compressed_ways(name: str, reader, rows, right, documents, found, k: int) -> dict[str, list]:
    """Prompts of the ways that read one model's vectors. What it finds itself is put into `found`."""
    asked, compressed = [row.question for row in rows], reader.compress(documents)

    def prompts(of) -> list:
        return [reader.prompt(question, [compressed[m] for m in of(n)]) for n, question in enumerate(asked)]

    ways = {
        f"gold-compressed/{name}": prompts(right.__getitem__),
        f"other-compressed/{name}": prompts(lambda n: right[(n + 1) % len(right)]),
        f"minilm-compressed/{name}": prompts(lambda n: found["minilm"][n][:k]),
    }
    if reader.searches:
        import torch

        of_piece = [n for n, pieces in enumerate(compressed) for _ in pieces]
        pieces = reader.search(asked, torch.cat(compressed), len(of_piece)).tolist()
        own = found[f"reasoner/{name}"] = [list(dict.fromkeys(of_piece[m] for m in some)) for some in pieces]
        ways[f"reasoner-compressed/{name}"] = prompts(lambda n: own[n][:k])
    return ways


# --- comparing -----------------------------------------------------------------------------------------------


def compare(
    args, models: list[str], measured: dict, in_turns: dict, answers: Answers, found: dict, right: list, documents: int
) -> dict:
    """Every figure of the report."""
    from lib.data import metrics, retrieval

    f1 = {way: [row["token_f1"] for row in answers.of(way)] for way in measured}
    ways, kinds = {}, group_by_kind(answers.rows)
    for way, one in measured.items():
        scores = {name: metrics.interval([row[name] for row in answers.of(way)], args.seed) for name in SCORES}
        by_kind = {kind: metrics.interval([f1[way][n] for n in some], args.seed) for kind, some in kinds.items()}
        ways[way] = (
            one | scores | {"of_full_text": metrics.ratio(f1[way], f1["text-full"], args.seed), "by_kind": by_kind}
        )
    hits = {name: {str(k): retrieval.recall(ranked, right, k) for k in RECALLS} for name, ranked in found.items()}
    recall = {name: {k: metrics.interval(each, args.seed) for k, each in one.items()} for name, one in hits.items()}
    return {
        "tag": args.output.name, "questions": len(answers.rows), "documents": documents, "k": args.k,
        "of_several_documents": sum(len(one) > 1 for one in right), "ways": ways, "recall": recall,
        "verdicts": compare_ways(args, models, answers),
        "targets": check_targets(args, models, ways, f1, hits, in_turns),
        "first_token": [{"model": name, "read": which, **one} for (name, which), one in in_turns.items()],
    }  # fmt: skip


def group_by_kind(rows: list) -> dict[str, list[int]]:
    """{kind of right answer: its questions}. A figure must be read as it stands; which word it is, a trace may tell."""
    kinds = {"words": [], "figures": []}
    for n, row in enumerate(rows):
        kinds["figures" if any(map(str.isdigit, row.golds[0])) else "words"].append(n)
    return {kind: some for kind, some in kinds.items() if some}


def compare_ways(args, models: list[str], answers: Answers) -> list[dict]:
    """Whether vectors tell more than as many tokens of the text, and more than any other's do; question by question."""
    from lib.core import wording
    from lib.data import metrics

    made = []
    for model in models:
        way = f"gold-compressed/{model}"
        for other, words, otherwise in (
            ("text-cut", "text truncated to as many tokens", ""),
            (
                f"other-compressed/{model}",
                "vectors of another question's documents",
                "; so the content of the vectors is not used, and any gain is in the form of the answers",
            ),
        ):
            ours, theirs = (dict(enumerate(answers.of(one))) for one in (way, other))
            gap = metrics.compare_paired(ours, theirs, "token_f1", args.seed)
            said = f"{describe_key(way, args.k)}, compared with {words}: token F1 {wording.difference(gap)}"
            said += otherwise if gap["verdict"] != "better" else ""
            made.append({"way": way, "against": other, "said": said, **gap})
    return made


def compare_with_stored(path: Path, stored: dict, here: dict) -> dict:
    """What another evaluation found by the ways of this one; of documents that were found it must read as many."""
    same = all(stored[key] == here[key] for key in ("base", "documents_digest"))
    ways = [way for way in here["ways"] if stored["k"] == here["k"] or not way.startswith(FOUND)]
    there = {way: stored["ways"][way]["token_f1"] for way in ways if way in stored["ways"]}
    return {"file": str(path), "comparable": same, "questions": stored["questions"], "ways": there if same else {}}


def check_targets(args, models: list[str], ways: dict, f1: dict, hits: dict, in_turns: dict) -> list[dict]:
    """What compression is for, against what was measured."""
    from lib.data import metrics

    made = []

    def check_target(model: str, target: str, least: float, ratio: dict | None) -> None:
        if ratio:
            verdict = "reached" if ratio["low"] >= least else "not reached" if ratio["high"] < least else metrics.NOISE
            made.append({"model": model, "target": target, "least": least, "verdict": verdict, **ratio})

    for model in models:
        for against, least in (("text-full", 0.85), ("closed-book", 2), ("text-cut", 2)):
            ratio = metrics.ratio(f1[f"gold-compressed/{model}"], f1[against], args.seed)
            check_target(model, f"f1-{against}", least, ratio)
        if reasoner := hits.get(f"reasoner/{model}"):
            check_target(model, "recall-minilm", 1, metrics.ratio(reasoner["5"], hits["minilm"]["5"], args.seed))
        text, read = ways["minilm-text"], ways[f"minilm-compressed/{model}"]
        shorter = text["prompt_tokens"] / read["prompt_tokens"]
        check_target(model, "prompt-length", 10, dict.fromkeys(("mean", "low", "high"), shorter))
        check_target(model, "first-token", 5, in_turns[model, "minilm-first"]["ratio"])
    return made


# --- writing ---------------------------------------------------------------------------------------------------


def build_blocks(found: dict, answers: Answers) -> list[tuple]:
    from lib.core import wording
    from lib.report import lineage

    k = found["k"]
    answered = [
        [
            describe_key(way, k), f"{one['prompt_tokens']:.0f}", wording.interval(one["token_f1"]),
            format_ratio(one["of_full_text"]), *(wording.interval(one[name]) for name in SCORES[1:]),
        ]
        for way, one in found["ways"].items()
    ]  # fmt: skip
    recalls = [
        [describe_key(name, k), *(wording.interval(one[str(first)]) for first in RECALLS)]
        for name, one in found["recall"].items()
    ]
    sooner = [
        [
            f"{describe_key(one['read'], k)}, {one['model']}",
            *(format_milliseconds(one[key]) for key in ("text", "vectors")),
            format_ratio(one["ratio"]),
        ]
        for one in found["first_token"]
    ]
    held = [
        [describe_key(one["target"], k), one["model"], f"{one['least']:g}×", format_ratio(one), one["verdict"]]
        for one in found["targets"]
    ]
    compressed = [way for way in found["ways"] if way.startswith("gold-compressed/")]
    shown = ["closed-book", "text-cut", "text-full", *compressed]
    lines = [
        [said[0]["question"], said[0]["gold"][0], *map(format_answer, said)]
        for said in list(zip(*map(answers.of, shown)))[:SHOWN]
    ]
    introduction = (
        f"{found['questions']} questions of the test split, {found['of_several_documents']} of them about several "
        f"documents; {found['documents']:,} documents to search. The first column is the model's input: no document, "
        "the right documents, or retrieved documents. Brackets: 95 % bootstrap interval over the questions."
    )
    notes = [
        "Truncated text: each document is truncated to as many tokens as a chunk has vectors. For another question: "
        "shows what can be answered from the form of the question alone.",
        "First token: median and range over questions, from prompt to first token, without retrieval and compression. "
        "Runs with text and with vectors are interleaved, in one model. Adapters are merged into the weights.",
        "A text model trained with the right documents alone, as by `make lora`, has not learnt to ignore other "
        "documents; the generator has. Retrieved documents therefore help the text model less.",
    ]
    columns = ["input", "tokens and vectors", "token F1", "relative to full text", "exact match", "contained"]
    return [
        ("title", f"{found['tag']}: answers from compressed documents"),
        ("text", introduction),
        ("notes", [f"{one['said']}." for one in found["verdicts"]]),
        ("heading", "Targets"),
        ("table", "words", ["target", "model", "threshold", "measured", "verdict"], held),
        ("heading", "Answers"),
        ("table", "numbers", columns, answered),
        ("notes", notes),
        *build_kind_blocks(found),
        ("heading", "First token"),
        ("table", "numbers", ["input", "from text, ms", "from vectors, ms", "times faster"], sooner),
        ("heading", "Retrieval"),
        ("table", "numbers", ["retriever", *(f"recall@{first}" for first in RECALLS)], recalls),
        *build_stored_blocks(found),
        ("heading", "Sample answers"),
        ("table", "answers", ["question", "reference answer", *(describe_key(way, k) for way in shown)], lines),
        *lineage.build_blocks(found),
    ]


def build_kind_blocks(found: dict) -> list[tuple]:
    from lib.core import wording

    ways = found["ways"]
    kinds = next(iter(ways.values()))["by_kind"]
    told = "Token F1 by kind of reference answer: words only, or containing a figure, which must be read exactly."
    lines = [
        [describe_key(way, found["k"]), *(wording.interval(one["by_kind"][kind]) for kind in kinds)]
        for way, one in ways.items()
    ]
    header = ["input", *(f"{kind} ({one['n']} questions)" for kind, one in kinds.items())]
    return [("heading", "Words and figures"), ("text", told), ("table", "numbers", header, lines)]


def build_stored_blocks(found: dict) -> list[tuple]:
    """The section about --against."""
    from lib.core import wording

    if not (there := found.get("against")):
        return []
    told = f"{there['file']} ({there['questions']} questions)"
    if not there["comparable"]:
        told += " was measured with another base model or on other documents, so it cannot be compared."
        return [("heading", "Another evaluation"), ("text", told)]
    lines = [
        [describe_key(way, found["k"]), wording.interval(found["ways"][way]["token_f1"]), wording.interval(one)]
        for way, one in there["ways"].items()
    ]
    return [
        ("heading", "Another evaluation"),
        ("text", f"Token F1 here and in {told}, on the same documents."),
        ("table", "numbers", ["input", "here", "there"], lines),
    ]


def format_ratio(ratio: dict | None) -> str:
    return "–" if ratio is None else f"{ratio['mean']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def format_answer(said: dict) -> str:
    from lib.core import wording

    return ("✓ " if said["exact_match"] else "✗ ") + wording.shorten(said["answer"], 80)


def format_milliseconds(spread: dict) -> str:
    return f"{1000 * spread['median']:.0f} ({1000 * spread['min']:.0f} to {1000 * spread['max']:.0f})"


def estimate_cost(job):
    """Every system answers through transformers. Documents are compressed beside the adapters, which are merged before
    answers are asked for; the two models are opened one after the other."""
    from lib.budget import memory
    from lib.forecast.costs import Cost, rate_seconds, start_seconds

    args, rates, w = job.args, job.rates, job.work["clara"]["evaluation"]
    made, compressed, timed = rates["base"], w["compressed"], w["timed"]
    seconds = start_seconds(rates, "adapter start", "load", "adapter start") + rate_seconds(rates["clara"]["start"])
    seconds += rate_seconds(rates["embedding start"]) + rate_seconds(rates["embedding"], w["characters"])
    seconds += rate_seconds(rates["lora"]["read batch"], compressed["tokens"], compressed["passes"])
    seconds += rate_seconds(made["read batch"], w["padded_tokens"], w["passes"])
    seconds += rate_seconds(made["step batch"], w["steps"]) + rate_seconds(
        made["read"], timed["tokens"], timed["passes"]
    )
    sizes = args.batch_size, job.work["most"]["prompt"], args.max_new_tokens
    return Cost(seconds, memory.estimate_answering(job.config, job.lora, args.precision, *sizes))


if __name__ == "__main__":
    cli.run(main, make_parser)
