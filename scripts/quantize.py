"""Quantise a model: to 4 or 8 bit for transformers (bitsandbytes), or to a GGUF for llama.cpp.

    python scripts/quantize.py --model models/smollm2-135m-base --data data/factbook/raw \\
        --method gguf-iq4_nl --output models/smollm2-135m-int4

Takes a model directory in 16 or 32 bits, and data: training examples calibrate the quantisation (gguf-iq4_nl, gguf-q4_0
and gguf-q5_0), validation examples measure the divergence. A file has no splits, so its examples are divided between
the two. Leaves a directory with the quantised model. Its metadata.json contains the size, the ratio of the source
model's size to it, and the divergence from the source model on answer tokens, which a fresh process measures on the
written files. A result that diverges too far, or loses what fine-tuning gained (--base), is rejected: nothing is
written, and the exit code is 2.
"""

import argparse
import sys
from pathlib import Path

from lib.core import artifact, cli, file_errors
from lib.core.cli import InputError
from lib.gguf import packing, writing
from lib.model import directory
from lib.model.directory import ModelDirectory

METHODS = ("auto", "nf4", "int8", *(f"gguf-{quantisation}" for quantisation in packing.QUANTISATIONS))


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--model", type=Path, required=True, help="model in 16 or 32 bits; merge an adapter first (merge_lora.py)"
    )
    files.add_argument("--data", type=Path, required=True, help="directory of generate_data.py, or a file (see README)")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    options = parser.add_argument_group("quantisation")
    options.add_argument(
        "--method", type=parse_method,
        help=f"quantisation method: {', '.join(METHODS)}; auto: nf4 on a GPU, else gguf-iq4_nl. A GGUF method may "
             "be followed, in any order, by -nearest (as --calibration-samples 0), -distilled (a label; needs "
             "--distil-samples) or the quantisation of its embedding: gguf-q4_0-nearest-q8_0",
    )  # fmt: skip
    options.add_argument(
        "--calibration-samples", type=cli.integer(0),
        help="training examples for calibrating gguf-iq4_nl, gguf-q4_0 and gguf-q5_0; 0: llama.cpp's own quantisation",
    )  # fmt: skip
    options.add_argument(
        "--distil-samples", type=cli.integer(0),
        help="training examples for tuning the scales, once calibrated, against the source model; 0: no tuning",
    )  # fmt: skip
    options.add_argument(
        "--embedding", choices=packing.QUANTISATIONS, default=None,
        help="format of a GGUF's embedding and LM head; a format at the end of --method takes its place (default: as "
             "the rest)",
    )  # fmt: skip
    check = parser.add_argument_group("check")
    check.add_argument("--samples", type=cli.integer(1), help="validation examples to measure the divergence on")
    check.add_argument(
        "--base",
        type=Path,
        help="model before fine-tuning, to measure the retained fine-tuning gain (default: none)",
    )
    check.add_argument(
        "--max-kl", type=cli.number(0),
        help="reject a model if the mean KL(source || quantised) per answer token exceeds this, in nats",
    )  # fmt: skip
    check.add_argument(
        "--max-general-kl", type=cli.number(0),
        help="the same limit for a few general questions that ship with Quartet, in nats",
    )  # fmt: skip
    check.add_argument(
        "--min-gain-kept", type=cli.number(-1, 1),
        help="reject a model that retains less of what fine-tuning gained in likelihood of the answers, from --base to "
             "--model: -1 to 1, 1 is all of it; needs --base",
    )  # fmt: skip
    check.add_argument(
        "--accept-divergence",
        action=cli.OnOff,
        default=False,
        help="write a model that exceeds a limit, and record that",
    )
    check.add_argument("--seed", type=cli.integer(0), help="random seed for the examples' choice")
    return parser


def parse_method(text: str) -> str:
    """An argparse type: a method, which may have variations."""
    split_method(text)
    return text


def split_method(text: str) -> tuple[str, list[str]]:
    """("gguf-q4_0", ["nearest", "q8_0"]) of "gguf-q4_0-nearest-q8_0"; ArgumentTypeError for an unknown method."""
    method = max((name for name in METHODS if f"{text}-".startswith(f"{name}-")), key=len, default=None)
    variations = text.removeprefix(f"{method}-").split("-") if method and text != method else []
    allowed = {"nearest", "distilled", *packing.QUANTISATIONS} if method and method.startswith("gguf-") else set()
    if method is None or not allowed.issuperset(variations):
        raise argparse.ArgumentTypeError(
            (f"unknown method {text!r}" if text else "no method was given")
            + f"; expected one of {', '.join(METHODS)}. A gguf- method may be followed by -nearest, -distilled or the "
            "format of its embedding"
        )
    return method, variations


def check_methods() -> None:
    """For Make: exit with code 2 unless each word of the arguments VARIABLE=words is a method."""
    for argument in sys.argv[1:]:
        variable, _, words = argument.partition("=")
        try:
            for text in words.split() or ([""] if len(sys.argv) == 2 else []):
                split_method(text)
        except argparse.ArgumentTypeError as error:
            print(f"{variable}={words}: {error}", file=sys.stderr)
            sys.exit(cli.BAD_INPUT)


def apply_method(args) -> None:
    """Replace --method's variations by the flags that they stand for, and `auto` by the method for this machine."""
    from lib.core import hardware

    args.method, variations = split_method(args.method)
    if args.method == "auto":
        args.method = "nf4" if hardware.device() == "cuda" else "gguf-iq4_nl"
    for variation in variations:
        if variation == "nearest":
            args.calibration_samples = 0
        elif variation == "distilled" and not args.distil_samples:
            raise InputError("--method …-distilled: needs --distil-samples, the examples that the scales are tuned on")
        elif variation != "distilled":
            args.embedding = variation
    if args.method.removeprefix("gguf-") not in packing.CALIBRATED:
        args.calibration_samples = 0
    if not args.calibration_samples:
        args.distil_samples = 0


def main(args):
    # --- check ---------------------------------------------------------------------------------------
    if not args.model.exists():
        raise artifact.missing_error(args.model)
    source = artifact.read(args.model) if (args.model / artifact.METADATA).is_file() else None
    model = directory.open_directory(args.model)
    check_plain(model)
    apply_method(args)
    if args.embedding and not args.method.startswith("gguf-"):
        raise InputError(f"--embedding {args.embedding}: needs a gguf- method, not --method {args.method}; omit it")
    quantisation = args.method.removeprefix("gguf-")
    inputs = artifact.identify_inputs({"model": args.model, "data": args.data, "base": args.base})
    train, rows = choose_rows(args)
    shared = len({row["id"] for row in train} & {row["id"] for row in rows})
    if shared:
        print(
            f"{args.data}: has only one prompt, so the same {shared:,} examples calibrate the model and measure its "
            "divergence; the divergence is likely to be larger on others"
        )

    expected = check_memory(model, args, rows, train)

    # --- quantise, then measure the written model --------------------------------------------------------
    from lib.quant import divergence

    with artifact.write_artifact(args.output, "quantized", args, inputs) as build:
        if args.method.startswith("gguf-"):
            write_gguf(model, build.path, quantisation, train, args)
        else:
            write_bitsandbytes(model, build.path, args.method)
        size = artifact.content_bytes(build.path)
        original = artifact.content_bytes(args.model)
        quantised, base = directory.open_directory(build.path), args.base and directory.open_directory(args.base)
        measured = divergence.run_in_fresh_process(divergence.compare, model, quantised, rows, base, args.threads)
        objections = divergence.find_objections(measured, args.max_kl, args.max_general_kl, args.min_gain_kept)
        build.notes["format"], build.notes["expected_memory_bytes"] = args.method, expected
        build.notes["engine"] = "llama.cpp" if args.method.startswith("gguf-") else "transformers"
        build.metrics = {
            "ratio": original / size,
            "input_bytes": original,
            "divergence": measured,
            "objections": objections,
            "examples": {"calibration": len(train), "divergence": len(rows), "both": shared},
        }
        if source and source.get("source", {}).get("model") == "smollm2-135m" and args.method == "gguf-q4_1":
            build.notes["caution"] = (
                "these weights are exact Q4_1 values already, so quantising them to Q4_1 is lossless"
            )
        print(f"{args.method}: {size / 1e6:.1f} MB, {original / size:.2f}x smaller than {original / 1e6:.1f} MB")
        print(divergence.describe(measured))
        if objections and not args.accept_divergence:
            raise InputError(
                f"{args.output}: rejected, nothing was written: {'; '.join(objections)}. Try another --method or more "
                "--calibration-samples, or keep the result anyway with --accept-divergence"
            )
    print(args.output)


def choose_rows(args) -> tuple[list[dict], list[dict]]:
    """(examples to calibrate with, examples to measure the divergence on). Those of a file are divided by prompt, in
    proportion to the numbers of both that are asked for; with a single prompt, all are in both."""
    from lib.data import records

    count = max(args.calibration_samples, args.distil_samples)
    if not args.calibration_samples:
        return [], records.sample_rows(records.load_split(args.data, "validation"), args.samples, args.seed)
    if args.data.is_file():
        rows = records.load_split(args.data, "train")
        prompts = sorted({row["group"] for row in rows}, key=lambda group: records.shuffle_key(args.seed, group))
        share = round(len(prompts) * count / (count + args.samples))
        calibrating = {*prompts[: min(max(1, share), len(prompts) - 1)]}
        train = [row for row in rows if row["group"] in calibrating] or rows
        held_out = [row for row in rows if row["group"] not in calibrating]
    else:
        train, held_out = (records.load_split(args.data, split) for split in ("train", "validation"))
    return records.sample_rows(train, count, args.seed), records.sample_rows(held_out, args.samples, args.seed)


def check_plain(model: ModelDirectory) -> None:
    if model.kind == "adapter":
        directory.check_lora(model)
        raise InputError(
            f"{model.path}: is an adapter; merge it first (`make lora-merged`), then quantise the merged model"
        )
    if model.kind != "plain":
        raise InputError(f"{model.path}: is already quantised; give its 16-bit source model")
    if not (model.path / "config.json").is_file():
        raise InputError(f"{model.path}: expected a plain model directory: config.json and 16-bit weights")


def check_memory(model: ModelDirectory, args, rows: list[dict], train: list[dict]) -> int | None:
    """Print and return the memory that calibration takes or, without it, the divergence check. OutOfMemory if clearly
    less is free."""
    from lib.budget import memory
    from lib.core import hardware
    from lib.model import chat
    from lib.quant import divergence

    config, tokenizer, ends = (
        directory.load_config(model),
        directory.load_tokenizer(model),
        directory.eos_token_ids(model),
    )
    longest = max((len(chat.encode_row(tokenizer, row, ends)["input_ids"]) for row in train), default=0)
    positions = divergence.count_positions(tokenizer, rows)

    def need(calibrated=bool(train), distilled=bool(args.distil_samples)):
        comparison = memory.estimate_comparison(config, positions)
        if not calibrated:
            return comparison
        return max(memory.estimate_calibration(config, longest, distilled), comparison, key=memory.total)

    changes = [[("--distil-samples 0", {"distilled": False})]] if args.distil_samples else []
    changes += [[("--calibration-samples 0, which quantises less accurately", {"calibrated": False})]] if train else []
    memory.check_disk(args.output, artifact.content_bytes(args.model))  # at most: a GGUF in 16 bit
    return memory.check_fits(need, changes, hardware.free_memory("cpu" if train else None))


def write_gguf(model: ModelDirectory, folder: Path, quantisation: str, train: list[dict], args) -> None:
    """Write model.gguf. Its token ids must equal the Hugging Face tokenizer's, or the model would write nonsense."""
    from safetensors import SafetensorError

    from lib.quant import same_tokens

    tokenizer = directory.load_tokenizer(model)  # fails before anything is written, if it cannot be loaded
    file = folder / "model.gguf"
    try:
        plan = writing.plan_file(directory.load_config(model), model.path, quantisation, args.embedding)
        blocks = calibrate(model, tokenizer, train, plan, args) if train else None
        writing.write_model(model.path, file, quantisation, blocks, args.embedding)
    except ValueError as error:
        raise InputError(str(error)) from None
    except SafetensorError as error:
        if file_errors.disk_is_full(error):
            raise
        raise InputError(f"{model.path}: its weights cannot be read: {error}") from None
    ends = directory.eos_token_ids(model)
    if differences := same_tokens.compare_token_ids(file, tokenizer, ends=ends):
        raise InputError(f"{model.path}: llama.cpp tokenises differently: " + "; ".join(differences[:3]))


def calibrate(plain: ModelDirectory, tokenizer, rows: list[dict], plan: dict, args) -> dict:
    """{matrix: packed rows} of the plan's matrices in a format that calibration supports."""
    from lib.core import compute
    from lib.model import chat, loading
    from lib.quant import distillation, rounding

    encoded = [chat.encode_row(tokenizer, row, directory.eos_token_ids(plain)) for row in rows]
    ids = (row["input_ids"] for row in encoded)
    directory.check_ids(plain.path, directory.count_embedding_rows(plain), tokenizer, ids)
    compute.use_threads(args.threads)
    model = loading.load_model(plain, "fp32", device="cpu")
    calibration_rows = encoded[: args.calibration_samples]
    if (tokens := sum(len(row["input_ids"]) for row in calibration_rows)) < packing.BLOCK:
        raise InputError(
            f"{args.data}: {tokens} tokens of training examples cannot calibrate blocks of {packing.BLOCK} weights; "
            "give more examples, or --calibration-samples 0"
        )
    kinds = {name: kind.name.lower() for name, (_, _, kind) in plan.items() if kind.name.lower() in packing.CALIBRATED}
    rounded = rounding.calibrate(model, calibration_rows, kinds, args.seed)
    if args.distil_samples:
        teacher = loading.load_model(plain, "auto", device="cpu")
        distillation.learn_scales(model, teacher, encoded[: args.distil_samples], rounded, args.seed)
    return {name: matrix.packed() for name, matrix in rounded.items()}


def write_bitsandbytes(model: ModelDirectory, folder: Path, method: str) -> None:
    from lib.model import loading

    tokenizer = directory.load_tokenizer(model)
    loading.load_model(model, method).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def estimate_cost(job):
    from lib.budget import memory
    from lib.forecast.costs import Cost, divergence_seconds, rate_seconds, start_seconds

    rates, work, model_rates = job.rates, job.work, job.rates["int4"]
    has_base = bool(job.args.base)
    seconds = 2 * start_seconds(rates) + has_base * rate_seconds(rates["load"])  # the check starts a process of its own
    seconds += divergence_seconds(job, "divergence", others=has_base)
    counts = {key: work["divergence"][key] + work["general"][key] for key in work["general"]}
    if "bytes" in model_rates:  # a GGUF
        seconds += rate_seconds(rates["write"]) + 2 * rate_seconds(model_rates["start"])
        seconds += rate_seconds(model_rates["read beside torch"], counts["tokens"] - counts["answers"])
        seconds += rate_seconds(model_rates["distribution"], counts["answers"])
    else:
        seconds += rate_seconds(rates["load"]) + rate_seconds(model_rates["read"], counts["tokens"], counts["rows"])
    if "round" in rates:
        seconds += rate_seconds(rates["gather"], work["calibration"]["tokens"])
        seconds += rate_seconds(rates["round"], work["model"]["rounded"])
    if work["calibration"]["rows"]:
        longest = work["most"]["calibration"]
        peak = memory.estimate_calibration(job.config, longest, bool(job.args.distil_samples))
    else:
        peak = memory.estimate_comparison(job.config, work["most"]["positions"])
    return Cost(seconds, peak, model_rates.get("bytes", work["model"]["int4_bytes"]))


if __name__ == "__main__":
    cli.run(main, make_parser)
