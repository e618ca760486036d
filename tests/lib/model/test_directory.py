"""What a directory is said to be: kind, base and whose tokenizer, for whatever lies there."""

import argparse
import json
import shutil

import pytest

from lib.core import artifact
from lib.core.cli import InputError
from lib.model.directory import eos_token_ids, open_directory


def write(folder, **files):
    """A directory of files by their stem: a dict is JSON, anything else an empty GGUF."""
    folder.mkdir(parents=True)
    for stem, content in files.items():
        name = f"{stem}.json" if isinstance(content, dict) else f"{stem}.gguf"
        (folder / name).write_text(json.dumps(content) if isinstance(content, dict) else "")
    return folder


def write_adapter(folder, base, **files):
    return write(folder, adapter_config={"base_model_name_or_path": base, "r": 4}, **files)


def test_the_kind_is_by_what_lies_there(tmp_path):
    plain = write(tmp_path / "plain", config={"hidden_size": 64})
    for kind, folder in {
        "plain": plain,
        "quantised": write(tmp_path / "nf4", config={"quantization_config": {"load_in_4bit": True}}),
        "gguf": write(tmp_path / "gguf", config={"quantization_config": {}}, model=None),
        "adapter": write_adapter(tmp_path / "lora", str(plain), adapter=None),
    }.items():
        assert open_directory(folder).kind == kind
    assert open_directory(tmp_path / "none").kind == "plain"  # whoever reads it says that there is nothing
    (plain / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: not JSON"):
        open_directory(plain)


def test_a_base_is_found_by_its_path_in_the_adapter_and_beside_it(tmp_path):
    base = write(tmp_path / "models" / "base", config={})
    write(tmp_path / "models" / "lora" / "inside", config={})
    for number, named in enumerate((str(base), "/elsewhere/base", "../base")):
        found = open_directory(write_adapter(tmp_path / "models" / f"lora-{number}", named)).base
        assert found.path.samefile(base) and found.kind == "plain"
    other = write(tmp_path / "other", model=None)
    assert open_directory(tmp_path / "models" / "lora-0", other).base.gguf == other / "model.gguf"
    assert open_directory(other).base is None


def test_a_base_beside_the_adapter_goes_before_one_in_the_working_directory(tmp_path, monkeypatch):
    """What an adapter names `base` is not whatever has that name where a script happens to run."""
    monkeypatch.chdir(write(tmp_path / "here" / "base", config={}).parent)
    for right in ("there", "there/lora"):
        base = write(tmp_path / right / "base", config={})
        adapter = tmp_path / "there" / "lora"
        if not (adapter / "adapter_config.json").exists():
            write_adapter(adapter, "base")
        assert open_directory(adapter).base.path.samefile(base)
    alone = write_adapter(tmp_path / "alone" / "lora", "base")
    assert open_directory(alone).base.path.samefile("base")  # PEFT's own meaning, where nothing else has the name


def test_only_the_base_that_the_metadata_records_will_do(base, tmp_path):
    """Beside the adapter lies another model; the right one is found by its digest, or the wrong one is named."""
    adapter = tmp_path / "models" / "lora"
    with artifact.write_artifact(adapter, "adapter", argparse.Namespace(), {"base": base}) as build:
        settings = {"base_model_name_or_path": str(tmp_path / "models" / "tiny-base")}
        (build.path / "adapter_config.json").write_text(json.dumps(settings))
    other = write(tmp_path / "models" / "tiny-base", config={"other": 1})
    with pytest.raises(
        InputError, match=r"tiny-base: is not the base that \S+ was trained on.*digest differs"
    ) as error:
        _ = open_directory(adapter).base
    assert artifact.read(base)["digest"][:12] in str(error.value)
    shutil.copytree(base, adapter.parent / "moved" / "tiny-base")
    moved = shutil.copytree(adapter, adapter.parent / "moved" / "lora")
    assert open_directory(moved).base.path == moved.parent / "tiny-base"
    with pytest.raises(InputError, match="digest differs"):
        _ = open_directory(moved, other).base
    assert open_directory(adapter, base).base.path == base


def test_adapters_that_name_each_other_are_refused(tmp_path):
    one, other = (write_adapter(tmp_path / name, beside) for name, beside in (("one", "other"), ("other", "one")))
    for adapter in (one, other):
        with pytest.raises(InputError, match="is itself an adapter"):
            _ = open_directory(adapter).base


@pytest.mark.parametrize("named", ["nowhere", "user/lora", None])
def test_a_base_that_is_not_there_is_missed_only_by_who_needs_it(tmp_path, named):
    """Scripts that take no adapter say so, whether its base is there or not. An adapter is not its own base."""
    adapter = open_directory(write_adapter(tmp_path / "lora", named))
    assert adapter.kind == "adapter" and adapter.config["r"] == 4
    with pytest.raises(InputError, match="is not there; `make base` makes it"):
        _ = adapter.base


def test_an_adapter_has_a_given_bases_tokenizer_and_else_its_own(tmp_path):
    base = write(tmp_path / "base", config={}, tokenizer_config={})
    bare, own = (write_adapter(tmp_path / name, "base") for name in ("bare", "own"))
    (own / "tokenizer_config.json").write_text("{}")
    assert open_directory(own).own_tokenizer and not open_directory(own, base).own_tokenizer
    assert not open_directory(bare).own_tokenizer and open_directory(base).own_tokenizer


def test_several_gguf_files_are_refused_by_who_wants_one(tmp_path):
    several = open_directory(write(tmp_path / "several", one=None, two=None))
    assert several.kind == "gguf"
    with pytest.raises(InputError, match="holds 2 GGUF files, expected one"):
        _ = several.gguf


def test_ids_that_end_an_answer_are_those_of_the_base_or_are_missed(tmp_path):
    base = write(tmp_path / "base", config={}, generation_config={"eos_token_id": [2, 7]})
    assert eos_token_ids(open_directory(write_adapter(tmp_path / "lora", str(base)))) == {2, 7}
    with pytest.raises(InputError, match="no ids that end an answer"):
        eos_token_ids(open_directory(write(tmp_path / "plain", config={})))
