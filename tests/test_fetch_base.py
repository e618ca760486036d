"""Base models from a directory of the user's, in the states in which users keep them."""

import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import fetch_base
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib.core import artifact
from lib.core.cli import InputError
from lib.gguf import vocabulary, writing
from lib.model import chat, directory, tiny
from lib.model.directory import open_directory
from tests.chat_templates import FAMILIES, find_turn_end, make_tokenizer
from tests.conftest import beside, call, environment, refused, script


def fetch(source, output) -> dict:
    done = call("fetch_base", "--model", source, "--output", output)
    assert done.code == 0, done.err
    return artifact.read(output, "base") | {"said": done.out}


def edit(file, **change) -> None:
    known = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (known | change).items() if v is not ...}))


@pytest.mark.slow
def test_the_artifact_loads_from_another_working_directory(base, tmp_path):
    """In a process that knows nothing of ours, through the plain Auto classes."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T, GenerationConfig as G\n"
        "t, m = T.from_pretrained(sys.argv[1]), M.from_pretrained(sys.argv[1])\n"
        "ids = t.apply_chat_template([{'role': 'user', 'content': 'hi'}], add_generation_prompt=True, "
        "return_tensors='pt', return_dict=True)\n"
        "out = m.generate(**ids, max_new_tokens=3, do_sample=False)\n"
        "new = out.shape[1] - ids['input_ids'].shape[1]\n"
        "print(m.dtype, m.generation_config.eos_token_id, t.pad_token_id is not None, new)"
    )
    shutil.copytree(base, tmp_path / "moved away")
    command = [sys.executable, "-c", code, str(tmp_path / "moved away")]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment())
    assert done.stdout.split()[:3] == ["torch.float16", "2", "True"], done.stderr
    assert done.stdout.split()[3] in "123"


def test_metadata_says_what_it_is(base):
    meta = artifact.read(base, "base")
    weights = load_file(base / "model.safetensors")
    assert meta["metrics"]["parameters"] == sum(w.numel() for w in weights.values())
    assert meta["metrics"]["dtype"] == "float16" and {w.dtype for w in weights.values()} == {torch.float16}
    assert meta["source"] == {"model": "tiny-random", "licence": None}
    assert meta["arguments"]["trust_remote_code"] is False
    assert "torch" in meta["versions"] and meta["size_bytes"] == artifact.content_bytes(base)


@pytest.mark.parametrize(
    ("card", "licence"),
    [("---\nlicense: mit\ntags: [a]\n---\n# Mine\n", "mit"), ("# Mine\nlicense: mit\n", None),
     ("---\nlicense: [\n---\n", None), ("---\njust text\n---\n", None), ("---\n---\n", None),
     ("---\nlicense: [mit, other]\n---\n", None)],
)  # fmt: skip
def test_the_licence_is_what_the_models_card_says(plain, tmp_path, card, licence):
    (plain / "README.md").write_text(card)
    assert fetch(plain, tmp_path / "base")["source"]["licence"] == licence


def test_the_same_model_twice_is_the_same_digest(base, tmp_path):
    assert fetch("tiny-random", tmp_path / "again")["digest"] == artifact.read(base)["digest"]


def test_a_local_directory_keeps_its_weights_template_and_ids(plain, base, tmp_path):
    meta = fetch(plain, tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(plain / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    one, other = (directory.load_tokenizer(open_directory(path)) for path in (tmp_path / "out", plain))
    assert one.chat_template == other.chat_template
    assert [chat.prompt_ids(one, c) for c in chat.PROBES] == [chat.prompt_ids(other, c) for c in chat.PROBES]
    assert meta["inputs"]["directory"]["path"] == str(plain) and "plain" not in meta["said"]


def test_fp32_weights_become_16_bit_and_too_large_ones_bfloat16(plain, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    model.save_pretrained(plain)
    assert fetch(plain, tmp_path / "half")["metrics"]["dtype"] == "float16"
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    model.save_pretrained(plain)
    assert fetch(plain, tmp_path / "brain")["metrics"]["dtype"] == "bfloat16"
    assert load_file(tmp_path / "brain" / "model.safetensors")["model.norm.weight"].isfinite().all()


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float16), (float("-inf"), torch.float32)])
def test_weights_that_are_no_numbers_are_refused(plain, tmp_path, value, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(plain / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, :2] = value
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    done = call("fetch_base", "--model", plain, "--output", tmp_path / "out")
    refused(done, str(plain), "tensor model.layers.1.mlp.up_proj.weight", "2 of 8,192 values that are NaN or infinite")
    assert beside(tmp_path) == ["my model"]


def without_template(folder) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=...)


def test_a_model_without_a_chat_template_gets_plain_turns_and_says_so(plain, tmp_path):
    without_template(plain)
    edit(plain / "tokenizer_config.json", pad_token=...)
    edit(plain / "generation_config.json", pad_token_id=...)
    meta = fetch(plain, tmp_path / "out")
    assert "no chat template" in meta["said"] and "fallback" in meta["source"]["chat_template"]
    tokenizer = directory.load_tokenizer(open_directory(tmp_path / "out"))
    assert tokenizer.pad_token_id is not None
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]}
    encoded = chat.encode_row(tokenizer, row, {tokenizer.eos_token_id})
    assert tokenizer.decode(encoded["input_ids"]) == "User: Hi\nAssistant: Ho<|im_end|>"
    assert encoded["labels"][-1] == tokenizer.eos_token_id
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id and generation["pad_token_id"] is not None
    assert chat.probes(tokenizer) == chat.PROBES, "system turns and several turns are rendered"


def test_plain_turns_begin_with_bos_where_the_tokenizer_would_add_one(plain, tmp_path):
    """Llama's base models were never trained without it, and prompts are tokenised without special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    without_template(plain)
    raw = Tokenizer.from_file(str(plain / "tokenizer.json"))
    raw.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    raw.save(str(plain / "tokenizer.json"))
    fetch(plain, tmp_path / "out")
    tokenizer = directory.load_tokenizer(open_directory(tmp_path / "out"))
    ids = chat.prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}])
    assert ids[0] == 1 and ids.count(1) == 1


def test_a_tokenizer_without_any_end_is_refused(plain, tmp_path):
    """Nothing would stop an answer, and nothing could teach the model to."""
    without_template(plain)
    edit(plain / "tokenizer_config.json", eos_token=..., pad_token=...)
    edit(plain / "generation_config.json", eos_token_id=..., pad_token_id=...)
    edit(plain / "config.json", eos_token_id=..., pad_token_id=...)
    refused(call("fetch_base", "--model", plain, "--output", tmp_path / "out"), "EOS")
    assert not (tmp_path / "out").exists()


def test_the_end_of_a_turn_stops_generation_even_where_the_model_forgot_it(plain, tmp_path):
    """Llama 3's first release named <|end_of_text|> alone; its template ends turns with another token."""
    edit(plain / "generation_config.json", eos_token_id=0)
    fetch(plain, tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')


def quantised(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def gguf_only(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")


def adapter_only(folder):
    for file in folder.iterdir():
        file.unlink()
    adapter(folder)


def emptied(folder):
    for file in folder.iterdir():
        file.unlink()


def cut_short(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def a_tensor_less(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder):
    edit(folder / "config.json", intermediate_size=96)


def no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def unknown_architecture(folder):
    edit(folder / "config.json", model_type="nonesuch", architectures=["NonesuchForCausalLM"])


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (adapter, "adapter"), (quantised, "quantised"), (gguf_only, "quantised"), (adapter_only, "adapter"),
        (emptied, "config.json"), (cut_short, "cannot load"), (no_weights, "cannot load"),
        (no_tokenizer, "cannot load"),
        (a_tensor_less, "layers.1.mlp.up_proj"), (other_shape, "shape"), (unknown_architecture, "cannot load"),
    ],
)  # fmt: skip
def test_a_directory_that_is_no_plain_model_is_refused(plain, tmp_path, damage, word):
    damage(plain)
    done = call("fetch_base", "--model", plain, "--output", tmp_path / "out")
    refused(done, str(plain), word)
    assert beside(tmp_path) == [plain.name]


def test_generation_settings_that_contradict_each_other_do_not_stop_it(plain, tmp_path):
    """Many models on the Hub say temperature 0.6 and do_sample false; transformers then refuses to save them."""
    edit(plain / "generation_config.json", temperature=0.6, top_p=0.9, do_sample=False)
    fetch(plain, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved again")


def test_code_that_a_model_brings_is_not_run_unless_asked_for(plain, tmp_path):
    marker = tmp_path / "was run"
    (plain / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    code = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit(plain / "config.json", auto_map=code, model_type="mine")
    refused(call("fetch_base", "--model", plain, "--output", tmp_path / "out"), "trust_remote_code")
    assert not marker.exists() and beside(tmp_path) == [plain.name]


@pytest.mark.parametrize("name", ["nonesuch", "someone/nonesuch", "not a name!", "./gone", ""])
def test_an_unknown_name_is_refused_at_once(name, tmp_path):
    began = time.perf_counter()
    done = call("fetch_base", "--model", name, "--output", tmp_path / "out")
    refused(done, *(["is neither a name in configs/models", "tiny-random", "local directory"] if name else []))
    assert time.perf_counter() - began < 2
    assert beside(tmp_path) == []


def test_an_unknown_name_needs_no_torch(tmp_path):
    began = time.perf_counter()
    refused(script("fetch_base", "--model", "nonesuch", "--output", tmp_path / "out"), "nonesuch")
    assert time.perf_counter() - began < 3


def test_the_tiny_model_is_what_its_maker_makes(base):
    tokenizer = tiny.tokenizer()
    assert AutoTokenizer.from_pretrained(base).get_vocab() == tokenizer.get_vocab()
    expected = tiny.model(len(tokenizer)).half().state_dict()
    found = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def use_tokenizer(folder, family: str):
    """Give a model directory the tokenizer of another family, and rows for its tokens."""
    words = make_tokenizer(family)
    tiny.model(len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return words


def test_a_line_end_that_is_a_token_ends_no_answer(plain, tmp_path):
    """Gemma 2 has such tokens, and its template puts one after the turn: answers would be cut to their first line."""
    words = use_tokenizer(plain, "gemma2")
    edit(plain / "generation_config.json", eos_token_id=words.eos_token_id)
    fetch(plain, tmp_path / "out")
    ends = directory.eos_token_ids(open_directory(tmp_path / "out"))
    assert ends == {*words.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_ends_where_its_turn_does(family):
    words, end = make_tokenizer(family), find_turn_end(family)
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=words.eos_token_id))
    fetch_base.set_end_of_turn(model, words)
    ends = chat.eos_token_ids(model.generation_config)
    assert ends == {words.eos_token_id, words.convert_tokens_to_ids(end)}
    answer = "The first line.\nThe second line.\n\nThe third."
    row = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": answer}]}
    labels = [token for token in chat.encode_row(words, row, ends)["labels"] if token != -100]
    assert words.decode(labels).endswith(answer + end)


def name_templates(folder, form: str, **templates) -> None:
    """Several named chat templates, as Hermes and Command R have, in one of the forms in which they are stored."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if form == "list":
        named = [{"name": name, "template": text} for name, text in templates.items()]
        edit(folder / "tokenizer_config.json", chat_template=named)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("form", ["list", "files"])
def test_of_several_templates_the_default_is_used_everywhere(plain, tmp_path, form):
    plain_template = AutoTokenizer.from_pretrained(plain).chat_template
    name_templates(plain, form, default=plain_template, tool_use="{{ tools }}")
    tokenizer = directory.load_tokenizer(open_directory(plain))
    assert tokenizer.chat_template == plain_template
    writing.write_model(plain, tmp_path / "model.gguf", "f16")
    assert vocabulary.read_tokenizer(tmp_path / "model.gguf").chat_template == plain_template
    done = call("fetch_base", "--model", plain, "--output", tmp_path / "out")
    assert done.code == 0 and "chat templates default, tool_use, `default` is used" in done.out, done.err
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == plain_template


def test_several_templates_without_a_default_are_refused_by_their_names(plain, tmp_path):
    name_templates(plain, "list", rag="{{ messages }}", tool_use="{{ tools }}")
    words = "its tokenizer has the chat templates rag, tool_use", "no `default`", "tokenizer_config.json"
    refused(call("fetch_base", "--model", plain, "--output", tmp_path / "out"), *words)
    refused(call("generate_data", "--source", "magpie", "--model", plain, "--output", tmp_path / "rows"), *words)
    with pytest.raises(InputError, match="chat templates rag, tool_use"):
        directory.load_tokenizer(open_directory(plain))


def test_a_template_with_the_date_is_reported_with_the_one_that_it_gets(plain, tmp_path):
    use_tokenizer(plain, "llama3.1")
    meta = fetch(plain, tmp_path / "out")
    assert meta["source"]["chat_date"] == "2024-07-26" and "26 July 2024" in meta["said"]
    saved = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert saved == FAMILIES["llama3.1"].template, "users of the model get the real date"


def add_tokens(folder, *tokens: str, pad: str | None = None):
    """Tokens that only the tokenizer knows: the embedding has no rows for them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*tokens])
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)


@pytest.mark.slow  # all stages
def test_a_pad_token_without_a_row_is_replaced_and_all_stages_run(plain, data, tmp_path):
    add_tokens(plain, pad="[PAD]")
    done = call("fetch_base", "--model", plain, "--output", tmp_path / "out")
    assert done.code == 0 and "'[PAD]' has no row in the embedding; EOS is used instead" in done.out
    tokenizer = directory.load_tokenizer(open_directory(tmp_path / "out"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_token_id"] == 2
    method = ("--method", "gguf-q8_0", "--samples", 2, "--output", tmp_path / "int8")
    done = call("quantize", "--model", tmp_path / "out", "--data", data, *method)
    assert done.code == 0, done.err
    argv = ("--data", data, "--samples", 8, "--batch-size", 4, "--accumulation-steps", 1, "--threads", 1)
    for model in (tmp_path / "out", plain):  # and where fetch_base.py was left out
        done = call(
            "sft", "--model", model, *argv, "--output", tmp_path / "lora", "--run-dir", tmp_path / "run" / model.name
        )
        assert done.code == 0, done.err


def test_words_without_a_row_are_refused(plain, data, tmp_path):
    add_tokens(plain, "capital")
    rows = json.loads((plain / "config.json").read_text())["vocab_size"]
    why = ("'capital' the id", f"has only {rows} rows. Remove the token from the tokenizer")
    refused(call("fetch_base", "--model", plain, "--output", tmp_path / "out"), *why)
    refused(call("sft", "--model", plain, "--data", data, "--output", tmp_path / "lora"), *why)
    assert beside(tmp_path) == [plain.name]


def test_a_template_without_rows_is_refused(plain, tmp_path):
    add_tokens(plain, pad="<|turn|>")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|turn|>")
    tokenizer.save_pretrained(plain)
    refused(call("fetch_base", "--model", plain, "--output", tmp_path / "out"), "'<|turn|>' the id", "has only")
