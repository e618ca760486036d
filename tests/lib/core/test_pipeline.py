"""The stages that Make prints, and the goal that builds an artifact of a given name."""

import pytest

from lib.core import pipeline
from lib.core.cli import ROOT, InputError

VALUES = ["ROOT=/somewhere", "MODEL_NAME=tiny", "SOURCE=rows.jsonl", "SAMPLES=7",
          "SFT_FLAGS=--lora-targets 'q_proj, v_proj'"]  # fmt: skip


def test_stages_come_with_their_inputs_first_and_their_own_arguments():
    stages = pipeline.list_stages("all", VALUES)
    seen = set()
    for stage in stages:
        assert (ROOT / "scripts" / f"{stage.script}.py").is_file()
        for other in stages:
            assert not stage.reads(other.output) or other.output in seen, (stage, other)
        seen.add(stage.output)
    assert [stage.script for stage in stages].count("evaluate") == 4
    sft = next(stage for stage in stages if stage.script == "sft")
    assert str(sft.output) == "/somewhere/models/tiny-lora" and sft.option("--samples") == "7"
    assert sft.option("--lora-targets") == "q_proj, v_proj" and sft.option("--no-such-flag") is None
    assert [str(other.output) for other in stages if sft.reads(other.output)] == [
        "/somewhere/models/tiny-base", "/somewhere/data/rows/raw",
    ]  # fmt: skip


def test_a_mirror_is_not_taken_for_the_stage():
    plain = pipeline.list_stages("align", VALUES)
    mirrored = pipeline.list_stages("align", [*VALUES, "MIRROR_TO=/a drive"])
    assert mirrored == plain and len(plain) > 10


@pytest.mark.parametrize(
    "place, goal",
    [
        ("models/x-base", "base"), ("/a/models/x-lora", "lora"), ("models/x-lora-merged", "lora-merged"),
        ("models/x-int4", "int4"), ("models/x-lora-int4", "lora-int4"), ("models/x-int4-lora", "recipes"),
        ("data/my-rows/raw", "data"), ("data/x/clara", "clara"), ("models/x-clara-stage2", "clara"),
        ("data/x-magpie/preferences", "preferences"), ("data/x-rows/filtered", "preferences"),
        ("models/x-rows-dpo", "align"), ("reports/general-x-base", "align"), ("reports/eval-x-int4", "evaluate"),
        ("reports/x", "report"), ("reports/x-estimate", "estimate"), ("models/x-pareto-nf4", "pareto"),
        ("somewhere", None), ("models", None),
    ],
)  # fmt: skip
def test_the_goal_that_makes_it_is_found_by_its_name(place, goal):
    assert pipeline.find_goal(place) == goal


def test_the_name_of_a_model_that_is_there_is_not_taken_apart(tmp_path):
    (tmp_path / "models" / "smollm2-135m-base").mkdir(parents=True)
    for place, goal in (
        ("smollm2-135m", "report"),
        ("eval-smollm2-135m-base", "evaluate"),
        ("smollm2-135m-my", "align"),
    ):
        assert pipeline.find_goal(tmp_path / "reports" / place) == goal


def test_values_keep_what_looks_like_a_flag_of_make(monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", " -j2 --jobserver-auth=3,4 -- SOURCE=data-jan.jsonl MODEL=llm-jp/x-j1")
    base, data = pipeline.list_stages("data", ["ROOT=/somewhere"]), pipeline.list_stages("base", ["ROOT=/somewhere"])
    assert [str(stage.output) for stage in base + data] == [
        "/somewhere/data/data-jan/raw",
        "/somewhere/models/x-j1-base",
    ]


def test_of_a_flag_that_is_given_twice_the_last_counts():
    stage = pipeline.list_stages("lora", ["SFT_FLAGS=--samples 9", "SAMPLES=3"])[-1]
    assert stage.option("--samples") == "9"


def test_what_make_refuses_is_said():
    with pytest.raises(InputError, match="PIPELINE=x: expected all, align or clara"):
        pipeline.list_stages("estimate", ["PIPELINE=x"])
    with pytest.raises(InputError, match="SFT_FLAGS: a quote is not closed"):
        pipeline.list_stages("lora", ["SFT_FLAGS=--lora-targets 'q"])
