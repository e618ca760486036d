"""evaluate.py on tiny models: scores of every kind of variant, kept rows, the two engines alike."""

import json
import signal
import subprocess
import sys
import time

import pytest

from lib.core import artifact
from lib.data import metrics, records
from lib.model import directory
from lib.model.directory import open_directory
from tests.conftest import SCRIPTS, call, environment, refused, row

FLAGS = ["--samples", 5, "--max-new-tokens", 6, "--speed-tokens", 4, "--precision", "fp32", "--threads", 1]


def flags(model, data, folder, *more):
    return ["--model", model, "--data", data, "--output", folder / "eval", "--run-dir", folder / "run", *FLAGS, *more]


def predictions(folder):
    return [json.loads(line) for line in (folder / "eval" / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def through_transformers(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    done = call("evaluate", *flags(base, data, folder))
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def through_llama_cpp(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    quantize = ["--model", base, "--data", data, "--method", "gguf-f16", "--samples", 2, "--output", folder / "f16"]
    assert call("quantize", *quantize).code == 0
    done = call("evaluate", *flags(folder / "f16", data, folder))
    assert done.code == 0, done.err
    return folder


def test_scores_have_intervals_and_speeds_have_ranges(through_transformers):
    meta = artifact.read(through_transformers / "eval", "evaluation")
    metrics = meta["metrics"]
    for name in ("token_f1", "exact_match", "contained", "nll"):
        assert metrics[name]["low"] <= metrics[name]["mean"] <= metrics[name]["high"] and metrics[name]["n"] == 5
    speed = metrics["speed"]
    measured = [speed["one_stream"][f"{what}_tokens_per_second"] for what in ("prefill", "decode")]
    for rate in [*measured, speed["batch"]["generated_tokens_per_second"]]:
        assert 0 < rate["min"] <= rate["median"] <= rate["max"] and rate["n"] == 3
    assert speed["batch"]["streams"] == 8
    assert metrics["load_seconds"] > 0 and metrics["model_bytes"] > 0 and meta["peak_memory_bytes"] > 0
    assert meta["engine"] == "transformers"


def test_questions_about_one_thing_are_drawn_together(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(n) | {"group": f"country {n // 4}"}) + "\n" for n in range(24)))
    done = call("evaluate", *flags(base, rows, tmp_path, "--samples", 24, "--max-new-tokens", 1))
    assert done.code == 0, done.err
    made, meta = predictions(tmp_path), artifact.read(tmp_path / "eval")
    groups = [one["group"] for one in made]
    assert groups == [f"country {int(one['id'].rpartition('-')[2]) // 4}" for one in made]
    expected = metrics.interval([one["nll"] for one in made], meta["arguments"]["seed"], groups, None)
    assert meta["metrics"]["nll"] == expected and expected["groups"] == 6 and expected["n"] == 24
    assert meta["metrics"]["exact_match"]["high"] > 0.38  # none of six, not none of 24: 0.14


def test_only_test_rows_are_asked_and_all_are_saved(through_transformers, data):
    held_out = {row["id"] for row in records.load_split(data, "test")}
    rows = predictions(through_transformers)
    assert {row["id"] for row in rows} <= held_out and len(rows) == 5
    assert all(row["answer"] is not None and row["gold"] and 0 <= row["token_f1"] <= 1 for row in rows)


def test_both_engines_give_the_same_answers_and_likelihoods(through_transformers, through_llama_cpp):
    """A 16-bit GGUF holds the same weights, so that what differs would be the engines' own doing."""
    ours, theirs = predictions(through_transformers), predictions(through_llama_cpp)
    assert [row["id"] for row in ours] == [row["id"] for row in theirs]
    assert [row["nll"] for row in ours] == pytest.approx([row["nll"] for row in theirs], abs=0.02)
    # A random model's best two tokens may be a hair apart, so one answer may part ways.
    assert sum(a["answer"] == b["answer"] for a, b in zip(ours, theirs)) >= 4
    assert artifact.read(through_llama_cpp / "eval")["engine"] == "llama.cpp"


def test_stopped_it_keeps_its_rows_and_continues(base, data, tmp_path, through_transformers):
    argv = flags(base, data, tmp_path, "--batch-size", 1, "--samples", 6, "--max-new-tokens", 6)
    run = tmp_path / "run" / "predictions.jsonl"
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), *map(str, argv)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    until = time.time() + 90
    while not (run.is_file() and run.read_text().count("\n") >= 1):
        assert time.time() < until and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 4 and "Repeat the command to resume" in said and "Traceback" not in said
    kept = run.read_text().splitlines()
    assert kept and not (tmp_path / "eval").exists()
    with open(run, "a") as file:
        file.write('{"id": "cut sho')  # as a kill in the middle of a line leaves it
    done = call("evaluate", *argv)
    assert done.code == 0 and f"resuming: {len(kept)} of 6 examples" in done.out
    rows = predictions(tmp_path)
    assert len({row["id"] for row in rows}) == len(rows) == 6
    first = [row["answer"] for row in predictions(through_transformers)]
    assert [row["answer"] for row in rows][:5] == first  # the rows of a larger sample begin with those of a smaller


def test_greedy_is_greedy_whatever_the_model_asks_for(base, plain, data, tmp_path):
    """Penalties, beams, lengths and lists of tokens, on the model alone and under an adapter: recorded, not used."""
    from lib.engines.transformers_engine import Transformers
    from tests.lib.model.test_loading import make_adapter

    own = {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "num_beams": 3, "min_length": 400,
        "forced_eos_token_id": 2, "suppress_tokens": [5], "begin_suppress_tokens": [7], "do_sample": True,
        "temperature": 0.5, "top_k": 3,
    }  # fmt: skip
    expected = Transformers(open_directory(base), load="fp32")
    prompts = [expected.prompt_ids(row["prompt"]) for row in records.load_split(data, "test")[:4]]
    answers = [answer.ids for answer in expected.generate(prompts, 20)]
    adapted = Transformers(open_directory(make_adapter(tmp_path / "lora", base)), load="fp32").generate(prompts, 20)
    config = json.loads((plain / "generation_config.json").read_text())
    (plain / "generation_config.json").write_text(json.dumps(config | own))
    assert [a.ids for a in Transformers(open_directory(plain), load="fp32").generate(prompts, 20)] == answers
    found = Transformers(open_directory(tmp_path / "lora", plain), load="fp32").generate(prompts, 20)
    assert [a.ids for a in found] == [a.ids for a in adapted]
    done = call("evaluate", *flags(plain, data, tmp_path, "--samples", 2))
    assert done.code == 0 and "are not used: " in done.out and "repetition_penalty 1.3" in done.out
    assert artifact.read(tmp_path / "eval")["generation"] == {"used": "greedy", "own": own}


def write_rows(folder, prompt: str, completion: str):
    folder.mkdir(exist_ok=True)
    rows = [{"prompt": f"{n} {prompt}", "completion": f"{completion} {n}"} for n in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("generate_data", "--source", folder / "rows.jsonl", "--output", folder / "data").code == 0
    return folder / "data"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "completion", "more"),
    [("根据内容回答" * 60, "是", ()), ("river?", "长" * 150, ()), ("river?", "yes", ("--speed-tokens", 400))],
)
def test_llama_cpp_has_room_for_prompts_answers_and_speed(through_llama_cpp, base, tmp_path, prompt, completion, more):
    """Whatever a token is worth in characters. Likelihoods are transformers' own, so that nothing was cut."""
    rows, nll = write_rows(tmp_path / "rows", prompt, completion), []
    for model in (base, through_llama_cpp / "f16"):
        done = call("evaluate", *flags(model, rows, tmp_path / model.name, "--samples", 2, "--batch-size", 2, *more))
        assert done.code == 0, done.err
        nll.append([row["nll"] for row in predictions(tmp_path / model.name)])
    assert nll[0] == pytest.approx(nll[1], abs=0.02)


def test_rows_longer_than_the_model_or_outside_its_vocabulary_are_refused(through_llama_cpp, plain, base, tmp_path):
    rows = write_rows(tmp_path / "rows", "长" * 700, "yes")
    for model in (base, through_llama_cpp / "f16"):
        done = call("evaluate", *flags(model, rows, tmp_path / "long"))
        refused(done, "row 'rows-0", "longer than the context of", "2,048 tokens")
    tokenizer = directory.load_tokenizer(open_directory(plain))
    tokenizer.add_tokens(["rhinoceros"])
    tokenizer.save_pretrained(plain)
    rows = write_rows(tmp_path / "other rows", "rhinoceros", "yes")
    refused(call("evaluate", *flags(plain, rows, tmp_path / "beyond")), "'rhinoceros' the id", "has only", "rows")


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_plain_weights_can_be_rounded_while_they_are_loaded(base, data, tmp_path, how, through_transformers):
    argv = flags(
        base, data, tmp_path, "--samples", 2, "--precision", how, "--attention", "eager", "--device-map", "cpu"
    )
    done = call("evaluate", *argv)
    assert done.code == 0, done.err
    exact, rounded = predictions(through_transformers)[:2], predictions(tmp_path)
    gaps = [abs(a["nll"] - b["nll"]) for a, b in zip(exact, rounded, strict=True)]
    assert 0 < max(gaps) < 0.5, gaps


@pytest.mark.slow
def test_what_is_quantised_already_cannot_be_rounded_again(through_llama_cpp, base, data, tmp_path):
    nf4 = ("--model", base, "--data", data, "--method", "nf4", "--samples", 2, "--output", tmp_path / "nf4")
    assert call("quantize", *nf4).code == 0
    done = call("evaluate", *flags(tmp_path / "nf4", data, tmp_path, "--precision", "int8"))
    refused(done, "is already quantised", "--precision int8")


def test_a_clock_is_read_once_the_device_has_finished(base, monkeypatch):
    """As on a GPU, which works in the background: here it finishes 30 ms after it is asked to."""
    from lib.core import hardware
    from lib.engines import opening

    engine = opening.open_engine(directory.open_directory(base), load="fp32", threads=1)
    prompts = [[5, 6, 7]]
    engine.generate(prompts, 3, exact=True)
    monkeypatch.setattr(hardware, "synchronise", lambda: time.sleep(0.03))
    (answer,) = engine.generate(prompts, 3, exact=True)
    assert answer.prompt_seconds > 0.03 and answer.decode_seconds > 2 * 0.03


# --- memory that runs out ------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """A function: batches of more than so many rows run out of memory, all of them or only while speed is measured;
    after so many batches all do. What got through is noted as (rows, exact)."""
    import torch

    from lib.engines.transformers_engine import Transformers

    real, passed, limit = Transformers.generate_batch, [], {}

    def generate_batch(self, prompts, max_new_tokens, exact):
        large = len(prompts) > limit["rows"] and exact >= limit["exact"]
        if large or len(passed) >= limit["batches"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        answered = real(self, prompts, max_new_tokens, exact)
        passed.append((len(prompts), exact))
        return answered

    def set_limit(rows=99, exact=False, batches=999):
        passed.clear()
        limit.update(rows=rows, exact=exact, batches=batches)
        return passed

    monkeypatch.setattr(Transformers, "generate_batch", generate_batch)
    set_limit()
    return set_limit


def test_a_batch_that_does_not_fit_is_repeated_in_halves(base, data, tmp_path, memory, through_transformers):
    passed = memory(rows=2)
    done = call("evaluate", *flags(base, data, tmp_path))
    assert done.code == 0, done.err
    assert "out of memory at batch size 5; continuing with batch size 3" in done.err
    assert done.err.count("out of memory") == 2
    assert [rows for rows, exact in passed if not exact] == [2, 2, 1]
    rows, expected = predictions(tmp_path), predictions(through_transformers)
    assert [(row["id"], row["answer"]) for row in rows] == [(row["id"], row["answer"]) for row in expected]
    assert [row["nll"] for row in rows] == pytest.approx([row["nll"] for row in expected])
    assert artifact.read(tmp_path / "eval")["metrics"]["speed"]["batch"]["streams"] == 2


def test_streams_are_those_that_ran_at_once(base, data, tmp_path, memory):
    """Memory runs out only once the speed is measured: all of it is measured again with what fits."""
    passed = memory(rows=3, exact=True)
    done = call("evaluate", *flags(base, data, tmp_path))
    assert done.code == 0, done.err
    batch = artifact.read(tmp_path / "eval")["metrics"]["speed"]["batch"]
    assert batch["streams"] == 2 and batch["generated_tokens_per_second"]["n"] == 3  # 8, 4, 2
    assert passed[-8:] == 4 * [(1, True), (2, True)]
    assert (5, False) in passed


def test_where_not_even_one_row_fits_the_answered_rows_are_kept(base, data, tmp_path, memory, through_transformers):
    argv = flags(base, data, tmp_path, "--batch-size", 1)
    memory(batches=4)
    done = call("evaluate", *argv)
    assert done.code == 3 and "Traceback" not in done.err, done.err
    assert "out of memory with a single example" in done.err and "4 answers are finished and saved in" in done.err
    assert not (tmp_path / "eval").exists()
    memory()
    done = call("evaluate", *argv)
    assert done.code == 0 and "resuming: 4 of 5 examples are done" in done.out
    answers = [[(row["id"], row["answer"]) for row in predictions(run)] for run in (tmp_path, through_transformers)]
    assert answers[0] == answers[1]


def test_answers_of_other_code_are_not_continued(base, data, tmp_path, memory, monkeypatch):
    argv = flags(base, data, tmp_path, "--batch-size", 1)
    memory(batches=3)
    assert call("evaluate", *argv).code == 3
    memory()
    monkeypatch.setattr(artifact, "code_digest", lambda script: "after a change of metrics.py")
    done = call("evaluate", *argv)
    assert done.code == 0 and "with other inputs, settings or code; starting over" in done.out
    assert "resuming" not in done.out


def test_a_model_that_is_not_there_or_was_changed_is_refused(data, plain, base, tmp_path):
    import shutil

    refused(call("evaluate", *flags(tmp_path / "none", data, tmp_path)), "does not exist")
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    with open(changed / "config.json", "a") as file:
        file.write("\n")
    refused(call("evaluate", *flags(changed, data, tmp_path)), "checksum mismatch", "config.json")
    (plain / "model.safetensors").unlink()
    refused(call("evaluate", *flags(plain, data, tmp_path)), str(plain))
