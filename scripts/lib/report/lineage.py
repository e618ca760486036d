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
ORIGINS = ("file", "asset", "hub", "data")  # the inputs that an artifact with splits has its rows from


def check_held_out(model: Path, data: dict) -> None:
    """InputError if test rows of `data`, an input's identity, may be rows that the model was trained on, judging by
    digests: both come from one file, and were not split together. Models and data without metadata are not checked."""
    models, (splits, origins) = {}, trace_rows(data)
    collect(model, models, [])
    for lesson in (meta["inputs"]["data"] for meta in models.values() if meta["kind"] in TRAINED):
        trained_splits, trained_origins = trace_rows(lesson)
        rebuilt = any(
            locate(one["path"]) == locate(other["path"]) and not have_same_content(one, other)
            for one in trained_origins for other in origins
        )  # fmt: skip
        shared = not splits & trained_splits and any(
            have_same_content(one, other) for one in trained_origins for other in origins
        )
        if rebuilt or shared:
            reason = f"{data['path']}: {model} was trained on rows of the same source, {lesson['path']}"
            raise InputError(
                f"{reason}, before it was built again, so that the test examples may be among its training examples; "
                "train the model again, or give the data that it was trained on"
                if rebuilt
                else f"{reason}, so that the test examples may be among its training examples; split the rows once "
                "(`generate_data.py --source FILE --output DIRECTORY`), then train and evaluate on that directory"
            )


def have_same_content(one: dict, other: dict) -> bool:
    """Whether two identities have the same content. A file's digest depends on its name, so that a copy is compared
    under the name of the original."""
    copy, name = locate(other["path"]), Path(one["path"]).name
    is_copy = copy.is_file() and artifact.digest_of({name: artifact.sha256(copy)}) == one["digest"]
    return one["digest"] == other["digest"] or is_copy


def trace_rows(source: dict) -> tuple[set, list]:
    """(the digests of the artifacts with splits that rows come from, the identities of all that they come from). What
    is made from an artifact with splits keeps these."""
    splits, origins, file = set(), [source], locate(source["path"]) / artifact.METADATA
    if file.is_file() and (meta := artifact.read_metadata(file.parent))["digest"] == source["digest"]:
        splits |= {meta["digest"]} if meta["kind"] in SPLIT else set()
        for name in ORIGINS:
            if name in meta["inputs"]:
                earlier_splits, earlier_origins = trace_rows(meta["inputs"][name])
                splits, origins = splits | earlier_splits, origins + earlier_origins
    return splits, origins


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
