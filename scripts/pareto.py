"""Compare quantisations of one model: size in bytes against divergence from the model.

    python scripts/pareto.py --models models/smollm2-135m-pareto-gguf-q8_0 models/smollm2-135m-pareto-nf4 \\
        --output reports/smollm2-135m-pareto

Takes quantised artifacts of one model, measured on the same examples; `make pareto` builds them. Leaves pareto.json,
and pareto.md with its picture pareto.svg, both written from it. Nothing is measured here: all figures come from
quantize.py. A setting is on the Pareto front if no other one is at least as good in both size and divergence and better
in one.
"""

import math
from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import InputError
from lib.core.wording import duration, megabytes
from lib.report.page import COLOURS, INK, as_markdown, load_matplotlib, make_standalone, new_canvas, render_svg

LINE = 9  # a label's height, in points


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--models", type=Path, nargs="+", required=True, help="quantised artifacts of one model")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    return parser


def main(args):
    # --- read and check ------------------------------------------------------------------------------
    paths = {path.name.removeprefix(f"{args.output.name}-"): path for path in args.models}
    if len(paths) < len(args.models):
        raise InputError(f"--models: a setting is given more than once; expected each of {', '.join(paths)} once")
    metas = {name: read_quantised(path) for name, path in paths.items()}
    inputs = artifact.identify_inputs(paths)
    check_comparable(metas, paths)

    # --- compare and write -----------------------------------------------------------------------------
    comparison = compare(args, metas)
    with artifact.write_artifact(args.output, "pareto", args, inputs) as build:
        artifact.write_json(build.path / "pareto.json", comparison)
        svg, words = draw_figure(comparison["settings"])
        (build.path / "pareto.svg").write_text(make_standalone(svg), encoding="utf-8")
        (build.path / "pareto.md").write_text(as_markdown(build_blocks(comparison, words)), encoding="utf-8")
        build.metrics = comparison
    for name, setting in comparison["settings"].items():
        front = "  Pareto-optimal" * setting["front"]
        print(f"{name:24} {megabytes(setting['size_bytes']):>10} MB   mean KL {setting['kl_mean']:.4f}{front}")
    print(args.output)


# --- reading -----------------------------------------------------------------------------------------------


def read_quantised(path: Path) -> dict:
    """The metadata of a quantised artifact; its files are checked later, like those of every input."""
    if not (path / artifact.METADATA).is_file():
        state = "is not an artifact (it has no metadata.json)" if path.exists() else "does not exist"
        raise InputError(f"{path} {state}; expected a quantised model, as built by `make pareto`")
    meta = artifact.read_metadata(path)
    if meta["kind"] != "quantized" or not meta["metrics"].get("divergence"):
        raise InputError(
            f"{path}: expected a quantised model with its measured divergence, found kind {meta['kind']!r}; give a "
            "model from quantize.py, or run `make pareto`"
        )
    return meta


def check_comparable(metas: dict, paths: dict) -> None:
    """InputError unless all artifacts were made from one model and measured on the same rows of the same data."""
    first, *names = metas
    for name in names:
        pair = f"{paths[name]} and {paths[first]} cannot be compared"
        source, first_source = (metas[n]["inputs"]["model"] for n in (name, first))
        if source["digest"] != first_source["digest"]:
            raise InputError(
                f"{pair}: their source models differ, {name_input(source)} and {name_input(first_source)}; quantise "
                "the same model, as `make pareto` does"
            )
        sampling, first_sampling = (describe_rows(metas[n]) for n in (name, first))
        if differing := [
            f"--{key} {sampling[key]} and {first_sampling[key]}"
            for key in sampling
            if sampling[key] != first_sampling[key]
        ]:
            raise InputError(
                f"{pair}: they were not measured on the same examples: {', '.join(differing)}; quantise both with the "
                "same --data, --samples and --seed"
            )


def describe_rows(meta: dict) -> dict:
    """The values that determine the choice of the validation rows."""
    arguments = {key: meta["arguments"].get(key) for key in ("samples", "seed")}
    return {"data": meta["inputs"]["data"]["digest"][:12]} | arguments


def name_input(source: dict) -> str:
    return f"{source['path']} {source['digest'][:12]}"


# --- comparing ---------------------------------------------------------------------------------------------


def compare(args, metas: dict) -> dict:
    """Every figure of the page. The settings are sorted by size, then by divergence."""
    settings = {name: describe(meta) for name, meta in metas.items()}
    settings = dict(sorted(settings.items(), key=lambda item: rank_key(item[1])))
    for setting in settings.values():
        setting["front"] = is_on_front(setting, settings.values())
    first = next(iter(metas.values()))
    return {
        "tag": args.output.name, "model": first["inputs"]["model"], "data": first["inputs"]["data"],
        "input_bytes": first["metrics"]["input_bytes"], "rows": first["metrics"]["divergence"]["rows"],
        "answer_positions": first["metrics"]["divergence"]["answer_positions"],
        "machines": sorted({f"{m['machine']['cpu']}, {m['machine']['cores']} cores" for m in metas.values()}),
        "settings": settings,
    }  # fmt: skip


def describe(meta: dict) -> dict:
    metrics, divergence = meta["metrics"], meta["metrics"]["divergence"]
    keys = ("kl_mean", "kl_p99", "top1_agreement", "nll_reference", "nll")
    arguments = {key: meta["arguments"].get(key) for key in ("method", "calibration_samples", "embedding")}
    return {
        "format": meta["format"], "arguments": arguments, "digest": meta["digest"],
        "size_bytes": meta["size_bytes"], "ratio": metrics["ratio"], **{key: divergence[key] for key in keys},
        "gain_kept": divergence.get("gain_kept"), "seconds": meta["seconds"], "objections": metrics["objections"],
    }  # fmt: skip


def rank_key(setting: dict) -> tuple[float, float]:
    """(size, divergence); less is better. A divergence that is not a number is worse than any number."""
    return setting["size_bytes"], setting["kl_mean"] if math.isfinite(setting["kl_mean"]) else math.inf


def is_on_front(setting: dict, settings) -> bool:
    """Whether no setting is at least as good in both size and divergence and better in one; equal ones are on the front
    together."""
    size, kl = point = rank_key(setting)
    return kl < math.inf and not any(s <= size and k <= kl and (s, k) != point for s, k in map(rank_key, settings))


# --- writing -----------------------------------------------------------------------------------------------


def build_blocks(comparison: dict, words: str) -> list[tuple]:
    header = [
        "setting", "size, MB", "times smaller", "mean KL, nats", "99th percentile", "same top token", "NLL before",
        "NLL after", "gain retained", "build time, s", "limits", "Pareto-optimal",
    ]  # fmt: skip
    rows = [
        [
            name if s["format"] in name else f"{name} ({s['format']})", megabytes(s["size_bytes"]),
            f"{s['ratio']:.2f}×", f"{s['kl_mean']:.4f}", f"{s['kl_p99']:.3f}", f"{s['top1_agreement']:.1%}",
            f"{s['nll_reference']:.3f}", f"{s['nll']:.3f}",
            "–" if s["gain_kept"] is None else f"{s['gain_kept']:.0%}", f"{s['seconds']:.1f}",
            "exceeded" if s["objections"] else "met", "yes" if s["front"] else "no",
        ]
        for name, s in comparison["settings"].items()
    ]  # fmt: skip
    several = len(rows) > 1
    introduction = (
        f"{len(rows)} quantisation{'s' * several} of {comparison['model']['path']} "
        f"({megabytes(comparison['input_bytes'])} MB), compared with it on {comparison['answer_positions']} answer "
        f"tokens of the same {comparison['rows']} validation examples of {comparison['data']['path']}."
    )
    total = sum(s["seconds"] for s in comparison["settings"].values())
    notes = [
        "Pareto-optimal: no other setting is better in size or KL without being worse in the other.",
        "KL is the mean divergence of the quantised model's next-token distribution from that of the source model, in "
        "nats per token. NLL is that of the reference answer, in nats per token. Gain retained is the share of the "
        "fine-tuning gain in NLL that is left.",
        f"Build time covers quantisation and the divergence check, on {' and '.join(comparison['machines'])}; the "
        f"total is {duration(total)}. Each setting was built once, so no range is given.",
        *(f"{n} would be rejected: {'; '.join(s['objections'])}." for n, s in comparison["settings"].items()
          if s["objections"]),
    ]  # fmt: skip
    return [
        ("title", f"{comparison['tag']}: size against divergence"),
        ("text", introduction),
        ("table", "words", header, rows),
        ("notes", notes),
        ("figures", [("pareto", words)]),
    ]


def draw_figure(settings: dict) -> tuple[str, str]:
    """The SVG, and the same in words. Filled points are on the front."""
    from matplotlib.ticker import LogLocator, NullLocator

    title = "Size (MB) against mean KL (nats)"
    finite = {name: rank_key(s) for name, s in settings.items() if rank_key(s)[1] < math.inf}
    # A logarithmic axis cannot show 0 (nor the -1e-9 that rounding errors make of it): such points are drawn below the
    # others, and their labels say so.
    floor = min((kl for _, kl in finite.values() if kl > 0), default=1e-3) / 3
    labels = {name: name + " (0)" * (kl <= 0) for name, (_, kl) in finite.items()}
    points = {name: (size / 1e6, kl if kl > 0 else floor) for name, (size, kl) in finite.items()}
    with load_matplotlib():
        figure, axes = new_canvas(4, title)
        axes.set_yscale("log")
        front = [points[name] for name in points if settings[name]["front"]]
        axes.plot(*zip(*front), color=COLOURS[2], lw=1.4) if front else None
        for name, point in points.items():
            face = COLOURS[2] if settings[name]["front"] else "none"
            axes.plot(*point, marker="o", ms=6, mfc=face, mec=COLOURS[2] if settings[name]["front"] else COLOURS[0])
        axes.margins(0.1, 0.12)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines["bottom"].set_visible(True)
        axes.set_xlabel("MB", color=INK)
        axes.set_ylabel("nats", color=INK)
        write_labels(figure, axes, points, labels)
        svg = render_svg(figure, "pareto")
    words = [
        f"{name} {megabytes(s['size_bytes'])} MB {s['kl_mean']:.4f}" + " (Pareto-optimal)" * s["front"]
        for name, s in settings.items()
    ]
    return svg, f"{title}: {'; '.join(words)}."


def write_labels(figure, axes, points: dict, labels: dict) -> None:
    """Write a label beside each point, towards the picture's middle. Labels that would cover another label or a point
    are moved up."""
    figure.draw_without_rendering()  # the points have no positions before
    scale, (left, right) = 72 / figure.dpi, axes.get_xlim()
    leader = {"arrowstyle": "-", "color": COLOURS[0], "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
    centres = [axes.transData.transform(point) * scale for point in points.values()]
    boxes = [(across - 4, across + 4, up) for across, up in centres]
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        centre = axes.transData.transform((x, y)) * scale
        side = 1 if x < (left + right) / 2 else -1
        width = 5 * len(labels[name])
        begin = centre[0] + 6 if side == 1 else centre[0] - 6 - width
        height = centre[1]
        for low, high, line in sorted(boxes, key=lambda box: box[2]):
            if begin < high and low < begin + width and abs(height - line) < LINE:
                height = line + LINE
        boxes.append((begin, begin + width, height))
        axes.annotate(
            labels[name], (x, y), (6 * side, height - centre[1]), textcoords="offset points", fontsize=8, color=INK,
            ha="left" if side == 1 else "right", va="center",
            arrowprops=leader | {"relpos": ((1 - side) / 2, 0.5)} if height - centre[1] > LINE else None,
        )  # fmt: skip


if __name__ == "__main__":
    cli.run(main, make_parser)
