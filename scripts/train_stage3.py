"""CLaRa, stage 3: train a model to retrieve documents for a question, guided by the answers that they lead to.

    python scripts/train_stage3.py --model models/smollm2-135m-clara-stage2 --data data/factbook/clara \\
        --output models/smollm2-135m-clara

Takes a model from train_stage2.py, and questions with candidate documents and answers: a file in the authors' published
format, or a data artifact from `generate_data.py --source clara`. The query reasoner starts as a copy of the compressor
and turns a question into vectors; the generator reads the candidates whose vectors are most similar. Reasoner and
generator are trained. Compressor and memory tokens do not change, so documents that are already compressed stay valid.
Leaves the files of train_stage2.py and the reasoner. Checkpoints are saved in --run-dir. If the run is killed, the same
command resumes it with the same losses.
"""

from pathlib import Path

from lib.core import artifact, cli, compute
from lib.model import directory, loading


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="model directory from train_stage2.py")
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
        "--candidates", type=cli.integer(2), help="maximum documents per question, including the right ones"
    )
    train.add_argument("--k", type=cli.integer(1), help="retrieved documents (or chunks of long ones) to read")
    train.add_argument(
        "--retrieval-share",
        type=cli.number(0, 1),
        help="fraction of steps that train retrieval only (contrastive loss)",
    )
    train.add_argument(
        "--temperature", type=cli.number(0.001), help="softmax temperature of the choice among candidates"
    )
    train.add_argument("--eval-samples", type=cli.integer(1), help="validation questions")
    train.add_argument("--eval-steps", type=cli.integer(1), help="optimiser steps between validations")
    loading.add_load_flags(train)
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib.clara import passages

    inputs = artifact.identify_inputs({"model": args.model, "data": args.data})
    splits = passages.load_splits(args.data, 3, args.samples, args.eval_samples, args.seed)
    rows, held_out = ([passages.limit_documents(row, args.candidates) for row in split] for split in splits)
    if args.retrieval_share and (unknown := sum(not row.positions for row in rows)):
        raise cli.InputError(
            f"{args.data}: {unknown:,} of {len(rows):,} examples have no pos_index, which marks the right documents "
            "for --retrieval-share to learn from; give --retrieval-share 0, or examples with pos_index"
        )

    # --- tokens and labels ----------------------------------------------------------------------------
    from dataclasses import replace

    from transformers import set_seed

    from lib.clara import learning, network
    from lib.core import hardware

    compute.use_threads(args.threads)
    hardware.keep_freed_memory()
    set_seed(args.seed)
    base, shape = network.open_base(args.model, args.base), replace(network.read_config(args.model), k=args.k)
    inputs |= artifact.identify_inputs({"base": base.path})
    tokenizer, ends = directory.load_tokenizer(base), directory.eos_token_ids(base)
    args.max_length = directory.limit_length(base, args.max_length)
    table = learning.CandidateTable(tokenizer, shape)
    examples, validation_set = ([table.search(row, ends) for row in split] for split in (rows, held_out))
    learning.check_ids(base, tokenizer, [*examples, *validation_set], table.rows)
    training_set, audit = learning.audit_examples(examples, tokenizer, args.max_length, shape)

    # --- train ------------------------------------------------------------------------------------------
    expected = learning.check_memory(base, shape, training_set, args)
    lm, dtype = learning.load_base(base, args)
    model = network.load_clara(args.model, lm, k=args.k)
    compressed = table.compressed(model, args.batch_size, dtype)
    model.learn_to_search(compressed)
    model.train_only("reasoner", "generator")
    run, metrics = learning.train_stage(
        args, "stage 3", learning.SearchTrainer, model, dtype, training_set, validation_set, inputs["model"], expected,
        table=compressed, retrieval_share=args.retrieval_share, temperature=args.temperature,
    )  # fmt: skip

    # --- write ------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "clara", args, inputs) as build:
        network.save_adapters(model, build.path, network.ADAPTERS, base.path)
        tokenizer.save_pretrained(build.path)
        build.metrics = metrics | {"stage": 3, "labels": audit}
    run.finish()
    learning.print_verdict(metrics)
    recall = metrics["watched"]["recall"]
    print(f"retrieval: {recall:.1%} of the right documents are among the {args.k} chosen from a question's candidates")
    print(args.output)


def estimate_cost(job):
    from lib.forecast import costs

    cost = costs.clara_stage_cost(job, "train_stage3")
    return cost._replace(seconds=cost.seconds + costs.rate_seconds(job.rates["clara"]["search start"]))


if __name__ == "__main__":
    cli.run(main, make_parser)
