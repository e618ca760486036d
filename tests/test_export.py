"""export.py: what was made, taken out of here, and loaded where it arrives by the programs that people use."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
from export import is_export, unpack

from lib.core import artifact
from lib.core.cli import InputError
from lib.export import card
from tests.conftest import SCRIPTS, beside, call, environment, refused, script
from tests.hub_server import Hub
from tests.test_merge_lora import make_adapter

CHECKED = "--i-have-checked-the-licence"
PROMPT = [{"role": "user", "content": "What is the capital of country 3?"}]


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    """An adapter, the merged model, and its GGUF."""
    folder = tmp_path_factory.mktemp("models")
    adapter = make_adapter(folder / "tiny-lora", base)
    assert call("merge_lora", "--adapter", adapter, "--output", folder / "tiny-lora-merged").code == 0
    argv = ["--model", folder / "tiny-lora-merged", "--data", data, "--method", "gguf-q8_0", "--accept-divergence"]
    assert call("quantize", *argv, "--output", folder / "tiny-lora-int4").code == 0
    return folder


def export(form, model, to, *argv, checked=True, run=call):
    more = [CHECKED] * checked + ["--run-dir", to.parent / "run"]
    return run("export", "--format", form, "--model", model, "--to", to, *more, *argv)


def exported(form, model, to, *argv):
    done = export(form, model, to, *argv)
    assert done.code == 0, done.err
    assert "read back" in done.out and done.out.splitlines()[-1] == str(to)
    assert beside(to.parent) == [to.name], "something was left"
    return to


def unzipped(file, folder):
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    (tree,) = folder.iterdir()
    return tree


def outside(code: str, folder):
    """What a Python that knows nothing of these scripts prints, from within a folder."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the forms -----------------------------------------------------------------------------------------------


def test_a_zip_has_the_same_bytes_each_time_and_no_path_of_this_machine(made, base, tmp_path):
    one = exported("zip", made / "tiny-lora", tmp_path / "a" / "x.zip")
    other = exported("zip", made / "tiny-lora", tmp_path / "b b" / "y.zip")
    assert artifact.sha256(one) == artifact.sha256(other)
    tree = unzipped(one, tmp_path / "else where")
    meta = artifact.read(tree, "adapter")
    assert meta["exported"]["of"] == artifact.read(made / "tiny-lora")["digest"]
    for file in ("metadata.json", "README.md", "adapter_config.json"):
        assert str(base.parent) not in (tree / file).read_text()
    assert "/tmp" not in (tree / "metadata.json").read_text()


def test_files_that_only_zip64_can_hold_come_back(base, tmp_path, monkeypatch):
    import export

    with monkeypatch.context() as smaller:
        smaller.setattr(zipfile, "ZIP64_LIMIT", 1000)  # in the place of 2 GB
        export.pack(base, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        weights = archive.getinfo(f"{base.name}/model.safetensors")
        assert weights.create_version >= zipfile.ZIP64_VERSION and archive.testzip() is None
    there = unzipped(tmp_path / "x.zip", tmp_path / "there")
    assert artifact.file_digests(there) == artifact.file_digests(base)


def test_a_model_of_the_users_is_not_said_to_have_lain_where_it_lay(plain, tmp_path):
    (plain / "README.md").write_text("---\nlicense: mit\n---\n")
    assert call("fetch_base", "--model", plain, "--output", tmp_path / "models" / "mine").code == 0
    done = export("folder", tmp_path / "models" / "mine", tmp_path / "drive" / "mine", checked=False)
    assert done.code == 0, done.err
    for file in ("metadata.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "drive" / "mine" / file).read_text()
    assert "base model my model: mit" in (tmp_path / "drive" / "mine" / "README.md").read_text()


@pytest.mark.slow
def test_an_unzipped_adapter_answers_through_peft(made, base, tmp_path):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    tree = unzipped(exported("zip", made / "tiny-lora", tmp_path / "a" / "x.zip"), tmp_path / "there")
    code = """
import torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.float32).eval()
print(model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1].topk(3).indices.tolist())
print(model.peft_config["default"].base_model_name_or_path)
"""
    there, named = outside(code, tree).splitlines()
    assert named == "base"
    here, alone = (
        str(model.from_pretrained(path, dtype=torch.float32).eval()(ids).logits[0, -1].topk(3).indices.tolist())
        for ids in [torch.tensor([[5, 6, 7, 8]])]
        for model, path in ((AutoPeftModelForCausalLM, made / "tiny-lora"), (AutoModelForCausalLM, base))
    )
    assert there == here != alone


@pytest.mark.slow
def test_a_merged_model_answers_through_a_pipeline(made, tmp_path):
    there = exported("folder", made / "tiny-lora-merged", tmp_path / "drive" / "my model")
    code = (
        "from transformers import pipeline\n"
        "ask = pipeline('text-generation', model='.', do_sample=False, max_new_tokens=8, dtype='float32')\n"
        f"print(repr(ask({PROMPT!r})[0]['generated_text'][-1]['content']))"
    )
    from lib.engines.opening import open_engine
    from lib.model.directory import open_directory

    engine = open_engine(open_directory(made / "tiny-lora-merged"), load="fp32")
    answer = engine.generate([engine.prompt_ids(PROMPT)], 8)[0].text
    assert outside(code, there).splitlines()[-1] == repr(answer)


@pytest.mark.parametrize("name", ["tiny-lora-merged", "tiny-lora-int4"])
def test_a_gguf_answers_a_chat_request_by_its_own_template(made, tmp_path, name):
    """llama.cpp's server on loopback, asked the way an OpenAI client does."""
    there = exported("gguf", made / name, tmp_path / "drive" / "for llama.cpp")
    code = f"""
import json, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.use_jinja = {name + ".gguf"!r}, 512, 1, True
server = xllamacpp.Server(params)
body = json.dumps({{"messages": {PROMPT!r}, "max_tokens": 4, "temperature": 0}}).encode()
address, kind = server.listening_address + "/v1/chat/completions", {{"Content-Type": "application/json"}}
request = urllib.request.Request(address, body, kind)
print(json.loads(urllib.request.urlopen(request, timeout=60).read())["usage"]["prompt_tokens"])
"""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(made / "tiny-lora-merged")
    expected = words.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
    assert outside(code, there).splitlines()[-1] == str(len(expected))


@pytest.mark.slow
def test_a_hub_repository_is_private_recorded_and_read_back(made, tmp_path):
    hub = Hub("hf_secretOfThisTest")
    argv = [
        "--format",
        "hub",
        "--model",
        made / "tiny-lora",
        "--to",
        "user/tiny",
        "--record",
        tmp_path / "hub.json",
        CHECKED,
    ]
    folders = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_TOKEN=hub.token, HF_HUB_DISABLE_XET="1")
    env = {k: v for k, v in environment().items() if not k.startswith("HF_")} | folders
    try:
        done = script("export", *argv, "--run-dir", tmp_path / "run", env=env)
        assert done.code == 0, done.err
        recorded = json.loads((tmp_path / "hub.json").read_text())
        assert recorded["revision"] == hub.head("user/tiny") and hub.private["user/tiny"]
        assert "read back from user/tiny" in done.out and recorded["revision"] in done.out
        again = script("export", *argv, "--run-dir", tmp_path / "run", env=env)
        assert "already up to date" in again.out, again.err
        meta = hub.content("user/tiny", "metadata.json").decode()
        assert hub.token not in meta + done.out + done.err and "/tmp" not in meta
        refused(
            script("export", *argv, "--run-dir", tmp_path / "run", env=env | {"HF_TOKEN": "hf_wrong"}),
            "token was rejected",
        )
    finally:
        hub.stop()


def test_ollama_gets_a_modelfile_beside_the_gguf(made, tmp_path):
    there = exported("ollama", made / "tiny-lora-int4", tmp_path / "drive" / "x")
    lines = (there / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./tiny-lora-int4.gguf" and (there / "tiny-lora-int4.gguf").is_file()
    assert 'PARAMETER stop "<|im_end|>"' in lines and "PARAMETER temperature 0" in lines
    assert "ollama create tiny-lora-int4 -f Modelfile" in (there / "README.md").read_text()


@pytest.mark.slow
def test_an_evaluation_harness_loads_the_merged_model(made, tmp_path):
    """lm-eval, on a task of its own kind whose rows lie here."""
    there = exported("folder", made / "tiny-lora-merged", tmp_path / "drive" / "x")
    (tmp_path / "tasks").mkdir()
    rows = [{"question": f"What is the capital of country {n}?", "answer": f"town {n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (tmp_path / "tasks" / "towns.yaml").write_text(
        "task: towns\ndataset_path: json\noutput_type: loglikelihood\n"
        f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(tmp_path / 'rows.jsonl'))}}}}}\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: " {{answer}}"\nmetric_list: [{metric: perplexity}]\n'
    )
    arguments = f"pretrained={there},dtype=float32"
    how = ["--model", "hf", "--model_args", arguments, "--tasks", "towns", "--include_path", tmp_path / "tasks"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, how), "--device", "cpu", "--output_path", str(tmp_path / "found")],
        capture_output=True, text=True, env=environment(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "found").rglob("results*.json")
    assert json.loads(found.read_text())["results"]["towns"]["perplexity,none"] > 1


# --- the card --------------------------------------------------------------------------------------------------


def test_the_card_holds_what_was_measured_and_the_licences(made, tmp_path):
    def one(model, f1):
        scores = {key: {"mean": f1, "low": f1 - 0.1, "high": f1 + 0.1} for key in card.SCORES}
        speed = {"decode": {"median": 30.0, "min": 29.0, "max": 31.0}}
        digest = artifact.read(model)["digest"]
        return scores | {"digest": digest, "model_bytes": 3e6, "tokens_per_second": speed, "engine": "transformers"}

    comparison = {
        "reference": "base", "rows": 77, "machine": {"cpu": "a CPU", "cores": 3, "gpu": None},
        "variants": {"base": one(made / "tiny-lora-merged", 0.25), "lora": one(made / "tiny-lora", 0.75)},
        "answers": [{"question": "Document: A secret of mine.\n\nQuestion: Which?\n\nAnswer:"}],
    }  # fmt: skip
    meta = artifact.read(made / "tiny-lora")
    text = card.write_card(made / "tiny-lora", meta, {"base model a/b": "Apache-2.0", "data rows": "MIT"}, comparison)
    assert text.startswith("---\nbase_model: a/b\nlibrary_name: peft\nlicense: apache-2.0\n")
    assert "| token F1 | 0.250 [0.150, 0.350] | 0.750 [0.650, 0.850] |" in text
    assert "77 held-out questions" in text and "3 cores of a CPU" in text and "75%" in text
    assert "- data rows: MIT" in text
    assert "    Document: …\n    \n    Question: …\n    \n    Answer:\n" in text and "secret" not in text
    merged = artifact.read(made / "tiny-lora-merged")
    comparison["variants"]["base"]["digest"] = "another"
    text = card.write_card(made / "tiny-lora-merged", merged, {}, comparison)
    assert "0.750 [0.650, 0.850]" in text and "of the adapter before merging" in text
    further = meta | {"digest": "of its own", "inputs": meta["inputs"] | {"adapter": {"digest": meta["digest"]}}}
    text = card.write_card(made / "tiny-lora", further, {}, comparison)
    assert "was not evaluated" in text, "what dpo.py leaves is not the adapter that it began with"
    there = exported("folder", made / "tiny-lora", tmp_path / "drive" / "x")
    assert "was not evaluated before the export" in (there / "README.md").read_text()


def test_licences_that_are_not_clear_are_refused(made, tmp_path):
    refused(
        export("zip", made / "tiny-lora", tmp_path / "x.zip", checked=False),
        "redistribution may not be allowed",
        CHECKED,
    )
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize(
    ("licence", "clear"),
    [("Apache-2.0", True), ("mit", True), ("cc-by-sa-4.0", True), ("text in the public domain (US)", True),
     ("cc-by-nc-4.0", False), ("cc-by-nd-4.0", False), ("llama3.2", False), (None, False)],
)  # fmt: skip
def test_which_licences_are_known_to_allow_it(licence, clear):
    assert (card.find_unclear({"data rows": licence}) == []) == clear


def test_what_something_was_made_of_is_found_through_all_steps(made, base):
    found = card.collect_licences(made / "tiny-lora-int4")
    assert list(found) == ["base model tiny-random", "data rows.jsonl"]


# --- what is refused -------------------------------------------------------------------------------------------


def test_what_is_no_model_is_refused(data, made, tmp_path):
    refused(export("zip", data, tmp_path / "x.zip"), "'data'", "can be exported")
    shutil.copytree(made / "tiny-lora-merged", odd := tmp_path / "an 'odd' name")
    refused(export("ollama", odd, tmp_path / "x"), "rename it")
    shutil.rmtree(odd)
    refused(export("zip", tmp_path / "nowhere", tmp_path / "x.zip"), "does not exist")
    refused(export("gguf", made / "tiny-lora", tmp_path / "x"), "is an adapter; merge it")
    refused(export("zip", made / "tiny-lora", tmp_path / "x.tar"), ".zip")
    refused(export("folder", made / "tiny-lora", made / "tiny-lora" / "x"), "is inside it")
    assert not list(tmp_path.iterdir())


def test_what_answers_otherwise_is_taken_back(made, tmp_path):
    """16 bit of llama.cpp differ a little from those of transformers, which a bound of nothing does not let pass."""
    there = tmp_path / "drive" / "x"
    refused(export("gguf", made / "tiny-lora-merged", there, "--max-kl", 0), "gives other answers than")
    assert beside(there.parent) == []


def test_an_artifact_whose_bytes_changed_is_refused(made, tmp_path):
    shutil.copytree(made / "tiny-lora-merged", tmp_path / "odd")
    with open(tmp_path / "odd" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    refused(export("folder", tmp_path / "odd", tmp_path / "there"), "checksum mismatch")
    assert not (tmp_path / "there").exists()


def test_nothing_of_the_users_is_overwritten(made, tmp_path):
    mine = tmp_path / "mine.zip"
    mine.write_bytes(b"a holiday")
    with zipfile.ZipFile(tmp_path / "theirs.zip", "w") as archive:
        archive.writestr("x/metadata.json", '{"title": "x"}')
    refused(export("zip", made / "tiny-lora", tmp_path / "theirs.zip", "--replace"), "was not exported by Quartet")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis").write_bytes(b"x")
    refused(export("zip", made / "tiny-lora", mine, "--replace"), "was not exported by Quartet")
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "picture").write_bytes(b"sea")
    refused(export("folder", made / "tiny-lora", folder, "--replace"), "was not made by Quartet")
    assert mine.read_bytes() == b"a holiday" and (folder / "picture").read_bytes() == b"sea"
    assert (tmp_path / "run" / "thesis").read_bytes() == b"x"


@pytest.mark.parametrize("place, value", [(6, 1), (8, 77), (30, 0xFF), (45, 0xFF), (-3, 0x7F)])
def test_a_damaged_zip_is_no_export_of_ours(tmp_path, place, value):
    """Encrypted, by an unknown method, under another name, not what was packed, without an end."""
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/metadata.json", '{"kind": "base", "digest": "0", "exported": {}}')
    assert is_export(file)
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\1\2")  # of the list at the end, where some of this stands once more
    content[place] = value
    if place in (6, 8):
        content[entry + 2 + place] = value
    file.write_bytes(content)
    assert not is_export(file)
    with pytest.raises(InputError, match="is damaged"):
        unpack(file, tmp_path / "y")


def test_a_zip_whose_metadata_is_no_object_is_no_export_of_ours(tmp_path):
    for content in ("[]", "7", '"kind digest exported"', "{", "[" * 99999):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("x/metadata.json", content)
        assert not is_export(tmp_path / "x.zip")


@pytest.mark.slow
def test_an_earlier_export_is_replaced_on_purpose_alone(made, tmp_path):
    there = exported("folder", made / "tiny-lora", tmp_path / "drive" / "x")
    before = artifact.read(there)["digest"]
    assert "is already up to date" in export("folder", made / "tiny-lora", there).out
    refused(export("folder", made / "tiny-lora-merged", there), "contains a different artifact")
    assert artifact.read(there)["digest"] == before
    exported("folder", made / "tiny-lora-merged", there, "--replace")
    assert artifact.read(there, "model")
    file = exported("zip", made / "tiny-lora", tmp_path / "zips" / "x.zip")
    refused(export("zip", made / "tiny-lora", file), "--replace")
    exported("zip", made / "tiny-lora", file, "--replace")


def test_too_little_room_is_said_before_anything_is_written(made, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    done = export("zip", made / "tiny-lora", tmp_path / "x.zip")
    assert done.code == 3 and "GB free" in done.err and not (tmp_path / "x.zip").exists()


@pytest.mark.slow
def test_killed_while_it_writes_it_leaves_nothing_that_looks_whole(made, tmp_path):
    to = tmp_path / "x.zip"
    argv = ["--format", "zip", "--model", made / "tiny-lora-merged", "--to", to, "--run-dir", tmp_path / "run", CHECKED]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "export.py"), *map(str, argv)], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.time() + 60
    while not (tmp_path / "x.zip.partial").exists():
        assert time.time() < until and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not to.exists()
    done = export("zip", made / "tiny-lora-merged", to, run=script)
    assert done.code == 0, done.err
    assert beside(tmp_path) == ["x.zip"]
    assert json.loads(zipfile.ZipFile(to).read("tiny-lora-merged/metadata.json"))["kind"] == "model"
