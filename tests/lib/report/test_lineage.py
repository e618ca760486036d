"""Test rows that a model may have been trained on are noticed by the digests in metadata."""

import json
from argparse import Namespace

import pytest

from lib.core import artifact
from lib.core.cli import InputError
from lib.report import lineage
from tests.conftest import call, refused


def build(path, kind, **inputs):
    with artifact.write_artifact(path, kind, Namespace(seed=1), inputs) as written:
        (written.path / "content").write_text(str(path))
    return path


def split(source, output, *flags):
    done = call("generate_data", "--source", source, "--output", output, *flags)
    assert done.code == 0, done.err
    return output


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) + "\n" for n in range(30)))
    return path


def test_a_model_is_evaluated_on_the_other_splits_of_its_data(rows, tmp_path):
    data = split(rows, tmp_path / "raw")
    filtered = build(tmp_path / "filtered", "data", data=data)
    adapter = build(tmp_path / "lora", "adapter", data=filtered)
    merged = build(tmp_path / "merged", "model", adapter=adapter)
    for model in (adapter, merged, tmp_path):
        for held_out in (data, filtered):
            lineage.check_held_out(model, artifact.identify(held_out))
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "x", "completion": "y"}\n')
    lineage.check_held_out(adapter, artifact.identify(other))


def test_training_rows_are_no_test_rows(rows, tmp_path):
    data, again = split(rows, tmp_path / "raw"), split(rows, tmp_path / "again", "--seed", 3)
    from_file, from_data = build(tmp_path / "a", "adapter", data=rows), build(tmp_path / "b", "adapter", data=data)
    merged = build(tmp_path / "merged", "model", adapter=from_file)
    for model, held_out in [
        (from_file, rows), (merged, rows), (from_file, data), (from_data, rows), (from_data, again),
        (build(tmp_path / "c", "clara", data=build(tmp_path / "d", "clara-data", data=again)), data),
    ]:  # fmt: skip
        with pytest.raises(InputError, match="was trained on rows of the same source"):
            lineage.check_held_out(model, artifact.identify(held_out))


def test_a_copy_or_a_link_of_the_training_rows_is_known(rows, tmp_path):
    model = build(tmp_path / "a", "adapter", data=rows)
    (tmp_path / "copy.jsonl").write_bytes(rows.read_bytes())
    (tmp_path / "link.jsonl").symlink_to(rows)
    for held_out in (
        tmp_path / "copy.jsonl",
        tmp_path / "link.jsonl",
        split(tmp_path / "copy.jsonl", tmp_path / "raw"),
    ):
        with pytest.raises(InputError, match="was trained on rows of the same source") as error:
            lineage.check_held_out(model, artifact.identify(held_out))
        assert "built again" not in str(error.value)
    rows.rename(tmp_path / "moved.jsonl")
    with pytest.raises(InputError, match="was trained on rows of the same source"):
        lineage.check_held_out(model, artifact.identify(tmp_path / "moved.jsonl"))


def test_each_training_of_a_model_counts(rows, tmp_path):
    """DPO on pairs of data that were split, after SFT on all their rows."""
    data = split(rows, tmp_path / "raw")
    first = build(tmp_path / "sft", "adapter", data=rows)
    pairs = build(tmp_path / "pairs", "preferences", data=data)
    with pytest.raises(InputError, match="was trained on rows of the same source"):
        model = build(tmp_path / "dpo", "adapter", adapter=first, data=pairs)
        lineage.check_held_out(model, artifact.identify(data))
    alone = build(tmp_path / "alone", "adapter", data=pairs)
    lineage.check_held_out(alone, artifact.identify(data))


def test_the_splits_of_a_hub_set_are_apart(tmp_path):
    def hub(name: str, split: str, commit: str = "abc"):
        return build(tmp_path / name, "data", hub=artifact.identify_hub("datasets", "someone/rows", commit, split))

    model = build(tmp_path / "lora", "adapter", data=hub("train", "train"))
    lineage.check_held_out(model, artifact.identify(hub("test", "test")))
    for name, commit in (("again", "abc"), ("later", "abd")):
        with pytest.raises(InputError, match="was trained on rows of the same source"):
            lineage.check_held_out(model, artifact.identify(hub(name, "train", commit)))


def test_data_that_were_built_again_may_be_split_otherwise(rows, tmp_path):
    data = split(rows, tmp_path / "raw")
    adapter = build(tmp_path / "lora", "adapter", data=data)
    filtered = build(tmp_path / "other" / "lora", "adapter", data=build(tmp_path / "filtered", "data", data=data))
    split(rows, data, "--seed", 3)
    for model in (adapter, filtered):
        with pytest.raises(InputError, match="before it was built again"):
            lineage.check_held_out(model, artifact.identify(data))


def test_the_evaluation_refuses_before_a_model_is_loaded(base, rows, tmp_path):
    model = tmp_path / "lora"
    flags = ["--model", base, "--data", rows, "--output", model, "--run-dir", tmp_path / "run", "--samples", 4]
    assert call("sft", *flags, "--accumulation-steps", 2).code == 0
    done = call("evaluate", "--model", model, "--data", rows, "--output", tmp_path / "eval")
    refused(done, "was trained on rows of the same source", str(rows))
