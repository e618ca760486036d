"""What an artifact was made of, and what that was made of, back to what was fetched or brought."""

from pathlib import Path

from lib import artifact, cli


def locate(path: str | Path) -> Path:
    """Where a path in metadata.json leads, from here or from the repository."""
    return (Path(path) if Path(path).exists() else cli.ROOT / path).resolve()


def follow(path: str | Path, stages: dict, gaps: list, digest: str | None = None) -> None:
    """Gather {path: metadata} of an artifact and of all that it was made of, inputs first, each once; into `gaps` what
    is not known of it any more."""
    place = locate(path)
    if not place.exists():
        gaps.append(f"{path} is not there any more")
    elif (place / artifact.METADATA).is_file():  # a plain file was made by no stage
        meta = stages.get(place) or artifact.read_metadata(place)
        if digest not in (None, meta["digest"]):
            gaps.append(f"{path} was made anew after it was used here")
        elif place not in stages:
            for source in meta["inputs"].values():
                follow(source["path"], stages, gaps, source["digest"])
            stages[place] = meta
