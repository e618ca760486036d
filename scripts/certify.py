"""Compare two models of any kind on the answers of held-out rows: how far is one from the other?

    python scripts/certify.py --reference models/smollm2-135m-lora --model models/smollm2-135m-int4-lora \\
        --base models/smollm2-135m-base --data data/factbook/raw --output reports/certificate-smollm2-135m-int4-lora

Takes two model directories (16 bit, an adapter, NF4 or INT8, a GGUF, an adapter on a GGUF) that share a tokenizer,
each read through its own engine; merging and quantising make the same comparison of what they write. Leaves a
directory whose metadata.json holds the divergence, and with --base the share of the fine-tuning's gain that the model
has. Nothing is refused: it is a measurement.
"""

from pathlib import Path

from lib.core import artifact, cli


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument("--reference", type=Path, required=True, help="the model to measure from")
    what.add_argument("--model", type=Path, required=True, help="the model to measure")
    what.add_argument("--base", type=Path, help="the model before the fine-tuning of the reference (default: none)")
    what.add_argument("--data", type=Path, required=True, help="data artifact, or a file of rows")
    what.add_argument("--output", type=Path, required=True, help="directory to write")
    how = parser.add_argument_group("how")
    how.add_argument("--samples", type=cli.integer(1), help="validation rows to measure on")
    how.add_argument("--seed", type=cli.integer(0), help="seed of the rows' choice")
    return parser


def main(args):
    from lib.data import records
    from lib.quant import divergence

    rows = records.sample_rows(records.load_split(args.data, "validation"), args.samples, args.seed)
    inputs = {"reference": args.reference, "model": args.model, "base": args.base, "data": args.data}
    inputs = {name: path for name, path in inputs.items() if path}
    with artifact.write_artifact(args.output, "certificate", args, inputs) as build:
        found = divergence.compare(args.reference, args.model, rows, args.base, args.threads)
        build.metrics = {"divergence": found}
        artifact.write_json(build.path / "divergence.json", found)
    print(divergence.describe(found))
    print(args.output)


if __name__ == "__main__":
    cli.run(main, make_parser)
