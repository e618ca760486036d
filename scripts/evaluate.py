"""Evaluate a model on held-out examples: accuracy, likelihood, speed, size and memory.

    python scripts/evaluate.py --model models/smollm2-135m-lora --data data/factbook/raw --samples 100 \\
        --output reports/eval-smollm2-135m-lora

Takes a model directory of any kind (plain, adapter, quantised, GGUF), and a data artifact (its test split) or a file of
examples. Leaves predictions.jsonl with one line per example, and metadata.json with the scores and their 95 %
intervals. Finished examples are saved in --run-dir. If the run is killed, the same command resumes it.
"""

import sys
import time
from pathlib import Path

from lib.core import artifact, cli, hardware
from lib.core.cli import OutOfMemory
from lib.model import directory, loading
from lib.model.directory import ModelDirectory


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="model directory of any kind")
    files.add_argument("--data", type=Path, required=True, help="directory of generate_data.py, or a file (see README)")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument(
        "--run-dir", type=Path, help="directory for finished examples and logs (default: runs/<name of the output>)"
    )
    options = parser.add_argument_group("options")
    options.add_argument("--samples", type=cli.integer(1), help="test examples; all if there are fewer")
    options.add_argument("--max-new-tokens", type=cli.integer(1), help="maximum tokens per answer")
    options.add_argument("--batch-size", type=cli.integer(1), help="examples answered at once")
    options.add_argument("--repeats", type=cli.integer(3), help="timings of each speed, at least 3")
    options.add_argument("--speed-tokens", type=cli.integer(2), help="tokens decoded per timing")
    options.add_argument(
        "--seed", type=cli.integer(0), help="random seed for the examples' choice and for the bootstrap"
    )
    loading.add_load_flags(options)
    return parser


def main(args):
    # --- check the inputs before a model is loaded ----------------------------------------------------
    from lib.core import runlog, wording
    from lib.core.kept import Kept
    from lib.data import metrics, records
    from lib.engines import opening
    from lib.report import lineage

    inputs = artifact.identify_inputs({"model": args.model, "data": args.data})
    source, model = inputs["model"], directory.open_directory(args.model)
    lineage.check_held_out(args.model, inputs["data"])
    rows = records.sample_rows(records.load_split(args.data, "test"), args.samples, args.seed)
    ids = {row["id"] for row in rows}
    identity = {
        "model": source["digest"],
        "rows": records.digest(rows),
        "precision": args.precision,
        "attention": args.attention,
        "code": artifact.code_digest(sys.argv[0]),
    }
    run = runlog.Run(
        args.run_dir or Path("runs") / args.output.name, identity | {"max_new_tokens": args.max_new_tokens}
    )
    finished = Kept(run.path / "predictions.jsonl", "id", belongs=lambda row: row["id"] in ids)
    finished.print_count(f"of {len(rows)} examples")
    if own_settings := directory.read_generation_settings(model):
        asked = ", ".join(f"{name} {value}" for name, value in own_settings.items())
        print(f"answers are greedy; the model's own generation settings are not used: {asked}")

    # --- answers and likelihoods, row by row ------------------------------------------------------------
    context = opening.context_for(rows, args.max_new_tokens)
    expected = check_memory(model, args, rows, context)
    engine = open_variant(model, args, context)
    prompts = {row["id"]: engine.prompt_ids(row["prompt"]) for row in rows}
    reserve_context(engine, rows, prompts, args)
    answer_rows([row for row in rows if row["id"] not in finished], engine, prompts, args, finished)
    predictions = [finished[row["id"]] | {"group": row["group"]} for row in rows]

    # --- speed, once nothing else runs --------------------------------------------------------------------
    speed = measure_speed(engine, list(prompts.values()), args)

    # --- write --------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "evaluation", args, inputs) as build:
        records.write(build.path / "predictions.jsonl", predictions)
        groups = [row["group"] for row in predictions]
        scores = {
            name: metrics.interval([row[name] for row in predictions], args.seed, groups, bounds)
            for name, bounds in (("token_f1", (0, 1)), ("exact_match", (0, 1)), ("contained", (0, 1)), ("nll", None))
        }
        build.notes["engine"], build.notes["expected_memory_bytes"] = engine.name, expected
        build.notes["generation"] = {"used": "greedy", "own": own_settings}
        build.notes["variant"] = {"digest": source["digest"], "format": read_format(model)}
        build.metrics = scores | {
            "stopped_share": sum(row["stopped"] for row in predictions) / len(predictions),
            "mean_new_tokens": sum(row["new_tokens"] for row in predictions) / len(predictions),
            "load_seconds": engine.load_seconds,
            "model_bytes": measure_model_bytes(model),
            "speed": speed,
        }
    engine.close()
    run.finish()
    f1, decode = scores["token_f1"], speed["one_stream"]["decode_tokens_per_second"]
    print(f"token F1 {wording.interval(f1)} on {len(rows)} examples", end="; ")
    print(f"decode {decode['median']:.1f} tokens/s at batch size 1 ({engine.name})")
    print(args.output)


def open_variant(model: ModelDirectory, args, context: int):
    """The variant's engine."""
    from lib.engines.opening import open_engine

    settings = dict(threads=args.threads, batch=args.batch_size, context=context)
    return open_engine(model, load=args.precision, **loading.placement_arguments(args), **settings)


def check_memory(model: ModelDirectory, args, rows, context: int) -> int | None:
    """Print and return the memory that answering takes. OutOfMemory if clearly less is free."""
    from lib.budget import memory
    from lib.engines import opening

    prompt = opening.longest_prompt(model, [row["prompt"] for row in rows])

    def need(config, adapter, precision, batch, new_tokens):
        return memory.estimate_answering(config, adapter, precision, batch, prompt, new_tokens)

    return opening.check_memory(model, args, need, context, args.max_new_tokens)


def reserve_context(engine, rows, prompts, args) -> None:
    """Make room for the longest prompt with its accepted answer, or with as many new tokens as it may get."""

    lengths = {}
    for n, row in enumerate(rows):
        prompt, gold = len(prompts[row["id"]]), len(engine.answer_ids(row["gold"][0]))
        lengths[f"{args.data}: row {row['id']!r}"] = prompt + max(gold, args.max_new_tokens)
        if n < engine.batch:  # measure_speed uses these
            lengths[f"{args.data}: row {row['id']!r} with --speed-tokens"] = prompt + args.speed_tokens
    longest = max(lengths, key=lengths.get)
    engine.reserve_context(lengths[longest], longest)


def answer_rows(rows, engine, prompts, args, finished) -> None:
    from tqdm import tqdm

    from lib.data import metrics

    chunk = 4 * args.batch_size  # rows that are lost if the process is killed
    with tqdm(total=len(rows), unit="row", desc=args.model.name, file=sys.stderr) as bar:
        for start in range(0, len(rows), chunk):
            batch = rows[start : start + chunk]
            golds = [engine.answer_ids(row["gold"][0]) for row in batch]
            try:
                results = engine.examine([prompts[row["id"]] for row in batch], golds, args.max_new_tokens)
            except OutOfMemory as error:
                folder = finished.file.parent
                raise OutOfMemory(f"{error}. {len(finished)} answers are finished and saved in {folder}") from None
            for row, (generation, logprobs) in zip(batch, results):
                answer = generation.text.strip()
                prediction = {
                    "id": row["id"], "question": row["prompt"][-1]["content"], "gold": row["gold"], "answer": answer,
                    **metrics.score_answer(answer, row["gold"]), "nll": float(-logprobs.mean()),
                    "new_tokens": generation.new_tokens, "stopped": generation.stopped,
                }  # fmt: skip
                finished.add([prediction])
                bar.update()


def measure_speed(engine, prompts: list[list[int]], args) -> dict:
    """Speeds over `repeats` runs with `speed_tokens` new tokens per prompt; EOS is ignored. A warm-up run comes first.

    A single stream has separate speeds of prefill and decoding, by the engine's own clock. A batch's speed is its new
    tokens per second of wall-clock time, prompts included: llama.cpp reads some prompts while it decodes others.
    """
    from lib.data import metrics

    single, streams, load = prompts[:1], 0, hardware.read_load()
    while streams != engine.batch:  # repeated with fewer at once if memory ran out meanwhile
        streams = engine.batch
        batch_prompts = (prompts * streams)[:streams]
        prefill, decode, batch = [], [], []
        for repeat in range(args.repeats + 1):
            generation = engine.generate(single, args.speed_tokens, exact=True)[0]
            started = time.perf_counter()
            batch_generations = engine.generate(batch_prompts, args.speed_tokens, exact=True)
            seconds = time.perf_counter() - started
            assert {args.speed_tokens} == {g.new_tokens for g in (generation, *batch_generations)}
            if repeat:
                prefill.append(generation.prompt_tokens / generation.prompt_seconds)
                decode.append((args.speed_tokens - 1) / generation.decode_seconds)
                batch.append(streams * args.speed_tokens / seconds)
    return {
        "busy_cores": hardware.count_busy_cores(load),  # kept so by other programs
        "new_tokens": args.speed_tokens,
        "one_stream": {
            "prompt_tokens": len(single[0]),
            "prefill_tokens_per_second": metrics.spread(prefill),
            "decode_tokens_per_second": metrics.spread(decode),
        },
        "batch": {
            "streams": streams,
            "prompt_tokens": sum(map(len, batch_prompts)),
            "generated_tokens_per_second": metrics.spread(batch),
        },
    }


def read_format(model: ModelDirectory) -> str:
    if (model.path / artifact.METADATA).is_file():
        meta = artifact.read_metadata(model.path)
        if "format" in meta:
            return meta["format"]
    if model.kind == "adapter":
        return f"{read_format(model.base)} + adapter" if model.base.kind in ("quantised", "gguf") else "adapter"
    return "gguf" if model.kind == "gguf" else "16 bit"


def measure_model_bytes(model: ModelDirectory) -> int:
    """Bytes needed to run this variant: its own files and, for an adapter, those of its base."""
    return artifact.content_bytes(model.path) + (measure_model_bytes(model.base) if model.base else 0)


def estimate_cost(job):
    from lib.budget import memory
    from lib.forecast.costs import Cost, rate_seconds, start_seconds

    args, rates, model_rates, maxima = job.args, job.rates, job.rates[job.model], job.work["most"]
    w, speed = job.work["evaluation"], job.work["evaluation"]["speed"]
    answers = w["tuned" if job.tuned else "untuned"]
    if "bytes" in model_rates:  # llama.cpp
        seconds = rate_seconds(model_rates["start"]) + rate_seconds(rates["rows"])
        seconds += rate_seconds(model_rates["read"], w["prompt_tokens"])
        seconds += rate_seconds(model_rates["write"], answers["new_tokens"] + w["gold_tokens"])
        repeat = rate_seconds(model_rates["read"], speed["prompt_tokens"] + speed["batch_tokens"])
        repeat += rate_seconds(model_rates["step"], speed["new_tokens"])
        repeat += rate_seconds(model_rates["write"], speed["streams"] * speed["new_tokens"])
        cache = memory.count_key_values(job.config)
        peak = memory.estimate_llamacpp(model_rates["bytes"], cache, args.batch_size, maxima["context"])
    else:
        seconds = start_seconds(rates, *["adapter start"] * (job.model == "lora"))
        seconds += rate_seconds(model_rates["read batch"], w["padded_tokens"], w["passes"])
        seconds += rate_seconds(model_rates["step batch"], answers["steps"])
        seconds += rate_seconds(model_rates["read"], w["prompt_tokens"] + w["gold_tokens"], w["rows"])
        repeat = rate_seconds(model_rates["read"], speed["prompt_tokens"], 1)
        repeat += rate_seconds(model_rates["read batch"], speed["padded_tokens"], 1)
        repeat += rate_seconds(model_rates["step"], speed["new_tokens"])
        repeat += rate_seconds(model_rates["step batch"], speed["new_tokens"])
        precision = job.method if job.model == "int4" else args.precision
        sizes = args.batch_size, maxima["prompt"], args.max_new_tokens
        peak = memory.estimate_answering(job.config, job.adapter, precision, *sizes)
    return Cost(seconds + speed["repeats"] * repeat, peak)


if __name__ == "__main__":
    cli.run(main, make_parser)
