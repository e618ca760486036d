"""CLaRa's first stage: teach a model to compress a document into a few vectors, and to answer from them.

    python scripts/train_stage1.py --model models/smollm2-135m-base --data data/factbook/clara \\
        --output models/smollm2-135m-clara-stage1

Takes a base model directory, and passages with their questions and answers in the authors' published form (a file), or
what `generate_data.py --source clara` makes of any data. From the compressed passage alone all its answers are to be
given, or its paraphrase. Trains the compressor and the generator; the base stays as it is.
Leaves one safetensors file an adapter, one for what is learnt beside them, clara.json and the tokenizer. Checkpoints
lie in --run while it works; killed at any moment, the same command continues with the same losses.
"""

from pathlib import Path

from lib.core import artifact, cli, compute
from lib.model import directory, loading


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument("--model", type=Path, required=True, help="base model directory")
    what.add_argument("--data", type=Path, required=True, help="rows of stage 1: a data artifact, or a file")
    what.add_argument("--output", type=Path, required=True, help="directory to write")
    what.add_argument("--run", type=Path, help="work in progress (default: runs/clara-<name of the output>)")
    shape = parser.add_argument_group("compression")
    shape.add_argument("--compress-rate", type=cli.integer(1, most=256), help="tokens a vector; 1 to 256")
    shape.add_argument("--doc-max-tokens", type=cli.integer(1), help="longer documents are cut into pieces")
    shape.add_argument("--lora-r", type=cli.integer(1), help="rank of the adapters")
    shape.add_argument("--lora-alpha", type=cli.number(0), help="scale: the update is multiplied by alpha / r")
    shape.add_argument("--lora-targets", help="all-linear, or layer names divided by commas")
    train = parser.add_argument_group("training")
    cli.add_training_flags(train, "passages")
    train.add_argument("--apart-weight", type=cli.number(0), help="of the distance between memory and text in the loss")
    train.add_argument(
        "--rebuild", type=cli.number(0), help="of the document itself, word for word, in the loss, against its answers"
    )
    train.add_argument(
        "--short-share", type=cli.number(0, 1), help="of the passages: these come first, and in stretches"
    )
    train.add_argument("--short-words", type=cli.integer(1), help="of such a stretch of whole sentences, at most")
    train.add_argument("--watched", type=cli.integer(1), help="held-out passages that the loss is watched on")
    train.add_argument("--watch-steps", type=cli.integer(1), help="steps between looks at them")
    loading.add_load_flags(train)
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib.clara import passages

    base = artifact.identify(args.model)
    rows, held_out = passages.load_splits(args.data, 1, args.samples, args.watched, args.seed)
    rows, short = passages.put_segments_first(rows, args.short_share, args.short_words)

    # --- tokens and labels ----------------------------------------------------------------------------
    from transformers import set_seed

    from lib.clara import learning, network
    from lib.core import hardware

    compute.use_threads(args.threads)
    hardware.keep_freed_memory()
    set_seed(args.seed)
    targets = (args.lora_r, args.lora_alpha, args.lora_targets)
    shape = network.ClaraConfig(args.compress_rate, args.doc_max_tokens, *targets)
    tokenizer, ends = directory.load_tokenizer(args.model), directory.eos_token_ids(args.model)
    told, most = (tokenizer, ends, shape), args.max_length
    examples = [learning.encode_passage(row, *told, args.rebuild, most) for row in rows]
    watched = [learning.encode_passage(row, *told) for row in held_out]
    kept, audit = learning.audit_examples(examples, tokenizer, args.max_length, shape)

    # --- train ------------------------------------------------------------------------------------------
    expected = learning.check_memory(args.model, shape, kept, args)
    lm, dtype = learning.load_base(args.model, args)
    model = network.Clara(lm, shape)
    model.know([piece for one in kept for piece in one.pieces])
    model.train_only("compressor", "generator")
    run, metrics = learning.train_stage(
        args, "stage 1", learning.ClaraTrainer, model, dtype, kept, watched, base, expected,
        before=sum(learning.fits(one, args.max_length) for one in examples[:short]),
        apart_weight=args.apart_weight,
    )  # fmt: skip

    # --- write ------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "clara", args, {"base": args.model, "data": args.data}) as build:
        network.save_adapters(model, build.path, ["compressor", "generator"], args.model)
        tokenizer.save_pretrained(build.path)
        build.metrics = metrics | {"stage": 1, "labels": audit}
    run.finish()
    learning.print_verdict(metrics)
    print(args.output)


if __name__ == "__main__":
    cli.run(main, make_parser)
