"""Build preference pairs: sample several responses per prompt, score them, and pair the best with the worst.

    python scripts/generate_preferences.py --models models/smollm2-135m-lora --data data/factbook/raw \\
        --output data/factbook/preferences

Takes one or more model directories, which are loaded one after another, and a data artifact (prompts of its train and
validation splits) or a file of examples. Leaves train.jsonl and validation.jsonl with one pair per line, and
responses.jsonl with all responses and their scores. metadata.json contains an audit of shortcuts, such as length, that
predict the choice.
Finished responses are saved in --run-dir. If the run is killed, the same command resumes it.
"""

import random
import sys
from collections import Counter
from math import ceil
from pathlib import Path

from lib.core import artifact, cli, compute, runlog
from lib.core.cli import InputError
from lib.core.kept import Kept
from lib.data import embedding, metrics, records
from lib.engines import opening, sampling, scorers
from lib.model import chat, directory
from lib.model.directory import ModelDirectory

SPLITS = ("train", "validation")
# Arguments left out of the run's identity: they change no response, or the digest of their content replaces them.
NOT_IN_RUN_ID = (
    "batch_size", "checkpoint_interval", "data", "min_margin", "models", "output", "profile", "run_dir", "samples",
    "scorer", "threads", "validation_samples",
)  # fmt: skip
TRIAL = 64  # prompts, after which a model whose responses give no pair is refused


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--models", type=Path, nargs="+", required=True, help="model directories that write responses")
    files.add_argument("--data", type=Path, required=True, help="directory of generate_data.py, or a file (see README)")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument(
        "--run-dir",
        type=Path,
        help="directory for finished responses and logs (default: runs/preferences-<end of the output>)",
    )
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--samples", type=cli.integer(1), help="training pairs, from prompts of the train split")
    pairs.add_argument(
        "--validation-samples", type=cli.integer(0), help="validation pairs, from the validation split; 0: none"
    )
    pairs.add_argument("--responses", type=cli.integer(1), help="responses per prompt and model")
    pairs.add_argument("--temperature", type=cli.number(0.01), help="sampling temperature of responses")
    pairs.add_argument("--top-p", type=cli.number(0.01, 1), help="nucleus sampling threshold; 1: all tokens")
    pairs.add_argument(
        "--max-new-tokens", type=cli.integer(1), help="maximum tokens per response; responses that reach it are dropped"
    )
    pairs.add_argument(
        "--scorer", type=parse_scorer,
        help="response scorer; gold: token F1 with the reference answer, which is an example's completion; "
             "gold-embedding: MiniLM cosine similarity with the reference answer; embedding: MiniLM cosine "
             "similarity with the instruction; reward:<directory or Hub id>: a reward model",
    )  # fmt: skip
    pairs.add_argument(
        "--min-margin", type=cli.number(0),
        help="minimum score difference within a pair, on the scorer's scale (gold: 0 to 1)",
    )  # fmt: skip
    pairs.add_argument("--seed", type=cli.integer(0), help="random seed for the prompts' choice and for sampling")
    opening.add_sampler_flags(parser.add_argument_group("engine"))
    return parser


def main(args):
    # --- check the inputs before a model is loaded ----------------------------------------------------
    if len(args.models) * args.responses < 2:
        raise InputError("--responses: a single model needs at least 2 responses per prompt to make a pair")
    paths = {f"model{n or ''}": path for n, path in enumerate(args.models)}
    inputs = artifact.identify_inputs(paths | {"data": args.data})
    models = [directory.open_directory(path) for path in args.models]
    splits = load_prompts(args.data, args.seed)
    open_scorer(args.scorer, args.threads)  # fails here, not after hours of sampling, if it cannot be loaded
    inputs |= scorers.identify_reward_model(args.scorer)
    output = args.output.resolve()
    run = runlog.Run(
        args.run_dir or Path("runs") / f"preferences-{output.parent.name}-{output.name}",
        {"models": [inputs[name]["digest"] for name in paths], "data": inputs["data"]["digest"]}
        | {"code": artifact.code_digest(sys.argv[0])}
        | {k: v for k, v in vars(args).items() if k not in NOT_IN_RUN_ID},
    )

    # --- responses and scores, in rounds until there are enough pairs -----------------------------------
    targets = {"train": args.samples, "validation": args.validation_samples}
    prompt_counts = {split: min(targets[split], len(splits[split])) for split in SPLITS}
    expected_bytes = []  # bytes that each engine will take
    while True:
        rows = {split: splits[split][: prompt_counts[split]] for split in SPLITS}
        responses = sample_responses(
            models, args, run, [row for split in SPLITS for row in rows[split]], expected_bytes
        )
        scored = score_responses(args, run, [row for split in SPLITS for row in rows[split]], responses, inputs)
        choices = {split: [choose_pair(row, scored[row["id"]], args) for row in rows[split]] for split in SPLITS}
        pairs = {split: [pair for pair, _ in choices[split] if pair][: targets[split]] for split in SPLITS}
        reasons = Counter(reason for split in SPLITS for _, reason in choices[split] if reason)
        prompt_total, pair_total = sum(prompt_counts.values()), sum(map(len, pairs.values()))
        print(
            f"{pair_total:,} pairs from {prompt_total:,} prompts; prompts without a pair: "
            f"{format_reasons(reasons) or 'none'}"
        )
        if unscored := count_unscored(scored.values()):
            print(
                f"{unscored:,} of {sum(map(len, scored.values())):,} responses are left out, because they are longer "
                f"with their prompts than the input limit of {args.scorer}"
            )
        if not pairs["train"] and (prompt_total >= TRIAL or prompt_counts["train"] == len(splits["train"])):
            raise InputError(
                f"no pair in {prompt_total:,} prompts ({format_reasons(reasons)}). The responses are saved in "
                f"{run.path}: repeat the command with a lower --min-margin or another --scorer to use them. A higher "
                "--temperature or more --responses make responses differ more, and a lower --max-new-tokens makes them "
                "shorter; with these, new ones are sampled"
            )
        extra = {  # at most double: few prompts predict badly how many pairs others give
            split: min(
                ceil(1.1 * (targets[split] - len(pairs[split])) * prompt_total / max(1, pair_total)),
                2 * prompt_counts[split],
            )
            for split in SPLITS
            if len(pairs[split]) < targets[split] and prompt_counts[split] < len(splits[split])
        }
        if not extra:
            break
        prompt_counts |= {split: min(prompt_counts[split] + n, len(splits[split])) for split, n in extra.items()}
    for split in SPLITS:
        if len(pairs[split]) < targets[split]:
            print(
                f"{targets[split]:,} {split} pairs requested, but all {prompt_counts[split]:,} prompts gave only "
                f"{len(pairs[split]):,}"
            )

    # --- audit, write -------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "preferences", args, inputs) as build:
        for split in SPLITS:
            records.write(build.path / f"{split}.jsonl", pairs[split])
        records.write(
            build.path / "responses.jsonl",
            [
                {"id": row["id"], "split": split, "responses": scored[row["id"]]}
                for split in SPLITS
                for row in rows[split]
            ],
        )
        figures = audit([pair for split in SPLITS for pair in pairs[split]], list(scored.values()), args)
        build.notes["expected_memory_bytes"] = max(filter(None, expected_bytes), default=None)
        build.metrics = {split: len(pairs[split]) for split in SPLITS}
        build.metrics |= {"prompts": prompt_total, "without_pair": dict(reasons), "unscored_responses": unscored}
        build.metrics |= figures | {"history": run.history()}
    run.finish()
    print_audit(figures)
    print(args.output)


def parse_scorer(text: str) -> str:
    """An argparse type."""
    return scorers.check_name(text, "gold", "gold-embedding")


def open_scorer(name: str, threads: int):
    """A function (row, texts) -> scores, higher is better: token F1 against the gold answers, the cosine with the
    nearest gold answer, or a score of row and text from lib/engines/scorers.py. A text has no score, None, if it is
    longer with its prompt than a reward model can read."""
    if name == "gold":
        return lambda row, texts: [metrics.score_answer(text, row["gold"])["token_f1"] for text in texts]
    compute.use_threads(threads)
    if name == "gold-embedding":
        embed = embedding.open_embedding()

        def nearest_gold(row: dict, texts: list[str]) -> list[float]:
            return (embed(texts) @ embed(row["gold"]).T).amax(1).tolist()

        return nearest_gold
    score = scorers.open_scorer(name)

    def score_texts(row: dict, texts: list[str]) -> list[float | None]:
        scores = score([row] * len(texts), texts)
        return [None if score == float("-inf") else score for score in scores]

    return score_texts


def format_reasons(reasons: Counter) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def load_prompts(data: Path, seed: int) -> dict[str, list[dict]]:
    """Prompts in a seeded order, so that a larger sample extends a smaller one. The order is the reverse of sft.py's
    with this seed, since a model's answers to rows that it was trained on differ less."""
    if data.is_file():
        splits = records.split_by_group(records.read_file(data), seed)
    else:
        splits = {split: records.load_split(data, split) for split in SPLITS}
    return {split: records.sample_rows(splits[split], len(splits[split]), seed)[::-1] for split in SPLITS}


def sample_responses(
    models: list[ModelDirectory], args, run, rows: list[dict], expected_bytes: list
) -> dict[str, list[dict]]:
    """{row id: responses}, those of the first model first."""
    finished = Kept(run.path / "responses.jsonl", "model", "id")
    settings = sampling.Settings(args.max_new_tokens, args.temperature, args.top_p)
    for number, model in enumerate(models):
        waiting = [row for row in rows if (number, row["id"]) not in finished]
        if not waiting:
            continue

        def line(key: str, samples: list, number: int = number) -> dict:
            texts = [
                {"text": sample.text.strip(), "stopped": sample.stopped, "new_tokens": sample.new_tokens}
                for sample in samples
            ]
            return {"id": key, "model": number, "responses": texts}

        jobs = list_jobs(waiting, number, model, args)
        longest, text_count = max(len(prompt) for _, prompt, _ in jobs), len(jobs) * args.responses
        sizes = longest + args.max_new_tokens, longest, args.max_new_tokens, text_count, args.responses
        engine, engine_bytes = opening.open_sampler(model, args, *sizes)
        expected_bytes.append(engine_bytes)
        try:
            sampling.write_samples(
                finished, engine, jobs, settings, line, run=run, interval=args.checkpoint_interval,
                done=len(rows) - len(waiting),
            )  # fmt: skip
        finally:
            engine.close()  # frees its memory for the next model
    return {
        row["id"]: [
            response | {"model": number}
            for number in range(len(models))
            for response in finished[number, row["id"]]["responses"]
        ]
        for row in rows
    }


def list_jobs(rows: list[dict], number: int, model: ModelDirectory, args) -> list[tuple]:
    """(id, prompt ids, seeds) of each row."""
    tokenizer, longest = directory.load_tokenizer(model), directory.context_length(model)
    jobs = []
    for row in rows:
        prompt = chat.prompt_ids(tokenizer, row["prompt"])
        if len(prompt) + args.max_new_tokens > longest:
            raise InputError(
                f"{args.data}: row {row['id']!r}: its prompt has {len(prompt):,} tokens; with --max-new-tokens "
                f"{args.max_new_tokens} that is longer than the context of {model.path}, {longest:,} tokens"
            )
        seeds = [
            sampling.derive_seed(args.seed, f"{row['id']} model {number} response {n}") for n in range(args.responses)
        ]
        jobs.append((row["id"], prompt, seeds))
    return jobs


def score_responses(args, run, rows: list[dict], responses: dict, inputs: dict) -> dict[str, list[dict]]:
    """{row id: responses with their scores}. Equal texts of a row are scored once."""
    from tqdm import tqdm

    identity = [args.scorer, inputs.get("reward model", {}).get("digest")]
    finished = Kept(run.path / "scores.jsonl", "id", belongs=lambda row: row["scorer"] == identity)
    waiting = [row for row in rows if row["id"] not in finished]
    scorer = open_scorer(args.scorer, args.threads) if waiting else None
    for start in tqdm(range(0, len(waiting), args.checkpoint_interval), desc="scores", unit="interval"):
        batch = []
        for row in waiting[start : start + args.checkpoint_interval]:
            texts = list(dict.fromkeys(response["text"] for response in responses[row["id"]]))
            scores = dict(zip(texts, scorer(row, texts)))
            batch.append({"id": row["id"], "scorer": identity, "scores": scores})
        finished.add(batch)
    return {
        row["id"]: [
            response | {"score": finished[row["id"]]["scores"][response["text"]]} for response in responses[row["id"]]
        ]
        for row in rows
    }


def count_unscored(responses) -> int:
    return sum(response["score"] is None for row_responses in responses for response in row_responses)


def choose_pair(row: dict, responses: list[dict], args) -> tuple[dict | None, str]:
    """(the pair, ""), or (None, why there is none). The seed chooses among equal scores, since the first response would
    win too often otherwise."""
    whole = [(n, response) for n, response in enumerate(responses) if response["stopped"] and response["text"]]
    complete = [(n, response) for n, response in whole if response["score"] is not None]
    texts, scores = {response["text"] for _, response in complete}, [response["score"] for _, response in complete]
    if len(whole) < 2:
        return None, "with fewer than two whole responses"
    if len(complete) < 2:
        return None, "with fewer than two responses that the reward model can read"
    if len(texts) == 1:
        return None, "with equal responses"
    if min(scores) == max(scores):
        return None, "with equal scores"
    if max(scores) - min(scores) < args.min_margin:
        return None, f"with a margin below {args.min_margin:g}"
    pick = random.Random(records.shuffle_key(args.seed, row["id"]))
    (best, chosen), (worst, rejected) = (
        pick.choice([(n, response) for n, response in complete if response["score"] == extreme])
        for extreme in (max(scores), min(scores))
    )
    fields = {key: row[key] for key in ("id", "source", "group", "prompt")}
    return fields | {
        "chosen": records.message("assistant", chosen["text"]),
        "rejected": records.message("assistant", rejected["text"]),
        "documents": row["documents"], "gold": row["gold"],
        "scores": {"chosen": chosen["score"], "rejected": rejected["score"]},
        "positions": {"chosen": best, "rejected": worst},
        "models": {"chosen": chosen["model"], "rejected": rejected["model"]},
    }, ""  # fmt: skip


def audit(pairs: list[dict], responses: list[list[dict]], args) -> dict:
    """Shortcuts that predict a pair's label without reading it: shares of pairs with their 95 % intervals, and counts
    of repeated and incomplete responses."""
    import numpy as np

    def text(pair: dict, which: str) -> str:
        return pair[which][0]["content"]

    def share(wins, some: list[dict]) -> dict | None:
        """The share of some pairs for which wins(pair) holds."""
        return metrics.interval([*map(wins, some)], args.seed, [pair["group"] for pair in some]) if some else None

    def longer(pair: dict) -> int:
        return len(text(pair, "chosen")) - len(text(pair, "rejected"))

    margins = [pair["scores"]["chosen"] - pair["scores"]["rejected"] for pair in pairs]
    repeated = [
        len(row_responses) - len({response["text"] for response in row_responses}) for row_responses in responses
    ]
    distinct_pairs = {(pair["prompt"][-1]["content"], text(pair, "chosen"), text(pair, "rejected")) for pair in pairs}
    return {
        "longer_wins": share(lambda pair: longer(pair) > 0, [*filter(longer, pairs)]),
        "first_wins": share(lambda pair: pair["positions"]["chosen"] < pair["positions"]["rejected"], pairs),
        "margin_quantiles": dict(
            zip(("0", "25", "50", "75", "100"), np.percentile(margins, [0, 25, 50, 75, 100]).tolist())
        ),
        "chosen_by_model": {
            str(path): sum(pair["models"]["chosen"] == n for pair in pairs) for n, path in enumerate(args.models)
        },
        "repeated_response_share": sum(repeated) / sum(map(len, responses)),
        "cut_response_share": sum(not response["stopped"] for row_responses in responses for response in row_responses)
        / sum(map(len, responses)),
        "repeated_pairs": len(pairs) - len(distinct_pairs),
    }


def print_audit(figures: dict) -> None:
    for rule, which in (("longer", "longer"), ("first", "earlier")):
        if share := figures[f"{rule}_wins"]:
            print(
                f"the {which} response is chosen in {share['mean']:.0%} [{share['low']:.0%}, {share['high']:.0%}] of "
                f"{share['n']:,} pairs (chance: 50%)"
            )
    quantiles = ", ".join(f"{value:.2f}" for value in figures["margin_quantiles"].values())
    print(f"score margins (minimum, quartiles, maximum): {quantiles}; ", end="")
    print(f"{figures['repeated_pairs']:,} duplicate pairs; ", end="")
    print(f"{figures['repeated_response_share']:.0%} of the responses repeat another one to the same prompt, ", end="")
    print(f"{figures['cut_response_share']:.0%} are incomplete")


def estimate_cost(job):
    from lib.budget import memory
    from lib.forecast.costs import Cost, sampling_seconds

    sizes = job.work["most"]["sampling"]["preferences"]
    peak = memory.estimate_sampling(job.config, job.adapter, job.args.precision, *sizes)
    return Cost(sampling_seconds(job, ("preferences",)), peak)


if __name__ == "__main__":
    cli.run(main, make_parser)
