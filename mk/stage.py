"""Run one stage for Make: one line before it, one after it, and only one stage at a time.

    python3 mk/stage.py .make "all" .make/values/sft/x-lora .venv/bin/python scripts/sft.py … --output models/x-lora

Takes a folder for the lock and the count, the targets that were asked for, the file with the stage's values (or ''),
and its command. Prints which stage of how many starts, what it makes and its estimated time; then the time it took, and
that of the run so far. With V=1 it shows the whole command. The stage's exit code is passed on. An interrupt or a
SIGTERM reaches the stage, which keeps its work.

What the stage replaces is kept (mk/kept.py), and taken instead of being made when the same command would make it again.

Runs before anything is installed: Python's own library alone.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kept


def main(folder: Path, targets: str, values: str, command: list) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # heavy stages take turns, so that `make -j2` is safe and timings hold
        os.set_inheritable(lock.fileno(), True)  # a stage that outlives this process still holds it
        number, total, started = count(folder, targets)
        if number == 1 and (remembered := os.environ.get("REMEMBERED")):
            say(f"values that were not given are those of the last run: {remembered}")
        name = next((Path(word).stem for word in reversed(command) if re.search(r"scripts/\w+\.py$", word)), command[0])
        output = command[command.index("--output") + 1] if "--output" in command else ""
        title = f"[{number}/{total}] {name}" + (f" -> {output}" if output else "")
        mirrored = "scripts/carry.py" in command  # which keeps and takes by itself
        replaced = kept.Replaced(folder, Path(output), command, values) if values and not mirrored else None
        if replaced and (how := replaced.take_back()):
            say(f"{title}: {how}")
            return remember(values)
        estimate = estimated_seconds(output)
        say(title + (f" (estimate: {duration(estimate)})" if estimate else ""))
        if os.environ.get("V"):
            say(" ".join(command))
        began = time.time()
        if replaced:
            replaced.set_aside()
        code = run(command, lock.fileno())
        if replaced:
            replaced.finish(code == 0)
        if code == 0:
            remember(values)
        took, so_far = duration(time.time() - began), duration(time.time() - started)
        say(f"{title}: {'done in' if code == 0 else f'exit code {code} after'} {took}; {so_far} in all")
    return code


def remember(values: str) -> int:
    """The values of a stage that ended well are those that its artifact was last made with (mk/memory.mk)."""
    if values:
        made = Path(values.replace("/values/", "/made/"))
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(Path(values).read_bytes())
    return 0


def count(folder: Path, targets: str) -> tuple:
    """(this stage's number, how many this run of make has, when its first one started). make's process is the run."""
    make = os.getppid()
    for other in folder.glob("run-*.json"):
        if not Path(f"/proc/{other.stem[4:]}").exists():
            other.unlink()
    file = folder / f"run-{make}.json"
    try:
        run = json.loads(file.read_text())
    except (OSError, ValueError):
        run = {"number": 0, "total": count_stages(targets), "started": time.time()}
    run["number"] += 1
    run["total"] = max(run["total"], run["number"])
    file.write_text(json.dumps(run))
    return run["number"], run["total"], run["started"]


def count_stages(targets: str) -> int:
    """How many stages `make -n` would run. It inherits the values given on the command line through MAKEFLAGS."""
    flags = re.sub(r" ?-j\d*| ?--jobserver-\S+", "", os.environ.get("MAKEFLAGS", ""))
    done = subprocess.run(
        ["make", "-n", *targets.split()], env={**os.environ, "MAKEFLAGS": flags, "MAKELEVEL": "0"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    return done.stdout.count("mk/stage.py")


def estimated_seconds(output: str) -> float:
    """What the latest `make estimate` says of this artifact; 0 where there is none."""
    root = Path(output).parent.parent
    for place in sorted(
        [*root.glob("reports/*-estimate/metadata.json"), *root.parent.glob("reports/*-estimate/metadata.json")]
    ):
        try:
            stages = json.loads(place.read_text())["metrics"]["stages"]
            found = [stage["seconds"] for stage in stages if Path(stage["artifact"]) == Path(output)]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if found:
            return found[0]
    return 0.0


def run(command: list, lock: int) -> int:
    stage = subprocess.Popen(command, pass_fds=[lock])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stage.send_signal(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C has reached the stage already
    code = stage.wait()
    return code if code >= 0 else 128 - code


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{rest} s"
        if minutes == 0
        else f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
