"""CLaRa's second stage: teach the generator to answer a question from several compressed documents.

    python scripts/train_stage2.py --model models/smollm2-135m-clara-stage1 --data data/factbook/clara \\
        --output models/smollm2-135m-clara-stage2

Takes what train_stage1.py left, and questions with documents and answers in the authors' published form (a file), or
what `generate_data.py --source clara` makes of any data. Trains the compressor further, and the generator: the one of
stage 1, or a fresh one. Leaves what train_stage1.py leaves. Checkpoints lie in --run while it works; killed at any
moment, the same command continues with the same losses.
"""

from pathlib import Path

from lib import artifact, cli, models


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
    train.add_argument("--watched", type=cli.whole(1), help="held-out questions that the loss is watched on")
    train.add_argument("--watch-steps", type=cli.whole(1), help="steps between looks at them")
    models.add_load_flags(train)
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib import clara_rows

    given = artifact.identify(args.model)
    rows, held_out = clara_rows.split(args.data, 2, args.samples, args.watched, args.seed)

    # --- tokens and labels ----------------------------------------------------------------------------
    from transformers import set_seed

    from lib import clara, clara_training, hardware

    models.use_threads(args.threads)
    hardware.keep_freed_memory()
    set_seed(args.seed)
    base, shape = clara.base_of(args.model, args.base), clara.shape_of(args.model)
    tokenizer, ends = models.tokenizer(base), models.ends(base)
    examples, watched = (
        [clara_training.about_documents(row, tokenizer, ends, shape) for row in some] for some in (rows, held_out)
    )
    kept, audit = clara_training.audit(examples, tokenizer, args.max_length, shape)

    # --- train ------------------------------------------------------------------------------------------
    expected = clara_training.check_memory(base, shape, kept, args)
    lm, dtype = clara_training.open_base(base, args)
    model = clara.load(args.model, lm)
    if args.generator == "fresh":
        model.forget("generator")
    model.train_only("compressor", "generator")
    run, metrics = clara_training.train(
        args, "stage 2", clara_training.ClaraTrainer, model, dtype, kept, watched, given, expected,
        apart_weight=args.apart_weight,
    )  # fmt: skip

    # --- write ------------------------------------------------------------------------------------------
    inputs = {"base": base, "model": args.model, "data": args.data}
    with artifact.building(args.output, "clara", args, inputs) as build:
        clara.save(model, build.path, ["compressor", "generator"], base)
        tokenizer.save_pretrained(build.path)
        build.metrics = metrics | {"stage": 2, "labels": audit}
    run.finish()
    clara_training.tell(metrics)
    print(args.output)


if __name__ == "__main__":
    cli.run(main, make_parser)
