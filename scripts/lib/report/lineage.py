"""The stages that an artifact was made by, back to what was downloaded or given; the time that they took, and the
estimate of that time."""

from pathlib import Path

from lib.core import artifact, cli
from lib.core.cli import InputError
from lib.core.wording import duration, gpu_peak, megabytes

KEPT = (
    "kind", "command", "seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "digest", "code", "versions", "started",
)  # fmt: skip


def locate(path: str | Path) -> Path:
    """The place that a path in metadata.json refers to, from the working directory or else from the repository."""
    return (Path(path) if Path(path).exists() else cli.ROOT / path).resolve()


def collect(path: str | Path, stages: dict, gaps: list, digest: str | None = None) -> None:
    """Gather {path: metadata} of an artifact and of all that it was made of into `stages`, inputs first, each once.
    `gaps` takes a message for each input that is gone or has changed."""
    place = locate(path)
    if str(path).startswith(artifact.HUB):  # its commit is recorded
        return
    if not place.exists():
        gaps.append(f"{path} no longer exists")
    elif (place / artifact.METADATA).is_file():  # a plain file was made by no stage
        meta = stages.get(place) or artifact.read_metadata(place)
        if digest not in (None, meta["digest"]):
            gaps.append(f"{path} was rebuilt after it was used here")
        elif place not in stages:
            for source in meta["inputs"].values():
                collect(source["path"], stages, gaps, source["digest"])
            stages[place] = meta


TRAINED, SPLIT = ("adapter", "clara"), ("data", "clara-data", "preferences")


def check_held_out(model: Path, data: Path) -> None:
    """InputError if test rows of `data` may be rows that the model was trained on, judging by digests: both come from
    one file, and were not split together. Models and data without metadata are not checked."""
    models, trained, evaluated = {}, {}, {}
    collect(model, models, [])
    lessons = [meta["inputs"]["data"] for meta in models.values() if meta["kind"] in TRAINED]
    for lesson in lessons:
        collect(lesson["path"], trained, [], lesson["digest"])
    collect(data, evaluated, [])
    files = source_digests(trained) | {lesson["digest"] for lesson in lessons}
    if data.is_file():
        shared = artifact.identify(data)["digest"] in files
    else:
        split_together = split_digests(trained) & split_digests(evaluated)
        shared = not split_together and files & source_digests(evaluated)
    rebuilt = [
        lesson for lesson in lessons
        if locate(lesson["path"]) in evaluated and evaluated[locate(lesson["path"])]["digest"] != lesson["digest"]
    ]  # fmt: skip
    if shared or rebuilt:
        lesson = rebuilt[0] if rebuilt else lessons[0]
        raise InputError(
            f"{data}: {model} was trained on rows of the same source, {lesson['path']}"
            + (", before it was built again" if rebuilt else "")
            + ", so that the test examples may be among its training examples; split the rows once (`generate_data.py "
            "--source FILE --output DIRECTORY`), then train and evaluate on that directory"
        )


def split_digests(stages: dict) -> set[str]:
    """The digests of the artifacts with splits, which what is made from them keeps."""
    return {meta["digest"] for meta in stages.values() if meta["kind"] in SPLIT}


def source_digests(stages: dict) -> set[str]:
    """The digests of what the artifacts with splits were made from: files, packages, other artifacts."""
    metas = [meta for meta in stages.values() if meta["kind"] in SPLIT]
    names = ("file", "hub", "asset", "data")
    return {source["digest"] for meta in metas for name, source in meta["inputs"].items() if name in names}


def display_paths(stages: dict) -> dict[Path, str]:
    """The stages' paths for display: relative to the working directory if they are below it."""
    cwd = Path.cwd()
    return {path: str(path.relative_to(cwd) if path.is_relative_to(cwd) else path) for path in stages}


def summarise(stages: dict, gaps: list, forecast: Path | None) -> dict:
    """The stages' times for a report, compared with the estimate `forecast` if there is one."""
    entries = [
        {"artifact": name} | {key: stages[path].get(key) for key in KEPT}
        for path, name in display_paths(stages).items()
    ]
    return {
        "stages": entries, "total_seconds": sum(stage["seconds"] for stage in entries), "uncounted": sorted(set(gaps)),
        "forecast": compare_estimate(forecast, stages) if forecast else None,
    }  # fmt: skip


def compare_estimate(path: Path, stages: dict) -> dict | None:
    """The times that estimate.py predicted, and the times of the same stages if they were built with the same values;
    None if the estimate is a rough one, for another machine."""
    meta = artifact.read(path, "estimate")
    if meta["metrics"]["rough"]:
        return None
    rows = []
    for stage in meta["metrics"]["stages"]:
        if stage["status"] == "estimated":
            actual = stages.get(locate(stage["artifact"]), {"arguments": {}})
            same_values = all(actual["arguments"].get(key) == value for key, value in stage["arguments"].items())
            seconds = actual.get("seconds") if same_values else None
            row = {"stage": stage["stage"], "forecast": stage["seconds"], "measured": seconds}
            rows.append(row | {"ratio": seconds and seconds / stage["seconds"]})
    measured = [row for row in rows if row["measured"] is not None]
    total = {key: sum(row[key] for row in measured) for key in ("forecast", "measured")}
    return {
        "estimate": str(path), "digest": meta["digest"], "stages": rows,
        "total": total | {"ratio": total["measured"] / total["forecast"] if measured else None},
    }  # fmt: skip


# --- writing --------------------------------------------------------------------------------------------------


def total_time(c: dict) -> str:
    return ("at least " if c["uncounted"] else "") + duration(c["total_seconds"])


def as_text(c: dict) -> str:
    text = f"total time of {len(c['stages'])} stages: {total_time(c)}"
    if c["forecast"] and (total := c["forecast"]["total"])["ratio"]:
        text += f"\nestimated {duration(total['forecast'])}, took {duration(total['measured'])}"
    return text


def build_blocks(c: dict) -> list[tuple]:
    """The sections of a report (lib/report/page.py) that show the result of `summarise`."""
    header = ["artifact", "time", "peak memory, MB", "started, UTC", "digest", "command"]
    rows = [
        [
            s["artifact"], duration(s["seconds"]), megabytes(s["peak_memory_bytes"]) + gpu_peak(s),
            s["started"][:16].replace("T", " "), (s["digest"] or "–")[:12], s["command"],
        ]
        for s in c["stages"]
    ]  # fmt: skip
    total = (
        f"Total time {total_time(c)}, each stage counted once. For a stage that was interrupted and resumed, only the "
        "time of its last run is known."
    )
    packages = {(name, v) for s in c["stages"] for name, v in s["versions"].items()}
    commits = {(s["code"]["commit"] or "no commit")[:12] + " + changes" * bool(s["code"]["dirty"]) for s in c["stages"]}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(packages))
    blocks = [("heading", "Stages"), ("text", total), ("table", "stages", header, rows)]
    blocks += [("text", f"Versions: {versions}. Code: {', '.join(sorted(commits))}.")]
    return blocks + (build_forecast_blocks(c["forecast"]) if c["forecast"] else [])


def build_forecast_blocks(forecast: dict) -> list[tuple]:
    lines = [*forecast["stages"], {"stage": "total", **forecast["total"]}]
    rows = [
        [line["stage"], duration(line["forecast"])]
        + (["–", "–"] if line["ratio"] is None else [duration(line["measured"]), f"{line['ratio']:.2f}×"])
        for line in lines
    ]
    rule = (
        "The time that estimate.py predicted, and the time that each stage took. A stage that was built with other "
        "settings is not compared and not part of the total."
    )
    header = ["stage", "estimated", "measured", "measured / estimated"]
    return [("heading", "Estimate and measurement"), ("text", rule), ("table", "numbers", header, rows)]
