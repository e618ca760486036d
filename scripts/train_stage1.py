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

from lib import artifact, cli, models
from lib.cli import InputError

# Arguments that change nothing in the result, or are known by their content's digest.
PARAPHRASE = "What does the document say, in other words?"
NO_MATTER = ("model", "data", "output", "run", "threads", "profile", "gradient_checkpointing")


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument("--model", type=Path, required=True, help="base model directory")
    what.add_argument("--data", type=Path, required=True, help="rows of stage 1: a data artifact, or a file")
    what.add_argument("--output", type=Path, required=True, help="directory to write")
    what.add_argument("--run", type=Path, help="work in progress (default: runs/clara-<name of the output>)")
    shape = parser.add_argument_group("compression")
    shape.add_argument("--compress-rate", type=cli.whole(1, 256), help="tokens a vector; 1 to 256")
    shape.add_argument("--doc-max-tokens", type=cli.whole(1), help="longer documents are cut into pieces")
    shape.add_argument("--lora-r", type=cli.whole(1), help="rank of the adapters")
    shape.add_argument("--lora-alpha", type=cli.number(0), help="scale: the update is multiplied by alpha / r")
    shape.add_argument("--lora-targets", help="all-linear, or layer names divided by commas")
    train = parser.add_argument_group("training")
    cli.add_training_flags(train, "passages")
    train.add_argument("--apart-weight", type=cli.number(0), help="of the distance between memory and text in the loss")
    train.add_argument("--first-rate", type=cli.whole(1, 256), help="tokens a vector at the beginning of the training")
    train.add_argument("--watched", type=cli.whole(1), help="held-out passages that the loss is watched on")
    train.add_argument("--watch-steps", type=cli.whole(1), help="steps between looks at them")
    models.add_load_flags(train)
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib import clara_rows, records

    base = artifact.identify(args.model)
    if models.is_adapter(args.model) or models.is_quantized(args.model):
        raise InputError(f"{args.model}: expected a base model in 16 bit")
    rows, held_out = clara_rows.split(args.data, 1, args.samples, args.watched, args.seed)

    # --- tokens and labels ----------------------------------------------------------------------------
    from transformers import set_seed

    from lib import clara, clara_training, hardware, runlog, training

    models.use_threads(args.threads)
    hardware.keep_freed_memory()
    targets = (args.lora_r, args.lora_alpha, args.lora_targets)
    shape = clara.Shape(args.compress_rate, args.doc_max_tokens, *targets)
    tokenizer, ends = models.tokenizer(args.model), models.ends(args.model)

    def encoded(row):
        pairs = [(question or PARAPHRASE, answer) for question, answer in row.pairs]
        return clara.encode(tokenizer, [row.document], pairs, ends, shape)

    examples, watched = ([*map(encoded, some)] for some in (rows, held_out))
    kept = [one for one in examples if len(one.after) <= args.max_length]
    audit = clara_training.audit(examples, kept, tokenizer, args.max_length, shape)

    # --- model, adapters, trainer -----------------------------------------------------------------------
    run = runlog.Run(
        args.run or Path("runs") / f"clara-{args.output.name}",
        {"base": base["digest"], "rows": records.digest([row._asdict() for row in rows])}
        | {k: v for k, v in vars(args).items() if k not in NO_MATTER},
    )
    micro_batch = training.MicroBatch(run, args.batch, args.accumulation, training.memory_work("clara", base, args))
    set_seed(args.seed)
    dtype = models.dtype(args.load)
    on_cpu = args.load == "auto" and hardware.device() == "cpu"
    model = clara.Clara(models.load(args.model, "fp32" if on_cpu else args.load, **models.placement(args)), shape)
    if on_cpu:
        models.hold_products_in(model.lm, dtype)
    model.train_only("compressor", "generator", memory=True)
    parameters = models.count_parameters(model)
    checkpoint = training.newest_checkpoint(run)
    trainer = clara_training.make_trainer(model, kept, watched, args, dtype, run, micro_batch)

    # --- train ------------------------------------------------------------------------------------------
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    # --- write ------------------------------------------------------------------------------------------
    with artifact.building(args.output, "clara", args, {"base": args.model, "data": args.data}) as build:
        clara.save(model, build.path, ["compressor", "generator"], args.model)
        tokenizer.save_pretrained(build.path)
        history = run.history()
        build.metrics = parameters | {
            "rows": len(kept), "steps": trainer.state.global_step, "labels": audit,
            "watched": {name: history[-1][name] for name in ("right", "shuffled")},
            "micro_batch": training.micro_batches(history), "history": history,
        }  # fmt: skip
    run.finish()
    right, other = (history[-1][name] for name in ("right", "shuffled"))
    print(f"held-out answers, nats a token: {right:.3f} with the right passage, {other:.3f} with another's")
    print(args.output)


if __name__ == "__main__":
    cli.run(main, make_parser)
