"""What an artifact was made of, and what that was made of, back to what was fetched or brought; and what all that took,
against what had been forecast."""

from pathlib import Path

from lib.core import artifact, cli
from lib.core.wording import duration, megabytes

KEPT = ("kind", "command", "seconds", "peak_memory_bytes", "digest", "code", "versions", "started")


def locate(path: str | Path) -> Path:
    """Where a path in metadata.json leads, from here or from the repository."""
    return (Path(path) if Path(path).exists() else cli.ROOT / path).resolve()


def collect(path: str | Path, stages: dict, gaps: list, digest: str | None = None) -> None:
    """Gather {path: metadata} of an artifact and of all that it was made of, inputs first, each once; into `gaps` what
    is not known of it any more."""
    place = locate(path)
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


def display_paths(stages: dict) -> dict[Path, str]:
    """How the stages' places are called: from here, where they lie below."""
    here = Path.cwd()
    return {path: str(path.relative_to(here) if path.is_relative_to(here) else path) for path in stages}


def summarise(stages: dict, gaps: list, forecast: Path | None) -> dict:
    """What the stages took, for a report; and against what estimate.py had `forecast`, where it had."""
    made = [
        {"artifact": name} | {key: stages[path].get(key) for key in KEPT}
        for path, name in display_paths(stages).items()
    ]
    return {
        "stages": made, "total_seconds": sum(stage["seconds"] for stage in made), "uncounted": sorted(set(gaps)),
        "forecast": compare_estimate(forecast, stages) if forecast else None,
    }  # fmt: skip


def compare_estimate(path: Path, stages: dict) -> dict | None:
    """What estimate.py had forecast against what the same stages took, made with the same values; None where it had
    reckoned with another machine."""
    meta = artifact.read(path, "estimate")
    if meta["metrics"]["rough"]:
        return None
    rows = []
    for stage in meta["metrics"]["stages"]:
        if stage["status"] == "estimated":
            made = stages.get(locate(stage["artifact"]), {"arguments": {}})
            same = all(made["arguments"].get(key) == value for key, value in stage["arguments"].items())
            took = made.get("seconds") if same else None
            found = {"stage": stage["stage"], "forecast": stage["seconds"], "measured": took}
            rows.append(found | {"ratio": took and took / stage["seconds"]})
    known = [row for row in rows if row["measured"] is not None]
    total = {key: sum(row[key] for row in known) for key in ("forecast", "measured")}
    return {
        "estimate": str(path), "digest": meta["digest"], "stages": rows,
        "total": total | {"ratio": total["measured"] / total["forecast"] if known else None},
    }  # fmt: skip


# --- written --------------------------------------------------------------------------------------------------


def total_time(c: dict) -> str:
    return ("at least " if c["uncounted"] else "") + duration(c["total_seconds"])


def as_text(c: dict) -> str:
    said = f"total time of {len(c['stages'])} stages: {total_time(c)}"
    if c["forecast"] and (total := c["forecast"]["total"])["ratio"]:
        said += f"\nestimated {duration(total['forecast'])}, took {duration(total['measured'])}"
    return said


def build_blocks(c: dict) -> list[tuple]:
    """The sections of a report (lib/report/page.py) about what `summarise` returns."""
    header = ["artifact", "time", "peak memory, MB", "started, UTC", "digest", "command"]
    rows = [
        [
            s["artifact"], duration(s["seconds"]), megabytes(s["peak_memory_bytes"]),
            s["started"][:16].replace("T", " "), (s["digest"] or "–")[:12], s["command"],
        ]
        for s in c["stages"]
    ]  # fmt: skip
    total = (
        f"Total time {total_time(c)}, each stage counted once. For a stage that was interrupted and resumed, only the "
        "time of its last run is known."
    )
    found = {(name, v) for s in c["stages"] for name, v in s["versions"].items()}
    commits = {(s["code"]["commit"] or "no commit")[:12] + " + changes" * bool(s["code"]["dirty"]) for s in c["stages"]}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found))
    made = [("heading", "Stages"), ("text", total), ("table", "stages", header, rows)]
    made += [("text", f"Versions: {versions}. Code: {', '.join(sorted(commits))}.")]
    return made + (build_forecast_blocks(c["forecast"]) if c["forecast"] else [])


def build_forecast_blocks(forecast: dict) -> list[tuple]:
    lines = [*forecast["stages"], {"stage": "total", **forecast["total"]}]
    said = [
        [line["stage"], duration(line["forecast"])]
        + (["–", "–"] if line["ratio"] is None else [duration(line["measured"]), f"{line['ratio']:.2f}×"])
        for line in lines
    ]
    rule = (
        "The time that estimate.py predicted, and the time that each stage took. A stage that was built with other "
        "settings is not compared and not part of the total."
    )
    header = ["stage", "estimated", "measured", "measured / estimated"]
    return [("heading", "Estimate and measurement"), ("text", rule), ("table", "numbers", header, said)]
