"""estimate.py on the tiny model: what it counts, what it says, what it refuses."""

import argparse
import importlib
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import estimate
import pytest
import torch

from lib.budget import memory
from lib.clara.network import Clara
from lib.core import artifact, cli, hardware
from lib.data import embedding, retrieval
from lib.engines import batching, transformers_engine
from lib.forecast import costs, workload
from lib.model import directory
from lib.model.directory import open_directory
from tests.conftest import Done, call, refused, script

pytestmark = pytest.mark.slow  # as a whole, three minutes of a core

EVALUATE = {"max_new_tokens": 6, "speed_tokens": 6, "batch_size": 2}
JUDGE = "--max-new-tokens 6 --speed-tokens 6 --batch-size 2"
FLAGS = f"EVALUATE_FLAGS={JUDGE}", "QUANTIZE_FLAGS=--samples 3 --calibration-samples 4"
BASE, DATA, LORA = "models/tiny-base", "data/capitals/raw", "models/tiny-lora"
STAGES = ["reports/eval-tiny-base", "models/tiny-int4", "reports/eval-tiny-int4", LORA, "reports/eval-tiny-lora",
          "models/tiny-lora-merged", "models/tiny-lora-int4", "reports/eval-tiny-lora-int4"]  # fmt: skip
INT4 = {"models/tiny-int4", "models/tiny-lora-int4"}


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    """An estimate in a process of its own, with what it said: nothing of the pipeline is there but base and data."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(base, root / BASE)
    shutil.copytree(data, root / DATA)
    output = root / "reports" / "tiny-estimate"
    given = [f"ROOT={root}", "MODEL_NAME=tiny", "SOURCE=capitals", "SAMPLES=16", "EVAL_SAMPLES=6", *FLAGS]
    done = script("estimate", *with_values(*given, "--output", output))
    assert done.code == 0, done.err
    return done, output, given


def with_values(*words) -> list:
    """The arguments, the values of make among them behind --values."""
    values = [word for word in words if re.match(r"\w+=", str(word))]
    return ["--values", *values, *(word for word in words if word not in values)]


def ask(*words) -> Done:
    return call("estimate", *with_values(*words))


def read(output) -> dict:
    artifact.read(output, "estimate")
    return json.loads((output / "estimate.json").read_text())


def again(made, name: str, *more) -> dict:
    """Another estimate with the rates of the first, and other values."""
    _, output, given = made
    done = ask(*given, "--rates", output, *more, "--output", output.with_name(f"{name}-estimate"))
    assert done.code == 0, done.err
    return read(output.with_name(f"{name}-estimate")) | {"said": done.out}


def seconds(found: dict) -> dict:
    return {stage["stage"]: stage["seconds"] for stage in found["stages"]}


# --- the table ----------------------------------------------------------------------------------------------


def test_all_stages_are_there_and_the_totals_are_their_sums(made, base, data):
    done, output, _ = made
    found = read(output)
    assert done.out.splitlines()[-1] == str(output)
    assert [stage["stage"] for stage in found["stages"]] == [BASE, DATA, *STAGES]
    for stage, place in zip(found["stages"], (base, data)):
        assert Path(stage["artifact"]).is_relative_to(output.parents[1])
        assert stage["status"] == "finished" and stage["seconds"] == artifact.read(place)["seconds"]
    coming = found["stages"][2:]
    assert all(stage["status"] == "estimated" and stage["seconds"] > 0 for stage in coming)
    for key in ("seconds", "bytes"):
        assert found[key] == pytest.approx(sum(stage[key] for stage in coming)) and found[key] > 0
    assert found["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in coming) > 3e8
    assert found["cost"] == 0 and not found["rough"]
    for stage in found["stages"]:
        line = next(x for x in done.out.splitlines() if x.startswith(f"{stage['stage']}  "))
        assert estimate.duration(stage["seconds"]) in line and stage["status"] in line
    total = next(line for line in done.out.splitlines() if line.startswith("total remaining"))
    assert estimate.duration(found["seconds"]) in total and "free" in total


def test_every_rate_is_stored_with_its_repeats(made):
    def walk(rates, where=""):
        for name, one in rates.items():
            if isinstance(one, dict) and "repeats" in one:
                yield f"{where}{name}", one
            elif isinstance(one, dict):
                yield from walk(one, f"{name} ")

    rates = dict(walk(read(made[1])["rates"]))
    assert {"base read", "lora step batch", "int4 distribution", "train", "round", "gather", "start"} <= rates.keys()
    for name, one in rates.items():
        assert one["repeats"] and all(seconds >= 0 for seconds in one["repeats"]), name
        assert min(one["repeats"]) <= one["seconds"] <= max(one["repeats"]), name


def test_what_is_not_known_is_said(made):
    said = made[0].out
    assert "6 tokens, the maximum" in said and "unknown" in said
    assert "llama.cpp was timed with a file in q4_0" in said  # for iq4_nl


# --- the work -----------------------------------------------------------------------------------------------


def test_twice_the_samples_take_longer_to_train_on_and_change_nothing_else(made):
    one, two = again(made, "one"), again(made, "two", "SAMPLES=32")
    changed = {name for name, took in seconds(one).items() if took != seconds(two)[name]}
    assert changed == {LORA}
    tokens = [found["work"]["training"]["tokens"] for found in (one, two)]
    longer = seconds(two)[LORA] - seconds(one)[LORA]
    expected = (tokens[1] - tokens[0]) * one["rates"]["train"]["seconds"] + 2 * one["rates"]["update"]["seconds"]
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=0.1) and longer == pytest.approx(expected)
    assert {name for name, size in sizes(one).items() if size != sizes(two)[name]} == set()


def sizes(found: dict) -> dict:
    return {stage["stage"]: stage["bytes"] for stage in found["stages"]}


@pytest.mark.parametrize(
    "more, changed",
    [
        ("EPOCHS=3", {LORA}),
        ("EVAL_SAMPLES=4", {name for name in STAGES if name.startswith("reports/eval-")}),
        ("QUANTIZE_FLAGS=--samples 2 --calibration-samples 4", INT4),
        ("QUANTIZE_FLAGS=--samples 3 --calibration-samples 2", INT4),
        ("SFT_FLAGS=--accumulation-steps 1", {LORA}),
    ],
)  # fmt: skip
def test_a_value_changes_the_stages_that_it_concerns(made, more, changed):
    one, other = again(made, "one"), again(made, "other", more)
    assert {name for name, took in seconds(one).items() if took != seconds(other)[name]} == changed


def test_the_counted_work_is_what_the_stages_do(made, data, tmp_path, monkeypatch):
    output = made[1]
    base, found = output.parents[1] / BASE, read(output)
    done = call("sft", "--model", base, "--data", data, "--samples", 16, "--run-dir", tmp_path / "run", "--output",
                tmp_path / "lora")  # fmt: skip
    assert done.code == 0, done.err
    trained = artifact.read(tmp_path / "lora")
    work = found["work"]["training"]
    assert work["tokens"] == trained["metrics"]["labels"]["tokens"] and work["updates"] == trained["metrics"]["steps"]
    assert sizes(found)[LORA] == pytest.approx(trained["size_bytes"], rel=0.1)  # a header

    read_batches, plain = [], transformers_engine.Transformers.generate_batch

    def watched(self, prompts, most, exact):
        rows, *ticks = plain(self, prompts, most, exact)
        read_batches.append((len(prompts) * max(map(len, prompts)), exact, max(map(len, rows))))
        return rows, *ticks

    monkeypatch.setattr(transformers_engine.Transformers, "generate_batch", watched)
    done = call("evaluate", "--model", base, "--data", data, "--samples", 6, *JUDGE.split(), "--run-dir",
                tmp_path / "run", "--output", tmp_path / "evaluation")  # fmt: skip
    assert done.code == 0, done.err
    work = found["work"]["evaluation"]
    answered = [one for one in read_batches if not one[1]]
    assert len(answered) == work["passes"] and sum(tokens for tokens, *_ in answered) == work["padded_tokens"]
    timed = [one for one in read_batches if one[1]]
    assert len(timed) == 2 * work["speed"]["repeats"]
    assert sum(tokens for tokens, *_ in timed[:2]) == work["speed"]["prompt_tokens"] + work["speed"]["padded_tokens"]
    assert all(longest <= EVALUATE["max_new_tokens"] for *_, longest in answered)
    assert found["stages"][2]["arguments"].items() <= artifact.read(tmp_path / "evaluation")["arguments"].items()


def test_answers_are_as_long_as_allowed_or_as_the_reference_answers():
    judge = {"batch_size": 2, "max_new_tokens": 5, "repeats": 3, "speed_tokens": 4}
    work = workload.count_evaluation([10, 30, 20], [9, 2, 3], judge)
    assert work["untuned"] == {"new_tokens": 15, "mean": 5, "steps": 8}
    assert work["tuned"] == {"new_tokens": 5 + 2 + 3, "mean": 10 / 3, "steps": 2 + 4}  # 30 with 20, then 10 alone
    assert work["padded_tokens"] == 2 * 30 + 10 and work["passes"] == 2
    assert work["speed"]["padded_tokens"] == 60 and work["speed"]["batch_tokens"] == 40
    assert workload.count_evaluation([10, 30, 20], [9, 2, 3], judge, as_reference=False)["tuned"] == work["untuned"]
    work = workload.count_evaluation([1, 2] * 4 + [50], [1] * 9, judge)  # the ninth comes after a chunk of eight
    assert work["padded_tokens"] == 4 * 2 + 4 * 1 + 50 and work["passes"] == 5


def test_what_anew_is_asked_for_takes_in_what_is_there(made):
    found, anew = again(made, "one"), again(made, "one", "--all-stages")
    assert anew["seconds"] == pytest.approx(found["seconds"] + sum(s["seconds"] for s in found["stages"][:2]))
    assert [stage["status"] for stage in anew["stages"][:2]] == ["as measured here"] * 2


# --- make align ---------------------------------------------------------------------------------------------

RAW, FILTERED, PREFERENCES = (f"data/tiny-magpie/{name}" for name in ("raw", "filtered", "preferences"))
SFT, DPO = "models/tiny-magpie-sft", "models/tiny-magpie-dpo"
ANSWERED = [f"reports/eval-tiny-magpie-{name}" for name in ("base", "sft", "dpo")]
FORGOTTEN = [f"reports/general-tiny{name}" for name in ("-base", "-magpie-sft", "-magpie-dpo")]
OWN = [RAW, FILTERED, SFT, PREFERENCES, DPO, *ANSWERED, *FORGOTTEN]
ALIGN = (
    "--pipeline", "align", "MAGPIE_SAMPLES=20", "PAIRS=12", "HELD_OUT_PAIRS=4", FLAGS[0],
    "MAGPIE_FLAGS=--batch-size 4 --max-instruction-tokens 20 --max-response-tokens 16",
    "PREFERENCES_FLAGS=--max-new-tokens 12 --batch-size 4 --scorer embedding",
    "GENERAL_FLAGS=--samples 2 --prompts 1 --max-new-tokens 6",
)  # fmt: skip


@pytest.fixture
def aligned(made, bundled, tmp_path_factory):
    """An estimate of make align with examples that magpie will write, timed once."""
    _, output, given = made
    output = output.with_name("tiny-magpie-estimate")
    given = [*given[:5], *ALIGN]
    if not output.exists():
        done = ask(*given, "--output", output)
        assert done.code == 0, done.err
    return None, output, given


def test_align_is_estimated_stage_by_stage(aligned):
    found = again(aligned, "family2")
    assert {stage["stage"] for stage in found["stages"]} == {BASE, DATA, *OWN}
    coming = {stage["stage"]: stage for stage in found["stages"] if stage["stage"] not in (BASE, DATA)}
    for name, stage in coming.items():
        assert stage["status"] == "estimated" and stage["seconds"] > 0
        assert stage["peak_memory_bytes"] > 3e8 or name == FILTERED
        assert stage["artifact"] == str(aligned[1].parents[1] / name)
    given = coming[PREFERENCES]["arguments"]
    assert given["samples"] == 12 and given["scorer"] == "embedding"
    assert "47% of the responses reach --max-response-tokens 16" in found["said"] and "9 tokens;" in found["said"]
    assert "40% of the prompts give a pair" in found["said"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, changed",
    [
        ("MAGPIE_SAMPLES=60", {RAW, SFT}),  # too few rows were left for so many
        ("PAIRS=2", {PREFERENCES, DPO}),
        ("DPO_FLAGS=--accumulation-steps 1", {DPO}),
        ("GENERAL_FLAGS=--samples 1 --prompts 1 --max-new-tokens 6", {*FORGOTTEN}),
    ],
)  # fmt: skip
def test_a_value_changes_the_steps_of_align_that_it_concerns(aligned, more, changed):
    one, other = again(aligned, "one"), again(aligned, "other", more)
    assert {name for name, took in seconds(one).items() if took != seconds(other)[name]} == changed


@pytest.mark.slow
def test_rows_of_ones_own_need_no_magpie(aligned, made):
    _, output, given = aligned
    timed = output.with_name("own-timed-estimate")  # without Magpie's drawing
    done = ask(*given, "ALIGN_DATA=capitals", "--output", timed)
    assert done.code == 0, done.err
    found = read(timed)
    own = {name.replace("magpie", "capitals") for name in OWN if name != RAW}
    assert {stage["stage"] for stage in found["stages"]} == {BASE, DATA, *own}
    assert "responses are as long as the reference answers" in done.out
    assert found["work"]["training"]["rows"] == 16


def test_steps_are_counted_as_they_are_taken(talker, monkeypatch):
    from lib.engines.sampling import Settings

    steps, plain = [], batching.Batch.step
    monkeypatch.setattr(batching.Batch, "step", lambda *given: steps.append(len(given[1])) or plain(*given))
    engine = transformers_engine.Transformers(open_directory(talker), load="fp32", threads=1, batch=6)
    prompts = [engine.prompt_ids([{"role": "user", "content": f"{n} {'long ' * (n % 5)}"}]) for n in range(30)]
    found = dict(engine.sample(prompts, [[n] for n in range(30)], Settings(40, 1.0, 1.0)))
    order = sorted(range(30), key=lambda n: -len(prompts[n]))
    work = workload.count_sampling([found[n][0].new_tokens for n in order], 0, 0, 6)
    # Of a text's tokens the first comes with its prompt, and after the last its place takes part in one more step.
    assert sum(steps) == pytest.approx(work["tokens"], abs=6) and len(steps) == pytest.approx(work["steps"], abs=3)


def test_what_forgetting_reads_is_counted(base, bundled, tmp_path, monkeypatch):
    read, plain = [], transformers_engine.Transformers.options_logprobs

    def watched(self, prompt, options):
        watch = self.model.register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
        found = plain(self, prompt, options)
        watch.remove()
        return found

    monkeypatch.setattr(transformers_engine.Transformers, "options_logprobs", watched)
    flags = {"samples": 2, "prompts": 1, "max_new_tokens": 4, "batch_size": 8, "seed": 42}
    done = call("evaluate_general", "--model", base, "--samples", 2, "--prompts", 1, "--max-new-tokens", 4, "--run-dir",
                tmp_path / "run", "--output", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    work, most = workload.count_forgetting(flags, directory.load_tokenizer(open_directory(base)))
    assert work["passes"] == len(read) and work["tokens"] == sum(read)
    assert work["steps"] == 3 and most["question"] == max(read)


# --- make clara ---------------------------------------------------------------------------------------------

CLARA = ["models/tiny-clara-stage1", "models/tiny-clara-stage2", "models/tiny-clara", LORA, "reports/tiny-clara"]
LEARN = "--batch-size 2 --eval-samples 3 --eval-steps 2 --precision fp32"
STAGE1 = f"--compress-rate 4 --doc-max-tokens 12 --lora-r 4 --accumulation-steps 2 --epochs 1.5 --short-words 5 {LEARN}"
STAGE2, STAGE3 = f"--samples 7 {LEARN}", f"--samples 8 --candidates 5 --k 3 --epochs 2 {LEARN}"
JUDGED = "--k 3 --max-new-tokens 6 --timed 3 --batch-size 4 --precision fp32"


@pytest.fixture
def compressed(made, clara_data, monkeypatch):
    """An estimate of make clara, timed once, without MiniLM."""
    monkeypatch.setattr(embedding, "open_embedding", lambda: lambda texts: None)
    _, output, given = made
    output, place = output.with_name("tiny-clara-estimate"), output.parents[1] / "data" / "capitals" / "clara"
    if not place.exists():
        shutil.copytree(clara_data, place)
    given = [
        *given[:5], "--pipeline", "clara", f"STAGE1_FLAGS={STAGE1}", f"STAGE2_FLAGS={STAGE2}", f"STAGE3_FLAGS={STAGE3}",
        f"EVALUATE_CLARA_FLAGS={JUDGED}",
    ]  # fmt: skip
    if not output.exists():
        done = ask(*given, "--output", output)
        assert done.code == 0, done.err
    return None, output, given


def test_clara_is_estimated_stage_by_stage(compressed):
    found, root = again(compressed, "tiny-clara"), compressed[1].parents[1]
    assert [stage["stage"] for stage in found["stages"]] == [BASE, DATA, "data/capitals/clara", *CLARA]
    assert found["stages"][2]["status"] == "finished"
    for stage in found["stages"][3:]:
        assert stage["status"] == "estimated" and stage["seconds"] > 0 and stage["peak_memory_bytes"] > 3e8
        assert stage["artifact"] == str(root / stage["stage"])
    assert "as long as those found by BM25" in found["said"]


@pytest.mark.parametrize(
    "more, changed",
    [
        ("SAMPLES=12", {CLARA[0], LORA}),
        (f"STAGE2_FLAGS={STAGE2} --samples 4", {CLARA[1]}),
        (f"STAGE3_FLAGS={STAGE3} --retrieval-share 0", {CLARA[2]}),
        ("EVAL_SAMPLES=3", {CLARA[4]}),
    ],
)  # fmt: skip
def test_a_value_changes_the_stages_of_clara_that_it_concerns(compressed, more, changed):
    one, other = read(compressed[1]), again(compressed, "other-clara", more)
    assert {name for name, took in seconds(one).items() if took != seconds(other)[name]} == changed


@pytest.mark.slow
def test_the_counted_work_is_what_the_stages_of_clara_do(compressed, base, clara_data, tmp_path, monkeypatch):
    """Token by token, with and without gradients."""
    found, tokens, plain = read(compressed[1]), {}, Clara.hidden

    def watched(self, inputs, mask):
        learning = torch.is_grad_enabled()
        tokens[learning] = tokens.get(learning, 0) + mask.numel()
        return plain(self, inputs, mask)

    def watched_logits(self, inputs, mask, chosen, logits=Clara.logits):
        tokens[torch.is_grad_enabled()] = tokens.get(torch.is_grad_enabled(), 0) + mask.numel()
        return logits(self, inputs, mask, chosen)

    monkeypatch.setattr(Clara, "hidden", watched)
    monkeypatch.setattr(Clara, "logits", watched_logits)
    model, ours = base, {stage["stage"]: stage for stage in found["stages"]}
    for number, flags in enumerate((f"{STAGE1} --samples 16", STAGE2, STAGE3), 1):
        tokens.clear()
        place = tmp_path / f"stage{number}"
        done = call(f"train_stage{number}", "--model", model, "--data", clara_data, "--output", place, "--run-dir",
                    tmp_path / f"run{number}", *flags.split())  # fmt: skip
        assert done.code == 0, done.err
        meta, work = artifact.read(place, "clara"), found["work"]["clara"][f"train_stage{number}"]
        metrics = meta["metrics"]
        assert (work["rows"], work["steps"]) == (metrics["rows"], metrics["steps"])
        assert tokens == {True: sum(one["tokens"] for one in work["learnt"].values()), False: work["read"]["tokens"]}
        stage = ours[CLARA[number - 1]]
        assert stage["bytes"] == pytest.approx(meta["size_bytes"], rel=0.1)
        assert stage["peak_memory_bytes"] == metrics["expected_memory_bytes"]
        assert stage["arguments"].items() <= meta["arguments"].items()
        model = place

    tokens.clear()
    answered, generate = [], transformers_engine.Transformers.generate_batch

    def batch(self, prompts, most, exact):
        answered.append((most, len(prompts) * max(map(len, prompts))))
        return generate(self, prompts, most, exact)

    monkeypatch.setattr(transformers_engine.Transformers, "generate_batch", batch)
    monkeypatch.setattr(retrieval, "scores_by_embedding", retrieval.scores_by_words)
    done = call("evaluate_clara", "--models", model, "--text-model", base, "--base", base, "--data", clara_data,
                "--samples", 6, *JUDGED.split(), "--run-dir", tmp_path / "run", "--output",
                tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    work = found["work"]["clara"]["evaluation"]
    kinds = {most: [count for each, count in answered if each == most] for most in (1, 6)}
    assert (len(kinds[6]), len(kinds[1])) == (work["passes"], work["timed"]["passes"])
    # What the reasoner finds need not be what BM25 finds.
    assert sum(kinds[6]) == pytest.approx(work["padded_tokens"], rel=0.05)
    assert sum(kinds[1]) == pytest.approx(work["timed"]["tokens"], rel=0.05)
    assert tokens == {False: work["compressed"]["tokens"]}


def stage_seconds(script: str, work: dict, rates: dict, **given) -> float:
    """What a script's own formula says of a stage; its memory is left out."""
    from lib.budget import memory

    args = argparse.Namespace(precision="auto", gradient_checkpointing=False, batch_size=2, max_new_tokens=6)
    job = costs.Job(args, "base", False, "nf4", None, {}, work, rates)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("estimate_training", "estimate_answering"):
            patch.setattr(memory, name, lambda *_: {})
        return importlib.import_module(script).estimate_cost(job).seconds


def test_clara_is_faster_on_a_faster_gpu(compressed):
    stored, args = read(compressed[1]), argparse.Namespace(compute_efficiency=0.3, bandwidth_efficiency=0.6)
    work = stored["work"] | {
        "model": stored["work"]["model"] | {"parameters": 7e9, "matrices": 6.5e9, "rounded": 6.6e9}
    }
    peaks, took = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml"), {}
    plan = SimpleNamespace(evaluation={"batch_size": 16}, values=defaultdict(lambda: {"gradient_checkpointing": False}))
    for name in ("t4", "a100", "h100"):
        used = estimate.derive_gpu_rates(args, plan, work, stored["rates"], peaks[name])
        took[name] = sum(stage_seconds(f"train_stage{n}", work, used) for n in (1, 2, 3))
    assert took["t4"] > took["a100"] > took["h100"]


def test_clara_needs_its_rows_and_numbers(compressed):
    _, output, given = compressed
    end = ["--rates", output, "--output", output.with_name("bad-estimate")]
    refused(ask(*given, "DATA_NAME=none", *end), "data/none/raw", "make data")
    refused(ask(*given, "STAGE3_FLAGS=--retrieval-share much", *end), "--retrieval-share", "'much' is not a number")
    refused(ask(*given, f"STAGE2_FLAGS={STAGE2} --max-length 17", *end), "longer than --max-length 17")
    refused(ask(*given, f"STAGE1_FLAGS={STAGE1} --compress-rate 6", *end), "different clara")


# --- other machines -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(made):
    _, output, given = made
    done = ask(*given[:5], "--profile", "t4", "--output", output.with_name("t4-estimate"))
    assert done.code == 0, done.err
    return done, output.with_name("t4-estimate"), [*given[:5], "--profile", "t4"]


def test_a_gpu_that_is_not_here_is_rough_and_costs_something(elsewhere, base):
    done, output, _ = elsewhere
    found, price = read(output), cli.read_yaml(cli.ROOT / "configs" / "prices.yaml")["t4"]
    assert found["rough"] and "Rough: nothing was measured on a Tesla T4" in done.out
    assert "65 TFLOP/s" in done.out and "30%" in done.out and price["price_source"] in done.out
    assert found["cost"] == pytest.approx(found["seconds"] / 3600 * price["dollars_per_hour"]) and found["cost"] > 0
    assert all(stage["status"] != "finished" for stage in found["stages"])  # a rented machine is empty
    given = {stage["stage"]: stage["arguments"] for stage in found["stages"]}
    profile = cli.read_yaml(cli.ROOT / "configs" / "profiles" / "t4.yaml")
    assert given[LORA].items() >= profile["sft"].items()
    assert given["reports/eval-tiny-int4"].items() >= profile["evaluate"].items()
    with hardware.simulate(hardware.GPU("Tesla T4", (7, 5), 16 * 10**9)):
        expected = memory.total(
            memory.estimate_comparison(directory.load_config(open_directory(base)), found["work"]["most"]["positions"])
        )
    peaks = {stage["stage"]: stage["peak_memory_bytes"] for stage in found["stages"]}
    assert peaks["models/tiny-int4"] == int(expected) and hardware.gpu() is None  # it was a simulation
    assert given["models/tiny-int4"]["method"] == "nf4" and "nf4 to compute as fast as 16 bit" in done.out


def test_a_price_can_be_given_and_need_not_be_known(elsewhere):
    found = again(elsewhere, "rtx", "--profile", "rtx4060", "EVALUATE_FLAGS=--batch-size 16",
                  "SFT_FLAGS=--batch-size 4 --no-gradient-checkpointing")  # fmt: skip
    assert (
        found["cost"] is None and "No list price" in found["said"] and all(s["cost"] is None for s in found["stages"])
    )
    given = again(elsewhere, "given", "--price-per-hour", "7.2")
    assert given["cost"] == pytest.approx(given["seconds"] * 0.002)


def test_a_faster_gpu_is_faster_where_the_model_is_large(elsewhere):
    stored, args = read(elsewhere[1]), argparse.Namespace(compute_efficiency=0.3, bandwidth_efficiency=0.6)
    work = stored["work"] | {"model": stored["work"]["model"] | {"parameters": 7e9, "matrices": 6.5e9}}
    peaks, took = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml"), {}
    for name in ("t4", "a100", "h100"):
        plan = SimpleNamespace(evaluation={"batch_size": 16}, values={"sft": {"gradient_checkpointing": False}})
        used = estimate.derive_gpu_rates(args, plan, work, stored["rates"], peaks[name])
        took[name] = stage_seconds("sft", work, used), stage_seconds("evaluate", work, used)
    assert took["t4"] > took["a100"] > took["h100"]
    assert used["base"]["step"]["seconds"] >= 2 * 7e9 / (peaks["h100"]["gigabytes_per_second"] * 0.6e9)


def test_peaks_and_prices_are_dated_and_have_a_source():
    peaks = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml")
    profiles = {path.stem for path in (cli.ROOT / "configs" / "profiles").glob("*.yaml")}
    assert set(peaks) == profiles - {"cpu", "conservative"}
    for name, peak in peaks.items():
        assert all(peak[key] > 0 for key in ("tflops_16bit", "tflops_32bit", "gigabytes_per_second")), name
        for what in ("peaks", "price") if "dollars_per_hour" in peak else ("peaks",):
            assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", peak[f"{what}_date"]), (name, what)
            assert len(peak[f"{what}_source"]) > 10, (name, what)
    assert sum("dollars_per_hour" in peak for peak in peaks.values()) >= 4


# --- other input --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_need_not_be_there(made):
    root = made[1].parents[1]
    model = root / "models" / "huge-base"
    shutil.copytree(root / BASE, model, ignore=shutil.ignore_patterns("*.safetensors", "metadata.json"))
    output = root / "reports" / "huge-estimate"
    done = ask(*made[2], "MODEL_NAME=huge", "QUANT=nf4", "--profile", "t4", "--output", output)
    assert done.code == 0, done.err
    assert "random weights of the same shape" in done.out
    found = read(output)
    parameters = artifact.read(root / BASE)["metrics"]["parameters"]
    assert found["work"]["model"]["parameters"] == parameters
    assert sizes(found)["models/huge-lora-merged"] > 2 * parameters


def test_bad_input_is_refused(made, tmp_path):
    _, output, given = made
    end = ["--output", tmp_path / "x-estimate"]
    refused(ask(*given, "--pipeline", "everything", *end), "everything", "all")
    refused(ask(*given, "samples=3", *end), "samples=3", "SAMPLES=200")
    refused(ask(*given, "MODEL_NAME=none", *end), "none-base", "does not exist", "make base")
    refused(ask(*given, "DATA_NAME=none", *end), "make data")
    refused(ask(*given, "DATA_NAME=two words", *end), "DATA_NAME=two words", "one word")
    refused(ask(*given, "QUANT=int3", *end), "int3", "gguf-iq4_nl", "nf4")
    refused(ask(*given, "--profile", "t5", *end), "t5", "t4")
    refused(ask(*given, "--rates", tmp_path / "none", *end), "none does not exist")
    refused(ask(*given, "--rates", output, "EVALUATE_FLAGS=--batch-size 3", *end), "different evaluation")
    refused(ask(*given, "SFT_FLAGS=--max-length 16", *end), "longer than --max-length 16")
    refused(ask(*given, "--price-per-hour", "-1", *end), "out of range")
    refused(ask(*given, "SFT_FLAGS=--batch-size 0", *end), "sft.py", "--batch-size", "at least 1")
    refused(ask(*given, "SFT_FLAGS=--max-length abc", *end), "--max-length", "whole number")
    refused(ask(*given, "SFT_FLAGS=--lora-targets 'q", *end), "SFT_FLAGS: a quote is not closed")
    assert not (tmp_path / "x-estimate").exists()
