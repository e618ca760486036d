"""Benchmark models in interleaved runs, for machines whose speed fluctuates.

    python scripts/bench.py --models models/smollm2-135m-lora-gguf-q4_0-nearest-q8_0 models/smollm2-135m-lora-int4 \\
        --data data/factbook/raw --output reports/bench-smollm2-135m
    python scripts/bench.py --benchmark magpie --models models/smollm2-135m-base --output reports/bench-magpie

`decode` measures decoding speed at batch size 1, relative to the model named first. `magpie` measures how fast
generate_data.py samples instructions and responses, with its own settings, relative to transformers' generate with one
prompt at a time.
A shared or warm machine changes its speed from minute to minute. Interleaved runs all meet the same changes, so the
ratio within a round is more reliable than a ratio of two medians. Leaves speeds.json and bench.md.
"""

import time
from pathlib import Path

from lib.core import artifact, cli
from lib.report.page import as_markdown

ALONE = "one prompt at a time"


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--benchmark", choices=["decode", "magpie"], default="decode", help="benchmark to run")
    files.add_argument(
        "--models", type=Path, nargs="+", required=True, help="model directories; decode: the reference first"
    )
    files.add_argument(
        "--data", type=Path,
        help="decode: data artifact or file of examples; its first test example is the prompt (default: none)",
    )  # fmt: skip
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    options = parser.add_argument_group("options")
    options.add_argument(
        "--turns", type=cli.integer(1), help="rounds; each loads and times every model, after one untimed warm-up run"
    )
    options.add_argument("--tokens", type=cli.integer(2), help="decode: new tokens per timing; EOS is ignored")
    options.add_argument("--rows", type=cli.integer(1), help="magpie: examples per timing")
    options.add_argument("--rows-alone", type=cli.integer(1), help="magpie: examples per timing of one at a time")
    options.add_argument("--batch-size", type=cli.integer(1), help="magpie: concurrent sequences")
    options.add_argument("--seed", type=cli.integer(0), help="random seed for the prompt's choice and for sampling")
    return parser


def main(args):
    inputs = {path.name: path for path in args.models}
    if len(inputs) < len(args.models):
        raise cli.InputError(f"--models: expected directories of different names, each once: {', '.join(inputs)}")
    if args.benchmark == "decode" and not args.data:
        raise cli.InputError("--benchmark decode: needs --data")
    from lib.data import metrics
    from lib.model.directory import open_directory

    models = {name: open_directory(path) for name, path in inputs.items()}
    sources = artifact.identify_inputs(inputs | ({"data": args.data} if args.benchmark == "decode" else {}))
    timers = make_decode_timers(args, models) if args.benchmark == "decode" else make_magpie_timers(args, models)
    with artifact.write_artifact(args.output, "bench", args, sources) as build:
        speeds = {name: [] for name in timers}
        for turn in range(args.turns + 1):
            for name in sorted(timers, reverse=turn % 2 == 1):  # so that no model always follows the same one
                speed = timers[name]()
                if turn:
                    speeds[name].append(speed)
        reference = next(iter(timers))
        ratios = {name: [a / b for a, b in zip(values, speeds[reference])] for name, values in speeds.items()}
        build.metrics = {
            "reference": reference,
            f"{args.benchmark}_tokens_per_second": {name: metrics.spread(values) for name, values in speeds.items()},
            "ratio": {name: metrics.spread(values) for name, values in ratios.items()},
        }
        artifact.write_json(build.path / "speeds.json", build.metrics | {"turns": speeds})
        text = as_markdown(build_blocks(args, build.metrics))
        (build.path / "bench.md").write_text(text, encoding="utf-8")
    print(text, end="")
    print(args.output)


# --- decode ------------------------------------------------------------------------------------------


def make_decode_timers(args, models: dict) -> dict:
    from lib.data import records

    row = records.sample_rows(records.load_split(args.data, "test"), 1, args.seed)[0]
    return {name: lambda model=model: measure_decode(model, row, args) for name, model in models.items()}


def measure_decode(model, row: dict, args) -> float:
    """New tokens per second, after a short warm-up run."""
    from lib.engines.opening import open_engine

    engine = open_engine(model, threads=args.threads, batch=1)
    try:
        prompts = [engine.prompt_ids(row["prompt"])]
        engine.reserve_context(len(prompts[0]) + args.tokens, f"{args.data}: row {row['id']!r}")
        engine.generate(prompts, min(16, args.tokens), exact=True)
        return (args.tokens - 1) / engine.generate(prompts, args.tokens, exact=True)[0].decode_seconds
    finally:
        engine.close()


# --- magpie ------------------------------------------------------------------------------------------


def make_magpie_timers(args, models: dict) -> dict:
    first = next(iter(models.values()))
    timers = {ALONE: lambda: measure_magpie(first, args, args.rows_alone, alone=True)}
    return timers | {
        name: lambda model=model: measure_magpie(model, args, args.rows, alone=False) for name, model in models.items()
    }


def measure_magpie(model, args, rows: int, alone: bool) -> float:
    """New tokens per second over `rows` instructions and the responses to them."""
    from lib.data import records
    from lib.engines import magpie, opening, sampling, transformers_engine
    from lib.model import chat, directory

    values = cli.read_yaml(cli.ROOT / "configs" / "generate_data.yaml")
    tokenizer = directory.load_tokenizer(model)
    query = magpie.build_pre_query(tokenizer)
    instruction_settings = sampling.Settings(
        values["max_instruction_tokens"], values["temperature"], values["top_p"], query.end
    )
    response_settings = sampling.Settings(
        values["max_response_tokens"], values["response_temperature"], values["top_p"]
    )
    context = 2 * len(query.ids) + 64 + instruction_settings.max_new_tokens + response_settings.max_new_tokens
    if alone:
        engine, draw = transformers_engine.Transformers(model, threads=args.threads, batch=1), sample_one_by_one
    else:
        engine = opening.open_engine(model, threads=args.threads, batch=args.batch_size, context=context)
        draw = sample_in_batch
    try:
        started = time.perf_counter()
        instructions = draw(engine, [query.ids] * rows, instruction_settings, args.seed)
        turns = [records.message("user", sample.text.strip() or "Hello") for sample in instructions]
        responses = draw(engine, [chat.prompt_ids(tokenizer, turn) for turn in turns], response_settings, args.seed + 1)
        return sum(sample.new_tokens for sample in instructions + responses) / (time.perf_counter() - started)
    finally:
        engine.close()


def sample_in_batch(engine, prompts: list, settings, seed: int) -> list:
    from lib.engines.sampling import derive_seed

    seeds = [[derive_seed(seed, str(n))] for n in range(len(prompts))]
    samples = dict(engine.sample(prompts, seeds, settings))
    return [samples[n][0] for n in range(len(prompts))]


def sample_one_by_one(engine, prompts: list, settings, seed: int) -> list:
    """The way of most scripts: transformers' generate with one prompt at a time."""
    import torch

    torch.manual_seed(seed)
    samples = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=engine.model.device)
        with torch.inference_mode():
            out = engine.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=settings.max_new_tokens, do_sample=True,
                temperature=settings.temperature, top_p=settings.top_p, top_k=0, pad_token_id=engine.pad,
            )  # fmt: skip
        samples.append(engine.as_sample(out[0, len(prompt) :].tolist(), engine.ends))
    return samples


def build_blocks(args, results: dict) -> list[tuple]:
    reference, header = results["reference"], ["model", f"{args.benchmark}, tokens/s", "ratio within a run"]
    speeds, ratios = results[f"{args.benchmark}_tokens_per_second"], results["ratio"]
    rows = [
        [
            name, f"{s['median']:.1f} ({s['min']:.1f}–{s['max']:.1f})",
            f"{ratios[name]['median']:.2f}× ({ratios[name]['min']:.2f}–{ratios[name]['max']:.2f})",
        ]
        for name, s in speeds.items()
    ]  # fmt: skip
    work = (
        f"{args.tokens} new tokens at batch size 1"
        if args.benchmark == "decode"
        else f"{args.rows} instructions and their responses, {args.batch_size} concurrently; {args.rows_alone} {ALONE}"
    )
    text = f"{args.turns} interleaved runs of {work}: median and range. Ratios are relative to {reference} in that run."
    title = "Interleaved decode benchmark" if args.benchmark == "decode" else "Interleaved Magpie benchmark"
    return [("title", title), ("text", text), ("table", "words", header, rows)]


if __name__ == "__main__":
    cli.run(main, make_parser)
