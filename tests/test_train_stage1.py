"""train_stage1.py on a tiny model: rows in the published form, what is left, what a killed run continues."""

import json

import pytest
import torch

from lib.clara import network
from lib.core import artifact
from lib.model import loading
from lib.model.directory import open_directory
from tests.conftest import call, killed_at_checkpoint, refused

FLAGS = ["--samples", 16, "--batch-size", 2, "--accumulation-steps", 2, "--eval-samples", 4, "--eval-steps", 2,
         "--compress-rate", 4, "--doc-max-tokens", 32, "--lora-r", 4, "--checkpoint-steps", 2, "--precision", "fp32",
         "--threads", 1, "--short-share", 0.5]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """In the form that the authors publish: several questions a row, and paraphrases."""
    made = []
    for n in range(24):
        told = f"The river of country {n} is the River {chr(65 + n)}. Its area is {n * 7} sq km. It rises on Mount {n}."
        asked = [f"Which river is in country {n}?", f"What is the area of country {n}?", "Where does it rise?"]
        answers = [f"River {chr(65 + n)}", f"{n * 7} sq km", f"Mount {n}"]
        made.append({"data_type": "qa", "question": asked, "answers": answers, "docs": [told]})
    made[3] = {"data_type": "paraphrase", "answers": ["A river flows there."], "docs": [made[3]["docs"][0]]}
    file = tmp_path_factory.mktemp("stage1") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


def flags(base, rows, folder, *more):
    return ["--model", base, "--data", rows, "--output", folder / "out", "--run-dir", folder / "run", *FLAGS, *more]


@pytest.fixture(scope="module")
def trained(base, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = call("train_stage1", *flags(base, rows, folder, "--epochs", 3))
    assert done.code == 0, done.err
    return folder / "out", done


def losses(folder) -> list:
    return [event["loss"] for event in artifact.read(folder, "clara")["metrics"]["history"]]


def test_it_learns_and_says_whether_the_vectors_carry_anything(trained):
    folder, done = trained
    history = artifact.read(folder, "clara")["metrics"]["history"]
    assert len(history) == 12 and history[-1]["loss"] < history[0]["loss"]
    assert all(event["right"] > 0 and event["shuffled"] > 0 and event["apart"] >= 0 for event in history)
    assert history[1]["right"] != history[0]["right"] and history[2]["right"] == history[1]["right"]
    assert f"{history[-1]['right']:.3f} with the right documents, {history[-1]['shuffled']:.3f}" in done.out


def test_what_is_left_is_what_was_learnt_and_no_copy_of_the_base(trained, base):
    folder, _ = trained
    assert {"clara.json", "compressor.safetensors", "generator.safetensors", "memory.safetensors"} <= {
        file.name for file in folder.iterdir()
    }
    assert not list(folder.glob("model*")) and json.loads((folder / "clara.json").read_text())["compress_rate"] == 4
    model = network.load_clara(folder, loading.load_model(open_directory(base), "fp32"))
    learnt = [p for name, p in model.named_parameters() if "lora_B" in name and ".reasoner." not in name]
    assert learnt and all(p.abs().sum() > 0 for p in learnt)
    assert torch.equal(
        model.lm.get_input_embeddings().weight,
        loading.load_model(open_directory(base), "fp32").get_input_embeddings().weight,
    )


@pytest.mark.slow
def test_a_killed_run_continues_with_the_same_losses(trained, base, rows, tmp_path):
    again = flags(base, rows, tmp_path, "--epochs", 3)
    killed_at_checkpoint("train_stage1", again, tmp_path / "run", "[46]")
    done = call("train_stage1", *again)
    assert done.code == 0 and "resuming from" in done.out, done.err
    assert losses(tmp_path / "out") == losses(trained[0])
    kept = (artifact.read(folder)["files"] for folder in (tmp_path / "out", trained[0]))
    assert len({files["compressor.safetensors"] for files in kept}) == 1


def test_a_training_that_diverges_ends_at_its_first_value_that_is_no_number(base, rows, tmp_path):
    argv = flags(base, rows, tmp_path, "--epochs", 3, "--checkpoint-steps", 1, "--learning-rate", 1e30)
    done = call("train_stage1", *argv)
    refused(done, "right is nan, so training ends", "Lower --learning-rate (it is 1e+30)", "is kept")
    assert not (tmp_path / "out").exists()
    again = call("train_stage1", *argv)
    refused(again, "is nan, so training ends")
    assert "resuming from" in again.out


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(trained, base, rows, tmp_path):
    done = call("train_stage1", *flags(base, rows, tmp_path, "--epochs", 3, "--gradient-checkpointing"))
    assert done.code == 0, done.err
    assert losses(tmp_path / "out") == pytest.approx(losses(trained[0]), rel=1e-4)


def test_the_first_half_is_read_in_stretches(base, rows, tmp_path):
    """Behind the first sentence one each, with its own answers: what is to be learnt stays, in more rows."""
    made = {}
    for words in (9, 99):
        folder = tmp_path / str(words)
        done = call("train_stage1", *flags(base, rows, folder, "--short-words", words, "--reconstruction-weight", 0))
        assert done.code == 0, done.err
        made[words] = artifact.read(folder / "out", "clara")["metrics"]
    assert made[99]["rows"] == 16 and made[9]["rows"] > 16
    assert made[9]["labels"]["labels"] == made[99]["labels"]["labels"]


def test_rows_and_models_that_cannot_work_are_refused(base, rows, tmp_path):
    refused(call("train_stage1", *flags(base, rows, tmp_path, "--max-length", 16)), "are longer than --max-length 16")
    refused(call("train_stage1", *flags(tmp_path / "none", rows, tmp_path)), "does not exist")
    (tmp_path / "bad.jsonl").write_text('{"docs": ["a"], "question": ["b", "c"], "answers": ["d"]}\n')
    refused(
        call("train_stage1", *flags(base, tmp_path / "bad.jsonl", tmp_path)), "bad.jsonl:1", "one answer per question"
    )
