"""Time models against each other in turns: decoding speed on one stream, and the ratio within each turn.

    python scripts/bench.py --models models/smollm2-135m-lora-gguf-q4_0-nearest-q8_0 models/smollm2-135m-lora-int4 \\
        --data data/factbook/raw --output reports/bench-smollm2-135m

Takes model directories of any kind, the one that the others are compared with first. A machine that is shared or warm
changes its speed from minute to minute; models that are timed one after the other, again and again, meet the same
changes, so that the ratio within a turn says more than two medians. Leaves speeds.json and bench.md.
"""

from pathlib import Path

from lib import artifact, cli
from lib.page import as_markdown


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument("--models", type=Path, nargs="+", required=True, help="model directories, the reference first")
    what.add_argument("--data", type=Path, required=True, help="data artifact, or a file of rows: the first test row")
    what.add_argument("--output", type=Path, required=True, help="directory to write")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--turns", type=cli.whole(1), help="times that each model is loaded and timed; one more goes before"
    )
    how.add_argument("--tokens", type=cli.whole(2), help="new tokens a time, EOS ignored")
    how.add_argument("--seed", type=cli.whole(0), help="seed of the row's choice")
    return parser


def main(args):
    from lib import metrics, records

    row = records.take(records.load(args.data, "test"), 1, args.seed)[0]
    inputs = {path.name: path for path in args.models}
    if len(inputs) < len(args.models):
        raise cli.InputError(f"--models: expected directories of different names, each once: {', '.join(inputs)}")
    with artifact.building(args.output, "bench", args, inputs | {"data": args.data}) as build:
        speeds = {name: [] for name in inputs}
        for turn in range(args.turns + 1):
            for name in sorted(inputs, reverse=turn % 2 == 1):  # none is always the one after the same other
                found = decode_speed(inputs[name], row, args)
                if turn:
                    speeds[name].append(found)
        reference = next(iter(inputs))
        ratios = {name: [a / b for a, b in zip(values, speeds[reference])] for name, values in speeds.items()}
        build.metrics = {
            "reference": reference,
            "decode_tokens_per_second": {name: metrics.spread(values) for name, values in speeds.items()},
            "ratio": {name: metrics.spread(values) for name, values in ratios.items()},
        }
        artifact.write_json(build.path / "speeds.json", build.metrics | {"turns": speeds})
        text = as_markdown(document(args, build.metrics))
        (build.path / "bench.md").write_text(text, encoding="utf-8")
    print(text, end="")
    print(args.output)


def decode_speed(path: Path, row: dict, args) -> float:
    """New tokens a second, after a short run that warms the engine up."""
    from lib.generation import open_engine

    engine = open_engine(path, threads=args.threads, batch=1)
    try:
        prompts = [engine.prompt_ids(row["prompt"])]
        engine.generate(prompts, min(16, args.tokens), exact=True)
        return (args.tokens - 1) / engine.generate(prompts, args.tokens, exact=True)[0].decode_seconds
    finally:
        engine.close()


def document(args, found: dict) -> list[tuple]:
    reference, header = found["reference"], ["model", "decode, tokens/s", "ratio within a turn"]
    speeds, ratios = found["decode_tokens_per_second"], found["ratio"]
    rows = [
        [
            name, f"{s['median']:.1f} ({s['min']:.1f}–{s['max']:.1f})",
            f"{ratios[name]['median']:.2f}× ({ratios[name]['min']:.2f}–{ratios[name]['max']:.2f})",
        ]
        for name, s in speeds.items()
    ]  # fmt: skip
    said = (
        f"{args.turns} turns of {args.tokens} new tokens on one stream each: median and range. The ratio is to "
        f"{reference} in the same turn."
    )
    return [("title", "Decoding speed in turns"), ("text", said), ("table", "words", header, rows)]


if __name__ == "__main__":
    cli.run(main, make_parser)
