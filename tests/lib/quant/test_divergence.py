"""The divergence: what has left its parent, or lost its fine-tuning, is refused."""

import os
import subprocess
import sys

import pytest
import torch

from lib.core import artifact
from lib.core.cli import OutOfMemory
from lib.data import records
from lib.engines import opening
from lib.gguf import families, packing, reading, writing
from lib.model import chat, tiny
from lib.model.directory import open_directory
from lib.quant import divergence
from tests.conftest import SCRIPTS, beside, call, refused

BOUNDS = dict(max_kl=1.0, max_general_kl=2.0, min_gain_kept=0.5)


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
    folder = tmp_path_factory.mktemp("divergence")
    return save(folder / "base", spoil), save(folder / "tuned")


@pytest.fixture(scope="module")
def rows(data):
    return records.load_split(data, "validation")


def test_a_model_is_no_distance_from_itself_and_keeps_all_it_gained(models, rows):
    base, tuned = map(open_directory, models)
    found = divergence.compare(tuned, tuned, rows, base, 1)
    assert found["kl_mean"] == pytest.approx(0, abs=1e-9) and found["top1_agreement"] == 1
    assert found["nll_base"] - found["nll_reference"] > divergence.LEAST_GAIN
    assert found["gain_kept"] == pytest.approx(1) and divergence.find_objections(found, **BOUNDS) == []


def test_examples_longer_than_the_context_are_counted_and_not_compared(models, rows, capsys):
    """Training drops them too."""
    tuned = open_directory(models[1])
    long = rows[0] | {"prompt": [{"role": "user", "content": "river " * 5000}]}
    found = divergence.compare(tuned, tuned, [long, *rows[:2]], None, 1)
    assert found["rows"] == 2 and "1 of 3 examples exceed the context of" in capsys.readouterr().out


def test_a_model_that_fell_back_to_its_base_is_refused_however_small_the_kl(models, rows):
    base, tuned = map(open_directory, models)
    found = divergence.compare(tuned, base, rows, base, 1)
    assert found["gain_kept"] == pytest.approx(0, abs=1e-6)
    (why,) = divergence.find_objections(found | {"kl_mean": 0.01}, **BOUNDS)
    assert "0% of the fine-tuning gain retained (minimum 50%)" in why


def test_what_is_not_a_number_is_refused(models, rows):
    base = open_directory(models[0])
    found = divergence.compare(base, base, rows, None, 1)
    assert "gain_kept" not in found
    assert divergence.find_objections(found | {"kl_mean": float("nan")}, **BOUNDS)


def test_a_fine_tuning_that_gained_nothing_is_not_judged_by_its_gain(models, rows):
    base = open_directory(models[0])
    found = divergence.compare(base, base, rows, base, 1)
    assert found["gain_kept"] is None and divergence.find_objections(found, **BOUNDS) == []


@pytest.mark.slow
def test_general_questions_are_measured_apart_and_have_a_bound_of_their_own(models, rows, monkeypatch):
    opened, base, tuned = [], *map(open_directory, models)
    engine = opening.open_engine
    monkeypatch.setattr(opening, "open_engine", lambda model, **how: opened.append(model) or engine(model, **how))
    found = divergence.compare(tuned, base, rows, base, 1)
    assert opened == [tuned, base, base]  # opening is slow: once for both sets
    general = found["general"]
    assert general.keys() == found.keys() - {"general", "nll_base", "gain_kept"}
    assert general["rows"] == len(divergence.GENERAL) and found["rows"] == len(rows)
    alone = divergence.compare(tuned, base, divergence.GENERAL, None, 1)
    assert {name: alone[name] for name in general} == general == alone["general"]
    (why,) = divergence.find_objections(found | {"kl_mean": 0, "gain_kept": 1, "general": {"kl_mean": 2.5}}, **BOUNDS)
    assert "mean KL 2.5 nats on answer tokens of general questions (limit 2)" in why
    assert divergence.compare(tuned, base, [], base, 1) == {"general": general}


def test_general_questions_need_one_user_turn_and_few_positions():
    for row in divergence.GENERAL:
        assert [turn["role"] for turn in row["prompt"]] == ["user"] and row["gold"][0]
    words = sum(len(row["gold"][0].replace(".", " .").split()) + 1 for row in divergence.GENERAL)
    assert words <= 60  # a usual tokenizer has a token for each of these words


def test_a_measuring_process_that_the_kernel_kills_is_out_of_memory():
    with pytest.raises(OutOfMemory, match="the process that compares the models was killed: out of memory"):
        divergence.run_in_fresh_process(os._exit, 137)  # as SIGKILL ends it


def test_the_measuring_process_raises_what_its_function_does():
    with pytest.raises(ZeroDivisionError) as error:
        divergence.run_in_fresh_process(divmod, 1, 0)
    assert "in send_result" in error.value.__notes__[0]
    assert divergence.run_in_fresh_process(divmod, 7, 2) == (3, 1)


def test_measuring_needs_no_shared_memory():
    """/dev/shm is read-only or missing in some containers."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from lib.quant import divergence
if __name__ == "__main__":
    print(divergence.run_in_fresh_process(divmod, 7, 2))
"""
    hidden = 'mount -t tmpfs -o ro none /dev/shm && ! touch /dev/shm/x 2> /dev/null && exec "$@"'
    if subprocess.run(["unshare", "-m", "bash", "-c", hidden, "-", "true"], stderr=-3).returncode:
        pytest.skip("may not mount a disk")
    command = ["unshare", "-m", "bash", "-c", hidden, "-", sys.executable, "-c", code]
    assert subprocess.check_output(command, text=True) == "(3, 1)\n"


def quantize(model, data, out, *more):
    flags = ["--method", "gguf-f16", "--samples", 4, "--threads", 1, "--output", out, *more]
    return call("quantize", "--model", model, "--data", data, *flags)


def test_swapped_query_and_key_rows_are_refused_and_nothing_is_left(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "permute", lambda rows, *_, **__: rows)
    monkeypatch.setattr(divergence, "run_in_fresh_process", lambda function, *given: function(*given))
    refused(
        quantize(models[1], data, tmp_path / "out"), "rejected, nothing was written", "mean KL", "--accept-divergence"
    )
    assert list(tmp_path.iterdir()) == []
    done = quantize(models[1], data, tmp_path / "out", "--accept-divergence")
    assert done.code == 0 and (tmp_path / "out" / "model.gguf").is_file()
    stored = artifact.read(tmp_path / "out", "quantized")
    assert stored["arguments"]["accept_divergence"] is True and "--accept-divergence" in stored["command"]
    (why,) = stored["metrics"]["objections"]
    assert "mean KL" in why and stored["metrics"]["divergence"]["kl_mean"] > stored["arguments"]["max_kl"]


def test_a_wrong_rope_base_is_refused(models, data, tmp_path, monkeypatch):
    import gguf as package

    written = package.GGUFWriter.add_rope_freq_base
    monkeypatch.setattr(package.GGUFWriter, "add_rope_freq_base", lambda self, value: written(self, value / 100))
    monkeypatch.setattr(divergence, "run_in_fresh_process", lambda function, *given: function(*given))
    refused(quantize(models[1], data, tmp_path / "out"), "rejected, nothing was written", "mean KL")


@pytest.mark.slow
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


@pytest.mark.parametrize("bos", [tiny.SPECIAL[0], pytest.param(tiny.SPECIAL[1], marks=pytest.mark.slow)])
def test_a_bos_that_the_template_writes_or_that_nobody_wants_is_refused(data, tmp_path, monkeypatch, bos):
    """<|im_start|> is what the template begins with: llama.cpp's server takes one of the two away and hides the other,
    which every program that renders the template itself would have twice."""
    import gguf as package

    words = tiny.tokenizer()
    words.bos_token = bos
    monkeypatch.setattr(tiny, "tokenizer", lambda: words)
    model = save(tmp_path / "model")
    assert quantize(model, data, tmp_path / "sound").code == 0
    written = package.GGUFWriter.add_add_bos_token
    monkeypatch.setattr(package.GGUFWriter, "add_add_bos_token", lambda self, _: written(self, True))
    refused(quantize(model, data, tmp_path / "out"), "llama.cpp tokenises differently", "BOS")
    assert beside(tmp_path) == ["model", "sound"]


def fine_tune(base, folder, rows):
    """A fine-tuning of a model on a Q4_0 grid that moves each weight by far less than half a step of it, and the
    largest of each block, which makes the grid, not at all: rounding then gives the base back."""
    from transformers import AutoModelForCausalLM

    words, model = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for row in rows:
        ids = {name: torch.tensor([value]) for name, value in chat.encode_row(words, row, {2}).items()}
        model(**ids).loss.backward()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                blocks = weight.reshape(-1, packing.BLOCK)
                top = blocks.abs().amax(1, keepdim=True)
                step = 0.02 * top / 8 * weight.grad.reshape(blocks.shape).sign()
                weight -= torch.where(blocks.abs() < top, step, 0).reshape(weight.shape)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_rounding_that_gives_the_base_back_is_refused_though_its_kl_is_small(
    models, rows, data, tmp_path, monkeypatch
):
    writing.write_model(models[1], tmp_path / "model.gguf", "q4_0")
    base = reading.load_dequantised(tmp_path / "model.gguf")
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    tuned = fine_tune(tmp_path / "base", tmp_path / "tuned", rows)
    monkeypatch.setattr(divergence, "run_in_fresh_process", lambda function, *given: function(*given))
    argv = ["--method", "gguf-q4_0", "--calibration-samples", 0, "--samples", len(rows), "--base", tmp_path / "base"]
    done = quantize(tuned, data, tmp_path / "out", *argv)
    refused(done, "of the fine-tuning gain retained (minimum 50%)")
    assert "at most" not in done.err  # no bound on the KL was touched
    assert quantize(tuned, data, tmp_path / "out", *argv, "--accept-divergence").code == 0
    back = dict(reading.load_dequantised(tmp_path / "out" / "model.gguf").named_parameters())
    assert all(torch.equal(weight, back[name]) for name, weight in base.named_parameters())
    found = artifact.read(tmp_path / "out")["metrics"]["divergence"]
    assert found["kl_mean"] < 0.3 and abs(found["gain_kept"]) < 0.3
    assert quantize(tuned, data, tmp_path / "finer", *argv, "--method", "gguf-q8_0").code == 0


@pytest.mark.slow
def test_a_sound_conversion_passes_the_same_bound(models, data, tmp_path):
    done = quantize(models[1], data, tmp_path / "out", "--base", models[0])
    assert done.code == 0, done.err
    assert "% of the fine-tuning gain retained" in done.out
