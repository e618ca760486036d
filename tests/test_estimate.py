"""estimate.py on the tiny model: what it counts, what it says, what it refuses."""

import argparse
import json
import re
import shutil

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
from tests.conftest import call, refused, script

EVALUATE = {"max_new_tokens": 6, "speed_tokens": 6, "batch": 2}
FLAGS = (
    "--evaluate-flags=--max-new-tokens 6 --speed-tokens 6 --batch 2",
    "--quantize-flags=--samples 3 --calibration-samples 4",
)
STAGES = ["evaluate base", "int4", "evaluate int4", "lora", "evaluate lora", "lora-merged", "lora-int4",
          "evaluate lora-int4"]  # fmt: skip


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    """An estimate in a process of its own, with what it said: nothing of the pipeline is there but base and data."""
    folder = tmp_path_factory.mktemp("a root") / "root"
    shutil.copytree(base, folder / "models" / "tiny-base")
    output = folder / "reports" / "tiny-estimate"
    given = ["--model", folder / "models" / "tiny-base", "--data", data, "--samples", 16, "--eval-samples", 6, *FLAGS]
    done = script("estimate", *given, "--output", output)
    assert done.code == 0, done.err
    return done, output, given


def read(output) -> dict:
    artifact.read(output, "estimate")
    return json.loads((output / "estimate.json").read_text())


def again(made, name: str, *more) -> dict:
    """Another forecast with the rates of the first, and other values."""
    _, output, given = made
    done = call("estimate", *given, "--rates", output, *more, "--output", output.with_name(f"{name}-estimate"))
    assert done.code == 0, done.err
    return read(output.with_name(f"{name}-estimate")) | {"said": done.out}


def seconds(found: dict) -> dict:
    return {stage["stage"]: stage["seconds"] for stage in found["stages"]}


# --- the table ----------------------------------------------------------------------------------------------


def test_all_stages_are_there_and_the_totals_are_their_sums(made, base, data):
    done, output, _ = made
    found = read(output)
    assert done.out.splitlines()[-1] == str(output)
    assert [stage["stage"] for stage in found["stages"]] == ["base", "data", *STAGES]
    for stage, place in zip(found["stages"], (base, data)):
        assert stage["status"] == "there already" and stage["seconds"] == artifact.read(place)["seconds"]
    coming = found["stages"][2:]
    assert all(stage["status"] == "forecast" and stage["seconds"] > 0 for stage in coming)
    for key in ("seconds", "bytes"):
        assert found[key] == pytest.approx(sum(stage[key] for stage in coming)) and found[key] > 0
    assert found["peak_memory_bytes"] == max(stage["peak_memory_bytes"] for stage in coming) > 3e8
    assert found["cost"] == 0 and not found["rough"]
    for stage in found["stages"]:
        line = next(x for x in done.out.splitlines() if x.startswith(f"{stage['stage']}  "))
        assert estimate.duration(stage["seconds"]) in line and stage["status"] in line
    total = next(line for line in done.out.splitlines() if line.startswith("total to come"))
    assert estimate.duration(found["seconds"]) in total and "nothing" in total


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
    assert "6 tokens, the most that is allowed" in said and "not known" in said
    assert "llama.cpp was timed on a file in q4_0" in said  # for iq4_nl


# --- the work -----------------------------------------------------------------------------------------------


def test_twice_the_samples_take_longer_to_train_on_and_change_nothing_else(made):
    one, two = again(made, "one"), again(made, "two", "--samples", 32)
    changed = {name for name, took in seconds(one).items() if took != seconds(two)[name]}
    assert changed == {"lora"}
    tokens = [found["work"]["training"]["tokens"] for found in (one, two)]
    longer = seconds(two)["lora"] - seconds(one)["lora"]
    expected = (tokens[1] - tokens[0]) * one["rates"]["train"]["seconds"] + 2 * one["rates"]["update"]["seconds"]
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=0.1) and longer == pytest.approx(expected)
    assert {name for name, size in sizes(one).items() if size != sizes(two)[name]} == set()


def sizes(found: dict) -> dict:
    return {stage["stage"]: stage["bytes"] for stage in found["stages"]}


@pytest.mark.parametrize(
    "more, changed",
    [
        (("--epochs", 3), {"lora"}),
        (("--eval-samples", 4), {name for name in STAGES if name.startswith("evaluate")}),
        (("--quantize-flags=--samples 2 --calibration-samples 4",), {"int4", "lora-int4"}),
        (("--quantize-flags=--samples 3 --calibration-samples 2",), {"int4", "lora-int4"}),
        (("--sft-flags=--accumulation 1",), {"lora"}),
    ],
)  # fmt: skip
def test_a_value_changes_the_stages_that_it_concerns(made, more, changed):
    one, other = again(made, "one"), again(made, "other", *more)
    assert {name for name, took in seconds(one).items() if took != seconds(other)[name]} == changed


def test_the_counted_work_is_what_the_stages_do(made, data, tmp_path, monkeypatch):
    _, output, given = made
    base, found = given[1], read(output)
    done = call("sft", "--model", base, "--data", data, "--samples", 16, "--run", tmp_path / "run", "--output",
                tmp_path / "lora")  # fmt: skip
    assert done.code == 0, done.err
    trained = artifact.read(tmp_path / "lora")
    work = found["work"]["training"]
    assert work["tokens"] == trained["metrics"]["labels"]["tokens"] and work["updates"] == trained["metrics"]["steps"]
    assert sizes(found)["lora"] == pytest.approx(trained["size_bytes"], rel=0.1)  # a header

    read_batches, plain = [], transformers_engine.Transformers.generate_batch

    def watched(self, prompts, most, exact):
        rows, *ticks = plain(self, prompts, most, exact)
        read_batches.append((len(prompts) * max(map(len, prompts)), exact, max(map(len, rows))))
        return rows, *ticks

    monkeypatch.setattr(transformers_engine.Transformers, "generate_batch", watched)
    flags = FLAGS[0].partition("=")[2].split()
    done = call("evaluate", "--model", base, "--data", data, "--samples", 6, *flags, "--run", tmp_path / "run",
                "--output", tmp_path / "evaluation")  # fmt: skip
    assert done.code == 0, done.err
    work = found["work"]["evaluation"]
    answered = [one for one in read_batches if not one[1]]
    assert len(answered) == work["passes"] and sum(tokens for tokens, *_ in answered) == work["padded_tokens"]
    timed = [one for one in read_batches if one[1]]
    assert len(timed) == 2 * work["speed"]["repeats"]
    assert sum(tokens for tokens, *_ in timed[:2]) == work["speed"]["prompt_tokens"] + work["speed"]["padded_tokens"]
    assert all(longest <= EVALUATE["max_new_tokens"] for *_, longest in answered)
    assert found["stages"][2]["arguments"].items() <= artifact.read(tmp_path / "evaluation")["arguments"].items()


def test_answers_are_as_long_as_allowed_or_as_the_accepted_ones():
    judge = {"batch": 2, "max_new_tokens": 5, "repeats": 3, "speed_tokens": 4}
    work = workload.evaluation_of([10, 30, 20], [9, 2, 3], judge)
    assert work["untuned"] == {"new_tokens": 15, "mean": 5, "steps": 8}
    assert work["tuned"] == {"new_tokens": 5 + 2 + 3, "mean": 10 / 3, "steps": 2 + 4}  # 30 with 20, then 10 alone
    assert work["padded_tokens"] == 2 * 30 + 10 and work["passes"] == 2
    assert work["speed"]["padded_tokens"] == 60 and work["speed"]["batch_tokens"] == 40
    assert workload.evaluation_of([10, 30, 20], [9, 2, 3], judge, alike=False)["tuned"] == work["untuned"]
    work = workload.evaluation_of([1, 2] * 4 + [50], [1] * 9, judge)  # the ninth comes after a chunk of eight
    assert work["padded_tokens"] == 4 * 2 + 4 * 1 + 50 and work["passes"] == 5


def test_flags_of_the_stages_are_understood():
    text = "--lora-r 16 --learning-rate=2e-4 --no-gradient-checkpointing --lora-targets='q_proj, v_proj' --x -1 --y"
    assert estimate.flags_of(text) == {
        "lora_r": 16, "learning_rate": 2e-4, "gradient_checkpointing": False, "lora_targets": "q_proj, v_proj", "x": -1,
        "y": True,
    }  # fmt: skip
    assert estimate.flags_of("") == {}
    assert estimate.flags_of("--held-out validation test --load fp32 --held-out test train x") == {
        "held_out": ["test", "train", "x"], "load": "fp32",
    }  # fmt: skip


# --- what is there already ----------------------------------------------------------------------------------


def test_stages_that_are_there_are_not_forecast(made):
    found, models = again(made, "tiny2"), made[2][1].parent
    values = next(s for s in found["stages"] if s["stage"] == "lora")["arguments"]
    place = models / "tiny2-lora"
    with artifact.write_artifact(place, "adapter", argparse.Namespace(**values)) as build:
        (build.path / "content").write_text("an adapter")
        build.notes = {"seconds": 77.0}
    there = again(made, "tiny2")
    status = {stage["stage"]: stage["status"] for stage in there["stages"]}
    assert status["lora"] == "there already" and seconds(there)["lora"] == 77
    assert {name for name, one in status.items() if one == "forecast"} == {*STAGES} - {"lora"}
    assert there["seconds"] == pytest.approx(found["seconds"] - seconds(found)["lora"])
    assert "1 min 17 s" in there["said"]

    anew = again(made, "tiny2", "--anew")
    assert anew["seconds"] == pytest.approx(found["seconds"] + sum(s["seconds"] for s in found["stages"][:2]))
    other = again(made, "tiny2", "--samples", 20)  # it was made of 16
    assert {s["stage"] for s in other["stages"] if s["status"] == "forecast"} == {*STAGES}


def test_what_depends_on_a_stage_to_come_is_to_come(made):
    models = made[2][1].parent
    found = again(made, "tiny3")
    for name in ("lora-merged", "int4"):
        values = next(s for s in found["stages"] if s["stage"] == name)["arguments"]
        with artifact.write_artifact(models / f"tiny3-{name}", "model", argparse.Namespace(**values)) as build:
            (build.path / "content").write_text(name)
    status = {stage["stage"]: stage["status"] for stage in again(made, "tiny3")["stages"]}
    assert status["int4"] == "there already" and status["lora-merged"] == status["lora"] == "forecast"


# --- make align ---------------------------------------------------------------------------------------------

OWN = ["magpie", "filtered", "sft", "preferences", "dpo", "evaluate base", "evaluate sft", "evaluate dpo",
       "forgetting base", "forgetting sft", "forgetting dpo"]  # fmt: skip
ALIGN = (
    "--goal", "align", "--raw", 20, "--pairs", 12, "--held-out-pairs", 4, FLAGS[0],
    "--magpie-flags=--batch 4 --max-instruction-tokens 20 --max-response-tokens 16",
    "--preferences-flags=--max-new-tokens 12 --batch 4 --scorer embedding",
    "--forgetting-flags=--samples 2 --prompts 1 --max-new-tokens 6",
)  # fmt: skip


@pytest.fixture
def aligned(made, bundled, tmp_path_factory):
    """A forecast of make align on what magpie will write, timed once."""
    _, output, given = made
    output = output.with_name("family-estimate")
    given = [*given[:8], *ALIGN]
    if not output.exists():
        done = call("estimate", *given, "--output", output)
        assert done.code == 0, done.err
    return None, output, given


def test_align_is_forecast_stage_by_stage(aligned):
    found = again(aligned, "family2")
    assert [stage["stage"] for stage in found["stages"]] == ["base", "data", *OWN]
    for stage in found["stages"][2:]:
        assert stage["status"] == "forecast" and stage["seconds"] > 0
        assert stage["peak_memory_bytes"] > 3e8 or stage["stage"] == "filtered"
    root = aligned[1].parents[1]
    places = {stage["stage"]: stage["artifact"] for stage in found["stages"]}
    assert places["sft"] == str(root / "models" / "family2-sft")
    assert places["forgetting base"] == str(root / "reports" / "forgetting-tiny-base")
    assert places["forgetting dpo"] == str(root / "reports" / "forgetting-family2-dpo")
    assert places["preferences"].endswith("family2/preferences")
    given = next(stage["arguments"] for stage in found["stages"] if stage["stage"] == "preferences")
    assert given["samples"] == 12 and given["scorer"] == "embedding"
    assert "47% of the responses reach --max-response-tokens 16" in found["said"] and "9;" in found["said"]
    assert "40% of the prompts give a pair" in found["said"]


@pytest.mark.parametrize(
    "more, changed",
    [
        (("--raw", 60), {"magpie", "sft"}),  # too few rows were left for so many
        (("--pairs", 2), {"preferences", "dpo"}),
        (("--dpo-flags=--accumulation 1",), {"dpo"}),
        (("--forgetting-flags=--samples 1 --prompts 1 --max-new-tokens 6",), {*OWN[-3:]}),
    ],
)  # fmt: skip
def test_a_value_changes_the_steps_of_align_that_it_concerns(aligned, more, changed):
    one, other = again(aligned, "one"), again(aligned, "other", *more)
    assert {name for name, took in seconds(one).items() if took != seconds(other)[name]} == changed


def test_rows_of_ones_own_need_no_magpie(aligned):
    found = again(aligned, "own", "--align-data", "capitals")
    assert [stage["stage"] for stage in found["stages"]] == ["base", "data", *OWN[1:]]
    assert "responses are as long as accepted answers" in found["said"]
    assert found["work"]["training"]["rows"] == 16


def test_steps_are_counted_as_they_are_taken(talker, monkeypatch):
    from lib.engines.sampling import Settings

    steps, plain = [], batching.Batch.step
    monkeypatch.setattr(batching.Batch, "step", lambda *given: steps.append(len(given[1])) or plain(*given))
    engine = transformers_engine.Transformers(talker, load="fp32", threads=1, batch=6)
    prompts = [engine.prompt_ids([{"role": "user", "content": f"{n} {'long ' * (n % 5)}"}]) for n in range(30)]
    found = dict(engine.sample(prompts, [[n] for n in range(30)], Settings(40, 1.0, 1.0)))
    order = sorted(range(30), key=lambda n: -len(prompts[n]))
    work = workload.drawn([found[n][0].new_tokens for n in order], 0, 0, 6)
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
    flags = {"samples": 2, "prompts": 1, "max_new_tokens": 4, "batch": 8, "seed": 42}
    done = call("forgetting", "--model", base, "--samples", 2, "--prompts", 1, "--max-new-tokens", 4, "--run",
                tmp_path / "run", "--output", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    work, most = workload.weighing(flags, directory.load_tokenizer(base))
    assert work["passes"] == len(read) and work["tokens"] == sum(read)
    assert work["steps"] == 3 and most["question"] == max(read)


def test_a_trained_adapter_is_there_already(made, data, tmp_path):
    """With a learning rate that sft.py itself has chosen."""
    _, _, given = made
    place = given[1].with_name("tiny4-lora")
    done = call(
        "sft", "--model", given[1], "--data", data, "--samples", 16, "--run", tmp_path / "run", "--output", place
    )
    assert done.code == 0, done.err
    status = {stage["stage"]: stage["status"] for stage in again(made, "tiny4")["stages"]}
    assert status["lora"] == "there already"


# --- make clara ---------------------------------------------------------------------------------------------

CLARA = ["clara-stage1", "clara-stage2", "clara", "lora", "evaluate clara"]
LEARN = "--batch 2 --watched 3 --watch-steps 2 --load fp32"
STAGE1 = f"--compress-rate 4 --doc-max-tokens 12 --lora-r 4 --accumulation 2 --epochs 1.5 --short-words 5 {LEARN}"
STAGE2, STAGE3 = f"--samples 7 {LEARN}", f"--samples 8 --candidates 5 --k 3 --epochs 2 {LEARN}"
JUDGED = "--k 3 --max-new-tokens 6 --timed 3 --batch 4 --load fp32"


@pytest.fixture
def compressed(made, clara_data, monkeypatch):
    """A forecast of make clara, timed once, without MiniLM."""
    monkeypatch.setattr(embedding, "open_embedding", lambda: lambda texts: None)
    _, output, given = made
    output = output.with_name("tiny-clara-estimate")
    given = [
        *given[:8], "--goal", "clara", "--clara-data", clara_data, f"--stage1-flags={STAGE1}",
        f"--stage2-flags={STAGE2}", f"--stage3-flags={STAGE3}", f"--evaluate-clara-flags={JUDGED}",
    ]  # fmt: skip
    if not output.exists():
        done = call("estimate", *given, "--output", output)
        assert done.code == 0, done.err
    return None, output, given


def test_clara_is_forecast_stage_by_stage(compressed, clara_data):
    found, root = again(compressed, "tiny-clara"), compressed[1].parents[1]
    assert [stage["stage"] for stage in found["stages"]] == ["base", "data", "clara data", *CLARA]
    assert found["stages"][2]["artifact"] == str(clara_data) and found["stages"][2]["status"] == "there already"
    for stage in found["stages"][3:]:
        assert stage["status"] == "forecast" and stage["seconds"] > 0 and stage["peak_memory_bytes"] > 3e8
    places = {stage["stage"]: stage["artifact"] for stage in found["stages"]}
    assert places["clara"] == str(root / "models" / "tiny-clara") and places["clara-stage1"].endswith("-clara-stage1")
    assert places["lora"] == str(root / "models" / "tiny-lora")
    assert places["evaluate clara"] == str(root / "reports" / "tiny-clara")
    assert "as long as what BM25 finds" in found["said"]


@pytest.mark.parametrize(
    "more, changed",
    [
        (("--samples", 12), {"clara-stage1", "lora"}),
        ((f"--stage2-flags={STAGE2} --samples 4",), {"clara-stage2"}),
        ((f"--stage3-flags={STAGE3} --contrast 0",), {"clara"}),
        (("--eval-samples", 3), {"evaluate clara"}),
    ],
)  # fmt: skip
def test_a_value_changes_the_stages_of_clara_that_it_concerns(compressed, more, changed):
    one, other = read(compressed[1]), again(compressed, "other-clara", *more)
    assert {name for name, took in seconds(one).items() if took != seconds(other)[name]} == changed


def test_the_counted_work_is_what_the_stages_of_clara_do(compressed, base, clara_data, tmp_path, monkeypatch):
    """Token by token, with and without gradients."""
    found, tokens, plain = read(compressed[1]), {}, Clara.hidden

    def watched(self, inputs, mask):
        learning = torch.is_grad_enabled()
        tokens[learning] = tokens.get(learning, 0) + mask.numel()
        return plain(self, inputs, mask)

    monkeypatch.setattr(Clara, "hidden", watched)
    model, ours = base, {stage["stage"]: stage for stage in found["stages"]}
    for number, flags in enumerate((f"{STAGE1} --samples 16", STAGE2, STAGE3), 1):
        tokens.clear()
        place = tmp_path / f"stage{number}"
        done = call(f"train_stage{number}", "--model", model, "--data", clara_data, "--output", place, "--run",
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
    done = call("evaluate_clara", "--models", model, "--reader", base, "--base", base, "--data", clara_data,
                "--samples", 6, *JUDGED.split(), "--run", tmp_path / "run", "--output", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    work = found["work"]["clara"]["evaluation"]
    kinds = {most: [count for each, count in answered if each == most] for most in (1, 6)}
    assert (len(kinds[6]), len(kinds[1])) == (work["passes"], work["timed"]["passes"])
    # What the reasoner finds need not be what BM25 finds.
    assert sum(kinds[6]) == pytest.approx(work["padded_tokens"], rel=0.05)
    assert sum(kinds[1]) == pytest.approx(work["timed"]["tokens"], rel=0.05)
    assert tokens == {False: work["compressed"]["tokens"]}


def test_clara_is_faster_on_a_faster_gpu(compressed):
    stored, args = read(compressed[1]), argparse.Namespace(compute_efficiency=0.3, bandwidth_efficiency=0.6)
    work = stored["work"] | {
        "model": stored["work"]["model"] | {"parameters": 7e9, "matrices": 6.5e9, "rounded": 6.6e9}
    }
    peaks, took = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml"), {}
    values = {script: {"batch": 16} for script in estimate.SCRIPTS.values()}
    for name in ("t4", "a100", "h100"):
        used = estimate.published(args, values, work, stored["rates"], peaks[name])
        took[name] = sum(costs.clara_training_cost(work, used, f"train_stage{n}")[0] for n in (1, 2, 3))
    assert took["t4"] > took["a100"] > took["h100"]


def test_clara_needs_its_rows_and_numbers(compressed, data):
    _, output, given = compressed
    end = ["--rates", output, "--output", output.with_name("bad-estimate")]
    refused(call("estimate", *given[:10], *end), "--clara-data", "make estimate GOAL=clara")
    refused(call("estimate", *given, "--clara-data", data, *end), "clara-data")
    refused(call("estimate", *given, "--stage3-flags=--contrast much", *end), "contrast", "at least 0")
    refused(call("estimate", *given, f"--stage2-flags={STAGE2} --max-length 17", *end), "longer than --max-length 17")
    refused(call("estimate", *given, f"--stage1-flags={STAGE1} --compress-rate 6", *end), "another clara")


# --- other machines -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(made):
    _, output, given = made
    done = call("estimate", *given[:8], "--profile", "t4", "--output", output.with_name("t4-estimate"))
    assert done.code == 0, done.err
    return done, output.with_name("t4-estimate"), [*given[:8], "--profile", "t4"]


def test_a_gpu_that_is_not_here_is_rough_and_costs_something(elsewhere, base):
    done, output, _ = elsewhere
    found, price = read(output), cli.read_yaml(cli.ROOT / "configs" / "prices.yaml")["t4"]
    assert found["rough"] and "Rough: nothing was measured on a Tesla T4" in done.out
    assert "65 TFLOP/s" in done.out and "30%" in done.out and price["price_source"] in done.out
    assert found["cost"] == pytest.approx(found["seconds"] / 3600 * price["dollars_per_hour"]) and found["cost"] > 0
    assert all(stage["status"] != "there already" for stage in found["stages"])  # a rented machine is empty
    given = {stage["stage"]: stage["arguments"] for stage in found["stages"]}
    profile = cli.read_yaml(cli.ROOT / "configs" / "profiles" / "t4.yaml")
    assert given["lora"].items() >= profile["sft"].items()
    assert given["evaluate int4"].items() >= profile["evaluate"].items()
    with hardware.simulate(hardware.GPU("Tesla T4", (7, 5), 16 * 10**9)):
        expected = memory.total(
            memory.estimate_comparison(directory.load_config(base), found["work"]["most"]["positions"])
        )
    peaks = {stage["stage"]: stage["peak_memory_bytes"] for stage in found["stages"]}
    assert peaks["int4"] == int(expected) and hardware.gpu() is None  # it was a simulation
    assert given["int4"]["method"] == "nf4" and "nf4 computes as fast as 16 bit" in done.out


def test_a_price_can_be_given_and_need_not_be_known(elsewhere):
    found = again(elsewhere, "rtx", "--profile", "rtx4060", "--evaluate-flags=--batch 16", "--sft-flags=--batch 4"
                  " --no-gradient-checkpointing")  # fmt: skip
    assert (
        found["cost"] is None and "no list price" in found["said"] and all(s["cost"] is None for s in found["stages"])
    )
    given = again(elsewhere, "given", "--price-per-hour", "7.2")
    assert given["cost"] == pytest.approx(given["seconds"] * 0.002)


def test_a_faster_gpu_is_faster_where_the_model_is_large(elsewhere):
    stored, args = read(elsewhere[1]), argparse.Namespace(compute_efficiency=0.3, bandwidth_efficiency=0.6)
    work = stored["work"] | {"model": stored["work"]["model"] | {"parameters": 7e9, "matrices": 6.5e9}}
    peaks, took = cli.read_yaml(cli.ROOT / "configs" / "prices.yaml"), {}
    for name in ("t4", "a100", "h100"):
        values = {"evaluate": {"batch": 16}, "sft": {}}
        used = estimate.published(args, values, work, stored["rates"], peaks[name])
        took[name] = costs.training_cost(work, used)[0], costs.evaluation_cost(work, used, "base")[0]
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


def test_weights_need_not_be_there(made, data, tmp_path):
    model = tmp_path / "huge-base"
    shutil.copytree(made[2][1], model, ignore=shutil.ignore_patterns("*.safetensors", "metadata.json"))
    done = call("estimate", "--model", model, "--data", data, "--samples", 16, "--eval-samples", 6, *FLAGS, "--method",
                "nf4", "--profile", "t4", "--output", tmp_path / "reports" / "huge-estimate")  # fmt: skip
    assert done.code == 0, done.err
    assert "random ones of its shape" in done.out
    found = read(tmp_path / "reports" / "huge-estimate")
    parameters = artifact.read(made[2][1])["metrics"]["parameters"]
    assert found["work"]["model"]["parameters"] == parameters
    assert sizes(found)["lora-merged"] > 2 * parameters


def test_bad_input_is_refused(made, data, tmp_path):
    _, output, given = made
    end = ["--output", tmp_path / "x-estimate"]
    model = given[1]
    refused(call("estimate", "--model", model, "--data", data, "--goal", "everything", *end), "everything", "all")
    refused(call("estimate", "--model", tmp_path / "none-base", "--data", data, *end), "does not exist", "make base")
    refused(call("estimate", "--model", model, "--data", tmp_path / "none", *end), "make data")
    refused(call("estimate", "--model", data, "--data", data, *end), "with a config.json")
    refused(call("estimate", *given, "--method", "int3", *end), "int3", "gguf-iq4_nl", "nf4")
    refused(call("estimate", *given, "--profile", "t5", *end), "t5", "t4")
    refused(call("estimate", *given, "--rates", tmp_path / "none", *end), "make estimate")
    refused(call("estimate", *given, "--rates", output, "--evaluate-flags=--batch 3", *end), "another evaluation")
    refused(call("estimate", *given, "--sft-flags=--max-length 16", *end), "longer than --max-length 16")
    refused(call("estimate", *given, "--price-per-hour", "-1", *end), "out of range")
    for flag, value in (("--batch", "0"), ("--max-length", "abc"), ("--accumulation", "1.5")):
        refused(call("estimate", *given, f"--sft-flags={flag} {value}", *end), flag[2:5], "at least 1")
    refused(call("estimate", *given, "--sft-flags=--lora-targets 'q", *end), "--sft-flags")
    assert not (tmp_path / "x-estimate").exists()
