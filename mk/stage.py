"""Run one stage for Make, with a line before and after it, and only one stage at a time.

    python3 mk/stage.py .make "all" "configs/profiles/cpu.yaml .make/values/sft/x-lora" python scripts/sft.py …

Takes a directory for the lock and the stage counter, the requested targets, the files with the stage's profile and
values (or ''), and its command. Prints the number of the stage, the number of all stages, the output and the estimated
time; afterwards the time of the stage and of the run so far. With V=1 it shows the full command. The exit code is the
stage's. An interrupt or a SIGTERM is passed on to the stage, which saves its progress.

The artifact that a stage replaces is kept (mk/kept.py). It is restored when the same command would build it again.

Uses only Python's standard library, because it runs before anything is installed.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import kept  # which finds the modules of scripts/lib/core

import children  # isort: skip


def main(folder: Path, targets: str, settings: list, command: list) -> int:
    children.end_with_parent()  # `kill -9` of make must not leave a stage behind
    folder.mkdir(parents=True, exist_ok=True)
    # Read now: while this stage waits or runs, another make may write other values there.
    values = {file: Path(file).read_bytes() for file in settings if Path(file).is_relative_to(folder / "values")}
    name = next((Path(word).stem for word in reversed(command) if re.search(r"scripts/\w+\.py$", word)), command[0])
    output = command[command.index("--output") + 1] if "--output" in command else ""
    title = name + (f" -> {output}" if output else "")
    with open(folder / "lock", "a+", encoding="utf-8", errors="replace") as lock:
        wait_for_turn(lock, title)  # one stage at a time: `make -j2` is safe and timings are valid
        os.set_inheritable(lock.fileno(), True)  # a stage that outlives this process keeps the lock
        number, total, started = count_stage(folder, targets)
        if number == 1 and (remembered := os.environ.get("REMEMBERED")):
            say(f"values remembered from the last run: {remembered}")
        title = f"[{number}/{total}] {title}"
        replaced = kept.Replaced(folder, Path(output), command, settings) if values else None
        if replaced and (outcome := replaced.restore()):
            say(f"{title}: {outcome}")
            write_note(output, remember, folder, values)
            return run(mirror_of(command), lock.fileno()) if mirror_of(command) else 0
        estimate = estimated_seconds(output)
        say(title + (f" (estimate: {duration(estimate)})" if estimate else ""))
        if os.environ.get("V"):
            say(" ".join(command))
        stage_started = time.time()
        if replaced:
            replaced.set_aside()
        code = run(command, lock.fileno())
        if replaced:
            write_note(output, replaced.finish, code == 0)
        if code == 0 or (replaced and replaced.is_new()):
            write_note(output, remember, folder, values)
        seconds, total_seconds = time.time() - stage_started, time.time() - started
        result = "done in" if code == 0 else f"failed with exit code {code} after"
        say(f"{title}: {result} {duration(seconds)}; {duration(total_seconds)} in total")
    return code


def wait_for_turn(lock, title: str) -> None:
    """Lock the lock file, and write into it who holds it, for those that wait."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "a stage that just started"
        say(f"{title}: waiting for another make in this directory: {holder}")
        fcntl.flock(lock, fcntl.LOCK_EX)
    lock.truncate(0)
    lock.write(f"{title}, process {os.getpid()}, since {time.strftime('%H:%M:%S')}\n")
    lock.flush()


def mirror_of(command: list) -> list:
    """The command that copies the artifacts to the mirror, if the stage's own command would."""
    return command[: command.index("--output")] if "--to" in command[: command.index("--output")] else []


def write_note(output: str, write, *values) -> None:
    """Write a note about an artifact. The artifact is there and must not fail for this."""
    try:
        write(*values)
    except OSError as error:
        say(f"warning: {error}; the next make will not know with which values {output} was built")


def remember(folder: Path, values: dict) -> None:
    """Store the values of a successful stage as those that its artifact was last built with (mk/memory.mk)."""
    for file, content in values.items():
        kept.write_file(folder / "made" / Path(file).relative_to(folder / "values"), content)


def count_stage(folder: Path, targets: str) -> tuple:
    """(number of this stage, number of stages, start time) of this run of make, identified by make's process id and the
    time when it started, since containers use the same ids again."""

    def started_at(process: str) -> str:
        try:
            status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
            return status.rpartition(")")[2].split()[19]
        except OSError:
            return "-"

    for record in folder.glob("run-*-*.json"):
        if started_at(record.stem.split("-")[1]) != record.stem.split("-")[2]:
            record.unlink()
    file = folder / f"run-{os.getppid()}-{started_at(str(os.getppid()))}.json"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        run = {"number": 0, "total": count_stages(targets), "started": time.time()}
    run["number"] += 1
    run["total"] = max(run["total"], run["number"])
    file.write_text(json.dumps(run), encoding="utf-8")
    return run["number"], run["total"], run["started"]


def count_stages(targets: str) -> int:
    """The number of stages that `make -n` would run. It inherits the values of the command line through MAKEFLAGS."""
    flags, separator, variables = os.environ.get("MAKEFLAGS", "").partition("-- ")
    flags = re.sub(r"(^| )(-j\d*|--jobserver-\S+)", "", flags) + separator + variables
    process = subprocess.run(
        ["make", "-n", *targets.split()], env={**os.environ, "MAKEFLAGS": flags, "MAKELEVEL": "0"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8", errors="replace",
    )  # fmt: skip
    return process.stdout.count("mk/stage.py")


def estimated_seconds(output: str) -> float:
    """The time that `make estimate` predicted for this artifact; 0 without an estimate."""
    root = Path(output).parent.parent
    for file in sorted(
        [*root.glob("reports/*-estimate/metadata.json"), *root.parent.glob("reports/*-estimate/metadata.json")]
    ):
        try:
            stages = json.loads(file.read_text(encoding="utf-8"))["metrics"]["stages"]
            seconds = [stage["seconds"] for stage in stages if Path(stage["artifact"]) == Path(output)]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if seconds:
            return seconds[0]
    return 0.0


def run(command: list, lock: int) -> int:
    early = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: early.append(number))
    stage = children.start(command, pass_fds=[lock])
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stage.send_signal(number))
    for number in early:
        stage.send_signal(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the stage directly
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
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(), sys.argv[4:]))
    except OSError as error:
        sys.exit(f"make: {error}; choose another ROOT, or make room there")
    except KeyboardInterrupt:  # before the stage has started
        sys.exit(130)
