"""Data sets from a file of the user's own and from the bundled factbook, and the stages of CLaRa made of one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.clara import passages
from lib.core import artifact
from lib.data import records
from lib.report import lineage
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


def test_a_hub_set_is_known_by_its_commit(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    commit, asked = "0123456789" * 4, []
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha=commit))

    def load(hub_id, revision, split):
        asked.append((hub_id, revision, split))
        return datasets.Dataset.from_list([{"question": f"Which is number {n}?", "gold": ["a"]} for n in range(9)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    done = call("generate_data", "--source", "owner/questions", "--output", tmp_path / "out")
    assert done.code == 0 and asked == [("owner/questions", commit, "train")], done.err
    meta = artifact.read(tmp_path / "out")
    assert meta["inputs"] == {"hub": {"path": "hf://datasets/owner/questions train", "digest": f"{commit} train"}}
    assert artifact.state(tmp_path / "out") == ("intact", "data")
    stages, gaps = {}, []
    lineage.collect(tmp_path / "out", stages, gaps)
    assert len(stages) == 1 and gaps == []


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
    refused(call("generate_data", "--source", rows, "--output", tmp_path), "was not made by Quartet")
    refused(call("generate_data", "--source", rows, "--output", rows), "rows.jsonl")
    assert beside(tmp_path) == ["rows.jsonl"] and len(records.read_file(rows)) == 9


# --- clara -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lands(tmp_path_factory) -> Path:
    """A data artifact of 40 lands with two documents each. Two neighbours stand in one split, and their border in the
    documents of both."""
    rows = []
    for n in range(40):
        other, km = n ^ 1, f"{300 + n // 2} km"
        coast = "yes" if n % 3 else "no"
        cities = f"Land {n}, cities. Capital: Town {n}. Border with land {other}: {km}. Harbour: {coast}."
        nature = f"Land {n}, nature. Highest point: Mount {n}."
        group = f"lands {n // 2}"
        for question, documents, gold in (
            (f"What is the capital of land {n}?", [cities], [f"Town {n}", f"the town {n}"]),
            (f"How long is the border of land {n} with land {other}?", [cities], [km]),
            (f"Does land {n} have a harbour?", [cities], [coast]),
            (f"What is the highest point of land {n}?", [nature], [f"Mount {n}"]),
            (f"What is the capital of the land whose highest point is Mount {n}?", [nature, cities], [f"Town {n}"]),
        ):
            rows.append({"question": question, "documents": documents, "gold": gold, "group": group})
    folder = tmp_path_factory.mktemp("lands")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in [*rows, {"prompt": "a", "completion": "b"}])
    )
    assert call("generate_data", "--source", folder / "rows.jsonl", "--output", folder / "raw").code == 0
    return folder / "raw"


def clara(data, output, *more):
    return call("generate_data", "--source", "clara", "--data", data, "--output", output, "--threads", 1, *more)


@pytest.fixture(scope="module")
def stages(lands) -> Path:
    assert clara(lands, lands.with_name("clara")).code == 0
    return lands.with_name("clara")


def published(folder, stage, split) -> list[dict]:
    return [json.loads(line) for line in (folder / f"stage{stage}-{split}.jsonl").open()]


def test_every_passage_comes_with_all_its_pairs_and_the_splits_stay(lands, stages):
    for split in records.SPLITS:
        rows = [r for r in records.load_split(lands, split) if r["documents"]]
        pairs = {(r["documents"][0], r["gold"][0]) for r in rows if len(r["documents"]) == 1}
        made = published(stages, 1, split)
        assert {(r["docs"][0], answer) for r in made for answer in r["answers"]} == pairs
        assert len(made) == len({r["docs"][0] for r in made}) and all(r["data_type"] == "qa" for r in made)
        assert all("Document:" not in question for r in made for question in r["question"])
        own = {document for r in rows for document in r["documents"]}
        for stage in (2, 3):
            made = published(stages, stage, split)
            assert len(made) == len(rows)
            assert {document for r in made for document in r["docs"]} <= own
    meta = artifact.read(stages, "clara-data")
    assert meta["metrics"] == {
        name.removesuffix(".jsonl"): len((stages / name).read_text().splitlines()) for name in meta["files"]
    }
    assert meta["inputs"]["data"]["digest"] == artifact.read(lands)["digest"]


@pytest.mark.parametrize(("stage", "size"), [(2, 5), (3, 20)])
def test_the_right_documents_are_among_the_candidates_at_places_of_their_own(lands, stages, stage, size):
    rows = {
        records.question_alone(r["prompt"][0]["content"], r["documents"]): r for r in records.load_split(lands, "train")
    }
    places = []
    for made in published(stages, stage, "train"):
        row = rows[made["question"]]
        assert len(made["docs"]) == len(set(made["docs"])) == size
        assert {made["docs"][n] for n in made["pos_index"]} == set(row["documents"])
        assert [made["gold_answer"], *row["gold"][1:]] == made["golden_answers"] == row["gold"]
        assert made["answer"] == row["completion"][0]["content"]
        places += made["pos_index"]
    assert set(places) == set(range(size)), "no place is always wrong"
    assert max(map(places.count, places)) < 4 * len(places) / size


def test_distractors_are_what_the_retriever_finds_but_for_what_answers_as_well(stages):
    for made in published(stages, 2, "train"):
        numbers = [int(n) for n in re.findall(r"land (\d+)", made["question"])]
        cities = {int(re.match(r"Land (\d+)", text)[1]) for text in made["docs"] if ", cities." in text}
        if "capital of land" in made["question"]:
            assert numbers[0] ^ 1 in cities, "the neighbour, whose passage names the land and a capital"
            assert any(text.startswith(f"Land {numbers[0]}, nature.") for text in made["docs"])
        if "border" in made["question"]:
            assert numbers[0] in cities and numbers[1] not in cities, "whose passage says the same length"
    coasts = [made for made in published(stages, 3, "train") if "harbour" in made["question"]]
    for made in coasts:
        said = [f"Harbour: {made['gold_answer']}." in text for text in made["docs"]]
        assert sum(said) > 1, "the answer alone does not tell the right passage"


def test_a_row_of_ours_reads_back_as_it_was_derived(stages):
    for stage in (1, 2, 3):
        for made, read in zip(published(stages, stage, "test"), passages.load_rows(stages, stage, "test"), strict=True):
            if stage == 1:
                assert read == (made["docs"][0], list(zip(made["question"], made["answers"])), "qa")
            else:
                keys = ("question", "docs", "answer", "golden_answers", "pos_index", "group")
                assert read == tuple(made[key] for key in keys)


def test_fewer_questions_are_the_first_of_more_and_the_seed_draws_others(lands, stages, tmp_path):
    for name, *more in (("few", "--questions", 7), ("other", "--questions", 7, "--seed", 1), ("again",)):
        assert clara(lands, tmp_path / name, *more).code == 0
    for stage in (2, 3):
        assert published(tmp_path / "few", stage, "train") == published(stages, stage, "train")[:7]
        assert published(tmp_path / "other", stage, "train") != published(tmp_path / "few", stage, "train")
    assert artifact.read(tmp_path / "again")["digest"] == artifact.read(stages)["digest"]


def test_sizes_are_as_asked_and_never_without_the_right_documents(lands, tmp_path):
    assert clara(lands, tmp_path / "out", "--documents", 1, "--candidates", 500).code == 0
    for made in published(tmp_path / "out", 2, "test"):
        assert len(made["docs"]) == len(made["pos_index"]) == 1 + ("whose" in made["question"])
    for made in published(tmp_path / "out", 3, "test"):
        assert 1 < len(made["docs"]) <= len(published(tmp_path / "out", 1, "test"))


def test_data_that_has_no_documents_is_refused(tmp_path, lands, stages):
    rows = [{"prompt": f"question {n}", "completion": "yes"} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert call("generate_data", "--source", tmp_path / "rows.jsonl", "--output", tmp_path / "raw").code == 0
    refused(clara(tmp_path / "raw", tmp_path / "out"), "has documents, which CLaRa learns to compress")
    refused(clara(tmp_path / "rows.jsonl", tmp_path / "out"), "--data is not a data artifact")
    refused(clara(tmp_path / "gone", tmp_path / "out"), "does not exist")
    refused(clara(stages, tmp_path / "out"), "expected kind 'data', found 'clara-data'")
    refused(call("generate_data", "--source", "clara", "--output", tmp_path / "out"), "--data is not a data artifact")
    assert beside(tmp_path) == ["raw", "rows.jsonl"]
