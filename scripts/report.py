"""Compare evaluated variants: an HTML page, a Markdown report, and every figure as JSON.

    python scripts/report.py --evaluations reports/eval-smollm2-135m-base reports/eval-smollm2-135m-int4 \\
        --output reports/smollm2-135m

Takes evaluation artifacts of the same examples; the first one is the reference. Leaves index.html (one file that needs
no network), report.md with its pictures, and comparison.json, from which both are written. Only differences per example
are computed here; everything else was measured before. A difference counts only if its 95 % interval excludes zero.
"""

import json
from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import InputError
from lib.core.wording import difference, duration, gpu_peak, interval, megabytes, shorten, signed
from lib.data import metrics, records
from lib.report import align_sections, lineage
from lib.report.page import (
    COLOURS,
    INK,
    MARKS,
    as_html,
    as_markdown,
    load_matplotlib,
    make_standalone,
    new_canvas,
    render_svg,
)

SCORES = ("token_f1", "exact_match", "nll")
# What pipelines of this kind promise, the way it is usually written.
SMALLER, FASTER, LOSES, GAINS = 3.5, 3.0, 0.3, 7.0
FOUR_BIT = ("nf4", "gguf-iq4_nl", "gguf-q4_0", "gguf-q4_1", "gguf-q4_k")
UNTOLD = ("alignment", "answers", "training", "stages")  # not in metadata.json: too long
ADAPTER = " + adapter"  # after the format of a quantised base that an adapter lies beside


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--evaluations", type=Path, nargs="+", required=True, help="evaluation directories, the reference first"
    )
    files.add_argument(
        "--divergences", type=Path, nargs="*", default=[],
        help="divergence checks (measure_divergence.py) of variants that were built without one (default: none)",
    )  # fmt: skip
    files.add_argument(
        "--general", type=Path, nargs="*", default=[],
        help="general benchmarks of the variants (evaluate_general.py) (default: none)",
    )  # fmt: skip
    files.add_argument("--estimate", type=Path, help="directory from estimate.py to compare with (default: none)")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    files.add_argument("--model-name", help="name of the model family in the report (default: the name of the output)")
    options = parser.add_argument_group("options")
    options.add_argument("--answers", type=cli.integer(0), default=12, help="sample answers to show; 0: none")
    options.add_argument("--seed", type=cli.integer(0), default=42, help="random seed for the bootstrap")
    return parser


def main(args):
    # --- read and check ------------------------------------------------------------------------------
    args.model_name = args.model_name or args.output.name
    paths = {path.name.removeprefix(f"eval-{args.model_name}-"): path for path in args.evaluations}
    if len(paths) < len(args.evaluations):
        raise InputError(f"--evaluations: a variant is given more than once; expected each of {', '.join(paths)} once")
    metas = {name: artifact.read(path, "evaluation") for name, path in paths.items()}
    extra_inputs = {path.name: path for path in [*args.divergences, *args.general]}
    inputs = artifact.identify_inputs(paths | extra_inputs)
    answers = {name: read_predictions(path) for name, path in paths.items()}
    check_same_rows(answers, paths)
    divergences = read_divergences(args.divergences, metas)
    forgetting = align_sections.read_forgetting(args.general, metas)

    # --- compare ---------------------------------------------------------------------------------------
    stages, gaps = {}, []
    for path in [*paths.values(), *extra_inputs.values()]:
        lineage.collect(path, stages, gaps)
    effort = lineage.summarise(stages, gaps, args.estimate)
    comparison = compare(args, metas, answers, divergences, stages, effort["uncounted"]) | effort
    comparison["alignment"] = align_sections.gather(stages, lineage.display_paths(stages), forgetting, args.seed)

    # --- write -----------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "report", args, inputs) as build:
        figures = draw_figures(comparison)
        blocks = build_blocks(comparison, figures)
        artifact.write_json(build.path / "comparison.json", comparison)
        for name, (svg, _) in figures.items():
            (build.path / f"{name}.svg").write_text(make_standalone(svg), encoding="utf-8")
        (build.path / "report.md").write_text(as_markdown(blocks), encoding="utf-8")
        (build.path / "index.html").write_text(as_html(blocks, figures), encoding="utf-8")
        build.metrics = {k: v for k, v in comparison.items() if k not in UNTOLD}
    print(as_text(comparison))
    print(lineage.as_text(comparison))
    print(f"open {args.output / 'index.html'} in a browser")
    print(args.output)


# --- reading -----------------------------------------------------------------------------------------------


def read_predictions(path: Path) -> dict[str, dict]:
    lines = (path / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return {row["id"]: row for row in map(json.loads, filter(None, lines))}


def check_same_rows(answers: dict, paths: dict) -> None:
    """InputError unless all evaluations asked the same questions."""
    reference = next(iter(paths))
    expected = {key: row["gold"] for key, row in answers[reference].items()}
    for name, rows in answers.items():
        actual = {key: row["gold"] for key, row in rows.items()}
        differing = sorted(key for key in expected | actual if expected.get(key) != actual.get(key))
        if differing:
            raise InputError(
                f"{paths[name]} and {paths[reference]} cannot be compared: {len(differing)} examples differ between "
                f"them ({', '.join(differing[:3])}{', …' * (len(differing) > 3)}); evaluate both with the same "
                "--data, --samples and --seed"
            )


def read_divergences(paths: list[Path], metas: dict) -> dict[str, dict]:
    """{digest of the model: metadata}; InputError for the divergence of a model that was not evaluated."""
    divergences = {}
    for path in paths:
        meta = artifact.read(path, "divergence")
        digest = meta["inputs"]["model"]["digest"]
        if digest not in (evaluation["variant"]["digest"] for evaluation in metas.values()):
            raise InputError(
                f"{path}: belongs to {meta['inputs']['model']['path']}, which none of --evaluations measured"
            )
        divergences[digest] = meta
    return divergences


# --- comparing ---------------------------------------------------------------------------------------------


def compare(args, metas: dict, answers: dict, divergences: dict, stages: dict, gaps: list) -> dict:
    """Every figure of the report."""
    reference = next(iter(metas))
    variants = {name: describe(meta, metas[reference], divergences, stages) for name, meta in metas.items()}
    by_digest = {variant["digest"]: name for name, variant in variants.items()}
    pairs = [(name, reference) for name in variants if name != reference]
    for name, variant in variants.items():
        checked = divergences.get(variant["digest"], {"inputs": {}})["inputs"]
        reference_digest = checked.get("reference", {}).get("digest")
        variant["unquantised"] = by_digest.get(reference_digest or find_unquantised(variant, stages, by_digest))
        adapter = by_digest.get(
            stages.get(lineage.locate(variant["model"]), {"inputs": {}})["inputs"].get("adapter", {}).get("digest")
        )
        pairs += [(name, against) for against in {variant["unquantised"], adapter} - {None, reference}]
    differences = [
        {"variant": name, "against": against}
        | {score: metrics.compare_paired(answers[name], answers[against], score, args.seed) for score in SCORES}
        for name, against in pairs
    ]
    sample_ids = sorted(answers[reference], key=lambda row_id: records.shuffle_key(0, row_id))[: args.answers]
    samples = [
        {key: answers[reference][row_id][key] for key in ("id", "question", "gold")}
        | {
            "answers": {
                name: {"text": rows[row_id]["answer"], "mark": choose_mark(rows[row_id])}
                for name, rows in answers.items()
            }
        }
        for row_id in sample_ids
    ]
    names = lineage.display_paths(stages)
    return {
        "tag": args.model_name, "reference": reference, "rows": len(answers[reference]),
        "data": metas[reference]["inputs"]["data"]["path"], "machine": metas[reference]["machine"],
        "measured": [min(m["started"] for m in metas.values()), max(m["finished"] for m in metas.values())],
        "variants": variants, "differences": differences, "promises": check_claims(variants, reference, differences),
        "remarks": find_remarks(variants, reference, differences),
        "cautions": find_cautions(variants, metas, answers, gaps),
        "training": {
            names[path]: meta["metrics"]["history"]
            for path, meta in stages.items() if meta["kind"] == "adapter" and meta["metrics"].get("history")
        },
        "answers": samples,
    }  # fmt: skip


def describe(meta: dict, base: dict, divergences: dict, stages: dict) -> dict:
    """One variant's figures, and the ratios of its size and speeds to the reference's."""
    figures, model, precision = meta["metrics"], meta["inputs"]["model"]["path"], meta["arguments"].get("precision")
    source = stages.get(lineage.locate(model), {"metrics": {}})
    divergence_meta = divergences.get(meta["variant"]["digest"])
    if divergence_meta is None and source.get("kind") == "quantized":  # merging has a divergence too
        divergence_meta = source
    model_stages = {}
    lineage.collect(model, model_stages, [])
    dtypes = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    dtype = dtypes.get(precision, meta["machine"].get("compute_dtype"))
    speeds, base_speeds = read_speeds(meta), read_speeds(base)
    return {
        "model": model, "digest": meta["variant"]["digest"], "format": meta["variant"]["format"],
        "engine": meta["engine"], "compute_dtype": dtype if meta["engine"] == "transformers" else None,
        "model_bytes": figures["model_bytes"], "size_ratio": base["metrics"]["model_bytes"] / figures["model_bytes"],
        "streams": figures["speed"]["batch"]["streams"], "tokens_per_second": speeds,
        "speed_ratio": {name: compare_speeds(speeds[name], base_speeds[name]) for name in speeds},
        **{name: figures[name] for name in ("token_f1", "exact_match", "contained", "nll")},
        "stopped_share": figures["stopped_share"], "mean_new_tokens": figures["mean_new_tokens"],
        "load_seconds": figures["load_seconds"], "peak_memory_bytes": meta["peak_memory_bytes"],
        "peak_gpu_memory_bytes": meta.get("peak_gpu_memory_bytes"),
        "divergence": divergence_meta["metrics"].get("divergence") if divergence_meta else None,
        "objections": source["metrics"].get("objections", []), "caution": source.get("caution"),
        "made_seconds": sum(stage["seconds"] for stage in model_stages.values()),
    }  # fmt: skip


def read_speeds(meta: dict) -> dict:
    single, batch = meta["metrics"]["speed"]["one_stream"], meta["metrics"]["speed"]["batch"]
    try:
        return {
            "decode": single["decode_tokens_per_second"], "batch": batch["generated_tokens_per_second"],
            "prefill": single["prefill_tokens_per_second"],
        }  # fmt: skip
    except KeyError as missing:
        model = meta["inputs"]["model"]["path"]
        raise InputError(
            f"the evaluation of {model} has no {missing}, because another version of evaluate.py made it, so its "
            "speeds cannot be compared; run `make evaluate` to rebuild it"
        ) from None


def compare_speeds(ours: dict, theirs: dict) -> dict:
    """The ratio of the medians, and the widest range of ratios that the single runs allow."""
    low, high = ours["min"] / theirs["max"], ours["max"] / theirs["min"]
    return {"median": ours["median"] / theirs["median"], "low": low, "high": high}


def find_unquantised(variant: dict, stages: dict, by_digest: dict) -> str | None:
    """The digest of the evaluated variant that a quantised one was made from: its input or the adapter in it."""
    meta = stages.get(lineage.locate(variant["model"]), {"kind": None})
    if meta["kind"] != "quantized":
        return None
    source = meta["inputs"]["model"]
    if source["digest"] in by_digest:
        return source["digest"]
    return stages.get(lineage.locate(source["path"]), {"inputs": {}})["inputs"].get("adapter", {}).get("digest")


def check_claims(variants: dict, reference: str, differences: list) -> list[dict]:
    """The usual claims compared with the measurements: reached, not reached, or within noise."""
    four_bit = [n for n, v in variants.items() if v["format"].removesuffix(ADAPTER) in FOUR_BIT]
    adapters = [n for n, v in variants.items() if v["format"] == "adapter" and n != reference]
    f1 = {(d["variant"], d["against"]): d["token_f1"] for d in differences}
    claims = []

    def check_claim(claim, name, against, unit, threshold, measured, low, high, unsure=None):
        verdict = "reached" if low >= threshold else "not reached" if high < threshold else metrics.NOISE
        claims.append({
            "promise": claim, "variant": name, "against": against, "unit": unit, "least": threshold,
            "measured": measured, "low": low, "high": high, "verdict": unsure or verdict,
        })  # fmt: skip

    def check_points(claim, pairs, threshold):
        for name, against in pairs:
            if gap := f1.get((name, against)):
                points = [100 * gap[key] for key in ("mean", "low", "high")]
                unsure = metrics.TOO_FEW if metrics.has_few_groups(gap) else metrics.NOISE
                differ = gap["differing_groups"] >= metrics.LEAST_GROUPS
                check_claim(claim, name, against, "points", threshold, *points, None if differ else unsure)

    if variants[reference]["format"] == "16 bit":
        for name in four_bit:
            check_claim(f"INT4 is {SMALLER:g}× smaller than the 16-bit base", name, reference, "×", SMALLER,
                 *[variants[name]["size_ratio"]] * 3)  # fmt: skip
        batch_claim = f"INT4 generates {variants[reference]['streams']} sequences {FASTER:g}× faster, prefill included"
        for key, claim in (("decode", f"INT4 decodes {FASTER:g}× faster at batch size 1"), ("batch", batch_claim)):
            for name in four_bit:
                if key == "batch" and variants[name]["streams"] != variants[reference]["streams"]:
                    continue  # memory allowed one of them fewer sequences at once
                ratio = variants[name]["speed_ratio"][key]
                check_claim(claim, name, reference, "×", FASTER,
                     ratio["median"], ratio["low"], ratio["high"])  # fmt: skip
    losing = [(name, variants[name]["unquantised"]) for name in four_bit]
    check_points(f"INT4 loses at most {LOSES:g} points of token F1", losing, -LOSES)
    gaining = [(name, reference) for name in adapters]
    check_points(f"LoRA gains at least {GAINS:g} points of token F1", gaining, GAINS)
    return claims


def find_remarks(variants: dict, reference: str, differences: list) -> list[str]:
    """Where the common claims fail, in words; only what the intervals and ranges support."""
    remarks = []
    f1 = {(d["variant"], d["against"]): d["token_f1"] for d in differences}
    conditions = {"decode": "at batch size 1", "batch": "with concurrent sequences", "prefill": "in prefill"}
    for name, v in variants.items():
        slower = [
            f"{v['speed_ratio'][key]['median']:.2f}× the speed {condition}"
            for key, condition in conditions.items() if v["speed_ratio"][key]["high"] < 1
        ]  # fmt: skip
        if slower:
            smaller = v["size_ratio"] > 1 and v["speed_ratio"]["decode"]["high"] < 1
            remarks.append(f"{name} is {'smaller but ' * smaller}slower than {reference}: {' and '.join(slower)}.")
        gain, cost = f1.get((name, reference)), f1.get((name, v["unquantised"]))
        if gain and v["format"] == "adapter" and gain["verdict"] in ("worse", metrics.NOISE):
            outcome = "made the answers worse" if gain["verdict"] == "worse" else "shows no gain"
            remarks.append(f"Fine-tuning {outcome}: token F1 of {name} compared with {reference}: {difference(gain)}.")
        gain_before = f1.get((v["unquantised"], reference))
        if gain and cost and gain_before and gain_before["verdict"] == "better" and cost["verdict"] == "worse":
            part = "part of " if gain["verdict"] == "better" else ""
            remarks.append(
                f"4-bit quantisation loses {part}the fine-tuning gain: token F1 of {name} compared with "
                f"{v['unquantised']}: {difference(cost)}; compared with {reference}: {difference(gain)}."
            )
    return remarks


def find_cautions(variants: dict, metas: dict, answers: dict, gaps: list) -> list[str]:
    """What a reader has to know before comparing."""
    cautions = [f"{name}: {v['caution']}" for name, v in variants.items() if v["caution"]]
    if ungrouped := [name for name, rows in answers.items() if not all("group" in row for row in rows.values())]:
        cautions.append(
            f"{' and '.join(ungrouped)}: evaluated by an older version, which did not store the examples' groups. "
            "Examples were resampled one by one, so intervals may be too narrow; repeat `make evaluate`."
        )
    cautions += [
        f"{name} exceeds the limits in configs/quantize.yaml and was accepted anyway: {'; '.join(objections)}."
        for name, v in variants.items() if (objections := v["objections"])
    ]  # fmt: skip
    for name, meta in metas.items():
        if own := meta.get("generation", {}).get("own"):
            settings = ", ".join(f"{key} {value}" for key, value in own.items())
            cautions.append(f"{name} answers greedily; its own generation settings are not used: {settings}.")
    engines = sorted({v["engine"] for v in variants.values()})
    if len(engines) > 1:
        cautions.append(
            f"The variants run in different engines ({' and '.join(engines)}: GGUF files in llama.cpp, all others in "
            "transformers), so speed ratios compare engine and format together."
        )
    if len({tuple(m["machine"].get(key) for key in ("cpu", "cores", "gpu")) for m in metas.values()}) > 1:
        cautions.append("The variants were measured on different machines, so their speeds cannot be compared.")
    busy = {name: meta["metrics"]["speed"].get("busy_cores", 0) for name, meta in metas.items()}
    if busy := {name: cores for name, cores in busy.items() if cores > metas[name]["machine"]["cores"] / 8}:
        listing = ", ".join(f"{name} ({cores:.1f} cores)" for name, cores in busy.items())
        cautions.append(f"Other programs were busy while the speed was measured, so it is too low: {listing}.")
    if len({v["streams"] for v in variants.values()}) > 1:
        listing = ", ".join(f"{name} {v['streams']}" for name, v in variants.items())
        cautions.append(f"The variants served different numbers of concurrent sequences, as memory allowed: {listing}.")
    for key in ("max_new_tokens", "speed_tokens", "batch_size", "threads", "precision", "attention"):
        values = {name: m["arguments"].get(key) for name, m in metas.items()}
        if len(set(values.values())) > 1:
            listing = ", ".join(f"{name} {value}" for name, value in values.items())
            cautions.append(f"The variants were measured with different --{key.replace('_', '-')}: {listing}.")
    return cautions + [f"{gap}, so its time is not counted." for gap in gaps]


def choose_mark(row: dict) -> str:
    return "✓" if row["exact_match"] else "◐" if row["contained"] else "✗"


# --- words and figures --------------------------------------------------------------------------------------


def format_speed(speed: dict) -> str:
    digits = 1 if speed["max"] < 1000 else 0
    return f"{speed['median']:,.{digits}f} ({speed['min']:,.{digits}f}–{speed['max']:,.{digits}f})"


def format_streams(c: dict) -> str:
    return " or ".join(map(str, sorted({v["streams"] for v in c["variants"].values()})))


def build_comparison_table(c: dict) -> tuple[list[str], list[list[str]]]:
    """The comparison table: its header, and one row per variant."""
    streams = format_streams(c)
    header = [
        "variant", "size, MB (times smaller)", "engine (format)", "decode, tokens/s (batch size 1)", "times faster",
        f"generation, tokens/s ({streams} sequences)", "prefill, tokens/s", "token F1", "exact match",
        "reference answer contained", "NLL, nats per token", "load, s", "peak memory, MB",
    ]  # fmt: skip
    rows = [
        [
            name, f"{megabytes(v['model_bytes'])} ({v['size_ratio']:.2f}×)", f"{v['engine']} ({v['format']})",
            format_speed(v["tokens_per_second"]["decode"]), f"{v['speed_ratio']['decode']['median']:.2f}×",
            format_speed(v["tokens_per_second"]["batch"]), format_speed(v["tokens_per_second"]["prefill"]),
            *(interval(v[score]) for score in ("token_f1", "exact_match", "contained", "nll")),
            f"{v['load_seconds']:.1f}", f"{v['peak_memory_bytes'] / 1e6:,.0f}" + gpu_peak(v),
        ]
        for name, v in c["variants"].items()
    ]  # fmt: skip
    return header, rows


def as_text(c: dict) -> str:
    """The comparison table for a terminal: one column per variant, so that it stays narrow."""
    header, rows = build_comparison_table(c)
    columns = [header, *rows]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns))


def write_introduction(c: dict) -> str:
    machine, (begun, ended) = c["machine"], (stamp[:16].replace("T", " ") for stamp in c["measured"])
    dtypes = " and ".join(sorted({v["compute_dtype"] for v in c["variants"].values() if v["compute_dtype"]}))
    return (
        f"{len(c['variants'])} variant{'s' * (len(c['variants']) > 1)} of {c['tag']} answered the same {c['rows']} "
        f"held-out examples of {c['data']} on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine.get('gpu') or 'no GPU'}, between {begun} and {ended} UTC"
        + (f"; transformers computed in {dtypes}." if dtypes else ".")
    )


def extract_question(question: str) -> str:
    """The question alone, out of a prompt that holds documents too (see records.question_with_documents)."""
    return shorten(question.rpartition("Question:")[2].strip().removesuffix("Answer:").strip())


def build_blocks(c: dict, figures: dict) -> list[tuple]:
    """The report as a list of blocks (form, content …), which as_markdown and as_html write out."""
    blocks = [("title", f"{c['tag']}: measured variants"), ("text", write_introduction(c))]
    blocks += [("points", c["cautions"])] if c["cautions"] else []

    blocks += [("heading", "Variants"), ("table", "numbers", *build_comparison_table(c))]
    notes = [
        f"{metrics.DESCRIPTION}. Parentheses: range of the repeated runs, after their median. Ratios are relative to "
        f"{c['reference']}. Decode and prefill are timed separately, at batch size 1. Generation of several sequences "
        "is measured in wall-clock time, with their prompts.",
        "Size is everything that is needed to run the variant, tokenizer included; for an adapter, base and adapter.",
        "Peak memory is the largest resident set (RAM) of the process that evaluated the variant and, on a GPU, the "
        "most memory that torch allocated there. NLL is that of the first reference answer after the prompt; lower is "
        "better.",
    ]
    blocks += [("notes", notes)]

    if rounded := {name: v["divergence"] for name, v in c["variants"].items() if v["divergence"]}:
        header = [
            "variant", "mean KL, nats", "99th percentile", "same top token", "NLL before", "NLL after",
            "gain retained", "answer tokens (examples)", "build time",
        ]  # fmt: skip
        rows = [
            [
                name, f"{d['kl_mean']:.4f}", f"{d['kl_p99']:.3f}", f"{d['top1_agreement']:.1%}",
                f"{d['nll_reference']:.3f}", f"{d['nll']:.3f}",
                "–" if d.get("gain_kept") is None else f"{d['gain_kept']:.0%}",
                f"{d['answer_positions']} ({d['rows']})", duration(c["variants"][name]["made_seconds"]),
            ]
            for name, d in rounded.items()
        ]  # fmt: skip
        rule = (
            "Divergence of the next-token distributions from those of the 16-bit source model, on reference answers of "
            "validation examples. Gain retained: the share of the fine-tuning gain in likelihood that is left. Build "
            "time: the total of all stages up to this model, including download, training and checks."
        )
        blocks += [("heading", "Cost of quantisation"), ("text", rule), ("table", "numbers", header, rows)]

    if c["differences"]:
        header = ["variant", "compared with", "token F1", "exact match", "NLL, nats", "examples whose F1 differs"]
        rows = [
            [
                d["variant"], d["against"], difference(d["token_f1"]), difference(d["exact_match"]),
                difference(d["nll"], 1, "", 3), f"{d['token_f1']['differing']} of {d['token_f1']['n']}",
            ]
            for d in c["differences"]
        ]  # fmt: skip
        rule = (
            "Paired differences on the same questions, in percentage points (NLL in nats). A difference counts as "
            "better or worse only if the paired 95 % interval excludes zero and examples of at least "
            f"{metrics.LEAST_GROUPS} groups differ; everything else is within noise. Fewer than {metrics.LEAST_GROUPS} "
            "groups are too few for a verdict. There is no correction for multiple comparisons."
        )
        blocks += [("heading", "Differences"), ("text", rule), ("table", "numbers", header, rows)]
    if c["promises"]:
        header = ["claim", "variant", "verdict", "measured"]
        rows = []
        for p in c["promises"]:
            figure = "{}× ({}–{})" if p["unit"] == "×" else "{} points [{}, {}]"
            form = "{:.2f}".format if p["unit"] == "×" else signed
            measured = figure.format(*(form(p[key]) for key in ("measured", "low", "high")))
            measured = f"{p['measured']:.2f}×" if p["low"] == p["high"] and p["unit"] == "×" else measured
            unclear = " (too few examples to decide)" if p["unit"] == "points" else " (the range includes the claim)"
            verdict = p["verdict"] + unclear * (p["verdict"] == metrics.NOISE)
            rows.append([p["promise"], f"{p['variant']} vs {p['against']}", verdict, measured])
        blocks += [("heading", "Claims and measurements"), ("table", "words", header, rows)]
        blocks += [("points", c["remarks"])] if c["remarks"] else []

    blocks += [("heading", "Figures"), ("figures", [(name, alt) for name, (_, alt) in figures.items()])]

    if c["answers"]:
        rule = (
            f"{len(c['answers'])} of the {c['rows']} examples, chosen by a hash of their ids and not by hand. "
            f"{'; '.join(f'{sign} {meaning}' for sign, meaning in MARKS.items())}."
        )
        header = ["question", "reference answer", *c["variants"]]
        rows = [
            [
                extract_question(r["question"]),
                shorten(r["gold"][0]) + f" (or {len(r['gold']) - 1} others)" * (len(r["gold"]) > 1),
            ] + [f"{a['mark']} {shorten(a['text']) or '(nothing)'}" for a in r["answers"].values()]
            for r in c["answers"]
        ]  # fmt: skip
        blocks += [("heading", "Sample answers"), ("text", rule), ("table", "answers", header, rows)]

    blocks += align_sections.build_blocks(c["alignment"])

    return blocks + lineage.build_blocks(c)


# --- pictures -----------------------------------------------------------------------------------------------


def draw_figures(c: dict) -> dict[str, tuple[str, str]]:
    """{name: (SVG, the same in words)}."""
    streams = format_streams(c)
    f1, decode, batch, size = {}, {}, {}, {}
    for name, v in c["variants"].items():
        speeds = v["tokens_per_second"]
        f1[name] = [v["token_f1"][key] for key in ("mean", "low", "high")]
        decode[name], batch[name] = ([speeds[s][key] for key in ("median", "min", "max")] for s in list(speeds)[:2])
        size[name] = [v["model_bytes"] / 1e6] * 3
    with load_matplotlib():
        figures = {
            "f1": draw_bars("f1", "Token F1, with 95 % intervals", f1, "{:.3f}"),
            "decode": draw_bars("decode", "Decode at batch size 1, tokens/s, with ranges", decode, "{:.1f}"),
            "batch": draw_bars("batch", f"Generation of {streams} sequences, tokens/s, with ranges", batch, "{:.1f}"),
            "size": draw_bars("size", "Size, MB", size, "{:.1f}"),
        }
        return figures | ({"training": draw_curve(c["training"])} if c["training"] else {})


def draw_bars(name: str, title: str, values: dict[str, list[float]], form: str) -> tuple[str, str]:
    """One bar per variant, [value, low, high] each."""
    figure, axes = new_canvas(0.42 * len(values) + 0.75, title)
    highest = max(high for _, _, high in values.values()) or 1
    for place, (value, low, high) in enumerate(values.values()):
        axes.barh(place, value, height=0.62, color=COLOURS[place % len(COLOURS)])
        if high > low:
            axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=INK, capsize=3, lw=1.2)
        axes.text(high + highest * 0.02, place, form.format(value), va="center", color=INK)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_xlim(0, highest * 1.18)
    axes.invert_yaxis()
    words = [
        f"{variant} {form.format(value)}" + f" ({form.format(low)} to {form.format(high)})" * (high > low)
        for variant, (value, low, high) in values.items()
    ]
    return render_svg(figure, name), f"{title}: {'; '.join(words)}."


def draw_curve(training: dict[str, list[dict]]) -> tuple[str, str]:
    """Each adapter's loss at each step."""
    title = "Training loss per step"
    figure, axes = new_canvas(2.6, title)
    words = []
    for (adapter, history), colour in zip(training.items(), COLOURS[2:] + COLOURS[:2]):
        steps, losses, name = [e["step"] for e in history], [e["loss"] for e in history], Path(adapter).name
        axes.plot(steps, losses, color=colour, lw=1.8, marker="o", ms=3, label=name)
        words.append(f"{name} from {losses[0]:.3f} at step {steps[0]} to {losses[-1]:.3f} at step {steps[-1]}")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, labelcolor=INK)
    return render_svg(figure, "training"), f"{title}: {'; '.join(words)}."


if __name__ == "__main__":
    cli.run(main, make_parser)
