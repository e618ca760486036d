"""Evaluate a model on general benchmarks, to measure forgetting: CommonsenseQA, BoolQ, and answers to MT-bench prompts.

    python scripts/evaluate_general.py --model models/smollm2-135m-base --output reports/general-smollm2-135m-base
    python scripts/evaluate_general.py --model models/smollm2-135m-lora --output reports/general-smollm2-135m-lora

Takes a model directory of any kind (plain, adapter, quantised, GGUF). Each option of a question is scored by its
log-likelihood (`acc` of the LM Evaluation Harness) and by its byte-normalised log-likelihood (`acc_norm`), which does
not favour short options. A model that does not know keeps picking the same option, and its accuracy is that of
guessing; both figures are given beside the accuracy. Leaves options.jsonl with one line per question, metadata.json
with the accuracies and their 95 % intervals, and answers.jsonl with greedy answers to first turns of MT-bench. These
answers are for reading side by side; they are not scored.
Finished questions are saved in --run-dir. If the run is killed, the same command resumes it.
"""

import sys
from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import OutOfMemory
from lib.data import evaluation_sets, records
from lib.model import directory, loading
from lib.model.directory import ModelDirectory


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="model directory of any kind")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument(
        "--run-dir", type=Path, help="directory for finished questions and logs (default: runs/<name of the output>)"
    )
    options = parser.add_argument_group("options")
    options.add_argument("--samples", type=cli.integer(1), help="questions per benchmark; all if there are fewer")
    options.add_argument("--prompts", type=cli.integer(0), help="MT-bench prompts to answer, of 80; 0: none")
    options.add_argument("--max-new-tokens", type=cli.integer(1), help="maximum tokens per MT-bench answer")
    options.add_argument("--batch-size", type=cli.integer(1), help="prompts answered at once")
    options.add_argument(
        "--seed", type=cli.integer(0), help="random seed for the questions' choice and for the bootstrap"
    )
    loading.add_load_flags(options)
    return parser


def main(args):
    # --- check the inputs before a model is loaded ----------------------------------------------------
    from lib.core import runlog, wording
    from lib.core.kept import Kept
    from lib.data import metrics

    sets = evaluation_sets.BY_OPTIONS
    inputs = {"model": args.model} | {name: evaluation_sets.find_file(name) for name in (*sets, "mt_bench")}
    inputs = artifact.identify_inputs(inputs)
    source, model = inputs["model"], directory.open_directory(args.model)
    questions = {name: records.sample_rows(evaluation_sets.load_set(name), args.samples, args.seed) for name in sets}
    rows = [row for set_rows in questions.values() for row in set_rows]
    prompts = evaluation_sets.first_turns(args.prompts, args.seed)
    identity = {
        "model": source["digest"],
        "rows": records.digest(rows),
        "precision": args.precision,
        "attention": args.attention,
        "code": artifact.code_digest(sys.argv[0]),
    }
    run = runlog.Run(args.run_dir or Path("runs") / args.output.name, identity)
    finished = Kept(run.path / "options.jsonl", "id")
    finished.print_count(f"of {len(rows)} questions")

    # --- questions, one by one, then the prompts --------------------------------------------------------
    chats = [records.message("user", row["turns"][0]) for row in prompts]
    engine, expected = open_model(model, args, rows, chats)
    reserve_context(engine, args, rows, chats)
    try:
        score_options([row for row in rows if row["id"] not in finished], engine, finished, args.model.name)
        answers = engine.generate([engine.prompt_ids(chat) for chat in chats], args.max_new_tokens)
    except OutOfMemory as error:
        raise OutOfMemory(f"{error}. {len(finished)} questions are finished and saved in {run.path}") from None

    # --- write --------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "forgetting", args, inputs) as build:
        records.write(build.path / "options.jsonl", [finished[row["id"]] | {"group": group_of(row)} for row in rows])
        records.write(build.path / "answers.jsonl", [
            {"id": row["id"], "category": row["category"], "prompt": row["turns"][0], "answer": answer.text.strip(),
             "new_tokens": answer.new_tokens, "stopped": answer.stopped} for row, answer in zip(prompts, answers)
        ])  # fmt: skip
        build.notes["engine"], build.notes["expected_memory_bytes"] = engine.name, expected
        for name, set_rows in questions.items():
            groups = [*map(group_of, set_rows)]
            build.metrics[name] = {
                key: metrics.interval(
                    [float(finished[row["id"]][key] == row["gold"]) for row in set_rows], args.seed, groups
                )
                for key in ("choice", "choice_per_byte")
            } | {
                "guessing": commonest_share([row["gold"] for row in set_rows]),
                "same_choice": commonest_share([finished[row["id"]]["choice"] for row in set_rows]),
            }
    engine.close()
    run.finish()
    for name, figures in build.metrics.items():
        accuracy, normalised = figures["choice"], figures["choice_per_byte"]
        print(
            f"{name}: accuracy {wording.interval(accuracy)}, byte-normalised {wording.interval(normalised)}, on "
            f"{accuracy['n']} questions; guessing: {figures['guessing']:.3f}; share of the most frequent choice: "
            f"{figures['same_choice']:.3f}"
        )
    print(args.output)


def open_model(model: ModelDirectory, args, rows: list[dict], chats: list[list[dict]]) -> tuple:
    """(the model's engine, with a context for the longest text; the bytes that it is expected to take, or None)."""
    from lib.budget import memory
    from lib.engines import opening

    longest = max(len(evaluation_sets.question_chat(row)[0]["content"]) + max(map(len, row["options"])) for row in rows)
    longest = max([longest, *(len(chat[0]["content"]) for chat in chats)])
    context = longest // 2 + args.max_new_tokens + 256  # two characters per token: more than any text here needs
    question_tokens, prompt_tokens = (
        opening.longest_prompt(model, [*map(evaluation_sets.question_chat, rows)]),
        opening.longest_prompt(model, chats),
    )

    def need(config, adapter, precision, batch, new_tokens):
        scoring = memory.estimate_answering(config, adapter, precision, 1, question_tokens, 1)
        return max(
            scoring,
            memory.estimate_answering(config, adapter, precision, batch, prompt_tokens, new_tokens),
            key=memory.total,
        )

    expected = opening.check_memory(model, args, need, context, args.max_new_tokens)
    settings = dict(threads=args.threads, batch=args.batch_size, context=context)
    return opening.open_engine(model, load=args.precision, **loading.placement_arguments(args), **settings), expected


def reserve_context(engine, args, rows: list[dict], chats: list[list[dict]]) -> None:
    """Make room for the longest question with its longest option, and for the longest prompt with its answer."""
    lengths = {
        f"--prompts: {chat[0]['content'][:60]!r}": len(engine.prompt_ids(chat)) + args.max_new_tokens for chat in chats
    }
    for row in rows:
        option = max(len(engine.answer_ids(text)) for text in evaluation_sets.option_texts(row))
        lengths[f"question {row['id']!r}"] = len(engine.prompt_ids(evaluation_sets.question_chat(row))) + option
    longest = max(lengths, key=lengths.get)
    engine.reserve_context(lengths[longest], longest)


def score_options(rows: list[dict], engine, finished, name: str) -> None:
    """Save each option's log-likelihood in nats, and the choices that follow from it."""
    from tqdm import tqdm

    for row in tqdm(rows, unit="question", desc=name, file=sys.stderr):
        texts = evaluation_sets.option_texts(row)
        options = [engine.answer_ids(text) for text in texts]
        sums = [
            float(logprobs.sum())
            for logprobs in engine.options_logprobs(engine.prompt_ids(evaluation_sets.question_chat(row)), options)
        ]
        normalised = [total / len(text.encode()) for total, text in zip(sums, texts)]
        result = {
            "id": row["id"], "question": row["question"], "options": row["options"], "gold": row["gold"],
            "choice": sums.index(max(sums)), "choice_per_byte": normalised.index(max(normalised)), "logprobs": sums,
        }  # fmt: skip
        finished.add([result])


def group_of(row: dict) -> str:
    """What the answers of several questions hang together by: BoolQ asks about some passages twice or more."""
    return row["passage"] or row["id"]


def commonest_share(positions: list[int]) -> float:
    """The share of the most frequent position. For the right options, that is the accuracy of always choosing it."""
    return max(map(positions.count, set(positions))) / len(positions)


def estimate_cost(job):
    """The cost of scoring the options, and of answers that are as long as allowed."""
    from lib.budget import memory
    from lib.forecast.costs import Cost, rate_seconds, start_seconds

    args, w, rates, maxima = job.args, job.work["forgetting"], job.rates[job.model], job.work["most"]
    seconds = start_seconds(job.rates, *["adapter start"] * (job.model == "lora"))
    seconds += rate_seconds(rates["read"], w["tokens"], w["passes"])
    seconds += rate_seconds(rates["read batch"], w["prompt_tokens"]) + rate_seconds(rates["step batch"], w["steps"])
    options = memory.estimate_answering(job.config, job.adapter, args.precision, 1, maxima["question"], 1)
    sizes = args.batch_size, maxima["chat"], args.max_new_tokens
    answers = memory.estimate_answering(job.config, job.adapter, args.precision, *sizes)
    return Cost(seconds, max(options, answers, key=memory.total))


if __name__ == "__main__":
    cli.run(main, make_parser)
