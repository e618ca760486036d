"""generate_preferences.py on tiny models that chatter at random: pairs, scorers, the audit, a killed run."""

import argparse
import json
import shutil

import generate_preferences
import pytest

from lib.core import artifact
from lib.data import metrics, records
from tests.conftest import call, killed, refused

FLAGS = ["--samples", 12, "--validation-samples", 4, "--max-new-tokens", 24, "--min-margin", 0.35, "--batch-size", 16,
         "--checkpoint-interval", 4, "--threads", 1]  # fmt: skip


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Rows whose gold answers are single letters, of which a random text holds some."""
    folder = tmp_path_factory.mktemp("letters")
    rows = [{"question": f"Which letter is number {n}?", "gold": list("bcdefghijklmnop")} for n in range(120)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("generate_data", "--source", folder / "rows.jsonl", "--output", folder / "raw").code == 0
    return folder / "raw"


def flags(model, data, folder, *more):
    return ["--models", model, "--data", data, "--output", folder / "pairs", "--run-dir", folder / "run", *FLAGS, *more]


def read(folder, name) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(talker, letters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    done = call("generate_preferences", *flags(talker, letters, folder))
    assert done.code == 0, done.err
    return folder, done


def test_the_best_response_is_chosen_and_the_worst_rejected(made, letters):
    folder, _ = made
    responses = {one["id"]: one["responses"] for one in read(folder, "responses")}
    for split, count in (("train", 12), ("validation", 4)):
        pairs, prompts = read(folder, split), {row["id"]: row for row in records.load_split(letters, split)}
        assert len(pairs) == count
        for pair in pairs:
            row, some = prompts[pair["id"]], [one for one in responses[pair["id"]] if one["stopped"] and one["text"]]
            assert all(pair[key] == row[key] for key in ("prompt", "group", "source", "gold", "documents"))
            scores = {one["text"]: metrics.score_answer(one["text"], row["gold"])["token_f1"] for one in some}
            (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
            assert chosen["role"] == rejected["role"] == "assistant"
            assert pair["scores"] == {"chosen": max(scores.values()), "rejected": min(scores.values())}
            assert scores[chosen["content"]] == max(scores.values()) > min(scores.values()) + 0.35 - 1e-9
            assert scores[rejected["content"]] == min(scores.values())
            assert some[0]["model"] == 0


def test_prompts_that_gave_no_pair_are_counted_by_reason(made):
    folder, done = made
    found = artifact.read(folder / "pairs", "preferences")["metrics"]
    assert found["train"] == 12 and found["validation"] == 4
    assert found["prompts"] == len(read(folder, "responses")) >= 16 + sum(found["without_pair"].values())
    assert 0 < sum(found["without_pair"].values()) < found["prompts"] and "with a margin below 0.35" in done.out
    assert all(len(one["responses"]) == 3 for one in read(folder, "responses"))
    assert artifact.read(folder / "pairs")["expected_memory_bytes"] > 3e8


def test_the_audit_says_what_else_predicts_the_label(made):
    folder, done = made
    pairs, found = read(folder, "train") + read(folder, "validation"), artifact.read(folder / "pairs")["metrics"]
    lengths = [(len(pair["chosen"][0]["content"]), len(pair["rejected"][0]["content"])) for pair in pairs]
    longer = [a > b for a, b in lengths if a != b]
    assert found["longer_wins"]["mean"] == pytest.approx(sum(longer) / len(longer))
    responses = {one["id"]: [r["text"] for r in one["responses"]] for one in read(folder, "responses")}
    first = [
        responses[pair["id"]].index(pair["chosen"][0]["content"])
        < responses[pair["id"]].index(pair["rejected"][0]["content"])
        for pair in pairs
    ]
    assert found["first_wins"]["mean"] == pytest.approx(sum(first) / len(first)) and found["first_wins"]["n"] == 16
    margins = sorted(pair["scores"]["chosen"] - pair["scores"]["rejected"] for pair in pairs)
    assert found["margin_quantiles"]["0"] == pytest.approx(margins[0]) and margins[0] >= 0.35
    assert found["margin_quantiles"]["100"] == pytest.approx(margins[-1])
    assert "the longer response is chosen in " in done.out and "the earlier response is chosen in " in done.out


def test_pairs_of_one_group_are_audited_as_one_observation():
    pairs = [
        {
            "group": f"country {n % 4}", "prompt": [{"content": str(n)}], "chosen": [{"content": "longer"}],
            "rejected": [{"content": "short"}], "positions": {"chosen": n % 4 // 2, "rejected": 1 - n % 4 // 2},
            "scores": {"chosen": 1, "rejected": 0}, "models": {"chosen": 0, "rejected": 0},
        }
        for n in range(40)
    ]  # fmt: skip
    responses = [[{"text": "longer", "stopped": True}, {"text": "short", "stopped": True}]] * 40
    found = generate_preferences.audit(pairs, responses, argparse.Namespace(seed=1, models=["m"]))
    assert found["longer_wins"]["mean"] == 1 and found["longer_wins"]["low"] < 0.6  # of 40 pairs it would be 0.91
    assert (
        found["first_wins"]["mean"] == 0.5 and found["first_wins"]["high"] > 0.8 and found["first_wins"]["groups"] == 4
    )


def test_killed_it_continues_with_the_same_pairs(made, talker, letters, tmp_path):
    argv = flags(talker, letters, tmp_path)
    kept = killed("generate_preferences", argv, tmp_path / "run" / "responses.jsonl", 4)
    assert not (tmp_path / "pairs").exists()
    done = call("generate_preferences", *argv)
    assert done.code == 0, done.err
    assert f"{kept}/16" in done.err  # it goes on from there
    for name in ("train", "validation", "responses"):
        assert read(tmp_path, name) == read(made[0], name)


@pytest.mark.slow
def test_several_models_respond_one_after_another(talker, letters, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(talker, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "another digest"}))
    argv = flags(talker, letters, tmp_path, "--models", talker, other, "--responses", 2)
    done = call("generate_preferences", *argv)
    assert done.code == 0, done.err
    assert [one["model"] for one in read(tmp_path, "responses")[0]["responses"]] == [0, 0, 1, 1]
    meta = artifact.read(tmp_path / "pairs")
    assert set(meta["inputs"]) == {"model", "model1", "data"}
    assert (
        sum(meta["metrics"]["chosen_by_model"].values()) == 16 and min(meta["metrics"]["chosen_by_model"].values()) > 0
    )


def test_prompts_begin_with_those_that_sft_has_not_seen(made, letters):
    folder, _ = made
    seen = {row["id"] for row in records.sample_rows(records.load_split(letters, "train"), 24, 42)}
    assert seen.isdisjoint(pair["id"] for pair in read(folder, "train"))


def test_a_file_of_rows_is_split_before_it_is_asked(talker, letters, tmp_path):
    done = call("generate_preferences", *flags(talker, letters / "train.jsonl", tmp_path))
    assert done.code == 0, done.err
    train, validation = ({pair["group"] for pair in read(tmp_path, split)} for split in ("train", "validation"))
    assert train and validation and not train & validation


# --- scorers ------------------------------------------------------------------------------------------------


def test_gold_is_the_best_token_f1_over_the_accepted_answers():
    score = generate_preferences.open_scorer("gold", 1)
    assert score({"gold": ["180 sq km", "180"]}, ["180", "The area is 180 sq km", "90"]) == pytest.approx([1, 0.75, 0])


@pytest.mark.slow  # it fetches 91 MB once
def test_embeddings_know_what_is_meant_by_other_words():
    row = {"prompt": records.message("user", "How long is the river?"), "documents": []}
    row["gold"] = ["The river is very long.", "Very."]
    texts = ["The river is very long.", "It is an extremely lengthy river", "Bananas are yellow.", ""]
    same, close, far, _ = generate_preferences.open_scorer("gold-embedding", 1)(row, texts)
    assert same == pytest.approx(1, abs=1e-5) and 0.7 < close < 1 and far < 0.4
    on_topic, _, off_topic, _ = generate_preferences.open_scorer("embedding", 1)(row, texts)
    assert on_topic > 0.5 > 0.3 > off_topic


def reward_model(folder, outputs, **config):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from lib.model import tiny

    words = tiny.tokenizer()
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2)
    made = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(words), num_labels=outputs, **shape | config))
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_a_reward_model_chooses(talker, letters, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = reward_model(tmp_path / "reward", 1)
    argv = flags(talker, letters, tmp_path, "--scorer", f"reward:{folder}", "--min-margin", 1e-4, "--samples", 4)
    done = call("generate_preferences", *argv)
    assert done.code == 0, done.err
    model, words = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for pair in read(tmp_path, "train"):
        for which in ("chosen", "rejected"):
            ids = words.apply_chat_template(pair["prompt"] + pair[which], return_dict=True, return_tensors="pt")
            assert model(**ids).logits.item() == pytest.approx(pair["scores"][which], abs=2e-3)  # 16 bit
        assert pair["scores"]["chosen"] > pair["scores"]["rejected"]
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert artifact.state(tmp_path / "pairs") == ("stale", str(folder))


def test_what_is_no_reward_model_is_refused_before_anything_is_drawn(talker, letters, base, tmp_path):
    two = reward_model(tmp_path / "two", 2)
    for scorer, words in {
        f"reward:{two}": ["has 2 outputs", "give a reward model"],
        f"reward:{tmp_path / 'gone'}": ["transformers cannot load it"],
        "reward:": ["expected reward:MODEL"],
        "best": ["none of gold, gold-embedding, embedding, reward:"],
    }.items():
        refused(call("generate_preferences", *flags(talker, letters, tmp_path, "--scorer", scorer)), *words)
    shutil.copytree(base, tmp_path / "lm")
    config = json.loads((base / "config.json").read_text()) | {"num_labels": 1, "id2label": {"0": "reward"}}
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    done = call("generate_preferences", *flags(talker, letters, tmp_path, "--scorer", f"reward:{tmp_path / 'lm'}"))
    refused(done, "has no weights for score.weight")
    assert not (tmp_path / "run").exists() and not (tmp_path / "pairs").exists()


def test_responses_too_long_for_the_reward_model_are_left_out_and_counted(talker, letters, tmp_path):
    """Here about half of them are."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(talker)
    asked = [row["prompt"] for row in records.load_split(letters, "train")]
    limit = max(len(words.apply_chat_template(prompt, return_dict=True)["input_ids"]) for prompt in asked) + 14
    folder = reward_model(tmp_path / "short", 1, max_position_embeddings=limit)
    argv = flags(talker, letters, tmp_path, "--scorer", f"reward:{folder}", "--min-margin", 1e-4)
    done = call("generate_preferences", *argv)
    assert done.code == 0, done.err
    scores = [one["score"] for line in read(tmp_path, "responses") for one in line["responses"]]
    unscored = artifact.read(tmp_path / "pairs")["metrics"]["unscored_responses"]
    assert 0 < unscored == scores.count(None) < len(scores)
    assert f"{unscored} of {len(scores)} responses are left out, because they are longer" in done.out
    for pair in read(tmp_path, "train"):
        assert pair["scores"]["chosen"] > pair["scores"]["rejected"]


def test_where_no_response_fits_the_reward_model_the_responses_serve_another_scorer(talker, letters, tmp_path):
    folder = reward_model(tmp_path / "short", 1, max_position_embeddings=8)
    done = call("generate_preferences", *flags(talker, letters, tmp_path, "--scorer", f"reward:{folder}"))
    refused(done, "that the reward model can read", "are saved in", "another --scorer to use them")
    done = call("generate_preferences", *flags(talker, letters, tmp_path))
    assert done.code == 0, done.err
    assert "scores: " in done.err and "responses: " not in done.err  # the bars of what was done


# --- what gives no pair ---------------------------------------------------------------------------------------


def test_where_all_scores_are_equal_no_artifact_is_written_and_the_responses_are_kept(talker, tmp_path):
    rows = [{"question": f"Which word is number {n}?", "gold": ["unutterable"]} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("generate_preferences", *flags(talker, tmp_path / "rows.jsonl", tmp_path))
    refused(done, "no pair in 54 prompts", "with equal scores", "are saved in")
    assert (tmp_path / "run" / "responses.jsonl").read_text().count("\n") == 54 and not (tmp_path / "pairs").exists()


def test_the_first_prompts_alone_decide_nothing(talker, letters, tmp_path, monkeypatch):
    """Neither that there will be no pair, nor that all prompts there are will be needed."""
    first = {row["id"] for row in generate_preferences.load_prompts(letters, 42)["train"][:12]}
    real = generate_preferences.choose_pair
    monkeypatch.setattr(
        generate_preferences,
        "choose_pair",
        lambda row, *given: (None, "x") if row["id"] in first else real(row, *given),
    )
    done = call("generate_preferences", *flags(talker, letters, tmp_path, "--validation-samples", 0))
    assert done.code == 0 and "0 pairs from 12 prompts" in done.out, done.err
    assert len(read(tmp_path, "train")) == 12 and "from 36 prompts" in done.out


def test_prompts_and_flags_that_cannot_work_are_refused(talker, letters, tmp_path):
    refused(call("generate_preferences", *flags(talker, letters, tmp_path, "--responses", 1)), "at least 2")
    refused(call("generate_preferences", *flags(tmp_path / "gone", letters, tmp_path)), "does not exist")
    rows = [{"prompt": "a river " * (2000 if n % 2 else 1) + str(n), "completion": "b"} for n in range(30)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("generate_preferences", *flags(talker, tmp_path / "long.jsonl", tmp_path, "--samples", 30))
    refused(done, "row 'long-0000", "longer than the context of", "2,048")


def test_too_few_prompts_give_the_pairs_there_are(talker, letters, tmp_path):
    done = call("generate_preferences", *flags(talker, letters, tmp_path, "--samples", 500))
    assert done.code == 0, done.err
    pairs = len(read(tmp_path, "train"))
    assert f"500 train pairs requested, but all 96 prompts gave only {pairs}" in done.out and 12 < pairs < 96


def test_a_tuned_prompt_is_refused(base, letters, tmp_path):
    adapter = tmp_path / "prompt"
    adapter.mkdir()
    said = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    refused(call("generate_preferences", *flags(adapter, letters, tmp_path)), str(adapter), "is a tuned prompt")
