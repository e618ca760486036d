"""CLaRa's second stage: teach the generator to answer a question from several compressed documents.

    python scripts/train_stage2.py --model models/smollm2-135m-clara-stage1 --data data/factbook/clara \\
        --output models/smollm2-135m-clara-stage2

Takes what train_stage1.py left, and questions with documents and answers in the authors' published form (a file), or
what `generate_data.py --source clara` makes of any data. Trains the compressor further, and the generator: the one of
stage 1, or a fresh one. Leaves what train_stage1.py leaves. Checkpoints lie in --run while it works; killed at any
moment, the same command continues with the same losses.
"""

from pathlib import Path

from lib.core import artifact, cli, compute
from lib.model import directory, loading


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument("--model", type=Path, required=True, help="what train_stage1.py left")
    what.add_argument("--base", type=Path, help="its base model (default: where it lay)")
    what.add_argument("--data", type=Path, required=True, help="rows of stage 2 or 3: a data artifact, or a file")
    what.add_argument("--output", type=Path, required=True, help="directory to write")
    what.add_argument("--run", type=Path, help="work in progress (default: runs/clara-<name of the output>)")
    train = parser.add_argument_group("training")
    cli.add_training_flags(train, "questions")
    train.add_argument("--generator", choices=["continue", "fresh"], help="the generator to begin with")
    train.add_argument("--apart-weight", type=cli.number(0), help="of the distance between memory and text in the loss")
    train.add_argument("--watched", type=cli.integer(1), help="held-out questions that the loss is watched on")
    train.add_argument("--watch-steps", type=cli.integer(1), help="steps between looks at them")
    loading.add_load_flags(train)
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib.clara import passages

    given = artifact.identify(args.model)
    rows, held_out = passages.load_splits(args.data, 2, args.samples, args.watched, args.seed)

    # --- tokens and labels ----------------------------------------------------------------------------
    from transformers import set_seed

    from lib.clara import learning, network
    from lib.core import hardware

    compute.use_threads(args.threads)
    hardware.keep_freed_memory()
    set_seed(args.seed)
    base, shape = network.find_base(args.model, args.base), network.read_config(args.model)
    tokenizer, ends = directory.load_tokenizer(base), directory.eos_token_ids(base)
    examples, watched = (
        [learning.encode_documents(row, tokenizer, ends, shape) for row in some] for some in (rows, held_out)
    )
    kept, audit = learning.audit_examples(examples, tokenizer, args.max_length, shape)

    # --- train ------------------------------------------------------------------------------------------
    expected = learning.check_memory(base, shape, kept, args)
    lm, dtype = learning.load_base(base, args)
    model = network.load_clara(args.model, lm)
    if args.generator == "fresh":
        model.forget("generator")
    model.train_only("compressor", "generator")
    run, metrics = learning.train_stage(
        args, "stage 2", learning.ClaraTrainer, model, dtype, kept, watched, given, expected,
        apart_weight=args.apart_weight,
    )  # fmt: skip

    # --- write ------------------------------------------------------------------------------------------
    inputs = {"base": base, "model": args.model, "data": args.data}
    with artifact.write_artifact(args.output, "clara", args, inputs) as build:
        network.save_adapters(model, build.path, ["compressor", "generator"], base)
        tokenizer.save_pretrained(build.path)
        build.metrics = metrics | {"stage": 2, "labels": audit}
    run.finish()
    learning.print_verdict(metrics)
    print(args.output)


if __name__ == "__main__":
    cli.run(main, make_parser)
