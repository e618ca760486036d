"""Measure how far one model is from another: the KL divergence on held-out answers.

    python scripts/measure_divergence.py --reference models/smollm2-135m-lora --model models/smollm2-135m-int4-lora \\
        --base models/smollm2-135m-base --data data/factbook/raw --output reports/divergence-smollm2-135m-int4-lora

Takes two model directories that share a tokenizer: 16 bit, an adapter, NF4 or INT8, a GGUF, or an adapter on a GGUF.
Each is read through its own engine. merge_lora.py and quantize.py make the same comparison for what they write.
Leaves a directory whose metadata.json contains the divergence and, with --base, the share of the fine-tuning gain that
the model retains. This is a measurement: no result is rejected.
"""

from pathlib import Path

from lib.core import artifact, cli


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--reference", type=Path, required=True, help="reference model directory")
    files.add_argument("--model", type=Path, required=True, help="model directory to measure")
    files.add_argument("--base", type=Path, help="model before the reference was fine-tuned (default: none)")
    files.add_argument("--data", type=Path, required=True, help="data artifact, or a file of examples")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    options = parser.add_argument_group("options")
    options.add_argument("--samples", type=cli.integer(1), help="validation examples to measure on")
    options.add_argument("--seed", type=cli.integer(0), help="random seed for the examples' choice")
    return parser


def main(args):
    from lib.data import records
    from lib.model.directory import open_directory
    from lib.quant import divergence

    inputs = {"reference": args.reference, "model": args.model, "base": args.base, "data": args.data}
    inputs = artifact.identify_inputs(inputs)
    rows = records.sample_rows(records.load_split(args.data, "validation"), args.samples, args.seed)
    with artifact.write_artifact(args.output, "divergence", args, inputs) as build:
        reference, model, base = (path and open_directory(path) for path in (args.reference, args.model, args.base))
        measured = divergence.compare(reference, model, rows, base, args.threads)
        build.metrics = {"divergence": measured}
        artifact.write_json(build.path / "divergence.json", measured)
    print(divergence.describe(measured))
    print(args.output)


if __name__ == "__main__":
    cli.run(main, make_parser)
