"""CLaRa, stage 2: train the generator to answer a question from several compressed documents.

    python scripts/train_stage2.py --model models/smollm2-135m-clara-stage1 --data data/factbook/clara \\
        --output models/smollm2-135m-clara-stage2

Takes a model from train_stage1.py, and questions with documents and answers: a file in the authors' published format,
or a data artifact from `generate_data.py --source clara`. Trains the compressor further, and a generator: that of stage
1, or a fresh one. Leaves the same files as train_stage1.py. Checkpoints are saved in --run-dir. If the run is killed,
the same command resumes it with the same losses.
"""

from pathlib import Path

from lib.core import artifact, cli, compute
from lib.model import directory, loading


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="model directory from train_stage1.py")
    files.add_argument("--base", type=Path, help="base model directory (default: as recorded in the model)")
    files.add_argument("--data", type=Path, required=True, help="data artifact, or a file of stage 2 or 3 examples")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument(
        "--run-dir", type=Path,
        help="directory for checkpoints and logs; a command with other settings deletes these and starts over "
             "(default: runs/clara-<name of the output>)",
    )  # fmt: skip
    train = parser.add_argument_group("training")
    cli.add_training_flags(train, "questions")
    train.add_argument(
        "--generator", choices=["continue", "fresh"], help="initial generator: that of stage 1, or a fresh one"
    )
    train.add_argument(
        "--mse-weight", type=cli.number(0), help="loss weight of the MSE between memory tokens and text; 0: none"
    )
    train.add_argument("--eval-samples", type=cli.integer(1), help="validation questions")
    train.add_argument("--eval-steps", type=cli.integer(1), help="optimiser steps between validations")
    loading.add_load_flags(train)
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib.clara import passages

    inputs = artifact.identify_inputs({"model": args.model, "data": args.data})
    rows, held_out = passages.load_splits(args.data, 2, args.samples, args.eval_samples, args.seed)

    # --- tokens and labels ----------------------------------------------------------------------------
    from transformers import set_seed

    from lib.clara import learning, network
    from lib.core import hardware

    compute.use_threads(args.threads)
    hardware.keep_freed_memory()
    set_seed(args.seed)
    base, shape = network.open_base(args.model, args.base), network.read_config(args.model)
    inputs |= artifact.identify_inputs({"base": base.path})
    tokenizer, ends = directory.load_tokenizer(base), directory.eos_token_ids(base)
    args.max_length = directory.limit_length(base, args.max_length)
    examples, validation_set = (
        [learning.encode_documents(row, tokenizer, ends, shape) for row in split] for split in (rows, held_out)
    )
    learning.check_ids(base, tokenizer, [*examples, *validation_set])
    training_set, audit = learning.audit_examples(examples, tokenizer, args.max_length, shape)

    # --- train ------------------------------------------------------------------------------------------
    expected = learning.check_memory(base, shape, training_set, args)
    lm, dtype = learning.load_base(base, args)
    model = network.load_clara(args.model, lm)
    if args.generator == "fresh":
        model.forget("generator")
    model.train_only("compressor", "generator")
    run, metrics = learning.train_stage(
        args, "stage 2", learning.ClaraTrainer, model, dtype, training_set, validation_set, inputs["model"], expected,
        mse_weight=args.mse_weight,
    )  # fmt: skip

    # --- write ------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "clara", args, inputs) as build:
        network.save_adapters(model, build.path, ["compressor", "generator"], base.path)
        tokenizer.save_pretrained(build.path)
        build.metrics = metrics | {"stage": 2, "labels": audit}
    run.finish()
    learning.print_verdict(metrics)
    print(args.output)


def estimate_cost(job):
    from lib.forecast import costs

    return costs.clara_stage_cost(job, "train_stage2")


if __name__ == "__main__":
    cli.run(main, make_parser)
