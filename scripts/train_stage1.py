"""CLaRa, stage 1: train a model to compress a document into a few vectors and to answer from them.

    python scripts/train_stage1.py --model models/smollm2-135m-base --data data/factbook/clara \\
        --output models/smollm2-135m-clara-stage1

Takes a base model directory, and passages with questions and answers: a file in the authors' published format, or a
data artifact from `generate_data.py --source clara`. The model learns to give all answers about a passage, or its
paraphrase, from the compressed passage alone. Compressor and generator are trained; the base does not change.
Leaves one safetensors file per adapter, one for the other trained weights, clara.json and the tokenizer. Checkpoints
are saved in --run-dir. If the run is killed, the same command resumes it with the same losses.
"""

from pathlib import Path

from lib.core import artifact, cli, compute
from lib.model import directory, loading


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="base model directory")
    files.add_argument("--data", type=Path, required=True, help="data artifact, or a file of stage 1 examples")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument(
        "--run-dir", type=Path,
        help="directory for checkpoints and logs; a command with other settings deletes these and starts over "
             "(default: runs/clara-<name of the output>)",
    )  # fmt: skip
    shape = parser.add_argument_group("compression")
    shape.add_argument("--compress-rate", type=cli.integer(1, most=256), help="document tokens per vector, 1 to 256")
    shape.add_argument("--doc-max-tokens", type=cli.integer(1), help="tokens per chunk; longer documents are split")
    shape.add_argument("--lora-r", type=cli.integer(1), help="LoRA rank of the adapters")
    shape.add_argument("--lora-alpha", type=cli.number(0), help="LoRA alpha: the update is scaled by alpha / rank")
    shape.add_argument(
        "--lora-targets", help="layers with an adapter: all-linear (not the LM head), or names: q_proj,v_proj"
    )
    train = parser.add_argument_group("training")
    cli.add_training_flags(train, "passages")
    train.add_argument(
        "--mse-weight", type=cli.number(0), help="loss weight of the MSE between memory tokens and text; 0: none"
    )
    train.add_argument(
        "--reconstruction-weight", type=cli.number(0),
        help="loss weight of reconstructing the document word for word, relative to its answers; 0: none",
    )  # fmt: skip
    train.add_argument(
        "--short-share", type=cli.number(0, 1),
        help="fraction of passages that are split into segments and trained first (curriculum); 0: none",
    )  # fmt: skip
    train.add_argument("--short-words", type=cli.integer(1), help="maximum words per segment of whole sentences")
    train.add_argument("--eval-samples", type=cli.integer(1), help="validation passages")
    train.add_argument("--eval-steps", type=cli.integer(1), help="optimiser steps between validations")
    loading.add_load_flags(train)
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib.clara import passages

    inputs = artifact.identify_inputs({"base": args.model, "data": args.data})
    base = directory.open_directory(args.model)
    rows, held_out = passages.load_splits(args.data, 1, args.samples, args.eval_samples, args.seed)
    rows, segment_count = passages.put_segments_first(rows, args.short_share, args.short_words)

    # --- tokens and labels ----------------------------------------------------------------------------
    from transformers import set_seed

    from lib.clara import learning, network
    from lib.core import hardware

    compute.use_threads(args.threads)
    hardware.keep_freed_memory()
    set_seed(args.seed)
    targets = (args.lora_r, args.lora_alpha, args.lora_targets)
    shape = network.ClaraConfig(args.compress_rate, args.doc_max_tokens, *targets)
    tokenizer, ends = directory.load_tokenizer(base), directory.eos_token_ids(base)
    args.max_length = directory.limit_length(base, args.max_length)
    encoder_args, max_length = (tokenizer, ends, shape), args.max_length
    examples = [learning.encode_passage(row, *encoder_args, args.reconstruction_weight, max_length) for row in rows]
    validation_set = [learning.encode_passage(row, *encoder_args) for row in held_out]
    learning.check_ids(base, tokenizer, [*examples, *validation_set])
    training_set, audit = learning.audit_examples(examples, tokenizer, args.max_length, shape)

    # --- train ------------------------------------------------------------------------------------------
    expected = learning.check_memory(base, shape, training_set, args)
    lm, dtype = learning.load_base(base, args)
    model = network.Clara(lm, shape)
    model.know([piece for example in training_set for piece in example.pieces])
    model.train_only("compressor", "generator")
    run, metrics = learning.train_stage(
        args, "stage 1", learning.ClaraTrainer, model, dtype, training_set, validation_set, inputs["base"], expected,
        before=sum(learning.fits(example, args.max_length) for example in examples[:segment_count]),
        mse_weight=args.mse_weight,
    )  # fmt: skip

    # --- write ------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "clara", args, inputs) as build:
        network.save_adapters(model, build.path, ["compressor", "generator"], args.model)
        tokenizer.save_pretrained(build.path)
        build.metrics = metrics | {"stage": 1, "labels": audit}
    run.finish()
    learning.print_verdict(metrics)
    print(args.output)


def estimate_cost(job):
    from lib.forecast import costs

    return costs.clara_stage_cost(job, "train_stage1")


if __name__ == "__main__":
    cli.run(main, make_parser)
