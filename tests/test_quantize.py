"""Each method on a tiny model: what was written is loaded again, measured again, and compared."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lib.core import artifact
from lib.data import records
from lib.engines.opening import open_engine
from lib.model import chat, directory, tiny
from lib.model.directory import open_directory
from lib.quant import divergence
from tests.conftest import beside, call, environment, refused, script

APART = "gguf-iq4_nl"  # the real command, which measures in a process of its own
HERE = ("gguf-f16", "gguf-q8_0", "gguf-q4_1", "gguf-q4_0", "nf4", "int8")  # in this one, to spare ten imports of torch


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A tiny model whose answers are far from uniform, so that rounding shows. No artifact of ours."""
    folder = tmp_path_factory.mktemp("sharp") / "my model"
    words = tiny.tokenizer()
    model = tiny.model(len(words), initializer_range=0.2)
    model.half().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(sharp, data, tmp_path_factory):
    """{method: (artifact, its metadata, what was said)}."""
    folder = tmp_path_factory.mktemp("quantised")

    def argv(method):
        where = ("--model", sharp, "--data", data, "--method", method, "--output", folder / method)
        return ("quantize", *where, "--samples", 4, "--threads", 1)

    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        apart = pool.submit(script, *argv(APART))
        patch.setattr(divergence, "run_in_fresh_process", lambda function, *given: function(*given))
        done = {method: call(*argv(method)) for method in HERE} | {APART: apart.result()}
    for method, one in done.items():
        assert one.code == 0, (method, one.err)
    return {m: (folder / m, artifact.read(folder / m, "quantized"), one.out) for m, one in done.items()}


@pytest.mark.parametrize("method", [APART, *HERE])
def test_size_and_ratio_are_those_on_the_disk(made, sharp, method):
    path, meta, said = made[method]
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != "metadata.json")
    whole = sum(p.stat().st_size for p in sharp.rglob("*") if p.is_file())
    assert meta["size_bytes"] == size and meta["metrics"]["input_bytes"] == whole
    assert meta["metrics"]["ratio"] == pytest.approx(whole / size)
    assert f"{whole / size:.2f}x" in said and said.splitlines()[-1] == str(path)
    assert meta["format"] == method and meta["arguments"]["method"] == method


@pytest.mark.parametrize("method", [APART, *HERE])
def test_what_was_written_loads_and_answers(made, method):
    path, meta, _ = made[method]
    engine = open_engine(open_directory(path), load="fp32", threads=1, batch=1, context=128)
    try:
        assert engine.name == meta["engine"]
        (answer,) = engine.generate([engine.prompt_ids([{"role": "user", "content": "the capital"}])], 4)
        assert 1 <= answer.new_tokens <= 4
    finally:
        engine.close()


def test_divergence_grows_as_bits_shrink(made):
    kl = {method: meta["metrics"]["divergence"]["kl_mean"] for method, (_, meta, _) in made.items()}
    assert 0 <= kl["gguf-f16"] < kl["gguf-q8_0"] < kl["gguf-iq4_nl"] < kl["gguf-q4_0"]
    assert kl["gguf-f16"] < kl["int8"] < kl["nf4"]
    assert kl["gguf-f16"] < 1e-4 and kl["gguf-iq4_nl"] > 1e-3
    sizes = {method: meta["size_bytes"] for method, (_, meta, _) in made.items()}
    assert sizes["gguf-q4_0"] < sizes["gguf-q4_1"] < sizes["gguf-q8_0"] < sizes["gguf-f16"]
    for _, meta, _ in made.values():
        measured = meta["metrics"]["divergence"]
        assert measured["rows"] == 4 and 0 <= measured["top1_agreement"] <= 1
        assert measured["kl_mean"] <= measured["kl_p99"] * 1.0001 + 1e-9
        assert measured["general"]["rows"] == len(divergence.GENERAL) and measured["general"]["kl_mean"] >= 0


def test_the_divergence_is_that_of_the_validation_rows(made, sharp, data):
    """Worked out again here, position by position: mean of Σ p·(log p - log q) over answer and end."""
    path, meta, _ = made[APART]
    rows = records.sample_rows(records.load_split(data, "validation"), 4, 42)
    reference = open_engine(open_directory(sharp), load="fp32", threads=1)
    other = open_engine(open_directory(path), threads=1, batch=1, context=512)
    found, tokens = [], []
    try:
        for row in rows:
            prompt = reference.prompt_ids(row["prompt"])
            answer = [*reference.answer_ids(row["gold"][0]), reference.tokenizer.eos_token_id]
            p, q = (e.answer_distributions(prompt, answer).astype(np.float64) for e in (reference, other))
            found += (np.exp(p) * (p - q)).sum(-1).tolist()
            tokens += p[np.arange(len(answer) - 1), answer[:-1]].tolist()
    finally:
        other.close()
    measured = meta["metrics"]["divergence"]
    assert measured["answer_positions"] == len(found)
    assert measured["kl_mean"] == pytest.approx(np.mean(found), rel=0.02)
    assert measured["nll_reference"] == pytest.approx(-np.mean(tokens), rel=1e-3)


ELSEWHERE = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

torch.set_num_threads(1)
for folder in sys.argv[2:]:
    prompt, answer = np.load(sys.argv[1])["prompt"].tolist(), np.load(sys.argv[1])["answer"].tolist()
    chat = [{"role": "user", "content": "the capital"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids == prompt
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    np.save(folder + ".npy", logits.float().log_softmax(-1).numpy())
"""


@pytest.mark.slow
def test_transformers_alone_reads_in_another_process_what_was_measured(made, sharp, data, tmp_path):
    """NF4 and INT8, by a process that knows nothing of this project, from another directory."""
    folders = [shutil.copytree(made[method][0], tmp_path / method) for method in ("nf4", "int8")]
    tokenizer = directory.load_tokenizer(open_directory(sharp))
    prompt = chat.prompt_ids(tokenizer, [{"role": "user", "content": "the capital"}])
    answer = tokenizer("town 1")["input_ids"]
    np.savez(tmp_path / "ids.npz", prompt=prompt, answer=answer)
    argv = [sys.executable, "-c", ELSEWHERE, tmp_path / "ids.npz", *folders]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, cwd="/", env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    rows = records.sample_rows(records.load_split(data, "validation"), 4, 42)
    for folder in folders:
        engine = open_engine(open_directory(folder), load="fp32", threads=1)
        expected = engine.answer_distributions(prompt, answer)
        assert np.abs(np.load(f"{folder}.npy") - expected).max() < 1e-4, folder
        stored = made[folder.name][1]["metrics"]["divergence"]
        # What these weights give is what was stored.
        again = divergence.compare(open_directory(sharp), open_directory(folder), rows, None, 1)
        assert again["kl_mean"] == pytest.approx(stored["kl_mean"], rel=1e-3)
        assert again["general"]["nll"] == pytest.approx(stored["general"]["nll"], rel=1e-3)


def test_ids_and_template_of_a_gguf_are_those_of_the_model(made, sharp):
    tokenizer = directory.load_tokenizer(open_directory(sharp))
    engine = open_engine(open_directory(made[APART][0]), threads=1, batch=1, context=512)
    try:
        for probe in chat.PROBES:
            assert engine.prompt_ids(probe) == chat.prompt_ids(tokenizer, probe)
    finally:
        engine.close()


def test_the_same_model_rounds_to_the_same_bytes(made, sharp, data, tmp_path, monkeypatch):
    monkeypatch.setattr(divergence, "run_in_fresh_process", lambda function, *given: function(*given))
    argv = ("--model", sharp, "--data", data, "--method", "gguf-q8_0", "--output", tmp_path / "again")
    assert call("quantize", *argv, "--samples", 1, "--threads", 1).code == 0
    again = artifact.read(tmp_path / "again")
    assert again["files"]["model.gguf"] == made["gguf-q8_0"][1]["files"]["model.gguf"]


# --- refused -----------------------------------------------------------------------------------------------


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def cut_short(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def other_architecture(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=512)).save_pretrained(folder)


DAMAGES = (adapter, empty, no_weights, no_tokenizer, cut_short)


@pytest.mark.parametrize(
    ("method", "damage"),
    [*((method, damage) for method in (APART, "nf4") for damage in DAMAGES), ("gguf-q4_0", other_shape)],
)
def test_what_is_no_plain_model_is_refused_and_leaves_nothing(plain, data, tmp_path, damage, method):
    damage(plain)
    done = call("quantize", "--model", plain, "--data", data, "--method", method, "--output", tmp_path / "out")
    refused(done, str(plain))
    assert beside(tmp_path) == [plain.name]


def test_an_architecture_that_gguf_cannot_hold_is_refused(plain, data, tmp_path):
    other_architecture(plain)
    argv = ("--model", plain, "--data", data, "--method", "gguf-q4_0", "--output", tmp_path / "out")
    refused(call("quantize", *argv), "cannot write GPT2LMHeadModel as GGUF")
    assert beside(tmp_path) == [plain.name]


def not_finite(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def odd_width(folder):
    words = tiny.tokenizer()
    tiny.model(len(words), intermediate_size=72).save_pretrained(folder)


@pytest.mark.parametrize("calibration", [0, 2])
@pytest.mark.parametrize(
    ("damage", "words"), [(not_finite, "up_proj"), (odd_width, "width 72 is not a multiple of 32")]
)
def test_weights_that_blocks_cannot_hold_are_named(plain, data, tmp_path, damage, words, calibration):
    damage(plain)
    argv = ("--model", plain, "--data", data, "--method", "gguf-iq4_nl", "--calibration-samples", calibration)
    refused(call("quantize", *argv, "--output", tmp_path / "out"), words)
    assert beside(tmp_path) == [plain.name]


def test_too_little_text_to_calibrate_on_is_refused(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    argv = ("--model", base, "--data", rows, "--method", "gguf-q4_0", "--output", tmp_path / "out")
    refused(call("quantize", *argv), "rows.jsonl", "cannot calibrate blocks of 32", "--calibration-samples 0")
    assert beside(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("prompts, both", [(40, 0), (3, 0), (1, 4)])
def test_a_file_is_divided_between_calibration_and_check(base, tmp_path, monkeypatch, prompts, both):
    import quantize

    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"Which town is number {n % prompts}?", "completion": f"town {n}"} for n in range(max(4, prompts))
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen, choose = [], quantize.choose_rows
    monkeypatch.setattr(quantize, "choose_rows", lambda args: chosen.append(choose(args)) or chosen[-1])
    monkeypatch.setattr(divergence, "run_in_fresh_process", lambda function, *given: function(*given))
    argv = ("--model", base, "--data", rows, "--method", "gguf-q4_0", "--accept-divergence")
    argv += ("--calibration-samples", 6, "--samples", 6)
    outputs = tmp_path / "one", tmp_path / "two"
    done = [call("quantize", *argv, "--output", output) for output in outputs]
    assert [one.code for one in done] == [0, 0], done
    calibration, held_out = ({row["id"] for row in part} for part in chosen[0])
    assert chosen[0] == chosen[1] and len(calibration & held_out) == both
    assert ("has only one prompt, so the same 4 examples" in done[0].out) == bool(both)
    examples = artifact.read(outputs[0])["metrics"]["examples"]
    assert examples == {"calibration": len(calibration), "divergence": len(held_out), "both": both}
    assert prompts < 40 or len(calibration) == len(held_out) == 6


@pytest.mark.parametrize("method", ["gguf-iq4_nl", "gguf-f16", "nf4", "int8"])
def test_what_is_quantised_already_is_refused(made, data, tmp_path, method):
    done = call("quantize", "--model", made[method][0], "--data", data, "--output", tmp_path / "out")
    refused(done, str(made[method][0]), "already quantised")
    assert beside(tmp_path) == []


def test_missing_and_wrong_inputs_are_refused(base, data, tmp_path):
    out = ("--output", tmp_path / "out")
    refused(call("quantize", "--model", base, "--data", tmp_path / "data" / "x" / "raw", *out), "make data")
    refused(call("quantize", "--model", base, "--data", base, *out), "expected kind 'data'")
    refused(call("quantize", "--model", data, "--data", data, *out), "plain model directory")
    refused(call("quantize", "--model", base, "--data", data, "--output", base), "input")
    refused(call("quantize", "--model", base, "--data", data, "--method", "q4", *out), "gguf-q4_0")
    nf4 = ("--method", "nf4", "--embedding", "q8_0")
    refused(call("quantize", "--model", base, "--data", data, *nf4, *out), "--embedding q8_0", "--method nf4")
    assert beside(tmp_path) == [] and artifact.read(base, "base")


def test_a_changed_base_is_refused(base, data, plain, tmp_path):
    (plain / "metadata.json").write_bytes((base / "metadata.json").read_bytes())
    with open(plain / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    done = call("quantize", "--model", plain, "--data", data, "--output", tmp_path / "out")
    refused(done, "model.safetensors", "checksum mismatch")
