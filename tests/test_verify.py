"""verify.py: intact, stale and broken artifacts are told apart."""

import json
import shutil

from tests.conftest import call, refused


def test_whole_stale_and_broken(base, data, tmp_path):
    mine = tmp_path / "base"
    shutil.copytree(base, mine)
    out = tmp_path / "q8"
    flags = ["--method", "gguf-q8_0", "--samples", 2, "--threads", 1, "--output", out]
    assert call("quantize", "--model", mine, "--data", data, *flags).code == 0
    (tmp_path / "nothing").mkdir()

    done = call("verify", mine, out, tmp_path / "nothing")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == ["intact", "intact"]

    meta = json.loads((mine / "metadata.json").read_text())
    (mine / "metadata.json").write_text(json.dumps(meta | {"digest": "another"}))
    done = call("verify", out)
    assert done.code == 0 and done.out.startswith(f"stale   {out}") and str(mine) in done.out

    with open(out / "model.gguf", "ab") as file:
        file.write(b"x")
    done = call("verify", out)
    assert done.code == 2 and "model.gguf modified after the build" in done.out


def test_no_artifact_at_all(tmp_path):
    refused(call("verify", tmp_path), "metadata.json", "make all")
