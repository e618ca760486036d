"""report.py on artifacts that are made up here: the figures, the verdicts, the refusals, the page."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import report

from lib.core import artifact, cli
from lib.data import metrics, records
from lib.report import align_sections, lineage

ROOT = Path(__file__).resolve().parents[1]
ROWS = 40
RIGHT = {"base": range(4), "int4": range(4), "lora": range(30), "lora-int4": range(14)}


def make(path, kind, inputs=None, seconds=1.0, found=None, **notes):
    args = argparse.Namespace(seed=1, precision="auto")
    with artifact.write_artifact(path, kind, args, inputs) as build:
        (build.path / "content").write_text(f"{path.name} {kind}")
        build.metrics = found or {}
        build.notes = {"seconds": seconds, **notes}
    return path


def predictions(right, answer="wrong", groups=ROWS):
    return [
        {
            "id": f"row-{n}", "question": f"Document: d{n}.\n\nQuestion: What is {n}?\n\nAnswer:",
            "gold": [f"gold {n}"], "answer": f"gold {n}" if n in right else answer, "token_f1": float(n in right),
            "exact_match": float(n in right), "contained": float(n in right), "nll": 0.5 if n in right else 2.0,
            "new_tokens": 5, "stopped": True, "group": f"group-{n % groups}",
        }
        for n in range(ROWS)
    ]  # fmt: skip


def evaluate(
    root, name, model, data, rows, *, form="16 bit", engine="transformers", size=272.6e6, decode=50.0, streams=8,
    gpu=None,
):  # fmt: skip
    speed = metrics.spread([0.9 * decode, decode, 1.1 * decode])
    scores = {k: metrics.interval([r[k] for r in rows], 1) for k in ("token_f1", "exact_match", "contained", "nll")}
    path = root / "reports" / f"eval-toy-{name}"
    inputs = {"model": model, "data": data}
    with artifact.write_artifact(path, "evaluation", argparse.Namespace(precision="auto"), inputs) as build:
        records.write(build.path / "predictions.jsonl", rows)
        build.notes = {
            "engine": engine, "seconds": 10.0, "peak_memory_bytes": 900_000_000,
            "peak_gpu_memory_bytes": gpu,
            "variant": {"digest": artifact.read(model)["digest"], "format": form},
        }  # fmt: skip
        build.metrics = scores | {
            "stopped_share": 1.0, "mean_new_tokens": 5.0, "load_seconds": 1.5, "model_bytes": int(size),
            "speed": {
                "new_tokens": 64,
                "one_stream": {
                    "prompt_tokens": 100, "prefill_tokens_per_second": speed, "decode_tokens_per_second": speed,
                },
                "batch": {"streams": streams, "prompt_tokens": 800, "generated_tokens_per_second": speed},
            },
        }  # fmt: skip
    return path


@pytest.fixture(scope="module")
def quartet(tmp_path_factory):
    """The four variants' evaluations, with the models that they were made of."""
    root = tmp_path_factory.mktemp("quartet")
    divergence = {
        "kl_mean": 0.1, "kl_p99": 1.2, "top1_agreement": 0.9, "nll_reference": 1.0, "nll": 1.1,
        "answer_positions": 77, "rows": 16,
    }  # fmt: skip
    models = root / "models"
    data = make(root / "data", "data", seconds=3)
    base = make(models / "base", "base", seconds=100)
    history = [{"step": n, "loss": 2 / n, "lr": 1e-4} for n in range(1, 9)]
    lora = make(models / "lora", "adapter", {"base": base, "data": data}, 60, {"history": history})
    merged = make(models / "merged", "model", {"adapter": lora, "base": base}, 7)
    found = {"divergence": divergence, "ratio": 3.5}
    int4 = make(models / "int4", "quantized", {"model": base, "data": data}, 5, found, caution="a caution <i>")
    lora_int4 = make(models / "lora-int4", "quantized", {"model": merged, "data": data}, 5, found)
    answer = "<b>bold</b> | piped\nand <script src=x> **"
    rows = {name: predictions(right, answer) for name, right in RIGHT.items()}
    gguf = dict(form="gguf-q4_0", engine="llama.cpp", size=77.6e6)
    return [
        evaluate(root, "base", base, data, rows["base"]),
        evaluate(root, "int4", int4, data, rows["int4"], **gguf, decode=30),
        evaluate(root, "lora", lora, data, rows["lora"], form="adapter", size=286e6, decode=45),
        evaluate(root, "lora-int4", lora_int4, data, rows["lora-int4"], **gguf, decode=200),
    ]


def run(evaluations, output):
    given = ["--evaluations", *map(str, evaluations), "--output", str(output)]
    report.main(cli.parse(report.make_parser(), given))
    return json.loads((output / "comparison.json").read_text())


@pytest.fixture(scope="module")
def made(quartet, tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "toy"
    return output, run(quartet, output)


def pair(comparison, variant, against):
    return next(d for d in comparison["differences"] if (d["variant"], d["against"]) == (variant, against))


def promise(comparison, start, variant):
    return next(p for p in comparison["promises"] if p["promise"].startswith(start) and p["variant"] == variant)


@pytest.fixture(scope="module")
def beside(quartet, tmp_path_factory):
    """An adapter that was trained beside the rounded base: its evaluation, and its divergence against the adapter."""
    root, models, data = quartet[0].parents[1], quartet[0].parents[1] / "models", quartet[0].parents[1] / "data"
    model = make(models / "int4-lora", "adapter", {"base": models / "int4", "data": data}, 50)
    form = dict(form="gguf-q4_0 + adapter", engine="llama.cpp", size=82.5e6, decode=170)
    evaluation = evaluate(root, "int4-lora", model, data, predictions(range(20)), **form)
    found = {
        "divergence": artifact.read(models / "int4")["metrics"]["divergence"] | {"kl_mean": 0.0314, "gain_kept": 0.9}
    }
    given = {"reference": models / "lora", "model": model, "data": data}
    return evaluation, make(root / "reports" / "divergence", "divergence", given, 70, found)


# --- figures and verdicts -----------------------------------------------------------------------------------


def test_a_divergence_names_the_reference_of_a_variant(quartet, beside, tmp_path):
    evaluation, divergence = beside
    given = ["--evaluations", *map(str, [*quartet, evaluation]), "--divergences", str(divergence)]
    given += ["--model-name", "toy"]
    report.main(cli.parse(report.make_parser(), [*given, "--output", str(tmp_path / "toy-recipes")]))
    comparison = json.loads((tmp_path / "toy-recipes" / "comparison.json").read_text())
    assert list(comparison["variants"])[-1] == "int4-lora" and comparison["tag"] == "toy"
    ours = comparison["variants"]["int4-lora"]
    assert ours["unquantised"] == "lora" and ours["divergence"]["kl_mean"] == 0.0314
    # data 3, base 100, int4 5 and the adapter itself 50 seconds; evaluations and the other adapter are not part of it
    assert ours["made_seconds"] == 158
    assert pair(comparison, "int4-lora", "lora")["token_f1"]["mean"] == pytest.approx(-10 / ROWS)
    assert promise(comparison, "INT4 loses", "int4-lora")["against"] == "lora"
    assert promise(comparison, "INT4 is 3.5", "int4-lora")["verdict"] == "not reached"
    line = next(x for x in (tmp_path / "toy-recipes" / "report.md").read_text().splitlines() if "0.0314" in x)
    assert line.startswith("| int4-lora |") and "| 90% |" in line and line.endswith("| 2 min 38 s |")


def test_the_divergence_of_a_model_that_was_not_evaluated_is_refused(quartet, beside, tmp_path):
    with pytest.raises(cli.InputError, match="int4-lora, which none of --evaluations measured"):
        given = ["--evaluations", *map(str, quartet), "--divergences", str(beside[1])]
        report.main(cli.parse(report.make_parser(), [*given, "--output", str(tmp_path / "toy")]))


def test_what_was_accepted_beyond_its_bounds_is_said(quartet, tmp_path):
    root = quartet[0].parents[1]
    models, data = root / "models", root / "data"
    found = {"objections": ["mean KL 1.5 nats (limit 1)"], "ratio": 3.5}
    bad = make(models / "bad", "quantized", {"model": models / "base", "data": data}, 5, found)
    evaluations = [quartet[0], evaluate(root, "bad", bad, data, predictions(range(3)), form="gguf-q4_1")]
    file = evaluations[1] / "metadata.json"
    own = {"generation": {"used": "greedy", "own": {"repetition_penalty": 1.1}}}
    meta = json.loads(file.read_text()) | own
    meta["metrics"]["speed"]["busy_cores"], meta["machine"]["cores"] = 1.4, 2
    file.write_text(json.dumps(meta))
    comparison = run(evaluations, tmp_path / "toy")
    assert any("bad" in line and "mean KL 1.5 nats" in line for line in comparison["cautions"])
    expected = "bad answers greedily; its own generation settings are not used: repetition_penalty 1.1."
    assert expected in comparison["cautions"]
    expected = "Other programs were busy while the speed was measured, so it is too low: bad (1.4 cores)."
    assert expected in comparison["cautions"]


# --- align ------------------------------------------------------------------------------------------------------


def forget(root, name, model, right, *, prompt="Write."):
    """What evaluate_general.py leaves: of ten questions of each set those in `right` are answered rightly."""
    path = root / "reports" / f"general-{name}"
    with artifact.write_artifact(path, "forgetting", argparse.Namespace(), {"model": model}) as build:
        options = [
            {"id": f"{questions}-{n:04d}", "gold": 0, "choice": int(n not in right), "choice_per_byte": 0}
            for questions in ("commonsense_qa", "boolq")
            for n in range(10)
        ]
        records.write(build.path / "options.jsonl", options)
        answers = [{"category": "writing", "prompt": prompt, "answer": f"<i>{name}</i> says"}]
        records.write(build.path / "answers.jsonl", answers)
        scores = [float(n in right) for n in range(10)]
        figures = {"choice": metrics.interval(scores), "choice_per_byte": metrics.interval([1.0] * 10)}
        build.metrics = dict.fromkeys(("commonsense_qa", "boolq"), figures | {"guessing": 1.0, "same_choice": 0.5})
    return path


@pytest.fixture
def aligned(quartet, tmp_path):
    """Evaluations of base, SFT and DPO, and what was forgotten."""
    root = quartet[0].parents[1]
    models, data = root / "models", root / "data"
    rules = {"ending": {"rows": 25, "alone": 20}, "language": {"rows": 0, "alone": 0}}
    filtered = make(tmp_path / "filtered", "data", {"data": data}, found={"rows": 100, "rejected": 25, "rules": rules})
    sft = make(tmp_path / "sft", "adapter", {"base": models / "base", "data": filtered})
    wins = {"longer_wins": metrics.interval([1.0] * 9 + [0.0]), "first_wins": metrics.interval([1.0, 0.0] * 5)}
    found = {"prompts": 12, "train": 10, "without_pair": {"with equal scores": 2}} | wins
    pairs = make(tmp_path / "pairs", "preferences", {"model": sft, "data": filtered}, found=found)
    some = metrics.interval([1.0, 0.0] * 10)
    held_out = {
        "pairs": 20, "reward_accuracy": metrics.interval([1.0] * 18 + [0.0] * 2), "margin": some,
        "likelihood_accuracy": {"before": some, "after": some}, "chosen_change": -0.05,
    }  # fmt: skip
    found = {"held_out": held_out, "pairs": 10, "collapsed_in_steps": [3]}
    dpo = make(tmp_path / "dpo", "adapter", {"base": models / "base", "adapter": sft, "data": pairs}, found=found)
    evaluations = [
        quartet[0],
        evaluate(tmp_path, "sft", sft, data, predictions(range(20)), form="adapter"),
        evaluate(tmp_path, "dpo", dpo, data, predictions(range(30)), form="adapter"),
    ]
    forgotten = [
        forget(tmp_path, "base", models / "base", range(10)), forget(tmp_path, "sft", sft, range(3)),
        forget(tmp_path, "dpo", dpo, range(4)),
    ]  # fmt: skip
    return evaluations, forgotten


def align(evaluations, forgotten, output):
    given = ["--evaluations", *map(str, evaluations), "--general", *map(str, forgotten), "--output", str(output)]
    report.main(cli.parse(report.make_parser(), [*given, "--model-name", "toy"]))
    return json.loads((output / "comparison.json").read_text())


def test_a_chain_is_reported_step_by_step(aligned, tmp_path):
    comparison = align(*aligned, tmp_path / "toy")
    assert pair(comparison, "dpo", "sft")["token_f1"]["mean"] == 10 / ROWS
    found = comparison["alignment"]
    assert [one["verdict"] for one in found["preferred"]] == ["better"]
    gap = found["forgetting"]["sft"]["boolq"]["difference"]["choice"]
    assert gap["mean"] == pytest.approx(-0.7) and gap["verdict"] == "worse" and gap["differing"] == 7
    assert found["forgetting"]["sft"]["boolq"]["difference"]["choice_per_byte"]["verdict"] == metrics.NOISE
    text = (tmp_path / "toy" / "report.md").read_text()
    for said in (
        "75 of 100 examples passed", "| ending | 25 | 25.0% |", "the chosen answers fell too, in steps", "[3]",
        "12 prompts were answered; prompts without a pair: 2 with equal scores",
        "The longer of two responses was chosen in 0.900", "can be guessed without reading",
        "The earlier of two responses was chosen in 0.500", "does not predict the choice", "| sft | BoolQ (10) | 0.300",
    ):  # fmt: skip
        assert said in text.replace("\\", ""), said
    assert "language" not in text and "<i>" not in (tmp_path / "toy" / "index.html").read_text()


def test_what_was_measured_on_other_questions_or_models_is_refused(aligned, quartet, tmp_path):
    evaluations, forgotten = aligned
    with pytest.raises(cli.InputError, match="their questions differ"):
        base = quartet[0].parents[1] / "models" / "base"
        align(evaluations, [*forgotten[1:], forget(tmp_path, "other", base, [], prompt="Sing.")], tmp_path / "toy")
    with pytest.raises(cli.InputError, match="a model that none of --evaluations measured"):
        align(evaluations[:2], forgotten, tmp_path / "toy")


@pytest.mark.parametrize(
    "right, of, said", [(9, 10, "better"), (1, 10, "worse"), (5, 10, "within noise"), (5, 5, "too few")]
)
def test_a_preference_accuracy_is_better_only_beyond_chance_and_on_enough_pairs(right, of, said):
    assert align_sections.describe_accuracy(metrics.interval([1.0] * right + [0.0] * (of - right))) == said


def test_streams_that_memory_cut_are_said_and_not_compared(quartet, tmp_path):
    root = quartet[0].parents[1]
    model = root / "models" / "int4"
    form = dict(form="gguf-q4_0", engine="llama.cpp", size=77.6e6, decode=300)
    for streams in (8, 4):
        cut = evaluate(root, "cut", model, root / "data", predictions(range(4)), **form, streams=streams)
        comparison = run([quartet[0], cut], tmp_path / f"toy-{streams}")
        said = any(
            "concurrent sequences, as memory allowed: eval-toy-base 8, eval-toy-cut 4" in c
            for c in comparison["cautions"]
        )
        promises = {p["promise"].split()[1] for p in comparison["promises"]}
        assert said == (streams == 4) and "decodes" in promises and ("generates" in promises) == (streams == 8)
        header = f"generation, tokens/s ({'8' if streams == 8 else '4 or 8'} sequences)"
        assert header in (tmp_path / f"toy-{streams}" / "report.md").read_text()


def test_markdown_holds_the_figures_of_comparison_json(made):
    output, comparison = made
    lines = (output / "report.md").read_text().splitlines()
    for name, v in comparison["variants"].items():
        cells = next(line for line in lines if line.startswith(f"| {name} |")).strip("| ").split(" | ")
        size, ratio = re.findall(r"\d+\.\d+", cells[1])
        assert float(size) == pytest.approx(v["model_bytes"] / 1e6, abs=0.05)
        assert float(ratio) == pytest.approx(v["size_ratio"], abs=0.005)
        assert float(cells[3].split()[0]) == pytest.approx(v["tokens_per_second"]["decode"]["median"], abs=0.05)
        assert float(cells[4][:-1]) == pytest.approx(v["speed_ratio"]["decode"]["median"], abs=0.005)
        for text, score in zip(cells[7:11], ("token_f1", "exact_match", "contained", "nll")):
            figures = [float(x) for x in re.findall(r"\d+\.\d+", text)]
            assert figures == pytest.approx([v[score][k] for k in ("mean", "low", "high")], abs=5e-4)
    assert comparison["variants"]["base"]["size_ratio"] == 1
    assert artifact.read(output, "report")["metrics"]["variants"] == comparison["variants"]


def test_the_peak_on_a_gpu_stands_beside_that_of_the_process(quartet, tmp_path):
    root = quartet[0].parents[1]
    made = evaluate(tmp_path, "base", root / "models" / "base", root / "data", predictions(range(4)), gpu=1_234_500_000)
    comparison = run([made], tmp_path / "toy")
    assert comparison["variants"]["base"]["peak_gpu_memory_bytes"] == 1_234_500_000
    assert (tmp_path / "toy" / "report.md").read_text().count("+ 1,234.5 on the GPU") == 2  # with the stages


def test_pairing_tells_what_the_intervals_alone_cannot():
    ours = {n: {"token_f1": n / 40 + 0.02} for n in range(40)}
    theirs = {n: {"token_f1": n / 40} for n in range(40)}
    one, other = (metrics.interval([row["token_f1"] for row in rows.values()]) for rows in (ours, theirs))
    assert one["low"] < other["high"]  # unpaired, they overlap
    found = metrics.compare_paired(ours, theirs, "token_f1", 0)
    assert found["verdict"] == "better" and found["low"] > 0
    assert metrics.compare_paired(theirs, ours, "token_f1", 0)["verdict"] == "worse"


def test_a_lower_nll_is_better():
    ours, theirs = {n: {"nll": 1.0} for n in range(20)}, {n: {"nll": 2.0 + n} for n in range(20)}
    assert metrics.compare_paired(ours, theirs, "nll", 0)["verdict"] == "better"


@pytest.mark.parametrize(
    "gaps, said",
    [([0.1, -0.1] * 20, metrics.NOISE), ([0.0] * 40, metrics.NOISE), ([1.0] * 4, metrics.TOO_FEW),
     ([1.0] * 5 + [0.0] * 35, metrics.NOISE)],
    ids=["both ways", "none", "four rows", "five of forty"],
)  # fmt: skip
def test_what_rows_do_not_bear_out_is_no_verdict(gaps, said):
    ours = {n: {"token_f1": gap} for n, gap in enumerate(gaps)}
    assert metrics.compare_paired(ours, {n: {"token_f1": 0.0} for n in ours}, "token_f1", 0)["verdict"] == said


def test_examples_of_one_group_are_one_observation(quartet, tmp_path):
    root = quartet[0].parents[1]
    places = [root / "models" / "base", root / "models" / "lora"]
    for groups, gap, claim in ((ROWS, "better", "reached"), (5, metrics.TOO_FEW, metrics.TOO_FEW)):
        evaluations = [
            evaluate(tmp_path, name, place, root / "data", predictions(RIGHT[name], groups=groups), form=form)
            for name, place, form in zip(("base", "lora"), places, ("16 bit", "adapter"))
        ]
        comparison = run(evaluations, tmp_path / "toy")
        assert pair(comparison, "lora", "base")["token_f1"]["verdict"] == gap
        assert promise(comparison, "LoRA gains", "lora")["verdict"] == claim
        assert comparison["remarks"] == [] and "no gain" not in (tmp_path / "toy" / "report.md").read_text()


def test_an_evaluation_without_groups_is_still_compared_and_that_is_said(quartet, tmp_path):
    root = quartet[0].parents[1]
    rows = [{key: value for key, value in row.items() if key != "group"} for row in predictions(range(9), groups=5)]
    old = evaluate(tmp_path, "old", root / "models" / "int4", root / "data", rows)
    comparison = run([quartet[0], old], tmp_path / "toy")
    (caution,) = [line for line in comparison["cautions"] if "groups" in line]
    assert (
        caution.startswith("old: ")
        and "make evaluate" in caution
        and "did not store the examples' groups" in caution
        and "base" not in caution
    )
    assert pair(comparison, "old", "base")["token_f1"]["groups"] == ROWS  # those of the other one


def test_quantised_variants_are_held_against_what_they_were_made_from(made):
    _, comparison = made
    assert comparison["variants"]["int4"]["unquantised"] == "base"
    assert comparison["variants"]["lora-int4"]["unquantised"] == "lora"
    assert pair(comparison, "lora", "base")["token_f1"]["verdict"] == "better"
    assert pair(comparison, "lora-int4", "lora")["token_f1"]["mean"] == pytest.approx(-16 / 40)
    assert pair(comparison, "lora-int4", "lora")["token_f1"]["verdict"] == "worse"
    assert len(comparison["differences"]) == 4  # int4 against base is there once


def test_promises_are_held_against_measurements(made):
    output, comparison = made
    assert promise(comparison, "INT4 is", "int4")["verdict"] == "reached"
    assert promise(comparison, "INT4 decodes", "int4")["verdict"] == "not reached"
    assert promise(comparison, "INT4 decodes", "lora-int4")["verdict"] == "reached"
    assert promise(comparison, "INT4 loses", "int4")["verdict"] == metrics.NOISE  # no row differs: nothing is known
    assert promise(comparison, "INT4 loses", "lora-int4")["verdict"] == "not reached"
    assert promise(comparison, "LoRA gains", "lora")["verdict"] == "reached"
    text = (output / "report.md").read_text()
    assert "int4 is smaller but slower than base: 0.60× the speed at batch size 1" in text
    assert "4-bit quantisation loses part of the fine-tuning gain" in text
    assert "compare engine and format together" in text


def test_total_time_counts_a_shared_stage_once(made, capsys):
    _, comparison = made
    assert [Path(s["artifact"]).name for s in comparison["stages"]].count("base") == 1
    assert comparison["total_seconds"] == pytest.approx(100 + 3 + 60 + 7 + 5 + 5 + 4 * 10)
    assert comparison["uncounted"] == []


def test_a_model_made_anew_is_not_counted(quartet, tmp_path):
    data, old = make(tmp_path / "data", "data", seconds=3), make(tmp_path / "old", "base", seconds=50)
    one = evaluate(tmp_path, "base", old, data, predictions(range(9)))
    (old / "content").write_text("other")
    meta = json.loads((old / "metadata.json").read_text()) | {"digest": "0" * 64}
    (old / "metadata.json").write_text(json.dumps(meta))
    stages, gaps = {}, []
    lineage.collect(one, stages, gaps)
    assert list(stages) == [data, one] and "was rebuilt" in gaps[0]


# --- the estimate -------------------------------------------------------------------------------------------


def forecast(path, quartet, rough=False):
    """An estimate of the quartet's stages: half the adapter's time, twice an evaluation's, int4 with another seed."""
    models = quartet[0].parents[1] / "models"
    stages = [
        {"stage": "base", "artifact": str(models / "base"), "status": "finished", "seconds": 100, "arguments": {}},
        {
            "stage": "lora",
            "artifact": str(models / "lora"),
            "status": "estimated",
            "seconds": 30,
            "arguments": {"seed": 1},
        },
        {
            "stage": "int4",
            "artifact": str(models / "int4"),
            "status": "estimated",
            "seconds": 5,
            "arguments": {"seed": 2},
        },
        {"stage": "evaluate base", "artifact": str(quartet[0]), "status": "estimated", "seconds": 20, "arguments": {}},
        {"stage": "evaluate more", "artifact": str(path / "x"), "status": "estimated", "seconds": 9, "arguments": {}},
    ]
    with artifact.write_artifact(path, "estimate", argparse.Namespace(seed=1)) as build:
        (build.path / "estimate.json").write_text("{}")
        build.metrics = {"stages": stages, "rough": rough}
    return path


def with_forecast(quartet, tmp_path, **how):
    estimate, output = forecast(tmp_path / "toy-estimate", quartet, **how), tmp_path / "toy"
    given = ["--evaluations", *map(str, quartet), "--output", str(output), "--estimate", str(estimate)]
    report.main(cli.parse(report.make_parser(), given))
    return json.loads((output / "comparison.json").read_text())["forecast"], (output / "report.md").read_text()


def test_a_forecast_is_held_against_what_happened(quartet, tmp_path, capsys):
    found, text = with_forecast(quartet, tmp_path)
    ratios = {stage["stage"]: stage["ratio"] for stage in found["stages"]}
    assert ratios == {"lora": 2.0, "int4": None, "evaluate base": 0.5, "evaluate more": None}
    assert found["total"] == {"forecast": 50, "measured": 70, "ratio": 1.4}
    assert "| lora | 30.0 s | 1 min 00 s | 2.00× |" in text and "| int4 | 5.0 s | – | – |" in text
    assert "| total | 50.0 s | 1 min 10 s | 1.40× |" in text
    assert "estimated 50.0 s, took 1 min 10 s" in capsys.readouterr().out
    assert "estimate" not in artifact.read(tmp_path / "toy")["inputs"]  # another forecast does not make it stale


def test_a_forecast_of_another_machine_is_not(quartet, made, tmp_path):
    found, text = with_forecast(quartet, tmp_path, rough=True)
    assert found is None and "Estimate" not in text
    assert made[1]["forecast"] is None and "Estimate" not in (made[0] / "report.md").read_text()


# --- the page -----------------------------------------------------------------------------------------------


def test_page_needs_nothing_else_and_escapes_what_models_say(made):
    output, _ = made
    page = (output / "index.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|src=[\"']", page)
    assert page.count("<svg") == 5 and page.count('aria-label="Token F1') == 1
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)
    assert "&lt;b&gt;bold&lt;/b&gt; | piped" in page and "<b>bold" not in page and "a caution &lt;i&gt;" in page
    text = (output / "report.md").read_text()
    assert r"&lt;b&gt;bold&lt;/b&gt; \| piped and &lt;script src=x&gt; \*\*" in text
    assert "What is 1" in text and "Document: d" not in text


def test_sample_answers_follow_a_rule(made, quartet, tmp_path):
    _, comparison = made
    again = run(reversed(quartet), tmp_path / "toy")
    assert [row["id"] for row in comparison["answers"]] == [row["id"] for row in again["answers"]]
    assert len(again["answers"]) == 12 and again["reference"] == "lora-int4"


def test_one_variant_alone(quartet, tmp_path, capsys):
    comparison = run(quartet[:1], tmp_path / "toy")
    assert comparison["differences"] == comparison["promises"] == []
    *_, total, page, last = capsys.readouterr().out.splitlines()
    assert total == "total time of 3 stages: 1 min 53 s" and last == str(tmp_path / "toy")
    assert page == f"open {tmp_path / 'toy' / 'index.html'} in a browser"


# --- the command line ---------------------------------------------------------------------------------------


def command(*given):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "report.py", *map(str, given)], capture_output=True, text=True
    )  # fmt: skip


def test_other_rows_are_refused(quartet, tmp_path):
    rows = [*predictions(range(4))[1:], predictions([])[0] | {"id": "stranger"}]
    base = Path(artifact.read(quartet[0])["inputs"]["model"]["path"])
    other = evaluate(tmp_path, "other", base, base.parents[1] / "data", rows)
    done = command("--evaluations", quartet[0], other, "--output", tmp_path / "toy")
    assert done.returncode == cli.BAD_INPUT and not (tmp_path / "toy").exists()
    assert "2 examples differ" in done.stderr and "row-0, stranger" in done.stderr and str(other) in done.stderr


def test_speeds_measured_another_way_are_refused(quartet):
    meta = artifact.read(quartet[0])
    del meta["metrics"]["speed"]["batch"]["generated_tokens_per_second"]
    with pytest.raises(cli.InputError, match="make evaluate"):
        report.read_speeds(meta)


def test_a_missing_evaluation_and_a_double_one_are_refused(quartet, tmp_path):
    with pytest.raises(cli.InputError, match="make evaluate"):
        run([quartet[0], tmp_path / "reports" / "eval-toy-lora"], tmp_path / "toy")
    with pytest.raises(cli.InputError, match="more than once"):
        run([quartet[0], quartet[0]], tmp_path / "toy")
