"""What a directory is said to be: kind, base and whose tokenizer, for whatever lies there."""

import json

import pytest

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
