"""Copies of artifacts: whole, checked, and going on where they were cut off."""

import json
import shutil

import pytest

from lib.core import artifact, copying
from lib.core.cli import InputError
from tests.conftest import beside


@pytest.fixture
def source(base, tmp_path):
    return shutil.copytree(base, tmp_path / "a model")


def test_a_copy_is_whole_and_is_not_made_twice(source, tmp_path):
    target = tmp_path / "mounted drive" / "models" / "a model"
    assert copying.copy_artifact(source, target)
    assert artifact.read(target) == artifact.read(source) and beside(target.parent) == ["a model"]
    before = (target / artifact.METADATA).stat().st_mtime_ns
    assert not copying.copy_artifact(source, target)
    assert (target / artifact.METADATA).stat().st_mtime_ns == before


def test_equal_files_that_were_measured_again_are_described_anew(source, tmp_path):
    target = tmp_path / "drive" / "model"
    assert copying.copy_artifact(source, target)
    weights = (target / "model.safetensors").stat().st_ino
    (source / artifact.METADATA).write_text(json.dumps(artifact.read(source) | {"seconds": 12345}))
    assert not copying.copy_artifact(source, target, replace=True)
    assert artifact.read(target)["seconds"] == 12345 and (target / "model.safetensors").stat().st_ino == weights


def test_a_copy_that_was_cut_off_goes_on(source, tmp_path):
    target, partial = tmp_path / "x" / "model", tmp_path / "x" / "model.partial"
    partial.mkdir(parents=True)
    shutil.copy2(source / "tokenizer.json", partial)
    there = (partial / "tokenizer.json").stat().st_ino
    half = (source / "model.safetensors").read_bytes()
    (partial / "model.safetensors").write_bytes(half[: len(half) // 2])
    (partial / "of another version.bin").write_text("x")
    assert copying.copy_artifact(source, target)
    assert artifact.read(target)["digest"] == artifact.read(source)["digest"] and beside(target.parent) == ["model"]
    assert (target / "tokenizer.json").stat().st_ino == there  # what was whole was not copied again


def test_what_lies_there_is_replaced_on_purpose_alone(source, data, tmp_path):
    target = tmp_path / "x"
    shutil.copytree(data, target)
    with pytest.raises(InputError, match="contains a different artifact"):
        copying.copy_artifact(source, target)
    assert artifact.read(target)["kind"] == "data"
    assert copying.copy_artifact(source, target, replace=True) and artifact.read(target)["kind"] == "base"
    (target / "config.json").write_text("{}")  # a copy that was damaged is mended
    assert copying.copy_artifact(source, target) and artifact.read(target)
    shutil.rmtree(target)
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="was not made by Quartet"):
        copying.copy_artifact(source, target, replace=True)
    assert beside(target) == ["thesis.txt"]


def test_too_little_room_is_said_before_anything_is_copied(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(InputError, match="nothing was copied"):
        copying.copy_artifact(source, tmp_path / "x" / "model")
    assert beside(tmp_path / "x") == []


def test_a_source_that_is_not_whole_and_a_place_that_is_gone_are_refused(source, tmp_path, monkeypatch):
    def gone(*given):
        raise OSError(107, "Transport endpoint is not connected")

    with monkeypatch.context() as cut, pytest.raises(InputError, match="copying failed: Transport endpoint"):
        cut.setattr(shutil, "copyfile", gone)
        copying.copy_artifact(source, tmp_path / "x")
    (source / "config.json").write_text("{}")
    with pytest.raises(InputError, match="checksum mismatch"):
        copying.copy_artifact(source, tmp_path / "x")
    assert not (tmp_path / "x").exists()
