"""The stages of a pipeline as Make prints them, with the arguments that each script's own parser reads."""

import importlib
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from lib.core import cli
from lib.core.pipeline import Stage, list_stages, locate

MAKES_ADAPTERS, MAKES_INT4 = ("sft", "dpo"), ("quantize",)


class Plan(NamedTuple):
    stages: list[tuple[Stage, Namespace]]
    values: dict[str, dict]  # {script: its arguments}; generate_data only if the model writes the examples itself
    model: Path
    data: Path
    clara_data: Path | None
    method: str | None  # quantisation method, never "auto"

    @property
    def evaluation(self) -> dict:
        """The arguments of the evaluation."""
        return self.values.get("evaluate") or self.values["evaluate_clara"]

    @property
    def writes_rows(self) -> bool:
        """Whether the model writes its own training examples."""
        return "generate_data" in self.values

    def describe_model(self, stage: Stage) -> tuple[str, bool]:
        """The kind of a stage's model ("base", "lora" or "int4", as in costs.Job) and whether it was fine-tuned."""
        flags = ("--text-model", "--models", "--adapter", "--model")
        path = next(filter(None, map(stage.option, flags)), None)
        source = next((candidate for candidate, _ in self.stages if path and candidate.output == locate(path)), None)
        if source is None or source.script == "fetch_base":
            return "base", False
        kind = "lora" if source.script in MAKES_ADAPTERS else "int4" if source.script in MAKES_INT4 else "base"
        return kind, source.script in MAKES_ADAPTERS or self.describe_model(source)[1]


def read_plan(goal: str, values: list[str], profile: str, elsewhere: bool) -> Plan:
    """The plan of a goal. A wrong value raises InputError or ends with the script's own message. `elsewhere` means
    another machine, with a GPU."""
    stages, arguments = [], {}
    for stage in list_stages(goal, values):
        module = importlib.import_module(stage.script)
        args = cli.parse(module.make_parser(), [*stage.arguments, "--profile", profile])
        stages.append((stage, args))
        if stage.script == "quantize":
            args.method = "nf4" if args.method == "auto" and elsewhere else args.method
            module.apply_method(args)
        if stage.script != "generate_data" or args.source == "magpie":
            arguments[stage.script] = vars(args)

    def find(*scripts: str, flag: str) -> Path | None:
        return next(
            (locate(stage.option(flag)) for script in scripts for stage, _ in stages if stage.script == script), None
        )

    method = arguments["quantize"]["method"] if "quantize" in arguments else None
    return Plan(
        stages, arguments, find("fetch_base", flag="--output"), find("evaluate", "sft", flag="--data"),
        find("train_stage1", flag="--data"), method,
    )  # fmt: skip
