"""The llama.cpp engine against transformers, on a tiny random Llama."""

import http.client
import json

import numpy as np
import pytest
import torch

from lib.core.cli import InputError
from lib.engines.llamacpp import LOGPROB, LlamaCpp, parse_distribution
from lib.engines.sampling import EngineError, Settings
from lib.engines.transformers_engine import Transformers
from lib.gguf import reading, writing
from lib.model import chat, directory, tiny
from lib.quant import same_tokens
from tests.chat_templates import make_tokenizer

CHATS = [[{"role": "user", "content": text}] for text in ("the capital", "a river", "what is 1 + 1?", "area")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    words = tiny.tokenizer()
    tiny.model(len(words), initializer_range=0.2).half().save_pretrained(folder)
    words.save_pretrained(folder)
    writing.write_model(folder, folder / "model.gguf", "f16")
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    made = LlamaCpp(folder / "model.gguf", context=128, parallel=3, threads=1)
    yield made
    made.close()


def logprobs(folder, prompt, answer):
    model = reading.load_dequantised(folder / "model.gguf")
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).numpy()


def test_greedy_answers_keep_their_order_and_are_each_token_the_likeliest(folder, engine):
    prompts = [engine.prompt_ids(chat) for chat in CHATS]
    answers = engine.generate(prompts, 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.prompt_tokens == len(prompt)
        assert answer.new_tokens == len(answer.ids) + answer.stopped <= 6
        expected = logprobs(folder, prompt, answer.ids)
        chosen = expected[np.arange(len(answer.ids)), answer.ids]
        assert (chosen > expected.max(1) - 0.02).all()


def test_parts_of_characters_have_likelihoods_too(folder, engine):
    """llama.cpp reports no probability beside a token that is only some bytes of a character."""
    prompt, answer = engine.prompt_ids(CHATS[0]), engine.answer_ids("Zürich 北京 🇫🇷")
    expected = logprobs(folder, prompt, answer)
    found = engine.answer_logprobs(prompt, answer)
    tolerance = 0.05  # f16 keys and values over 40 positions; log-probabilities here spread over 10
    assert np.abs(found - expected[np.arange(len(answer)), answer]).max() < tolerance
    assert np.abs(engine.answer_distributions(prompt, answer) - expected).max() < tolerance


def test_an_answer_ends_at_the_end_of_turn_and_does_not_show_it(tmp_path, folder):
    words = tiny.tokenizer()
    model = tiny.model(len(words))
    with torch.no_grad():  # every position's hidden state is the same vector, and EOS lies along it
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:] = 1e-3
        model.model.embed_tokens.weight[2] = 1
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    writing.write_model(tmp_path, tmp_path / "model.gguf", "q8_0")
    engine = LlamaCpp(tmp_path / "model.gguf", context=64, parallel=1, threads=1)
    (answer,) = engine.generate([engine.prompt_ids(CHATS[0])], 5)
    (exact,) = engine.generate([engine.prompt_ids(CHATS[0])], 5, exact=True)
    engine.close()
    assert (exact.stopped, exact.new_tokens) == (False, 5)
    assert (answer.stopped, answer.text, answer.ids, answer.new_tokens) == (True, "", [], 1)


def test_logprobs_of_given_answers_agree_with_transformers(folder, engine):
    prompt, answer = engine.prompt_ids(CHATS[0]), [5, 260, 33, 7, 2]
    expected = logprobs(folder, prompt, answer)
    whole = engine.answer_distributions(prompt, answer)
    assert whole.shape == expected.shape and whole.dtype == np.float32
    assert np.abs(whole - expected).max() < 0.02
    assert np.abs(np.exp(whole.astype(np.float64)).sum(1) - 1).max() < 1e-5
    chosen = expected[np.arange(len(answer)), answer]
    assert np.abs(engine.answer_logprobs(prompt, answer) - chosen).max() < 0.02
    assert chosen.min() < -5  # an unlikely token was forced, too


def test_what_is_read_by_pattern_is_what_the_json_says(engine):
    """Of every token, also of those with quotes, backslashes and broken characters in them."""
    asked = dict(n_predict=1, n_probs=engine.vocabulary, cache_prompt=True)
    body = engine.complete(engine.prompt_ids(CHATS[0]), 0, raw=True, **asked)
    (position,) = json.loads(body)["completion_probabilities"]
    expected = {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}
    found = [(int(token), float(value)) for token, value in LOGPROB.findall(body)]
    assert found[0] == (position["id"], position["logprob"])  # that of the token which was drawn comes first, once more
    assert len(found[1:]) == len(expected) == engine.vocabulary and dict(found[1:]) == expected
    tokens = {entry["token"] for entry in position["top_logprobs"]}
    assert {'"', "\\", "{", "]"} <= tokens
    parsed = parse_distribution(body, engine.vocabulary)
    assert max(abs(parsed[token] - value) for token, value in expected.items()) < 1e-3


def test_context_is_made_for_what_is_asked_and_for_no_more_than_the_model_has(folder):
    engine = LlamaCpp(folder / "model.gguf", context=64, parallel=1, threads=1)
    prompt = (engine.prompt_ids(CHATS[0]) * 3)[:60]
    with pytest.raises(EngineError, match=r"cut after \d+ of 900 tokens, since the context is only 64 tokens"):
        engine.generate([prompt], 900, exact=True)
    for length, new in ((300, 30), (2000, 48)):  # the second fills the model's context to the last token
        long = (prompt * 40)[:length]
        engine.reserve_context(length + new, "a text")
        ((answer, logprobs),) = engine.examine([long], [[5] * new], new)
        (exact,) = engine.generate([long], new, exact=True)
        assert exact.new_tokens == new and len(logprobs) == new and (answer.stopped or answer.new_tokens == new)
    with pytest.raises(
        InputError, match=r"a text: takes 2,049 tokens together with its answer, longer than the context"
    ):
        engine.reserve_context(2049, "a text")
    engine.close()


def test_settings_inside_the_file_change_no_answer(folder, engine, tmp_path, monkeypatch):
    """general.sampling.* of other programs' files; a penalty is no part of greedy decoding."""
    write_file = writing.write_file

    def write_settings(writer, *rest):
        writer.add_float32("general.sampling.penalty_repeat", 9.0)
        writer.add_int32("general.sampling.mirostat", 2)
        write_file(writer, *rest)

    monkeypatch.setattr(writing, "write_file", write_settings)
    writing.write_model(folder, tmp_path / "model.gguf", "f16")
    other = LlamaCpp(tmp_path / "model.gguf", context=128, parallel=3, threads=1)
    prompts = [engine.prompt_ids(chat) for chat in CHATS]
    assert other.request("GET", "/props")["default_generation_settings"]["params"]["repeat_penalty"] == 9
    assert [a.ids for a in other.generate(prompts, 12)] == [a.ids for a in engine.generate(prompts, 12)]
    settings = Settings(8, 1.0, 0.95)
    found = [
        {n: [s.ids for s in samples] for n, samples in e.sample(prompts, [[3]] * 4, settings)} for e in (other, engine)
    ]
    assert found[0] == found[1]
    other.close()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer none"}])
def test_other_users_of_the_host_read_no_prompt(engine, folder, headers):
    """They can reach the port."""
    asked = [("POST", "/completion", {"prompt": "a", "n_predict": 1}), ("POST", "/tokenize", {"content": "a"}),
             ("GET", "/props", None), ("POST", "/props", {}), ("GET", "/slots", None)]  # fmt: skip
    for method, path, fields in asked:
        connection = http.client.HTTPConnection(engine.address)
        connection.request(method, path, fields and json.dumps(fields), headers)
        assert connection.getresponse().status == 401, path
        connection.close()
    other = LlamaCpp(folder / "model.gguf", context=64, parallel=1, threads=1)
    assert len(engine.key) > 30 and other.key != engine.key
    other.close()


def test_not_even_with_the_key_can_the_slots_be_read(engine):
    with pytest.raises(EngineError, match="does not support slots endpoint"):
        engine.request("GET", "/slots")


def test_prompts_that_do_not_fit_are_refused(engine):
    with pytest.raises(ValueError, match="200 tokens, but the context is only 128"):
        engine.generate([[1] * 200], 4)


@pytest.mark.parametrize("content", [b"", b"no GGUF at all" * 100, None])
def test_a_bad_file_is_an_error_that_names_it(tmp_path, folder, content):
    bad = tmp_path / "bad.gguf"
    whole = (folder / "model.gguf").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"bad\.gguf"):
        LlamaCpp(bad, context=64, parallel=1)
    with pytest.raises(ValueError, match=r"missing\.gguf"):
        LlamaCpp(tmp_path / "missing.gguf", context=64, parallel=1)


def test_it_is_quiet(folder, capfd):
    engine = LlamaCpp(folder / "model.gguf", context=64, parallel=2, threads=1)
    engine.generate([engine.prompt_ids(CHATS[0])], 3)
    engine.close()
    assert capfd.readouterr() == ("", "")


def test_samples_follow_the_distribution_that_transformers_has(folder, engine):
    """Temperature first, then top-p, and none of llama.cpp's further defaults (top-k 40, min-p 0.05)."""
    prompt, temperature, top_p, count = engine.prompt_ids(CHATS[0]), 1.5, 0.5, 3000
    p = np.exp(logprobs(folder, prompt, [0])[0].astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    nucleus = order[np.cumsum(p[order]) - p[order] < top_p]
    expected = np.zeros_like(p)
    expected[nucleus] = p[nucleus] / p[nucleus].sum()
    settings = Settings(1, temperature, top_p)
    ((n, samples),) = engine.sample([prompt], [list(range(count))], settings)
    first = [sample.ids[0] if sample.ids else sample.end for sample in samples]
    frequency = np.bincount(first, minlength=len(p)) / count
    assert n == 0 and len(nucleus) > 40
    outside = frequency[expected == 0].sum()  # f16 keys move the border a little
    assert outside < 0.02 and np.abs(frequency - expected).max() < 0.02
    assert np.abs(frequency - expected).sum() < 3 * np.sqrt(2 * len(nucleus) / (np.pi * count))


def test_a_sample_depends_on_its_seed_and_says_how_it_ended(engine):
    prompts = [engine.prompt_ids(chat) for chat in CHATS]
    settings = Settings(8, 1.0, 0.95)
    found = dict(engine.sample(prompts, [[1, 2, 1]] * len(prompts), settings))
    assert sorted(found) == [0, 1, 2, 3]
    for samples in found.values():
        one, other, again = (sample.ids for sample in samples)
        assert one == again != other
        assert all(s.new_tokens == len(s.ids) + s.stopped and (s.end is not None) == s.stopped for s in samples)


@pytest.mark.parametrize("family", ["qwen3", "llama3.1", "mistral0.1"])
def test_prompts_and_answers_are_those_of_training_in_both_engines(tmp_path, family):
    words = make_tokenizer(family)
    model = tiny.model(len(words), bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    row = {"prompt": CHATS[0], "completion": [{"role": "assistant", "content": "the river"}]}
    ids = chat.encode_row(words, row, {words.eos_token_id})["input_ids"]
    transformers = Transformers(directory.open_directory(tmp_path), threads=1)
    writing.write_model(tmp_path, tmp_path / "model.gguf", "f16")
    engine = LlamaCpp(tmp_path / "model.gguf", context=64, parallel=1, threads=1)
    for one in (transformers, engine):
        assert one.prompt_ids(CHATS[0]) + one.answer_ids("the river") == ids[: -1 if family != "llama3.1" else -2]
        one.close()
    assert same_tokens.compare_token_ids(tmp_path / "model.gguf", words) == []
