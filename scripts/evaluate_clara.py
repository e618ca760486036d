"""Evaluate CLaRa's compression: answers from compressed documents, from text and from no documents.

    python scripts/evaluate_clara.py --models models/smollm2-135m-clara --text-model models/smollm2-135m-lora \\
        --data data/factbook/clara --output reports/smollm2-135m-clara

Takes one or more models from the train_stage scripts (for instance of different rates), a text model as the baseline
(--text-model: the same base, fine-tuned), and the test split of a data artifact from `generate_data.py --source clara`.
The same questions are answered from different inputs: no document; the text of the right documents, in full or cut to
as many tokens as there are vectors; their vectors; the vectors of another question's documents; and the k documents
that BM25, MiniLM or the model itself retrieves from all documents of the test split. The text model answers from text
and without documents, the others from their vectors. Token F1, exact match and containment have 95 % intervals. Leaves
predictions.jsonl, comparison.json, report.md and index.html. Finished answers are saved in --run-dir. If the run is
killed, the same command resumes it.
"""

import sys
from itertools import count
from pathlib import Path

from lib.core import artifact, cli, compute
from lib.core.cli import InputError
from lib.model import directory, loading
from lib.model.directory import ModelDirectory

# Results are stored under these keys; the values are labels for readers. A key that belongs to one model is followed by
# the model's name: gold-compressed/16x.
WORDS = {
    # ways to answer, by what is read
    "closed-book": "closed book",
    "text-cut": "truncated text",
    "text-full": "full text",
    "bm25-text": "top {k} of BM25, as text",
    "minilm-text": "top {k} of MiniLM, as text",
    "gold-compressed": "{model} compressed",
    "other-compressed": "{model} compressed, for another question",
    "minilm-compressed": "top {k} of MiniLM, {model} compressed",
    "reasoner-compressed": "top {k} of the reasoner, {model} compressed",
    # retrievers
    "bm25": "BM25",
    "minilm": "MiniLM",
    "reasoner": "{model} reasoner",
    # documents with which the first token is timed
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
FOUND = ("minilm-", "bm25-", "reasoner-")  # ways that read k retrieved documents
RECALLS, SHOWN = (1, 3, 5), 12
SCORES = ("token_f1", "exact_match", "contained")


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--models", type=Path, nargs="+", required=True, help="model directories from train_stage scripts"
    )
    files.add_argument(
        "--text-model",
        type=Path,
        required=True,
        help="text model to compare with: the same base, fine-tuned; an adapter or merged",
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
    files.add_argument("--estimate", type=Path, help="directory from estimate.py to compare with (default: none)")
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

    names = name_models({path: network.read_config(path).compress_rate for path in check_models(args.models)})
    base = network.open_base(args.models[0], args.base)
    paths = {f"model {n}": path for n, path in enumerate(args.models)}
    paths |= {"text model": args.text_model, "data": args.data}
    inputs = artifact.identify_inputs(paths | {"base": base.path, "against": args.against})
    identity = {name: inputs[name]["digest"] for name in paths} | {"code": artifact.code_digest(sys.argv[0])}
    for path in (*args.models, args.text_model):
        lineage.check_held_out(path, inputs["data"])
    rows, golds, documents = passages.test_questions(args.data, args.samples, args.seed)
    text_reader = directory.open_directory(args.text_model, args.base)
    digests = {"base": inputs["base"]["digest"], "documents_digest": records.digest(documents)}
    stored = read_comparison(args.against) if args.against else None
    if args.estimate:
        artifact.read(args.estimate, "estimate")
    models = [*names.values()]
    run = runlog.Run(
        args.run_dir or Path("runs") / args.output.name,
        identity | {key: getattr(args, key) for key in ("samples", "k", "max_new_tokens", "seed", "precision")},
    )
    groups = [row.group or "\n".join(gold) for row, gold in zip(rows, golds)]  # else: about the same documents
    answers = Answers(run.path / "predictions.jsonl", rows, groups)

    # --- which documents each question is about, by words and by meaning ---------------------------------
    compute.use_threads(args.threads)  # before torch's first product, which MiniLM makes
    questions, positions = [row.question for row in rows], {document: n for n, document in enumerate(documents)}
    right = [[positions[document] for document in gold] for gold in golds]
    others = choose_other_documents(right, len(documents))
    rankings = {
        name: retrieval.open_retriever(name, documents)(questions, max(args.k, *RECALLS)).tolist()
        for name in retrieval.RETRIEVERS
    }

    expected = check_memory(base, text_reader, args, questions, documents)

    # --- answers, way by way --------------------------------------------------------------------------------
    sizes, cuts, timings = {}, {}, {}
    for path, name in names.items():
        reader = open_reader(path, args)
        cuts[key_cut_text(name, models)] = [[reader.count_vectors(document) for document in gold] for gold in golds]
        ways = compressed_ways(name, reader, rows, right, others, documents, rankings, args.k)
        reader.merge()
        sizes |= measure(reader, ways, answers, args)
        for source, indices in (("gold", right), ("minilm", [ranking[: args.k] for ranking in rankings["minilm"]])):
            texts = as_text(reader, rows, lambda n, indices=indices: [documents[m] for m in indices[n]])
            timings[name, f"{source}-first"] = first_tokens(reader, texts, ways[f"{source}-compressed/{name}"], args)
        reader.close()
    reader = open_text(text_reader, args)
    reader.merge()
    sizes = measure(reader, text_ways(reader, rows, golds, documents, rankings, cuts, args.k), answers, args) | sizes
    reader.close()

    # --- write ------------------------------------------------------------------------------------------------
    comparison = compare(args, models, sizes, timings, answers, rankings, right, len(documents)) | digests
    if stored:
        comparison["against"] = compare_with_stored(args.against, stored, comparison)
    stages, gaps = {}, []
    for path in paths.values():
        lineage.collect(path, stages, gaps)
    stages[args.output.resolve()] = artifact.run_metadata("clara-evaluation", args)
    comparison |= lineage.summarise(stages, gaps, args.estimate)
    with artifact.write_artifact(args.output, "clara-evaluation", args, inputs) as build:
        records.write(build.path / "predictions.jsonl", [answer for way in sizes for answer in answers.of(way)])
        artifact.write_json(build.path / "comparison.json", comparison)
        blocks = build_blocks(comparison, answers)
        (build.path / "report.md").write_text(page.as_markdown(blocks), encoding="utf-8")
        (build.path / "index.html").write_text(page.as_html(blocks, {}), encoding="utf-8")
        build.metrics = {name: value for name, value in comparison.items() if name != "stages"}
        build.notes["expected_memory_bytes"] = expected
    run.finish()
    for line in [verdict["said"] for verdict in comparison["verdicts"]]:
        print(line)
    for name, scores in comparison["ways"].items():
        print(f"{describe_key(name, args.k):48} token F1 {wording.interval(scores['token_f1'])}")
    print(lineage.as_text(comparison))
    print(args.output)


def read_comparison(path: Path) -> dict:
    stored = cli.read_json(path)
    if missing := [key for key in ("base", "documents_digest", "questions", "k", "ways") if key not in stored]:
        raise InputError(f"{path}: {missing[0]} is missing; expected a comparison.json of evaluate_clara.py")
    return stored


def check_memory(
    base: ModelDirectory, text_reader: ModelDirectory, args, questions: list[str], documents: list[str]
) -> int | None:
    """Print the memory that the longest prompts will take, those with k documents as text. Raises OutOfMemory if there
    is clearly less."""
    from lib.budget import memory
    from lib.data import records
    from lib.engines import opening

    texts = sorted(documents, key=len)[-args.k :]
    content = records.question_with_documents(max(questions, key=len), texts)
    prompt, adapter = (
        opening.longest_prompt(base, [records.message("user", content)]),
        directory.read_adapter_shape(text_reader),
    )

    def need(config, _, how, batch, new):
        return memory.estimate_answering(config, adapter, how, batch, prompt, new)

    return opening.check_memory(base, args, need, prompt + args.max_new_tokens, args.max_new_tokens)


def check_models(paths: list[Path]) -> list[Path]:
    """The paths. InputError if two of them are one directory."""
    places = [path.resolve() for path in paths]
    for n, path in enumerate(paths):
        if places[n] in places[:n]:
            raise InputError(f"--models: {path} is given more than once; expected each model once")
    return paths


def name_models(rates: dict[Path, int]) -> dict[Path, str]:
    """{path: the model's name in keys and in the report}: its rate, and if there are several models, the end of its
    path, as long as it takes to tell them apart."""
    if len(rates) == 1:
        return {path: f"{rate}x" for path, rate in rates.items()}
    for length in count(1):
        names = {path: f"{rate}x {'/'.join(path.resolve().parts[-length:])}" for path, rate in rates.items()}
        if len({*names.values()}) == len(names):
            return names


def key_cut_text(model: str, models: list[str]) -> str:
    """The key of the truncated text that is as long as a model's vectors. One model needs no name in it."""
    return f"text-cut/{model}" if len(models) > 1 else "text-cut"


def describe_key(key: str, k: int) -> str:
    kind, _, model = key.partition("/")
    as_long = f", as long as {model}" if kind == "text-cut" and model else ""
    return WORDS[kind].format(k=k, model=model) + as_long


# --- answering ---------------------------------------------------------------------------------------------


class Answers:
    """The answers so far, in a file of which a kill can lose at most the last line."""

    def __init__(self, file: Path, rows: list, groups: list[str]):
        from lib.core.kept import Kept

        self.rows, self.groups = rows, groups
        self.known = Kept(file, "way", "n", belongs=lambda row: row["n"] < len(rows))
        self.known.print_count("answers")

    def add(self, way: str, engine, prompts: list, args) -> None:
        """Answer the questions that have no answer by this way yet."""
        from tqdm import tqdm

        from lib.data import metrics

        missing = [n for n in range(len(self.rows)) if (way, n) not in self.known]
        with tqdm(total=len(missing), unit="row", desc=describe_key(way, args.k), file=sys.stderr) as bar:
            for start in range(0, len(missing), 4 * args.batch_size):
                indices = missing[start : start + 4 * args.batch_size]
                generations = engine.generate([prompts[n] for n in indices], args.max_new_tokens)
                results = []
                for n, answer in zip(indices, generations):
                    row, text = self.rows[n], answer.text.strip()
                    results.append({
                        "way": way, "n": n, "question": row.question, "gold": row.golds, "answer": text,
                        "prompt_tokens": answer.prompt_tokens, **metrics.score_answer(text, row.golds),
                    })  # fmt: skip
                self.known.add(results)
                bar.update(len(indices))

    def of(self, way: str) -> list[dict]:
        return [self.known[way, n] | {"group": group} for n, group in enumerate(self.groups)]


def measure(engine, ways: dict[str, list], answers: Answers, args) -> dict[str, dict]:
    """Answer the questions by each way. Returns the mean prompt length of each way."""
    sizes = {}
    for way, prompts in ways.items():
        answers.add(way, engine, prompts, args)
        sizes[way] = {"prompt_tokens": sum(map(len, prompts)) / len(prompts)}
    return sizes


def first_tokens(engine, texts: list, vectors: list, args) -> dict:
    """Seconds to the first token of an answer, from text and from vectors: with one model, alternating question by
    question. The first question is a warm-up and does not count."""
    from lib.data import metrics

    pairs = [*zip(texts, vectors)][: args.timed + 1]
    seconds = [[engine.generate([prompt], 1)[0].prompt_seconds for prompt in pair] for pair in pairs]
    text_seconds, vector_seconds = zip(*(seconds[1:] or seconds))
    ratio = metrics.ratio(text_seconds, vector_seconds, args.seed)
    return {"text": metrics.spread(text_seconds), "vectors": metrics.spread(vector_seconds), "ratio": ratio}


def open_reader(path: Path, args):
    from lib.clara import network
    from lib.clara.clara_engine import ClaraEngine

    flags = dict(load=args.precision, threads=args.threads, batch=args.batch_size, **loading.placement_arguments(args))
    return ClaraEngine(path, network.open_base(path, args.base), **flags)


def open_text(text_reader: ModelDirectory, args):
    from lib.engines import transformers_engine

    flags = dict(load=args.precision, threads=args.threads, batch=args.batch_size, **loading.placement_arguments(args))
    return transformers_engine.Transformers(text_reader, **flags)


def text_ways(engine, rows, golds, documents, rankings, cuts: dict[str, list[list[int]]], k: int) -> dict[str, list]:
    """Prompts of the ways that read text. `cuts` has for each way that truncates the number of tokens that it keeps of
    each right document of each question."""
    from lib.data import retrieval
    from lib.model import chat

    def cut(text: str, tokens: int) -> str:
        return engine.tokenizer.decode(chat.token_ids(engine.tokenizer, text)[:tokens])

    ways = {"closed-book": as_text(engine, rows, lambda n: [])}
    for way, kept in cuts.items():
        ways[way] = as_text(engine, rows, lambda n, kept=kept: [*map(cut, golds[n], kept[n])])
    ways["text-full"] = as_text(engine, rows, golds.__getitem__)
    for name in retrieval.RETRIEVERS:
        ways[f"{name}-text"] = as_text(engine, rows, lambda n, name=name: [documents[m] for m in rankings[name][n][:k]])
    return ways


def as_text(engine, rows, documents_of) -> list:
    """Prompts of all questions; question n is about documents_of(n)."""
    from lib.data import records

    contents = [records.question_with_documents(row.question, documents_of(n)) for n, row in enumerate(rows)]
    return [engine.prompt_ids(records.message("user", content)) for content in contents]


def choose_other_documents(right: list[list[int]], count: int) -> list[list[int]]:
    """Documents of another question for each question, none of which is among its own: those of the next question that
    is about others only. If there is none, as many of all `count` documents. [] if a question is about all of these."""
    others = []
    for n, own in enumerate(right):
        later = (indices for indices in right[n + 1 :] + right[:n] if not {*indices} & {*own})
        rest = [m for m in range(count) if m not in own]
        others.append(next(later, rest[: len(own)]))
    if not all(others):
        print("note: a question is about all documents, so there is no comparison with another question's documents")
        return []
    return others


def compressed_ways(name: str, reader, rows, right, others, documents, rankings, k: int) -> dict[str, list]:
    """Prompts of the ways that read one model's vectors. The model's own rankings are added to `rankings`."""
    questions, compressed = [row.question for row in rows], reader.compress(documents)

    def prompts(indices_of) -> list:
        return [reader.prompt(question, [compressed[m] for m in indices_of(n)]) for n, question in enumerate(questions)]

    ways = {
        f"gold-compressed/{name}": prompts(right.__getitem__),
        **({f"other-compressed/{name}": prompts(others.__getitem__)} if others else {}),
        f"minilm-compressed/{name}": prompts(lambda n: rankings["minilm"][n][:k]),
    }
    if reader.searches:
        import torch

        piece_documents = [n for n, pieces in enumerate(compressed) for _ in pieces]
        pieces = reader.search(questions, torch.cat(compressed), len(piece_documents)).tolist()
        own_rankings = rankings[f"reasoner/{name}"] = [
            list(dict.fromkeys(piece_documents[m] for m in ranking)) for ranking in pieces
        ]
        ways[f"reasoner-compressed/{name}"] = prompts(lambda n: own_rankings[n][:k])
    return ways


# --- comparing -----------------------------------------------------------------------------------------------


def compare(
    args, models: list[str], sizes: dict, timings: dict, answers: Answers, rankings: dict, right: list, documents: int
) -> dict:
    """Every figure of the report."""
    from lib.data import metrics, retrieval

    f1 = {way: [row["token_f1"] for row in answers.of(way)] for way in sizes}
    ways, kinds, groups = {}, group_by_kind(answers.rows), answers.groups
    for way, size in sizes.items():
        scores = {name: metrics.interval([row[name] for row in answers.of(way)], args.seed, groups) for name in SCORES}
        by_kind = {
            kind: metrics.interval([f1[way][n] for n in indices], args.seed, [groups[n] for n in indices])
            for kind, indices in kinds.items()
        }
        of_full_text = metrics.ratio(f1[way], f1["text-full"], args.seed, groups)
        ways[way] = size | scores | {"of_full_text": of_full_text, "by_kind": by_kind}
    hits = {name: {str(k): retrieval.recall(ranking, right, k) for k in RECALLS} for name, ranking in rankings.items()}
    recall = {
        name: {k: metrics.interval(values, args.seed, groups) for k, values in by_k.items()}
        for name, by_k in hits.items()
    }
    return {
        "tag": args.output.name, "questions": len(answers.rows), "documents": documents, "k": args.k,
        "of_several_documents": sum(len(gold) > 1 for gold in right), "ways": ways, "recall": recall,
        "verdicts": compare_ways(args, models, ways, answers),
        "targets": check_targets(args, models, ways, f1, hits, timings, groups),
        "first_token": [{"model": name, "read": source, **timing} for (name, source), timing in timings.items()],
    }  # fmt: skip


def group_by_kind(rows: list) -> dict[str, list[int]]:
    """{kind of reference answer: its questions}. A figure must be read exactly; for a word a trace may be enough."""
    kinds = {"words": [], "figures": []}
    for n, row in enumerate(rows):
        kinds["figures" if any(map(str.isdigit, row.golds[0])) else "words"].append(n)
    return {kind: indices for kind, indices in kinds.items() if indices}


def compare_ways(args, models: list[str], ways: dict, answers: Answers) -> list[dict]:
    """Whether the vectors tell more than as many tokens of the text, and more than the vectors of another question's
    documents; paired by question."""
    from lib.core import wording
    from lib.data import metrics

    verdicts = []
    for model in models:
        way = f"gold-compressed/{model}"
        for baseline, words, caveat in (
            (key_cut_text(model, models), "text truncated to as many tokens", ""),
            (
                f"other-compressed/{model}",
                "vectors of another question's documents",
                "; so the content of the vectors is not used, and any gain is in the form of the answers",
            ),
        ):
            if baseline not in ways:
                continue
            ours, theirs = (dict(enumerate(answers.of(key))) for key in (way, baseline))
            gap = metrics.compare_paired(ours, theirs, "token_f1", args.seed)
            text = f"{describe_key(way, args.k)}, compared with {words}: token F1 {wording.difference(gap)}"
            text += caveat if gap["verdict"] in ("worse", metrics.NOISE) else ""
            verdicts.append({"way": way, "against": baseline, "said": text, **gap})
    return verdicts


def compare_with_stored(path: Path, stored: dict, comparison: dict) -> dict:
    """The scores of another evaluation by the ways of this one. Ways that read retrieved documents need the same k."""
    same = all(stored[key] == comparison[key] for key in ("base", "documents_digest"))
    ways = [way for way in comparison["ways"] if stored["k"] == comparison["k"] or not way.startswith(FOUND)]
    scores = {way: stored["ways"][way]["token_f1"] for way in ways if way in stored["ways"]}
    return {"file": str(path), "comparable": same, "questions": stored["questions"], "ways": scores if same else {}}


def check_targets(
    args, models: list[str], ways: dict, f1: dict, hits: dict, timings: dict, groups: list[str]
) -> list[dict]:
    """The targets of compression, compared with the measurements."""
    from lib.data import metrics

    targets = []

    def check_target(model: str, target: str, limit: float, ratio: dict | None) -> None:
        if ratio:
            verdict = metrics.check_threshold(ratio, limit)
            targets.append({"model": model, "target": target, "least": limit, "verdict": verdict, **ratio})

    for model in models:
        for baseline, limit in (("text-full", 0.85), ("closed-book", 2), (key_cut_text(model, models), 2)):
            ratio = metrics.ratio(f1[f"gold-compressed/{model}"], f1[baseline], args.seed, groups)
            check_target(model, f"f1-{baseline.partition('/')[0]}", limit, ratio)
        if reasoner := hits.get(f"reasoner/{model}"):
            ratio = metrics.ratio(reasoner["5"], hits["minilm"]["5"], args.seed, groups)
            check_target(model, "recall-minilm", 1, ratio)
        text, vectors = ways["minilm-text"], ways[f"minilm-compressed/{model}"]
        shorter = text["prompt_tokens"] / vectors["prompt_tokens"]
        counted = {"n": len(groups), "groups": len({*groups})}
        check_target(model, "prompt-length", 10, dict.fromkeys(("mean", "low", "high"), shorter) | counted)
        check_target(model, "first-token", 5, timings[model, "minilm-first"]["ratio"])
    return targets


# --- writing ---------------------------------------------------------------------------------------------------


def build_blocks(report: dict, answers: Answers) -> list[tuple]:
    from lib.core import wording
    from lib.data import metrics
    from lib.report import lineage

    k = report["k"]
    answer_rows = [
        [
            describe_key(way, k), f"{scores['prompt_tokens']:.0f}", wording.interval(scores["token_f1"]),
            format_ratio(scores["of_full_text"]), *(wording.interval(scores[name]) for name in SCORES[1:]),
        ]
        for way, scores in report["ways"].items()
    ]  # fmt: skip
    recall_rows = [
        [describe_key(name, k), *(wording.interval(scores[str(depth)]) for depth in RECALLS)]
        for name, scores in report["recall"].items()
    ]
    timing_rows = [
        [
            f"{describe_key(timing['read'], k)}, {timing['model']}",
            *(format_milliseconds(timing[key]) for key in ("text", "vectors")),
            format_ratio(timing["ratio"]),
        ]
        for timing in report["first_token"]
    ]
    target_rows = [
        [describe_key(goal["target"], k), goal["model"], f"{goal['least']:g}×", format_ratio(goal), goal["verdict"]]
        for goal in report["targets"]
    ]
    cut, compressed = ([way for way in report["ways"] if way.startswith(kind)] for kind in ("text-cut", "gold-com"))
    ways = ["closed-book", *cut, "text-full", *compressed]
    sample_rows = [
        [replies[0]["question"], replies[0]["gold"][0], *map(format_answer, replies)]
        for replies in list(zip(*map(answers.of, ways)))[:SHOWN]
    ]
    introduction = (
        f"{report['questions']} questions of the test split, {report['of_several_documents']} of them about several "
        f"documents; {report['documents']:,} documents to search. The first column is the model's input: no document, "
        f"the right documents, or retrieved documents. {metrics.DESCRIPTION}. Fewer than {metrics.LEAST_GROUPS} groups "
        "are too few for a verdict."
    )
    notes = [
        "Truncated text: each document is truncated to as many tokens as it has vectors. For another question: shows "
        "what can be answered from the form of the question alone.",
        "First token: median and range over questions, from prompt to first token, without retrieval and compression. "
        "Runs with text and with vectors are interleaved, in one model. Adapters are merged into the weights.",
        "A text model trained with the right documents alone, as by `make lora`, has not learnt to ignore other "
        "documents; the generator has. Retrieved documents therefore help the text model less.",
    ]
    columns = ["input", "tokens and vectors", "token F1", "relative to full text", "exact match", "contained"]
    return [
        ("title", f"{report['tag']}: answers from compressed documents"),
        ("text", introduction),
        ("notes", [f"{verdict['said']}." for verdict in report["verdicts"]]),
        ("heading", "Targets"),
        ("table", "words", ["target", "model", "threshold", "measured", "verdict"], target_rows),
        ("heading", "Answers"),
        ("table", "numbers", columns, answer_rows),
        ("notes", notes),
        *build_kind_blocks(report),
        ("heading", "First token"),
        ("table", "numbers", ["input", "from text, ms", "from vectors, ms", "times faster"], timing_rows),
        ("heading", "Retrieval"),
        ("table", "numbers", ["retriever", *(f"recall@{depth}" for depth in RECALLS)], recall_rows),
        *build_stored_blocks(report),
        ("heading", "Sample answers"),
        ("table", "answers", ["question", "reference answer", *(describe_key(way, k) for way in ways)], sample_rows),
        *lineage.build_blocks(report),
    ]


def build_kind_blocks(report: dict) -> list[tuple]:
    from lib.core import wording

    ways = report["ways"]
    kinds = next(iter(ways.values()))["by_kind"]
    text = "Token F1 by kind of reference answer: words only, or containing a figure, which must be read exactly."
    lines = [
        [describe_key(way, report["k"]), *(wording.interval(scores["by_kind"][kind]) for kind in kinds)]
        for way, scores in ways.items()
    ]
    header = ["input", *(f"{kind} ({interval['n']} questions)" for kind, interval in kinds.items())]
    return [("heading", "Words and figures"), ("text", text), ("table", "numbers", header, lines)]


def build_stored_blocks(report: dict) -> list[tuple]:
    """The section about --against."""
    from lib.core import wording

    if not (stored := report.get("against")):
        return []
    description = f"{stored['file']} ({stored['questions']} questions)"
    if not stored["comparable"]:
        description += " was measured with another base model or on other documents, so it cannot be compared."
        return [("heading", "Another evaluation"), ("text", description)]
    lines = [
        [describe_key(way, report["k"]), wording.interval(report["ways"][way]["token_f1"]), wording.interval(f1)]
        for way, f1 in stored["ways"].items()
    ]
    return [
        ("heading", "Another evaluation"),
        ("text", f"Token F1 here and in {description}, on the same documents."),
        ("table", "numbers", ["input", "here", "there"], lines),
    ]


def format_ratio(ratio: dict | None) -> str:
    from lib.core import wording

    return "–" if ratio is None else f"{ratio['mean']:.2f} {wording.limits(ratio, '{:.2f}'.format)}"


def format_answer(answer: dict) -> str:
    from lib.core import wording

    return ("✓ " if answer["exact_match"] else "✗ ") + wording.shorten(answer["answer"], 80)


def format_milliseconds(spread: dict) -> str:
    return f"{1000 * spread['median']:.0f} ({1000 * spread['min']:.0f} to {1000 * spread['max']:.0f})"


def estimate_cost(job):
    """Every model answers through transformers. Documents are compressed with unmerged adapters; then these are merged,
    and the model answers. The two models are opened one after the other."""
    from lib.budget import memory
    from lib.forecast.costs import Cost, rate_seconds, start_seconds

    args, rates, w = job.args, job.rates, job.work["clara"]["evaluation"]
    base_rates, compression, timed = rates["base"], w["compressed"], w["timed"]
    seconds = start_seconds(rates, "adapter start", "load", "adapter start") + rate_seconds(rates["clara"]["start"])
    seconds += rate_seconds(rates["embedding start"]) + rate_seconds(rates["embedding"], w["characters"])
    seconds += rate_seconds(rates["lora"]["read batch"], compression["tokens"], compression["passes"])
    seconds += rate_seconds(base_rates["read batch"], w["padded_tokens"], w["passes"])
    seconds += rate_seconds(base_rates["step batch"], w["steps"]) + rate_seconds(
        base_rates["read"], timed["tokens"], timed["passes"]
    )
    sizes = args.batch_size, job.work["most"]["prompt"], args.max_new_tokens
    return Cost(seconds, memory.estimate_answering(job.config, job.lora, args.precision, *sizes))


if __name__ == "__main__":
    cli.run(main, make_parser)
