"""Fine-tune an adapter on prompt-completion examples; the loss covers only the answer and its EOS.

    python scripts/sft.py --model models/smollm2-135m-base --data data/factbook/raw --samples 200 \\
        --output models/smollm2-135m-lora

Takes a base model directory, and a data artifact (its train split) or a file of examples. A quantised base (GGUF or
NF4) stays as it is, and the adapter is trained on top of it. The adapter is LoRA (arXiv 2106.09685) or a soft prompt
(prompt tuning, arXiv 2104.08691): vectors before every text, which cannot be merged or quantised.
Leaves an adapter that AutoPeftModelForCausalLM loads from any directory; for a GGUF, one that llama.cpp loads.
Checkpoints are saved in --run-dir. If the run is killed, the same command resumes it with the same losses. When memory
runs out, the micro-batch is halved; the examples of each step stay the same.
"""

from pathlib import Path

from lib.core import artifact, cli, compute
from lib.core.cli import InputError
from lib.model import directory, loading

LEARNING_RATES = {"lora": 5e-4, "prompt-tuning": 3e-2}  # for --learning-rate 0; the few vectors of a prompt move far


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="base model directory: 16 bit, NF4, or with a GGUF")
    files.add_argument("--data", type=Path, required=True, help="directory of generate_data.py, or a file (see README)")
    files.add_argument("--output", type=Path, required=True, help="adapter directory to write")
    files.add_argument(
        "--run-dir", type=Path,
        help="directory for checkpoints and logs; a command with other settings deletes these and starts over "
             "(default: runs/sft-<name of the output>)",
    )  # fmt: skip
    train = parser.add_argument_group("training")
    cli.add_training_flags(train, "examples")
    loading.add_load_flags(train)
    adapter = parser.add_argument_group("adapter")
    rates = ", ".join(f"{rate:g} for {method}" for method, rate in LEARNING_RATES.items())
    adapter.add_argument(
        "--method", choices=[*LEARNING_RATES], help=f"kind of adapter; with --learning-rate 0 the rate is {rates}"
    )
    adapter.add_argument("--virtual-tokens", type=cli.integer(1), help="length of the soft prompt, in tokens")
    adapter.add_argument("--lora-r", type=cli.integer(1), help="LoRA rank")
    adapter.add_argument("--lora-alpha", type=cli.number(0), help="LoRA alpha: the update is scaled by alpha / rank")
    adapter.add_argument(
        "--lora-dropout", type=cli.number(0, 1), help="dropout probability before the adapter; 0: none"
    )
    adapter.add_argument(
        "--lora-targets", help="layers with an adapter: all-linear (not the LM head), or names: q_proj,v_proj"
    )
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib.data import records

    if not args.samples:
        raise InputError("--samples: expected at least 1")
    base = directory.open_directory(args.model)
    if args.method == "prompt-tuning" and base.kind == "gguf":
        raise InputError(
            f"{args.model}: llama.cpp does not support soft prompts; use a 16-bit or NF4 base, or --method lora"
        )
    args.learning_rate = args.learning_rate or LEARNING_RATES[args.method]
    inputs = artifact.identify_inputs({"base": args.model, "data": args.data})
    rows = records.draw_training_rows(records.load_split(args.data, "train"), args.samples, args.seed)

    # --- tokens and labels ----------------------------------------------------------------------------
    from transformers import set_seed

    from lib.core import hardware
    from lib.model import chat
    from lib.train import loop

    compute.use_threads(args.threads)
    hardware.keep_freed_memory()
    if base.kind == "adapter":
        raise InputError(f"{args.model}: expected a base model, found an adapter; merge it first (`make lora-merged`)")
    if args.method == "lora":
        check_targets(directory.load_config(base), args)
    tokenizer = directory.load_tokenizer(base)
    ends = directory.eos_token_ids(base)
    encoded = [chat.encode_row(tokenizer, row, ends) for row in rows]
    directory.check_ids(
        base.path, directory.count_embedding_rows(base), tokenizer, (row["input_ids"] for row in encoded)
    )
    args.max_length = directory.limit_length(
        base, args.max_length, args.virtual_tokens if args.method == "prompt-tuning" else 0
    )
    kept = [row for row in encoded if len(row["input_ids"]) <= args.max_length]
    audit = audit_labels(encoded, kept, tokenizer, ends, args.max_length)

    # --- model, adapter, trainer ----------------------------------------------------------------------
    run, micro_batch = loop.open_run(args, "sft", inputs["base"], {"rows": records.digest(rows)})
    lengths = [len(row["input_ids"]) for row in kept]
    micro_batch.expected_bytes = loop.check_memory(base, adapter_settings(args), lengths, micro_batch.rows, args)
    set_seed(args.seed)
    dtype = loading.torch_dtype(args.precision)
    on_cpu = args.precision == "auto" and hardware.device() == "cpu"
    plain = loading.load_model(base, "fp32" if on_cpu else args.precision, **loading.placement_arguments(args)).train()
    model = add_lora(plain, args) if args.method == "lora" else add_prompt(plain, tokenizer, args)
    if on_cpu:
        loading.cast_frozen_linears(model, dtype)

    # --- train ------------------------------------------------------------------------------------------
    metrics = loop.fit(make_trainer(model, tokenizer, kept, lengths, args, dtype, run, micro_batch), run)

    # --- write ------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "adapter", args, inputs) as build:
        loading.save_adapter(model, args.model, build.path)
        if base.kind == "gguf":  # llama.cpp runs the two together, and the tokenizer is in the base
            write_beside_gguf(build.path, model.config)
        else:
            tokenizer.save_pretrained(build.path)
        build.notes["expected_memory_bytes"] = micro_batch.expected_bytes
        build.metrics = metrics | {"rows": len(kept), "labels": audit}
    run.finish()
    print(args.output)


def write_beside_gguf(folder: Path, config) -> None:
    from lib.gguf import writing

    try:
        writing.write_adapter(folder, folder / "adapter.gguf", config)
    except ValueError as error:
        raise InputError(str(error)) from None
    (folder / "adapter_model.safetensors").unlink()


def audit_labels(encoded, kept, tokenizer, ends, max_length) -> dict:
    """Statistics of the labels, which are also printed. InputError if no row fits or an EOS has no label."""
    if not kept:
        shortest = min(len(row["input_ids"]) for row in encoded)
        raise InputError(
            f"all {len(encoded):,} examples are longer than --max-length {max_length} (the shortest has {shortest} "
            "tokens)"
        )
    tokens = sum(len(row["input_ids"]) for row in kept)
    supervised = sum(label != -100 for row in kept for label in row["labels"])
    with_eos = sum(row["labels"][-1] in ends for row in kept)
    if with_eos != len(kept):
        raise InputError(
            f"{len(kept) - with_eos:,} examples have no label on EOS, so the model would not learn to stop"
        )
    example = kept[0]
    answer = [label for label in example["labels"] if label != -100]
    prompt = example["input_ids"][: -len(answer)]
    print(f"{len(kept):,} examples, {tokens:,} tokens, loss on {supervised / tokens:.1%} of them; ", end="")
    print("every answer ends in EOS; none truncated; ", end="")
    print(f"{len(encoded) - len(kept):,} dropped (longer than {max_length} tokens)")
    print(f"no loss on: …{tokenizer.decode(prompt)[-160:]!r}")
    print(f"loss on:    {tokenizer.decode(answer)!r}")
    return {
        "tokens": tokens,
        "supervised_tokens": supervised,
        "rows_left_out": len(encoded) - len(kept),
        "rows_cut": 0,
        "eos_supervised_share": with_eos / len(kept),
        "longest_row_tokens": max(len(row["input_ids"]) for row in kept),
    }


def adapter_settings(args) -> dict:
    """The adapter's settings for PEFT."""
    if args.method == "prompt-tuning":
        return {"num_virtual_tokens": args.virtual_tokens}
    targets = args.lora_targets if args.lora_targets == "all-linear" else args.lora_targets.split(",")
    return {
        "r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "target_modules": targets
    }  # fmt: skip


def check_targets(config, args) -> None:
    """InputError if an adapter would not be trained, or could not be merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lib.budget import trace

    model = trace.build_meta_model(config, "fp32", adapter_settings(args))
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            f"--lora-targets {args.lora_targets}: the LM head cannot have an adapter, because the loss is computed "
            "from its weights alone, and the adapter would not be trained; leave it out"
        )
    if isinstance(model.get_input_embeddings(), BaseTunerLayer) and config.get_text_config().tie_word_embeddings:
        raise InputError(
            f"--lora-targets {args.lora_targets}: the embeddings of this model are its LM head as well (they are "
            "tied), so merging an adapter on them would change both; leave them out"
        )


def add_lora(model, args):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter_settings(args)))


def add_prompt(model, tokenizer, args):
    """The model with a soft prompt, initialised with the embeddings of a text. With those of random tokens, or with
    random numbers, the loss starts higher and falls more slowly."""
    import torch
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", **adapter_settings(args)))
    ids = tokenizer("Answer the question in as few words as possible.", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([ids[n % len(ids)] for n in range(args.virtual_tokens)], device=model.device)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(model.get_input_embeddings()(ids))
    return model


def make_trainer(model, tokenizer, rows, lengths, args, dtype, run, micro_batch):
    """TRL's SFTTrainer, with batches of similar length. Rows are not truncated; TRL's default is 1,024 tokens."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lib.train import loop

    loop.project_labels_only()

    class Trainer(loop.LoopMixin, SFTTrainer):
        pass

    config = SFTConfig(
        **loop.trainer_settings(args, dtype, run), max_length=None, packing=False, completion_only_loss=True,
        dataset_kwargs={"skip_prepare_dataset": True}, eos_token=None,
    )  # fmt: skip
    return Trainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        run=run, micro_batch=micro_batch, lengths=lengths,
    )  # fmt: skip


def estimate_cost(job):
    from lib.budget import memory
    from lib.forecast.costs import Cost, rate_seconds, start_seconds

    args, w, rates = job.args, job.work["training"], job.rates
    seconds = start_seconds(rates, "adapter start", "training start")
    seconds += rate_seconds(rates["train"], w["tokens"], w["passes"]) + rate_seconds(rates["update"], w["updates"])
    sizes = min(args.batch_size, w["rows"]), job.work["most"]["length"], args.gradient_checkpointing
    precision = job.method if job.model == "int4" and job.method in memory.QUANTISED else args.precision
    peak = memory.estimate_training(job.config, job.lora, precision, *sizes)
    return Cost(seconds, peak, job.work["model"]["adapter_bytes"])


if __name__ == "__main__":
    cli.run(main, make_parser)
