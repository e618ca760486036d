"""evaluate_general.py on a tiny model: the likeliest option, both engines alike, kept questions."""

import json

import pytest

from lib.core import artifact
from lib.data import evaluation_sets, records
from lib.engines import opening, transformers_engine
from lib.model.directory import open_directory
from tests.conftest import beside, call, refused

FLAGS = ["--samples", 2, "--prompts", 1, "--max-new-tokens", 4, "--precision", "fp32", "--threads", 1]


def run(model, folder, *more):
    return call(
        "evaluate_general", "--model", model, "--output", folder / "out", "--run-dir", folder / "run", *FLAGS, *more
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def measured(bundled, base, tmp_path):
    done = run(base, tmp_path)
    assert done.code == 0, done.err
    return tmp_path / "out", done


def test_the_choice_is_the_likeliest_option(measured, base):
    """Against the engine's own log-probabilities, one option after the other."""
    engine = opening.open_engine(open_directory(base), load="fp32", threads=1)
    rows = {row["id"]: row for name in ("commonsense_qa", "boolq") for row in evaluation_sets.load_set(name)}
    found = read(measured[0] / "options.jsonl")
    assert {row["id"] for row in found} == rows.keys()
    for row in found:
        passages = [rows[row["id"]]["passage"]] if rows[row["id"]]["passage"] else []
        asked = records.message("user", records.question_with_documents(row["question"], passages))
        prompt = engine.prompt_ids(asked)
        texts = [option[0].upper() + option[1:] for option in row["options"]]
        sums = [engine.answer_logprobs(prompt, engine.answer_ids(text)).sum() for text in texts]
        assert row["logprobs"] == pytest.approx(sums, abs=1e-3)
        each = [total / len(text) for total, text in zip(sums, texts)]
        assert row["choice"] == sums.index(max(sums)) and row["choice_per_byte"] == each.index(max(each))
        assert row["gold"] == rows[row["id"]]["gold"]


def test_accuracies_have_intervals_and_what_guessing_gives(measured):
    output, done = measured
    metrics = artifact.read(output, "forgetting")["metrics"]
    assert artifact.read(output)["expected_memory_bytes"] > 3e8
    found = read(output / "options.jsonl")
    rows = {row["id"]: row for name in ("commonsense_qa", "boolq") for row in evaluation_sets.load_set(name)}
    for name in ("commonsense_qa", "boolq"):
        some = [row for row in found if row["id"].startswith(name)]
        for key in ("choice", "choice_per_byte"):
            accuracy = metrics[name][key]
            assert accuracy["mean"] == sum(row[key] == row["gold"] for row in some) / 2 and accuracy["n"] == 2
            assert accuracy["low"] <= accuracy["mean"] <= accuracy["high"]
        assert [row["group"] for row in some] == [rows[row["id"]]["passage"] or row["id"] for row in some]
        assert metrics[name]["guessing"] == 0.5
        assert metrics[name]["same_choice"] == (1 if some[0]["choice"] == some[1]["choice"] else 0.5)
        assert f"{name}: accuracy {metrics[name]['choice']['mean']:.3f} [" in done.out
    (answer,) = read(output / "answers.jsonl")
    assert answer["prompt"] == "Write about Hawaii." and answer["new_tokens"] <= 4


@pytest.mark.slow
def test_llama_cpp_weighs_options_alike(measured, base, data, tmp_path):
    quantize = ["--model", base, "--data", data, "--method", "gguf-f16", "--samples", 2, "--output", tmp_path / "f16"]
    assert call("quantize", *quantize).code == 0
    other = tmp_path / "other"
    done = run(tmp_path / "f16", other)
    assert done.code == 0, done.err
    for ours, theirs in zip(read(measured[0] / "options.jsonl"), read(other / "out" / "options.jsonl"), strict=True):
        assert ours["id"] == theirs["id"] and ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=0.05)


def test_options_weigh_what_each_weighs_alone(base):
    engine = opening.open_engine(open_directory(base), load="fp32", threads=1)
    prompt, several = engine.prompt_ids([{"role": "user", "content": "Where is Hilo?"}]), [[7], [40, 41, 42], [43, 44]]
    for options in (several, several[:1]):
        found = engine.options_logprobs(prompt, options)
        for ids, each in zip(options, found, strict=True):
            assert each == pytest.approx(engine.answer_logprobs(prompt, ids), abs=1e-5)


def test_stopped_it_keeps_its_questions_and_continues(bundled, base, tmp_path, monkeypatch, measured):
    again = tmp_path / "again"
    real, asked = transformers_engine.Transformers.options_logprobs, []

    def options_logprobs(self, prompt, options):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(prompt)
        return real(self, prompt, options)

    monkeypatch.setattr(transformers_engine.Transformers, "options_logprobs", options_logprobs)
    assert run(base, again).code == 4 and beside(again) == ["run"]
    asked.clear()
    done = run(base, again)
    assert done.code == 0 and "resuming: 3 of 4 questions are done" in done.out and len(asked) == 1
    assert artifact.read(again / "out")["files"] == artifact.read(measured[0])["files"]


def test_a_model_that_is_not_there_is_refused(bundled, tmp_path):
    refused(run(tmp_path / "none", tmp_path), "does not exist")
    assert "run" not in beside(tmp_path)
