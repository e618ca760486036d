"""Data sets from a file of the user's own and from the bundled factbook."""

import json

from lib import artifact, records
from tests.conftest import beside, call, refused, row

FILES = ["documents.jsonl", "metadata.json", "test.jsonl", "train.jsonl", "validation.jsonl"]


def test_every_row_falls_into_one_split_and_metadata_counts_them(data, tiny_artifacts):
    assert beside(data) == FILES
    splits = {split: records.read_file(data / f"{split}.jsonl") for split in records.SPLITS}
    meta = artifact.read(data, "data")
    assert {split: len(rows) for split, rows in splits.items()} | {"documents": 60} == meta["metrics"]
    asked = [r["prompt"][-1]["content"] for rows in splits.values() for r in rows]
    assert len(set(asked)) == len(asked) == 60
    original = {r["id"]: r for r in records.read_file(tiny_artifacts["rows"])}
    assert all(original[r["id"]] == r for rows in splits.values() for r in rows)
    assert meta["seed"] == 42 and meta["inputs"]["file"]["path"] == str(tiny_artifacts["rows"])


def test_documents_stand_once_each_however_many_rows_share_them(tmp_path):
    rows = tmp_path / "rows.jsonl"
    shared = [row(n) | {"documents": ["shared", f"own {n}"]} for n in range(9)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in shared))
    assert call("generate_data", "--source", rows, "--output", tmp_path / "out").code == 0
    documents = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").open()]
    assert sorted(d["text"] for d in documents) == sorted(["shared", *(f"own {n}" for n in range(9))])
    assert len({d["id"] for d in documents}) == 10


def test_the_same_file_and_seed_is_the_same_digest_and_another_seed_is_not(tiny_artifacts, data, tmp_path):
    for seed in (42, 43):
        argv = ("--source", tiny_artifacts["rows"], "--seed", seed, "--output", tmp_path / f"{seed}")
        assert call("generate_data", *argv).code == 0
    assert artifact.read(tmp_path / "42")["digest"] == artifact.read(data)["digest"]
    assert artifact.read(tmp_path / "43")["digest"] != artifact.read(data)["digest"]


def test_bad_sources_are_refused_and_leave_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.txt").write_text("hello")
    for source, word in {
        tmp_path / "folder": "is a directory",
        tmp_path / "rows.txt": ".jsonl",
        tmp_path / "gone.jsonl": "does not exist",
        tmp_path / "gone.CSV": "does not exist",
        "": "is a directory",
    }.items():
        refused(call("generate_data", "--source", source, "--output", tmp_path / "out"), word)
    assert beside(tmp_path) == ["folder", "rows.txt"]


def test_an_unreachable_hub_set_is_refused_without_waiting(tmp_path):
    done = call("generate_data", "--source", "someone/nonesuch", "--output", tmp_path / "out")
    refused(done, "someone/nonesuch", "factbook")
    assert not (tmp_path / "out").exists()


def test_a_failed_run_leaves_the_old_data_as_it_was(tiny_artifacts, tmp_path):
    out = tmp_path / "out"
    assert call("generate_data", "--source", tiny_artifacts["rows"], "--output", out).code == 0
    before = artifact.read(out)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
    refused(call("generate_data", "--source", tmp_path / "bad.jsonl", "--output", out), "bad.jsonl:1")
    assert artifact.read(out) == before


def test_the_output_cannot_be_where_the_source_lies(tmp_path):
    """`--output .` beside one's own rows must not take them away."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(n)) + "\n" for n in range(9)))
    refused(call("generate_data", "--source", rows, "--output", tmp_path), "not an artifact")
    refused(call("generate_data", "--source", rows, "--output", rows), "rows.jsonl")
    assert beside(tmp_path) == ["rows.jsonl"] and len(records.read_file(rows)) == 9
