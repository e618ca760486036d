"""Read the stages of a pipeline from what Make prints. The rules in mk/ are the only definition of a pipeline."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

from lib.core.cli import ROOT, InputError


class Stage(NamedTuple):
    script: str  # "sft" for scripts/sft.py
    arguments: list[str]
    output: Path

    def option(self, flag: str) -> str | None:
        """The value of a flag, for example "--model". Of several, argparse takes the last."""
        places = [n for n, word in enumerate(self.arguments) if word == flag]
        return self.arguments[places[-1] + 1] if places else None

    def reads(self, path: Path) -> bool:
        return any(locate(word) == path for word in self.arguments if word != self.option("--output"))


def locate(word: str) -> Path:
    """A path in a rule, which is relative to the repository, as a path relative to the current directory."""
    return Path(word) if os.path.isabs(word) else Path(os.path.relpath(ROOT / word))


def print_rules(*words: str) -> str:
    """The output of `make -n`. MAKEFLAGS in the environment passes on the values of a make that runs this."""
    flags, separator, values = os.environ.get("MAKEFLAGS", "").partition("-- ")
    flags = re.sub(r"(^| )(-j\d*|--jobserver-\S+)", "", flags) + separator + values
    environment = os.environ | {"MAKEFLAGS": flags, "MAKELEVEL": "0"}
    try:
        process = subprocess.run(
            ["make", "-C", str(ROOT), "--no-print-directory", "-n", *words],
            env=environment, capture_output=True, encoding="utf-8", errors="surrogateescape",
        )  # fmt: skip
    except FileNotFoundError:
        raise InputError("GNU Make is not installed; install it, for example with `apt install make`") from None
    if process.returncode:
        raise InputError(f"`make {' '.join(words)}` failed: {process.stderr.strip()}")
    return process.stdout


def list_stages(goal: str, values: list[str] = (), only_stale: bool = False) -> list[Stage]:
    """The stages of a goal, inputs first, or only those that Make would run now. `values` are Make variables, such as
    SAMPLES=200."""
    # The list of imports changes no command; -B would write it again, which takes a second.
    rebuild_all = ["-B", *["-o", ".make/imports.mk"] * (ROOT / ".make/imports.mk").is_file()]
    rules, stages = print_rules(*[] if only_stale else rebuild_all, goal, *values), []
    for line in rules.replace("\\\n", " ").splitlines():
        if "mk/stage.py" not in line:
            continue
        words = shlex.split(line)
        scripts = [n for n, word in enumerate(words) if re.fullmatch(r"scripts/\w+\.py", word)]
        arguments = words[scripts[-1] + 1 :]  # the command that mirrors artifacts precedes the stage
        if "--output" in arguments:
            output = locate(arguments[arguments.index("--output") + 1])
            stages.append(Stage(Path(words[scripts[-1]]).stem, arguments, output))
    return stages


def find_goal(path: Path | str) -> str | None:
    """The goal that builds an artifact of this name, or None. If several do, the one with the fewest artifacts."""
    try:
        rules, goals = read_rules()
    except InputError:  # without Make, no goal is known
        return None
    metadata, models, scores = Path(path).resolve() / "metadata.json", list_models(Path(path).resolve()), {}
    for target in rules:
        pattern = re.escape(target).replace("@root@", ".*")
        of_model = PLACEHOLDER.sub("[^/]+", pattern.replace("@model@", f"(?:{'|'.join(models)})"))
        if target.endswith("/metadata.json") and re.fullmatch(PLACEHOLDER.sub("[^/]+", pattern), metadata.as_posix()):
            # smollm2-135m is the name of a model rather than the model smollm2, aligned with the data 135m. And
            # models/@model@-int4-lora also matches models/@model@-lora: the target with the longest fixed part counts.
            known = bool(models) and "@model@" in target and re.fullmatch(of_model, metadata.as_posix())
            scores[target] = bool(known), "@align@" not in target, len(PLACEHOLDER.sub("", target))
    closest = {target for target, score in scores.items() if score == max(scores.values())}
    sizes = {goal: len(targets) for goal in goals if closest & (targets := collect_targets(rules, goal))}
    return min(sizes, key=sizes.get, default=None)


def list_models(path: Path) -> list[str]:
    """The names of the models beside an artifact, as regular expressions."""
    root = next((folder for folder in path.parents if (folder / "models").is_dir()), path)
    return [re.escape(base.name.removesuffix("-base")) for base in root.glob("models/*-base")]


PLACEHOLDER = re.compile("@[a-z]+@|%")


def read_rules() -> tuple[dict[str, list[str]], list[str]]:
    """{target: its prerequisites} for any model and data, and the goals in the order of the rules."""
    rules, names = {}, ["ROOT=@root@", "MODEL_NAME=@model@", "DATA_NAME=@data@"]
    for data in ([], ["ALIGN_DATA=@align@"]):  # training data that the model writes, and data of the user
        for line in print_rules("-p", "help", *names, *data).splitlines():
            if match := re.match(r"([^\s:#]+):(?!=)([^|]*)", line):
                rules.setdefault(match[1], []).extend(match[2].split())
    return rules, rules[".PHONY"]


def collect_targets(rules: dict, target: str) -> set[str]:
    """The artifacts of a target, including all their inputs."""
    targets, queue = set(), [target]
    while queue:
        for prerequisite in rules.get(queue.pop(), []):
            if prerequisite.endswith("/metadata.json") and prerequisite not in targets:
                targets.add(prerequisite)
                queue.append(prerequisite)
    return targets
