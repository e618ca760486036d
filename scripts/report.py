"""Put evaluated variants side by side: a page to read, a text, and every figure as JSON.

    python scripts/report.py --evaluations reports/eval-smollm2-135m-base reports/eval-smollm2-135m-int4 \\
        --output reports/smollm2-135m

Takes evaluation artifacts of the same rows; the first one is the reference. Leaves index.html (one file, no
network), report.md with its pictures, and comparison.json, which both are written from. Nothing is measured
here but differences row by row; a difference is called one only where its 95 % interval excludes zero.
"""

import html
import io
import json
import re
from pathlib import Path

from lib import artifact, cli
from lib.cli import InputError

SCORES = {"token_f1": "token F1", "exact_match": "exact match", "nll": "NLL"}
# The two-sided sign test of rows that all point one way: five have p = 0.06, six have p = 0.03. Below six,
# the bootstrap cannot see the rows that might have pointed the other way.
LEAST_DIFFERING = 6
# What pipelines of this kind promise, the way it is usually written.
SMALLER, FASTER, LOSES, GAINS = 3.5, 3.0, 0.3, 7.0
MARKS = {"✓": "exact match", "◐": "contains the accepted answer", "✗": "wrong"}
NOISE = "within noise"


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument(
        "--evaluations", type=Path, nargs="+", required=True, help="evaluation directories, the reference first"
    )  # fmt: skip
    what.add_argument("--output", type=Path, required=True, help="directory to write")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--answers", type=cli.whole(0), default=12, help="sample answers shown; 0: none (default: %(default)s)"
    )  # fmt: skip
    how.add_argument(
        "--seed", type=cli.whole(0), default=42, help="seed of the bootstrap (default: %(default)s)"
    )
    return parser


def main(args):
    # --- read and check ------------------------------------------------------------------------------
    names = [path.name.removeprefix(f"eval-{args.output.name}-") for path in args.evaluations]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--evaluations: {', '.join(twice)}: given more than once; expected each variant once")
    metas = {name: artifact.read(path, "evaluation") for name, path in zip(names, args.evaluations)}
    answers = {name: read_predictions(path) for name, path in zip(names, args.evaluations)}
    check_same_rows(answers, args.evaluations)

    # --- compare ---------------------------------------------------------------------------------------
    stages, gaps = {}, []
    for path in args.evaluations:
        follow(path, stages, gaps)
    comparison = compare(args, dict(zip(names, args.evaluations)), metas, answers, stages, gaps)

    # --- write -----------------------------------------------------------------------------------------
    with artifact.building(args.output, "report", args, dict(zip(names, args.evaluations))) as build:
        figures = pictures(comparison)
        blocks = document(comparison, figures)
        artifact.write_json(build.path / "comparison.json", comparison)
        for name, (svg, _) in figures.items():
            (build.path / f"{name}.svg").write_text(standalone(svg), encoding="utf-8")
        (build.path / "report.md").write_text(as_markdown(blocks), encoding="utf-8")
        (build.path / "index.html").write_text(as_html(blocks, figures), encoding="utf-8")
        build.metrics = {k: v for k, v in comparison.items() if k not in ("answers", "training", "stages")}
    print(as_text(comparison))
    print(f"total time of {len(stages)} stages: {total_time(comparison)}")
    print(args.output)


# --- reading -----------------------------------------------------------------------------------------------


def read_predictions(path: Path) -> dict[str, dict]:
    lines = (path / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return {row["id"]: row for row in map(json.loads, filter(None, lines))}


def check_same_rows(answers: dict, paths: list[Path]) -> None:
    """InputError unless all evaluations asked the same questions."""
    first, *others = zip(answers.values(), paths)
    if not first[0]:
        raise InputError(f"{first[1]}: its predictions.jsonl holds no rows; evaluate it on at least one")
    for rows, path in others:
        differing = sorted(first[0].keys() ^ rows.keys()) or sorted(
            name for name, row in rows.items() if row["gold"] != first[0][name]["gold"]
        )
        if differing:
            raise InputError(
                f"{path} and {first[1]} cannot be compared: {len(differing)} rows are not the same in both "
                f"({', '.join(differing[:3])}{', …' if len(differing) > 3 else ''}); evaluate both with the same "
                "--data, --samples and --seed"
            )


def follow(path: str | Path, stages: dict, gaps: list, digest: str | None = None) -> None:
    """Gather the metadata of an artifact and of all that it was made of, inputs first, each once."""
    place = Path(path) if Path(path).exists() else cli.ROOT / path
    if str(path) in stages or (place.exists() and not (place / artifact.METADATA).is_file()):
        return  # known already, or a plain file that no stage made
    if not place.exists():
        return gaps.append(f"{path} is not there any more, so its time is not counted")
    meta = artifact.read_metadata(place)
    if digest not in (None, meta["digest"]):
        return gaps.append(f"{path} was made anew after it was used here, so its time is not counted")
    for source in meta["inputs"].values():
        follow(source["path"], stages, gaps, source["digest"])
    stages[str(path)] = meta


# --- comparing ---------------------------------------------------------------------------------------------


def compare(args, paths: dict, metas: dict, answers: dict, stages: dict, gaps: list) -> dict:
    """Every figure of the report."""
    reference = next(iter(paths))
    variants = {name: describe(metas[name], metas[reference], stages) for name in paths}
    by_digest = {variant["digest"]: name for name, variant in variants.items()}
    for variant in variants.values():
        variant["unquantised"] = by_digest.get(unquantised(variant, stages, by_digest))
    pairs = [(name, reference) for name in paths if name != reference]
    pairs += [
        (name, variant["unquantised"]) for name, variant in variants.items()
        if variant["unquantised"] and (name, variant["unquantised"]) not in pairs
    ]  # fmt: skip
    differences = [
        {"variant": one, "against": other}
        | {score: paired(answers[one], answers[other], score, args.seed) for score in SCORES}
        for one, other in pairs
    ]
    training = [
        {"adapter": path, "history": meta["metrics"]["history"], "labels": meta["metrics"].get("labels")}
        for path, meta in stages.items()
        if meta["metrics"].get("history")
    ]
    chosen = sorted(answers[reference], key=lambda name: artifact.digest_of({name: ""}))[: args.answers]
    shown = [
        {"id": row["id"], "question": row["question"], "gold": row["gold"]}
        | {"answers": {name: {"text": rows[key]["answer"], "mark": mark(rows[key])} for name, rows in answers.items()}}
        for key, row in ((key, answers[reference][key]) for key in chosen)
    ]  # fmt: skip
    made = [
        {
            "artifact": path, "kind": meta["kind"], "command": meta["command"], "seconds": meta["seconds"],
            "peak_memory_bytes": meta["peak_memory_bytes"], "digest": meta["digest"], "code": meta["code"],
            "versions": meta["versions"], "started": meta["started"],
        }
        for path, meta in stages.items()
    ]  # fmt: skip
    promises = promised(variants, reference, differences)
    return {
        "tag": args.output.name,
        "reference": reference,
        "rows": len(answers[reference]),
        "data": metas[reference]["inputs"]["data"]["path"],
        "machine": metas[reference]["machine"],
        "measured": [min(m["started"] for m in metas.values()), max(m["finished"] for m in metas.values())],
        "variants": variants,
        "differences": differences,
        "promises": promises,
        "remarks": remarks(variants, reference, differences),
        "cautions": cautions(variants, metas, gaps),
        "training": training,
        "answers": shown,
        "stages": made,
        "total_seconds": sum(stage["seconds"] for stage in made),
        "uncounted": gaps,
    }


def describe(meta: dict, base: dict, stages: dict) -> dict:
    """One variant's figures, and its speeds' ratios to the reference's: of the medians, and the widest range."""
    got, model = meta["metrics"], meta["inputs"]["model"]["path"]
    source = stages.get(model, {"metrics": {}})
    dtype = meta["arguments"].get("dtype", "auto")
    names = {"auto": meta["machine"].get("compute_dtype"), "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    speeds = {name: speed["decode_tokens_per_second"] for name, speed in got["speed"].items()}
    ours, theirs = speeds["one_stream"], base["metrics"]["speed"]["one_stream"]["decode_tokens_per_second"]
    return {
        "model": model, "digest": meta["variant"]["digest"], "format": meta["variant"]["format"],
        "engine": meta["engine"], "compute_dtype": names[dtype] if meta["engine"] == "transformers" else None,
        "model_bytes": got["model_bytes"], "size_ratio": base["metrics"]["model_bytes"] / got["model_bytes"],
        "decode_one_stream": ours, "decode_batch": speeds["batch"], "streams": got["speed"]["batch"]["streams"],
        "prefill_one_stream": got["speed"]["one_stream"]["prefill_tokens_per_second"],
        "decode_ratio": {
            "median": ours["median"] / theirs["median"], "low": ours["min"] / theirs["max"],
            "high": ours["max"] / theirs["min"],
        },
        **{name: got[name] for name in ("token_f1", "exact_match", "contained", "nll")},
        "stopped_share": got["stopped_share"], "mean_new_tokens": got["mean_new_tokens"],
        "load_seconds": got["load_seconds"], "peak_memory_bytes": meta["peak_memory_bytes"],
        "divergence": source["metrics"].get("divergence"), "caution": source.get("caution"),
    }  # fmt: skip


def unquantised(variant: dict, stages: dict, known: dict) -> str | None:
    """The digest of the evaluated variant that a quantised one was made from: its input, or the adapter in it."""
    inputs = stages.get(variant["model"], {"inputs": {}})["inputs"]
    if variant["format"] in ("16 bit", "adapter") or "model" not in inputs:
        return None
    if inputs["model"]["digest"] in known:
        return inputs["model"]["digest"]
    merged = stages.get(inputs["model"]["path"], {"inputs": {}})["inputs"]
    return merged.get("adapter", {}).get("digest")


def paired(ours: dict, theirs: dict, score: str, seed: int) -> dict:
    """The mean difference row by row, its interval, and what may be said about it."""
    from lib import metrics

    gaps = [ours[name][score] - theirs[name][score] for name in sorted(ours)]
    found = metrics.interval(gaps, seed) | {"differing": sum(gap != 0 for gap in gaps)}
    up = -1 if score == "nll" else 1
    certain = found["differing"] >= LEAST_DIFFERING and not found["low"] <= 0 <= found["high"]
    return found | {"verdict": ("better" if found["mean"] * up > 0 else "worse") if certain else NOISE}


def promised(variants: dict, reference: str, differences: list) -> list[dict]:
    """What is usually claimed against what was measured: reached, not reached, or within noise."""
    found = []
    for name, v in variants.items():
        four_bit = v["format"] == "nf4" or v["format"].startswith("gguf-q4")
        if four_bit and variants[reference]["format"] == "16 bit":
            size, speed = v["size_ratio"], v["decode_ratio"]
            found += [
                promise(f"INT4 is {SMALLER:g}× smaller than the 16-bit base", name, reference, "×", SMALLER, size, size, size),
                promise(f"INT4 decodes {FASTER:g}× faster", name, reference, "×", FASTER, speed["median"], speed["low"], speed["high"]),
            ]  # fmt: skip
        for pair in differences:
            claim = None
            if pair["variant"] == name and four_bit and pair["against"] == v["unquantised"]:
                claim, least = f"INT4 loses at most {LOSES:g} points of token F1", -LOSES
            elif pair["variant"] == name and v["format"] == "adapter" and pair["against"] == reference:
                claim, least = f"LoRA gains at least {GAINS:g} points of token F1", GAINS
            if claim:
                f1 = pair["token_f1"]
                figures = [100 * f1[key] for key in ("mean", "low", "high")]
                enough = f1["differing"] >= LEAST_DIFFERING
                found.append(promise(claim, name, pair["against"], "points", least, *figures, enough))
    return sorted(found, key=lambda one: one["promise"])


def promise(text, variant, against, unit, least, measured, low, high, enough=True) -> dict:
    verdict = "reached" if low >= least else "not reached" if high < least else NOISE
    return {
        "promise": text, "variant": variant, "against": against, "unit": unit, "least": least,
        "measured": measured, "low": low, "high": high, "verdict": verdict if enough else NOISE,
    }  # fmt: skip


def remarks(variants: dict, reference: str, differences: list) -> list[str]:
    """Where folklore fails, in words; only what the intervals and ranges bear out."""
    said = []
    f1 = {(d["variant"], d["against"]): d["token_f1"] for d in differences}
    for name, v in variants.items():
        ratio = v["decode_ratio"]
        slower = ratio["high"] < 1 and f"it decodes at {ratio['median']:.2f}× the speed of {reference}"
        if slower and v["size_ratio"] > 1:
            said.append(f"{name} is smaller but slower: {v['size_ratio']:.2f}× smaller, and {slower}.")
        elif slower and v["format"] == "adapter":
            said.append(f"{name} pays for the adapter left beside its base: {slower}.")
        gain, cost = f1.get((name, reference)), f1.get((name, v["unquantised"]))
        if gain and v["format"] == "adapter" and gain["verdict"] != "better":
            lost = "The fine-tuning lost" if gain["verdict"] == "worse" else "The fine-tuning shows no gain"
            said.append(f"{lost}: token F1 of {name} against {reference}: {difference(gain)}.")
        parent = f1.get((v["unquantised"], reference))
        if parent and parent["verdict"] == "better" and cost and cost["verdict"] == "worse":
            kept = "part of what" if gain["verdict"] == "better" else "what"
            said.append(
                f"4 bit takes away {kept} the fine-tuning had gained: token F1 of {name} against "
                f"{v['unquantised']}: {difference(cost)}; against {reference}: {difference(gain)}."
            )
    return said


def cautions(variants: dict, metas: dict, gaps: list) -> list[str]:
    """What a reader has to know before comparing."""
    said = [f"{name}: {v['caution']}" for name, v in variants.items() if v["caution"]]
    engines = sorted({v["engine"] for v in variants.values()})
    if len(engines) > 1:
        said.append(
            f"The variants run through different engines ({' and '.join(engines)}: a GGUF through llama.cpp, all "
            "else through transformers), so a ratio of speeds compares engine and format together."
        )
    machines = {json.dumps({k: m["machine"].get(k) for k in ("cpu", "cores", "gpu")}) for m in metas.values()}
    if len(machines) > 1:
        said.append("The variants were measured on different machines: their speeds cannot be compared.")
    for key in ("max_new_tokens", "speed_tokens", "batch", "threads", "dtype"):
        if len({m["arguments"].get(key) for m in metas.values()}) > 1:
            each = ", ".join(f"{name} {m['arguments'].get(key)}" for name, m in metas.items())
            said.append(f"The variants were measured with different --{key.replace('_', '-')}: {each}.")
    return said + [f"{gap}." for gap in gaps]


def mark(row: dict) -> str:
    return "✓" if row["exact_match"] else "◐" if row["contained"] else "✗"


# --- words and figures --------------------------------------------------------------------------------------


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def total_time(c: dict) -> str:
    return ("at least " if c["uncounted"] else "") + duration(c["total_seconds"])


def interval(found: dict) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def speed(found: dict) -> str:
    return f"{found['median']:,.1f} ({found['min']:,.1f}–{found['max']:,.1f})"


def signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def difference(found: dict, scale: float = 100, unit: str = " points", digits: int = 1) -> str:
    mean, low, high = (signed(scale * found[key], digits) for key in ("mean", "low", "high"))
    return f"{found['verdict']}, {mean}{unit} [{low}, {high}]"


def figures_of(c: dict) -> tuple[list[str], list[list[str]]]:
    """The comparison table: its header, and a row a variant."""
    streams = next(iter(c["variants"].values()))["streams"]
    header = [
        "variant", "size, MB", "times smaller", "engine, format", "decode, tokens/s, one stream", "times faster",
        f"decode, tokens/s, {streams} streams", "prefill, tokens/s", "token F1", "exact match", "answer contained",
        "NLL, nats a token", "load, s", "peak memory, MB",
    ]  # fmt: skip
    rows = [
        [
            name, megabytes(v["model_bytes"]), f"{v['size_ratio']:.2f}×", f"{v['engine']}, {v['format']}",
            speed(v["decode_one_stream"]), f"{v['decode_ratio']['median']:.2f}×", speed(v["decode_batch"]),
            speed(v["prefill_one_stream"]), interval(v["token_f1"]), interval(v["exact_match"]),
            interval(v["contained"]), interval(v["nll"]), f"{v['load_seconds']:.1f}", megabytes(v["peak_memory_bytes"]),
        ]
        for name, v in c["variants"].items()
    ]  # fmt: skip
    return header, rows


def as_text(c: dict) -> str:
    """The comparison table for a terminal: a column a variant, so that it stays narrow."""
    header, rows = figures_of(c)
    columns = [header, *rows]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns))


def introduction(c: dict) -> str:
    machine, (begun, ended) = c["machine"], (stamp[:16].replace("T", " ") for stamp in c["measured"])
    dtypes = " and ".join(sorted({v["compute_dtype"] for v in c["variants"].values() if v["compute_dtype"]}))
    return (
        f"{len(c['variants'])} variant{'s' * (len(c['variants']) > 1)} of {c['tag']} answered the same {c['rows']} "
        f"held-out rows of {c['data']} on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine.get('gpu') or 'no GPU'}, between {begun} and {ended} UTC"
        + (f"; transformers computed in {dtypes}." if dtypes else ".")
    )


def asked(question: str) -> str:
    """The question alone, out of a prompt that holds documents too (see records.question_with_documents)."""
    return clip(question.rpartition("Question:")[2].strip().removesuffix("Answer:").strip())


def clip(text: str, most: int = 240) -> str:
    return text if len(text) <= most else text[:most].rstrip() + "…"


def document(c: dict, figures: dict) -> list[tuple]:
    """The report as a list of blocks (form, content …), which as_markdown and as_html write out."""
    reference, several = c["reference"], len(c["variants"]) > 1
    blocks = [("title", f"{c['tag']}: measured variants"), ("text", introduction(c))]
    blocks += [("list", c["cautions"])] if c["cautions"] else []

    blocks += [("heading", "The variants"), ("table", "numbers", *figures_of(c))]
    notes = [
        "In brackets: 95 % bootstrap interval over the rows; in parentheses: range of the repeated runs, their "
        f"median before it. Ratios are to {reference}. Prefill is of one stream.",
        "Size is what is needed to run the variant: for an adapter, its base and the adapter; tokeniser included.",
        "Peak memory is the largest resident set of the process that evaluated the variant, in main memory. NLL is "
        "of the first accepted answer after the prompt; lower is better.",
    ]
    notes += [
        f"{name}, on {d['answer_positions']} answer positions of {d['rows']} validation rows: mean KL from what was "
        f"quantised {d['kl_mean']:.3f} nats (99th percentile {d['kl_p99']:.2f}), same top token "
        f"{d['top1_agreement']:.1%}, NLL {d['nll_reference']:.3f} before and {d['nll']:.3f} after."
        for name, d in ((name, v["divergence"]) for name, v in c["variants"].items()) if d
    ]  # fmt: skip
    blocks += [("list", notes)]

    if c["differences"]:
        header = ["variant", "against", "token F1", "exact match", "NLL, nats", "rows whose F1 differs"]
        rows = [
            [
                d["variant"], d["against"], difference(d["token_f1"]), difference(d["exact_match"]),
                difference(d["nll"], 1, "", 3), f"{d['token_f1']['differing']} of {d['token_f1']['n']}",
            ]
            for d in c["differences"]
        ]  # fmt: skip
        rule = (
            "Row by row on the same questions, in points of 100. Better or worse is said only where the paired 95 % "
            f"interval excludes zero and at least {LEAST_DIFFERING} rows differ; all else is within noise. There is no "
            "correction for making several comparisons."
        )
        blocks += [("heading", "Differences"), ("text", rule), ("table", "numbers", header, rows)]
    if c["promises"]:
        header = ["promise", "variant", "verdict", "measured"]
        rows = []
        for p in c["promises"]:
            figure = "{}× ({}–{})" if p["unit"] == "×" else "{} points [{}, {}]"
            form = "{:.2f}".format if p["unit"] == "×" else signed
            measured = figure.format(*(form(p[key]) for key in ("measured", "low", "high")))
            measured = f"{p['measured']:.2f}×" if p["low"] == p["high"] and p["unit"] == "×" else measured
            cannot = " (cannot be told at this sample size)" if p["unit"] == "points" else " (the ranges allow both)"
            verdict = p["verdict"] + cannot * (p["verdict"] == NOISE)
            rows.append([p["promise"], f"{p['variant']} against {p['against']}", verdict, measured])
        blocks += [("heading", "Promises and measurements"), ("table", "words", header, rows)]
        blocks += [("list", c["remarks"])] if c["remarks"] else []

    blocks += [("heading", "Pictures"), ("figures", [(name, alt) for name, (_, alt) in figures.items()])]

    if c["answers"]:
        rule = (
            f"{len(c['answers'])} of the {c['rows']} rows, the first in the order of a hash of their ids, so nobody chose "
            f"them. {'; '.join(f'{sign} {meaning}' for sign, meaning in MARKS.items())}."
        )
        header = ["question", "accepted", *c["variants"]]
        rows = [
            [asked(r["question"]), clip(" / ".join(r["gold"]))]
            + [f"{a['mark']} {clip(a['text']) or '(nothing)'}" for a in r["answers"].values()]
            for r in c["answers"]
        ]  # fmt: skip
        blocks += [("heading", "Sample answers"), ("text", rule), ("table", "words", header, rows)]

    header = ["artifact", "time", "peak memory, MB", "started, UTC", "digest", "command"]
    rows = [
        [
            s["artifact"], duration(s["seconds"]), megabytes(s["peak_memory_bytes"]),
            s["started"][:16].replace("T", " "), s["digest"][:12], s["command"],
        ]
        for s in c["stages"]
    ]  # fmt: skip
    total = (
        f"Total time {total_time(c)}, each stage once; of a stage that was interrupted and continued, the last run "
        "alone is known."
    )
    found = {(name, v) for s in c["stages"] for name, v in s["versions"].items()}
    commits = {(s["code"]["commit"] or "no commit")[:12] + " + changes" * bool(s["code"]["dirty"]) for s in c["stages"]}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found))
    blocks += [("heading", "Stages"), ("text", total), ("table", "stages", header, rows)]
    blocks += [("text", f"Versions: {versions}. Code: {', '.join(sorted(commits))}.")]
    return blocks if several else [b for b in blocks if b[0] != "figures" or b[1]]


# --- pictures -----------------------------------------------------------------------------------------------

INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#7d8590", "#d9822b", "#2f7fd1", "#8e63ce", "#2a9d6f", "#c94f6d")


def pictures(c: dict) -> dict[str, tuple[str, str]]:
    """{name: (SVG, the same in words)}."""
    v = c["variants"]
    streams = next(iter(v.values()))["streams"]
    ranges = {
        "f1": ("Token F1, with 95 % intervals", "token_f1", ("mean", "low", "high"), "{:.3f}"),
        "decode": ("Decode, one stream, tokens/s, with ranges", "decode_one_stream", ("median", "min", "max"), "{:.1f}"),
        "decode-batch": (f"Decode, {streams} streams, tokens/s, with ranges", "decode_batch", ("median", "min", "max"), "{:.1f}"),
    }  # fmt: skip
    made = {}
    for name, (title, key, fields, form) in ranges.items():
        made[name] = bars(name, title, {n: [one[key][f] for f in fields] for n, one in v.items()}, form)
    made["size"] = bars("size", "Size, MB", {n: [one["model_bytes"] / 1e6] * 3 for n, one in v.items()}, "{:.1f}")
    if c["training"]:
        made["training"] = curve(c["training"])
    return made


def bars(name: str, title: str, values: dict[str, list[float]], form: str) -> tuple[str, str]:
    """One bar a variant, [value, low, high] each."""
    figure, axes = canvas(0.42 * len(values) + 0.75, title)
    highest = max(high for _, _, high in values.values()) or 1
    for place, (value, low, high) in enumerate(values.values()):
        axes.barh(place, value, height=0.62, color=COLOURS[place % len(COLOURS)])
        if high > low:
            axes.errorbar(value, place, xerr=[[value - low], [high - value]], color=INK, capsize=3, lw=1.2)
        axes.text(high + highest * 0.02, place, form.format(value), va="center", color=INK)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_xlim(0, highest * 1.18)
    axes.invert_yaxis()
    each = (f"{n} {form.format(x)}" + f" ({form.format(a)} to {form.format(b)})" * (b > a) for n, (x, a, b) in values.items())
    return svg_of(figure, name), f"{title}: {'; '.join(each)}."


def curve(training: list[dict]) -> tuple[str, str]:
    title = "Training loss, step by step"
    figure, axes = canvas(2.6, title)
    words = []
    for one, colour in zip(training, COLOURS[2:] + COLOURS[:2]):
        steps, losses = [e["step"] for e in one["history"]], [e["loss"] for e in one["history"]]
        name = Path(one["adapter"]).name
        axes.plot(steps, losses, color=colour, lw=1.8, marker="o", ms=3, label=name)
        words.append(f"{name} from {losses[0]:.3f} at step {steps[0]} to {losses[-1]:.3f} at step {steps[-1]}")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, labelcolor=INK)
    return svg_of(figure, "training"), f"{title}: {'; '.join(words)}."


def canvas(height: float, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.patch.set_alpha(0)
    for side in axes.spines:
        axes.spines[side].set_visible(side == "left")
        axes.spines[side].set_color(INK)
    return figure, axes


def svg_of(figure, name: str) -> str:
    """A figure as SVG to be put into a page: text as text, the page's colour, ids of its own, no addresses."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(r"font(-family)?: ([\d.]+px )?[^;\"]*sans-serif", r"font\1: \2system-ui, sans-serif", svg)
    return svg.replace(INK, "currentColor")


def standalone(svg: str) -> str:
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: white" ', 1)


# --- Markdown and HTML --------------------------------------------------------------------------------------


def as_markdown(blocks: list[tuple]) -> str:
    def escape(text: str, signs: str) -> str:
        return html.escape(re.sub(signs, r"\\\g<0>", " ".join(text.split())), quote=False)

    def line(cells, signs: str) -> str:
        return f"| {' | '.join(escape(cell, signs) for cell in cells)} |"

    parts = []
    for form, *content in blocks:
        match form:
            case "title" | "heading":
                parts.append(f"{'#' if form == 'title' else '##'} {escape(content[0], '[*_`]')}")
            case "text":
                parts.append(escape(content[0], r"[\\*_`]"))
            case "list":
                parts.append("\n".join(f"- {escape(item, r'[\\*_`]')}" for item in content[0]))
            case "figures":
                parts += [f"![{escape(alt, r'[\\*_`\[\]]')}]({name}.svg)" for name, alt in content[0]]
            case "table":
                kind, header, rows = content
                signs = r"[|]" if kind == "numbers" else r"[\\|*_`\[\]~]"
                rule = ["---"] * len(header)
                parts.append("\n".join(line(cells, signs) for cells in (header, rule, *rows)))
    return "\n\n".join(parts) + "\n"


def as_html(blocks: list[tuple], figures: dict) -> str:
    body = []
    for form, *content in blocks:
        match form:
            case "title":
                title = html.escape(content[0])
                body.append(f"<h1>{title}</h1>")
            case "heading":
                body.append(f"<h2>{html.escape(content[0])}</h2>")
                name = html.escape(content[0])
            case "text":
                body.append(f"<p>{html.escape(content[0])}</p>")
            case "list":
                body.append(f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in content[0])}</ul>")
            case "figures":
                inline = (
                    figures[key][0].replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
                    for key, alt in content[0]
                )
                body.append(f'<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in inline)}</div>')
            case "table":
                kind, header, rows = content
                head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
                lines = "".join(f"<tr>{''.join(cell(text, kind) for text in row)}</tr>" for row in rows)
                body.append(
                    f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table class="{kind}">'
                    f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
                )
    return (
        '<!doctype html>\n<html lang="en-GB">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def cell(text: str, kind: str) -> str:
    """A table's cell; spread on a line of its own, verdicts and marks set off by more than their colour."""
    safe = html.escape(text)
    if kind == "numbers":
        safe = re.sub(r"^(better|worse|within noise), ", r'<b class="\1">\1</b><br>', safe)
        safe = re.sub(r" (\[.*\]|\(.*\))$", r"<br><small>\1</small>", safe)
        return f"<td>{safe}</td>"
    if kind == "words" and text[:1] in MARKS:
        sign = f'<b role="img" aria-label="{MARKS[text[0]]}">{text[0]}</b>'
        return f'<td class="{MARKS[text[0]].split()[0]}">{sign}{safe[1:]}</td>'
    safe = re.sub(r"^(not reached|reached|within noise)(?=$| \()", r'<b class="\1">\1</b>', safe)
    return f"<td>{safe}</td>"


CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b636d; --line: #d8dde3; --page: #fff; --tint: #f4f6f8;
  --good: #19703f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4b0; --line: #343b44; --page: #14171b;
  --tint: #1d2228; --good: #66c58d; --bad: #ff8d84; } }
* { box-sizing: border-box; }
body { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 3rem 0 .75rem; font-size: 1.25rem; }
p, ul { max-width: 46rem; margin: 0 0 1rem; }
ul { padding-left: 1.2rem; color: var(--soft); font-size: .9rem; }
li { margin-bottom: .35rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; border: 1px solid var(--line); border-radius: .5rem; }
table { width: 100%; border-collapse: collapse; font-size: .875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: .55rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: .78rem; vertical-align: bottom; background: var(--tint); }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page); }
th:first-child { background: var(--tint); }
td:first-child { font-weight: 600; }
.numbers td, .stages td { white-space: nowrap; }
.words td { min-width: 8.5rem; overflow-wrap: anywhere; }
.words td:first-child { min-width: 11rem; font-weight: 400; }
.wrong { color: var(--soft); }
.better, .reached, td.exact b { color: var(--good); }
.worse, .not, td.wrong b { color: var(--bad); }
small { color: var(--soft); font-size: .78rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
@media (max-width: 40rem) { body { padding-top: 1.5rem; } .words td:first-child { position: static; } }
@media print { @page { size: A4 landscape; margin: 12mm; } body { max-width: none; padding: 0; font-size: 9pt; }
  .scroll { overflow: visible; border: 0; } table { font-size: 7pt; } th, td { padding: 2pt 3pt; }
  .numbers td, .stages td { white-space: normal; } tr, figure { break-inside: avoid; } h2 { break-after: avoid; } }
"""


if __name__ == "__main__":
    cli.run(main, make_parser)
