"""Merge a LoRA adapter into its base model in full precision, and check that the outputs agree.

    python scripts/merge_lora.py --adapter models/smollm2-135m-lora --data data/factbook/raw \\
        --output models/smollm2-135m-lora-merged

Takes an adapter directory; the base is the one recorded in it, or --base. Leaves a plain model directory in the base's
16-bit format. Its metadata.json contains the divergence from base + adapter on fixed chats and general questions and,
with --data, on validation examples. A merge that diverges is rejected. So is a quantised base, because merging into 4
bit nearly erases the adapter.
"""

from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import InputError


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--adapter", type=Path, required=True, help="adapter directory")
    files.add_argument("--base", type=Path, help="base model directory (default: as recorded in the adapter)")
    files.add_argument("--output", type=Path, required=True, help="model directory to write")
    check = parser.add_argument_group("check")
    check.add_argument(
        "--data", type=Path, help="data artifact or file of examples, to check more answers on (default: none)"
    )
    check.add_argument("--samples", type=cli.integer(1), help="validation examples of --data to check")
    check.add_argument(
        "--max-kl", type=cli.number(0), help="reject a merge whose mean KL from base + adapter exceeds this, in nats"
    )
    check.add_argument(
        "--min-gain-kept", type=cli.number(-1, 1),
        help="reject a merge that retains a smaller fraction of the fine-tuning gain; needs --data",
    )  # fmt: skip
    check.add_argument("--seed", type=cli.integer(0), help="random seed for the examples' choice")
    return parser


def main(args):
    # --- check ---------------------------------------------------------------------------------------
    from lib.core import compute
    from lib.data import records
    from lib.model import directory, loading

    artifact.read(args.adapter, "adapter")
    adapter = directory.open_directory(args.adapter, args.base)
    directory.check_lora(adapter)
    if adapter.known_base and adapter.known_base.kind != "plain":
        raise InputError(
            f"{adapter.known_base.path}: is quantised, and merging into it would nearly erase this adapter. Merge into "
            "the 16-bit base (--base), then quantise"
        )
    base = adapter.base
    inputs = artifact.identify_inputs({"adapter": args.adapter, "base": base.path, "data": args.data})
    rows = (
        records.sample_rows(records.load_split(args.data, "validation"), args.samples, args.seed) if args.data else []
    )

    # --- merge in fp32, after the logits of base + adapter ------------------------------------------------
    import torch

    from lib.budget import memory
    from lib.core import hardware
    from lib.quant import divergence

    tokenizer = directory.load_tokenizer(base)
    config, positions = directory.load_config(base), divergence.count_positions(tokenizer, rows)
    memory.check_disk(args.output, artifact.content_bytes(base.path))
    expected = memory.check_fits(lambda: memory.estimate_merge(config, positions), [], hardware.free_memory("cpu"))
    compute.use_threads(args.threads)
    with artifact.write_artifact(args.output, "model", args, inputs) as build:
        build.notes["expected_memory_bytes"] = expected
        plain = loading.load_model(base, "fp32", device="cpu")
        stored = stored_dtype(base.path)
        adapted = loading.attach_adapter(plain, args.adapter, base.path)
        before = probe_logits(adapted, tokenizer)
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:  # NaN in the merged weights
            raise InputError(f"{args.adapter}: cannot be merged: {error}") from None
        exact = compare_logits(before, probe_logits(merged, tokenizer))
        merged.to(stored).save_pretrained(build.path)
        tokenizer.save_pretrained(build.path)
        merged.generation_config.save_pretrained(build.path)

        # --- check the written model, loaded again --------------------------------------------------------
        del plain, adapted, merged
        compute.release_memory()
        merged_directory = directory.open_directory(build.path)
        written = compare_logits(
            before, probe_logits(loading.load_model(merged_directory, "fp32", device="cpu"), tokenizer)
        )
        build.metrics = {
            "merged_fp32": exact,
            "written": written | {"dtype": str(stored).removeprefix("torch.")},
        }
        for label, measured in (
            ("merged in fp32", exact),
            (f"written as {build.metrics['written']['dtype']}", written),
        ):
            print(f"{label}: max |Δ logit| {measured['max_abs_logit']:.2e}, mean KL {measured['kl_mean']:.2e}")
        if not written["kl_mean"] <= args.max_kl or not torch.isfinite(torch.tensor(written["max_abs_logit"])):
            raise InputError(
                f"the merged model gives other outputs than base + adapter: mean KL {written['kl_mean']:.3g} exceeds "
                f"--max-kl {args.max_kl:g}; nothing was written"
            )
        compute.release_memory()
        adapter = adapter._replace(own_tokenizer=False)  # the merged model has the base's
        measured = divergence.compare(adapter, merged_directory, rows, base, args.threads)
        build.metrics["divergence"] = measured
        for label, figures in (("validation examples", measured), ("general questions", measured["general"])):
            if "kl_mean" in figures:
                print(f"on {figures['rows']} {label}: mean KL {figures['kl_mean']:.2e}, NLL {figures['nll']:.3f}")
        if objections := divergence.find_objections(measured, args.max_kl, args.max_kl, args.min_gain_kept):
            raise InputError(
                f"the merged model gives other outputs than base + adapter: {'; '.join(objections)}; nothing was "
                "written. The limits are --max-kl and --min-gain-kept"
            )
    print(args.output)


def stored_dtype(folder: Path):
    """The dtype of the weights in a model directory."""
    import torch
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).dtype or torch.float16


def probe_logits(model, tokenizer) -> list:
    """Logits at each position of the fixed chats: a tensor of float32 [tokens, vocabulary] per chat."""
    import torch

    from lib.model import chat

    prompts = [chat.prompt_ids(tokenizer, turns) for turns in chat.probes(tokenizer)]
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def compare_logits(before: list, after: list) -> dict[str, float]:
    import torch

    def divergence(expected, actual):  # in float64: a float32 sum over a vocabulary may fall below 0
        p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    kl = torch.cat([divergence(*pair) for pair in zip(before, after, strict=True)])
    return {
        "max_abs_logit": (torch.cat(before) - torch.cat(after)).abs().max().item(),
        "kl_mean": kl.mean().item(),
        "kl_max": kl.max().item(),
        "positions": len(kl),
    }


def estimate_cost(job):
    from lib.budget import memory
    from lib.forecast.costs import Cost, divergence_seconds, rate_seconds, start_seconds

    rates, work = job.rates, job.work
    # Loaded four times more: the merged model after it was written, and the models of the divergence check.
    seconds = start_seconds(rates, "adapter start") + 4 * rate_seconds(rates["load"])
    seconds += rate_seconds(rates["read on CPU"], 3 * work["chats"]) + divergence_seconds(job, "merge", others=2)
    return Cost(seconds, memory.estimate_merge(job.config, work["most"]["positions"]), work["model"]["bytes"])


if __name__ == "__main__":
    cli.run(main, make_parser)
