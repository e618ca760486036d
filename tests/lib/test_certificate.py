"""The certificate: what has left its parent, or lost its fine-tuning, is refused."""

import pytest
import torch

from lib import certificate, gguf, records, tiny
from tests.conftest import call, refused

BOUNDS = dict(most_kl=1.0, least_gain_kept=0.5)


def save(folder, change=None):
    """A model whose answers are far from uniform."""
    words, model = tiny.tokenizer(), tiny.model(376, initializer_range=0.2)
    if change:
        with torch.no_grad():
            change(model)
    model.half().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def spoil(model):
    """Make a base out of the fine-tuned model: one that finds the answers less likely by over a nat a token."""
    wanted = tiny.tokenizer()("town 1", add_special_tokens=False)["input_ids"]
    state = model.model.embed_tokens.weight[wanted].mean(0)
    model.model.layers[1].mlp.down_proj.weight += 0.5 * state[:, None] * torch.ones(1, 128) / 128**0.5
    model.model.embed_tokens.weight[wanted] *= 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    return save(folder / "base", spoil), save(folder / "tuned")


@pytest.fixture(scope="module")
def rows(data):
    return records.load(data, "validation")


def test_a_model_is_no_distance_from_itself_and_keeps_all_it_gained(models, rows):
    base, tuned = models
    found = certificate.compare(tuned, tuned, rows, base, 1)
    assert found["kl_mean"] == pytest.approx(0, abs=1e-9) and found["top1_agreement"] == 1
    assert found["nll_base"] - found["nll_reference"] > certificate.LEAST_GAIN
    assert found["gain_kept"] == pytest.approx(1) and certificate.objections(found, **BOUNDS) == []


def test_a_model_that_fell_back_to_its_base_is_refused_however_small_the_kl(models, rows):
    base, tuned = models
    found = certificate.compare(tuned, base, rows, base, 1)
    assert found["gain_kept"] == pytest.approx(0, abs=1e-6)
    (why,) = certificate.objections(found | {"kl_mean": 0.01}, **BOUNDS)
    assert "0% of what the fine-tuning gained is left, at least 50% wanted" in why


def test_what_is_not_a_number_is_refused(models, rows):
    found = certificate.compare(models[0], models[0], rows, None, 1)
    assert "gain_kept" not in found
    assert certificate.objections(found | {"kl_mean": float("nan")}, **BOUNDS)


def test_a_fine_tuning_that_gained_nothing_is_not_judged_by_its_gain(models, rows):
    found = certificate.compare(models[0], models[0], rows, models[0], 1)
    assert found["gain_kept"] is None and certificate.objections(found, **BOUNDS) == []


def quantize(model, data, out, *more):
    flags = ["--method", "gguf-f16", "--samples", 4, "--threads", 1, "--most-kl", 0.01, "--output", out, *more]
    return call("quantize", "--model", model, "--data", data, *flags)


def test_swapped_query_and_key_rows_are_refused_and_nothing_is_left(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "permute", lambda rows, *_, **__: rows)
    monkeypatch.setattr(certificate, "in_fresh_process", lambda function, *given: function(*given))
    refused(
        quantize(models[1], data, tmp_path / "out"), "refused, nothing was written", "mean KL", "--accept-divergence"
    )
    assert list(tmp_path.iterdir()) == []
    done = quantize(models[1], data, tmp_path / "out", "--accept-divergence")
    assert done.code == 0 and (tmp_path / "out" / "model.gguf").is_file()


def test_a_wrong_rope_base_is_refused(models, data, tmp_path, monkeypatch):
    import gguf as package

    written = package.GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(package.GGUFWriter, "add_rope_freq_base", lambda self, value: written(self, value / 100))
    monkeypatch.setattr(certificate, "in_fresh_process", lambda function, *given: function(*given))
    refused(quantize(models[1], data, tmp_path / "out"), "refused, nothing was written", "mean KL")


def test_a_lost_end_of_answer_is_refused(data, tmp_path, monkeypatch):
    """The numbers are all right then, and the model never stops. llama.cpp knows the usual end tokens by their text,
    so this one has a name of its own."""
    import gguf as package

    monkeypatch.setattr(tiny, "SPECIAL", ["<|endoftext|>", "<|im_start|>", "<|fin|>"])
    monkeypatch.setattr(tiny, "CHATML", tiny.CHATML.replace("<|im_end|>", "<|fin|>"))
    model = save(tmp_path / "model")
    assert quantize(model, data, tmp_path / "sound").code == 0
    written = package.GGUFWriter.add_eos_token_id
    monkeypatch.setattr(package.GGUFWriter, "add_eos_token_id", lambda self, _: written(self, 300))
    refused(quantize(model, data, tmp_path / "out"), "an answer does not end at token 2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "sound"]


def test_a_sound_conversion_passes_the_same_bound(models, data, tmp_path):
    done = quantize(models[1], data, tmp_path / "out", "--base", models[0])
    assert done.code == 0, done.err
    assert "% of the fine-tuning's gain kept" in done.out
