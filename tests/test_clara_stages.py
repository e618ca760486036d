"""train_stage2.py, train_stage3.py, ask.py and evaluate_clara.py on a tiny model, one after another."""

import argparse
import json
import shutil
import weakref
from pathlib import Path

import evaluate_clara
import pytest
import torch
from safetensors.torch import load_file

from lib.clara import network, passages
from lib.core import artifact
from lib.core.cli import InputError
from lib.model import directory
from tests.conftest import REPOSITORY, beside, call, killed, killed_at_checkpoint, refused

PASSAGES = [f"The river of country {n} is the River {chr(65 + n)}. Its area is {n * 7} sq km." for n in range(24)]
ONE_THREAD = ["--threads", 1, "--precision", "fp32"]
TRAINING = ["--samples", 12, "--batch-size", 2, "--eval-samples", 3, "--eval-steps", 2, "--checkpoint-steps", 2,
            *ONE_THREAD]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Questions with two or four candidates in the published form: more than k, and fewer."""
    made = [
        {
            "question": f"Which river is in country {n}?", "gold_answer": f"River {chr(65 + n)}", "pos_index": [n % 2],
            "docs": [PASSAGES[(n + k * 5 - 5 * (n % 2)) % 24] for k in range(4 if n % 3 else 2)],
        }
        for n in range(24)
    ]  # fmt: skip
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def run(name, model, data, folder, *more):
    done = call(name, "--model", model, "--data", data, "--output", folder, "--run-dir", f"{folder}-run", *more)
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture(scope="module")
def stages(base, clara_data, rows, tmp_path_factory):
    """What the three stages left, and what the third said."""
    folder = tmp_path_factory.mktemp("stages")
    shape = ["--compress-rate", 4, "--doc-max-tokens", 16, "--lora-r", 4]
    one, _ = run("train_stage1", base, clara_data, folder / "one", *TRAINING, *shape)
    two, _ = run("train_stage2", one, rows, folder / "two", *TRAINING, "--accumulation-steps", 2)
    three, said = run("train_stage3", two, rows, folder / "three", *TRAINING, "--k", 3, "--epochs", 2)
    return one, two, three, said


def weights(folder, name):
    return load_file(folder / f"{name}.safetensors")


def same(one, other) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# --- stages 2 and 3 -----------------------------------------------------------------------------------------


def test_the_second_stage_goes_on_with_both_adapters(stages):
    one, two, *_ = stages
    for name in ("compressor", "generator", "memory"):
        assert not same(weights(one, name), weights(two, name))
    history = artifact.read(two, "clara")["metrics"]["history"]
    assert len(history) == 3 and all(event["right"] > 0 for event in history)


def test_a_fresh_generator_forgets_the_first_stage(stages, rows, tmp_path):
    one, two, *_ = stages
    fresh, _ = run(
        "train_stage2", one, rows, tmp_path / "fresh", *TRAINING, "--accumulation-steps", 2, "--generator", "fresh"
    )
    sizes = {
        folder: sum(t.norm() for n, t in weights(folder, "generator").items() if "lora_B" in n)
        for folder in (fresh, two)
    }
    assert 0 < sizes[fresh] < sizes[two] / 2


def test_the_third_stage_leaves_every_compressed_document_valid(stages):
    _, two, three, said = stages
    assert same(weights(two, "compressor"), weights(three, "compressor"))
    before, after = weights(two, "memory"), weights(three, "memory")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"centre", "whitening", "seeking", "places"}  # of searching alone
    assert not same(weights(two, "generator"), weights(three, "generator"))
    assert not same(weights(three, "compressor"), weights(three, "reasoner"))
    meta = artifact.read(three, "clara")
    assert json.loads((three / "clara.json").read_text())["k"] == 3
    assert f"{meta['metrics']['watched']['recall']:.1%} of the right documents are among the 3" in said.out


def test_the_third_stage_counts_no_documents_that_it_does_not_read(stages):
    for folder, some in zip(stages, (True, True, False)):
        assert bool(artifact.read(folder, "clara")["metrics"]["labels"]["document_tokens"]) is some
    assert "per vector" not in stages[3].out and "examples, loss on" in stages[3].out


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_killed_stage_continues_with_the_same_losses(stage, stages, rows, tmp_path):
    name, given = f"train_stage{stage}", ["--model", stages[stage - 2], "--data", rows, *TRAINING, "--epochs", 6]
    given += ["--accumulation-steps", 1]
    place = [["--output", tmp_path / n, "--run-dir", tmp_path / f"{n}-run"] for n in "ab"]
    whole = call(name, *given, *place[0])
    assert whole.code == 0, whole.err
    killed_at_checkpoint(name, [*given, *place[1]], tmp_path / "b-run", "1[0-9]")
    done = call(name, *given, *place[1])
    assert done.code == 0 and "resuming from" in done.out, done.err
    histories = [artifact.read(tmp_path / n)["metrics"]["history"] for n in "ab"]
    assert [event["loss"] for event in histories[0]] == [event["loss"] for event in histories[1]]
    assert same(weights(tmp_path / "a", "generator"), weights(tmp_path / "b", "generator"))


@pytest.mark.parametrize("stage", [2, 3])
def test_validation_takes_the_batch_that_training_has_backed_off_to(stage, stages, rows, tmp_path, monkeypatch):
    """Memory for one example: the first validation runs out of it with two, and every later pass takes one."""
    real, sizes, most = network.Clara.loss, [], 1

    def loss(self, examples, *given):
        sizes.append(len(examples))
        if len(examples) > most and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, examples, *given)

    given = ["--epochs", 1, "--accumulation-steps", 1]
    whole = artifact.read(run(f"train_stage{stage}", stages[stage - 2], rows, tmp_path / "whole", *TRAINING, *given)[0])
    monkeypatch.setattr(network.Clara, "loss", loss)
    for name in ("first", "again"):
        sizes.clear()
        folder, done = run(f"train_stage{stage}", stages[stage - 2], rows, tmp_path / name, *TRAINING, *given)
        assert "micro-batch 2" in done.err if name == "first" else "using micro-batch 1" in done.err
        assert sizes[-1] == 1 and (2 in sizes) == (name == "first")
        for event, other in zip(artifact.read(folder)["metrics"]["history"], whole["metrics"]["history"], strict=True):
            assert event["right"] == pytest.approx(other["right"], abs=1e-3)
    most = 0
    given += ["--output", tmp_path / "none", "--run-dir", tmp_path / "none-run"]
    done = call(f"train_stage{stage}", "--model", stages[stage - 2], "--data", rows, *TRAINING, *given)
    assert done.code == 3 and "out of memory while validating after step 1" in done.err


def test_rows_that_do_not_say_what_is_right_teach_without_contrast(stages, rows, tmp_path):
    bare = tmp_path / "bare.jsonl"
    known = [json.loads(line) for line in rows.read_text().splitlines()]
    bare.write_text("".join(json.dumps(row | {"pos_index": None}) + "\n" for row in known))
    given = ["--model", stages[1], "--data", bare, "--output", tmp_path / "out", "--run-dir", tmp_path / "run",
             *TRAINING]  # fmt: skip
    refused(call("train_stage3", *given), "bare.jsonl", "12 of 12 examples have no pos_index")
    assert call("train_stage3", *given, "--retrieval-share", 0).code == 0


def test_another_base_or_another_directory_is_told_apart(stages, base, rows, tmp_path):
    elsewhere = shutil.copytree(base, tmp_path / "moved")
    model = shutil.copytree(stages[0], tmp_path / "model")
    done = run("train_stage2", model, rows, tmp_path / "out", *TRAINING, "--accumulation-steps", 2, "--base", elsewhere)
    assert same(weights(done[0], "generator"), weights(stages[1], "generator"))
    (elsewhere / "metadata.json").unlink()
    (elsewhere / "more.txt").write_text("changed")
    given = ["--model", model, "--data", rows, "--output", tmp_path / "no", *TRAINING]
    refused(call("train_stage2", *given, "--base", elsewhere), "is not the base that")
    refused(call("train_stage2", *given, "--base", tmp_path / "none"), "does not exist; give its path with --base")
    refused(call("train_stage2", "--model", base, *given[2:]), "contains no clara.json")


# --- ask.py ---------------------------------------------------------------------------------------------------


@pytest.fixture
def notes(tmp_path):
    """A document of a token and one of thousands."""
    folder = tmp_path / "my notes"
    folder.mkdir()
    (folder / "short.txt").write_text("a")
    (folder / "long.md").write_text("the river of the north and the island of the south " * 500)
    return folder


def answered(*argv) -> dict:
    done = call("ask", *argv, "--json", "--max-new-tokens", 4, *ONE_THREAD)
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_documents_are_read_as_text_as_vectors_and_from_an_index(stages, notes, tmp_path):
    short, asked = notes / "short.txt", ["--model", stages[2], "--question", "Which river?"]
    text = answered(*asked, "--documents", short, "--mode", "text")
    few = answered(*asked, "--documents", short)
    told = network.encode_question(directory.load_tokenizer(network.open_base(stages[2])), "Which river?", [1])
    read = len(told.before[0]) + 16 // 4 + 1 + len(told.after)  # the vectors, and the separator
    assert text["mode"] == "text" and few["mode"] == "compressed" and few["prompt_tokens"] == read
    everything = answered(*asked, "--documents", notes, "--index", tmp_path / "index")
    pieces = artifact.read(tmp_path / "index", "clara-index")["metrics"]["pieces"]
    assert pieces > 100 and len(everything["sources"]) == 3 and everything["mode"] == "retrieve"
    again = answered(*asked, "--index", tmp_path / "index")
    assert again["sources"] == everything["sources"] and again["answer"] == everything["answer"]
    assert len(answered(*asked, "--index", tmp_path / "one", "--documents", short, "--k", 50)["sources"]) == 1


@pytest.mark.slow
def test_an_index_of_another_model_is_refused_and_made_anew_from_its_documents(stages, notes, rows, tmp_path):
    _, two, three, _ = stages
    index, short = tmp_path / "index", ["--documents", notes / "short.txt"]
    assert call("ask", "--model", three, *short, "--index", index, *ONE_THREAD).code == 0
    other, _ = run("train_stage3", two, rows, tmp_path / "other", *TRAINING, "--seed", 7)
    asked = ["--question", "Which river?", "--index", index, *ONE_THREAD]
    refused(call("ask", "--model", other, *asked), "was made by another model", "--documents")
    refused(call("ask", "--model", two, *asked), "has not learnt to retrieve")
    done = call("ask", "--model", other, *asked, *short)
    assert done.code == 0 and "rebuilding the index, because --model changed" in done.err
    assert call("ask", "--model", other, *asked).code == 0


def test_what_it_takes_is_said_beside_the_answer(stages, notes):
    for model, mode in ((stages[2], "compressed"), (stages[2], "text")):
        given = ["--model", model, "--question", "Which river?", "--documents", notes / "short.txt", "--mode", mode]
        done = call("ask", *given, "--max-new-tokens", 4, *ONE_THREAD)
        assert done.code == 0 and "estimated memory: " in done.err and "memory" not in done.out


def test_a_plain_model_answers_about_text_and_about_nothing(base, notes):
    about = answered("--model", base, "--question", "Which river?", "--documents", notes / "short.txt")
    nothing = answered("--model", base, "--question", "Which river?")
    assert about["mode"] == nothing["mode"] == "text" and about["prompt_tokens"] > nothing["prompt_tokens"]


def test_questions_that_cannot_be_answered_are_refused(stages, base, notes, tmp_path):
    asked = ["--question", "Which river?", *ONE_THREAD]
    refused(call("ask", "--model", base, *asked, "--documents", notes / "long.md"), "are more than the 2,048")
    refused(call("ask", "--model", base, *asked, "--index", tmp_path), "cannot compress documents")
    refused(call("ask", "--model", stages[2], *asked, "--mode", "compressed"), "needs --documents")
    refused(call("ask", "--model", stages[2], *asked, "--documents", tmp_path / "none"), "does not exist")
    refused(call("ask", "--model", stages[2], "--question", " "), "--question: is empty")
    (notes / "short.txt").write_bytes(b"caf\xe9")
    refused(call("ask", "--model", stages[2], *asked, "--documents", notes), "short.txt: is not UTF-8 text (byte 3)")


def test_a_merged_generator_answers_alike(stages):
    from lib.clara.clara_engine import ClaraEngine

    reader = ClaraEngine(stages[2], network.open_base(stages[2]), load="fp32", threads=1)
    prompts = [reader.prompt("Which river?", reader.compress(PASSAGES[n : n + 2])) for n in range(3)]

    def logits():
        model, inputs = reader.inputs(prompts)
        with torch.inference_mode():
            return model(**inputs).logits[:, -1]

    before = logits()
    reader.merge()
    assert logits().allclose(before, atol=1e-4) and before.std() > 0
    model = weakref.ref(reader.model)
    reader.close()
    assert model() is None, "an evaluation would hold two models at once"


def test_a_batch_is_multiplied_by_the_output_matrix_at_once(stages):
    from lib.clara.clara_engine import ClaraEngine

    reader = ClaraEngine(stages[2], network.open_base(stages[2]), load="fp32", threads=1)
    words = len(reader.model.get_output_embeddings().weight)
    prompts = [reader.prompt("Which river?", reader.compress(PASSAGES[:2])) for _ in range(3)]
    with torch.profiler.profile(record_shapes=True) as seen:
        reader.generate(prompts, 1)
    shapes = [event.input_shapes for event in seen.events() if event.name in ("aten::mm", "aten::bmm")]
    assert [len(right) for _, right, *_ in shapes if words in right] == [2], "each row has its copy of the matrix"


# --- evaluate_clara.py ------------------------------------------------------------------------------------------

WAYS = ["closed-book", "text-cut", "text-full", "bm25-text", "minilm-text", "gold-compressed/4x", "other-compressed/4x",
        "minilm-compressed/4x", "reasoner-compressed/4x"]  # fmt: skip


def evaluation(stages, base, clara_data, folder):
    return ["--models", stages[2], "--text-model", base, "--data", clara_data, "--output", folder / "out", "--run-dir",
            folder / "run", "--k", 3, "--samples", 5, "--max-new-tokens", 6, "--timed", 3, *ONE_THREAD]  # fmt: skip


@pytest.mark.slow  # MiniLM
def test_every_way_answers_the_same_questions_and_a_killed_evaluation_continues(stages, base, clara_data, tmp_path):
    given = evaluation(stages, base, clara_data, tmp_path)
    killed("evaluate_clara", given, tmp_path / "run" / "predictions.jsonl", 5)
    done = call("evaluate_clara", *given)
    assert done.code == 0 and "answers are done" in done.out, done.err
    found = artifact.read(tmp_path / "out", "clara-evaluation")["metrics"]
    assert [*found["ways"]] == WAYS and found["questions"] == 5
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 5 * len(WAYS)
    read = {way: one["prompt_tokens"] for way, one in found["ways"].items()}
    for one in found["ways"].values():
        kinds = one["by_kind"].values()
        assert sum(kind["n"] for kind in kinds) == 5
        assert sum(kind["n"] * kind["mean"] for kind in kinds) / 5 == pytest.approx(one["token_f1"]["mean"])
    assert read["closed-book"] < read["text-cut"] < read["text-full"] < read["minilm-text"]
    assert read["minilm-compressed/4x"] == read["reasoner-compressed/4x"]
    for recall in found["recall"].values():
        assert recall["1"]["mean"] <= recall["3"]["mean"] <= recall["5"]["mean"]
    assert (tmp_path / "out" / "index.html").is_file() and beside(tmp_path / "run") == []
    assert [one["against"] for one in found["verdicts"]] == ["text-cut", "other-compressed/4x"]
    assert {one["verdict"] for one in found["targets"] + found["verdicts"]} == {"too few"}  # five questions
    assert (
        f"4x compressed, compared with text truncated to as many tokens: token F1 {found['verdicts'][0]['verdict']}"
        in done.out
    )
    again = [*given, "--against", tmp_path / "out" / "comparison.json", "--estimate", tmp_path / "estimate"]
    again[again.index("--output") + 1] = tmp_path / "again"
    forecast(tmp_path / "estimate", {"clara": stages[2], "evaluate clara": tmp_path / "again"})
    done = call("evaluate_clara", *again)
    assert done.code == 0 and "estimated 10.0 s, took" in done.out
    meta = artifact.read(tmp_path / "again", "clara-evaluation")
    compared = meta["metrics"]
    assert compared["against"]["comparable"]
    assert meta["inputs"]["against"]["path"] == str(tmp_path / "out" / "comparison.json")
    assert compared["against"]["ways"] == {way: one["token_f1"] for way, one in compared["ways"].items()}
    # What it took itself is part of what happened, but for the writing.
    trained, measured = (one["measured"] for one in compared["forecast"]["stages"])
    assert trained == artifact.read(stages[2])["seconds"] and 0 <= meta["seconds"] - measured < 5
    made = json.loads((tmp_path / "again" / "comparison.json").read_text())["stages"]
    names = [Path(one["artifact"]).name for one in made]
    assert [name for name in names if name in ("one", "two", "three", "again")] == ["one", "two", "three", "again"]
    assert "| evaluate clara | 5.0 s |" in (tmp_path / "again" / "report.md").read_text()


def test_the_other_question_has_none_of_the_right_documents(capsys):
    others = evaluate_clara.choose_other_documents([[0, 1], [1], [2], [0]], 4)
    assert others == [[2], [2], [0], [1]]
    assert evaluate_clara.choose_other_documents([[1], [1]], 3) == [[0], [0]]  # no other question: another document
    assert evaluate_clara.choose_other_documents([[0], [0]], 1) == []  # a single document
    assert "a question is about all documents" in capsys.readouterr().out


def test_models_have_keys_of_their_own(tmp_path):
    one, two, three = tmp_path / "a" / "clara", tmp_path / "b" / "clara", tmp_path / "b" / "other"
    assert evaluate_clara.name_models({one: 16}) == {one: "16x"}
    assert [*evaluate_clara.name_models({one: 4, three: 16}).values()] == ["4x clara", "16x other"]
    names = evaluate_clara.name_models({one: 16, two: 16})
    assert [*names.values()] == ["16x a/clara", "16x b/clara"]
    assert evaluate_clara.describe_key(f"gold-compressed/{names[one]}", 5) == "16x a/clara compressed"
    with pytest.raises(InputError, match="given more than once"):
        evaluate_clara.check_models([one, two, tmp_path / "b" / ".." / "a" / "clara"])


def test_text_is_truncated_to_as_many_tokens_as_its_document_has_vectors(stages):
    """Of a long document, that is those of all its pieces; and each model's text is as long as its own vectors."""
    from lib.clara.clara_engine import ClaraEngine

    reader = ClaraEngine(stages[2], network.open_base(stages[2]), load="fp32", threads=1)
    documents = [PASSAGES[0], " ".join(PASSAGES[:4])]
    vectors = [len(pieces.flatten(0, 1)) for pieces in reader.compress(documents)]
    assert vectors == [*map(reader.count_vectors, documents)] and vectors[1] > 3 * vectors[0] > 0
    rows = [passages.Question("Which river?", documents, "A", ["A"], [0, 1])]
    cuts = {"text-cut/4x": [vectors], "text-cut/8x": [[count // 2 for count in vectors]]}
    ways = evaluate_clara.text_ways(reader, rows, [documents], documents, {"bm25": [[0]], "minilm": [[0]]}, cuts, 1)
    lengths = {way: len(prompts[0]) for way, prompts in ways.items()}
    assert lengths["closed-book"] < lengths["text-cut/8x"] < lengths["text-cut/4x"] < lengths["text-full"]
    kept = reader.tokenizer.decode(ways["text-cut/4x"][0])
    for document, count in zip(documents, vectors):
        assert f"Document: {reader.tokenizer.decode(reader.answer_ids(document)[:count])}\n" in kept
    reader.close()


@pytest.mark.slow  # MiniLM
def test_models_of_one_name_are_answered_and_reported_apart(stages, base, clara_data, tmp_path):
    places = [shutil.copytree(stages[n], tmp_path / folder / "clara") for n, folder in ((1, "a"), (2, "b"))]
    given = evaluation(stages, base, clara_data, tmp_path)
    given[1:2] = places
    given[given.index("--samples") + 1] = 2
    done = call("evaluate_clara", *given)
    assert done.code == 0, done.err
    found = artifact.read(tmp_path / "out", "clara-evaluation")["metrics"]
    expected = {f"{kind}/4x {folder}/clara" for kind in ("text-cut", "gold-compressed") for folder in "ab"}
    assert expected <= found["ways"].keys() and "text-cut" not in found["ways"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len({(row["way"], row["n"]) for row in rows}) == len(rows) == 2 * len(found["ways"])
    assert all(row["group"] for row in rows)
    assert "truncated text, as long as 4x a/clara" in (tmp_path / "out" / "report.md").read_text()
    refused(call("evaluate_clara", *given, "--models", places[0], tmp_path / "a" / "clara"), "more than once")


def forecast(path, places):
    """An estimate of five seconds a stage."""
    made = [
        {"stage": name, "artifact": str(place), "status": "estimated", "seconds": 5, "arguments": {}}
        for name, place in places.items()
    ]
    with artifact.write_artifact(path, "estimate", argparse.Namespace()) as build:
        build.metrics = {"stages": made, "rough": False}


def test_answers_with_a_figure_are_told_from_words():
    rows = [passages.Question("?", [], "", [gold], []) for gold in ("Bangui", "62.9%", "St. John's", "17 March")]
    assert evaluate_clara.group_by_kind(rows) == {"words": [0, 2], "figures": [1, 3]}
    assert evaluate_clara.group_by_kind(rows[:1]) == {"words": [0]}


def test_only_the_same_ways_of_another_evaluation_are_shown_beside():
    """The stored evaluation can be read, and documents that were found are compared with as many."""
    path = REPOSITORY / "docs" / "results" / "clara" / "comparison.json"
    stored = evaluate_clara.read_comparison(path)
    same = evaluate_clara.compare_with_stored(path, stored, stored)
    assert same["comparable"] and list(same["ways"]) == list(stored["ways"])
    fewer = evaluate_clara.compare_with_stored(path, stored, stored | {"k": 3})
    assert list(fewer["ways"]) == [
        "closed-book", "text-cut", "text-full", "gold-compressed/16x", "other-compressed/16x",
    ]  # fmt: skip
    assert evaluate_clara.compare_with_stored(path, stored, stored | {"base": "another"})["ways"] == {}


def test_what_an_evaluation_is_held_against_is_checked_first(stages, base, clara_data, tmp_path):
    given = evaluation(stages, base, clara_data, tmp_path)
    refused(call("evaluate_clara", *given, "--against", tmp_path / "none.json"), "none.json")
    (tmp_path / "other.json").write_text('{"ways": {}}')
    refused(call("evaluate_clara", *given, "--against", tmp_path / "other.json"), "base is missing", "comparison.json")
    refused(call("evaluate_clara", *given, "--estimate", stages[2]), "estimate")
