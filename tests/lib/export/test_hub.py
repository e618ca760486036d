"""Artifacts in a Hub repository, through huggingface_hub's real client and a stand-in for the Hub on this machine.

The client reads its settings when it is imported, so all calls are made in a process that is kept: a line of JSON in,
a line out. What it wrote is searched for the token in the end, as each answer is.
"""

import argparse
import json
import random
import select
import shutil
import subprocess
import sys
import time

import pytest

from lib.core import artifact
from tests.conftest import SCRIPTS, beside, environment
from tests.hub_server import Hub

TOKEN = "hf_QuartetSecretOfTheTests"
REPO = "user/small.model"

# Runs as a script of ours does: offline unless the module goes online, and InputError alone for a user's mistake.
SCRIPT = f"""
import json, os, sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
from lib.core import cli
from lib.export import hub

def main(args):
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.update(asked.pop("environment", dict()))
        if "folder" in asked:
            asked["folder"] = Path(asked["folder"])
        begun, do = time.monotonic(), getattr(hub, asked.pop("do"))
        try:
            answer = dict(gave=do(**asked), error=None)
        except cli.InputError as error:
            answer = dict(gave=None, error=str(error))
        print(json.dumps(answer | dict(seconds=time.monotonic() - begun), default=str), flush=True)

cli.run(main, lambda: cli.parser("Calls of lib/export/hub.py.", "calls.py"))
"""

# The package `keyring`, as far as it is asked.
KEYRING = {
    "errors.py": "class KeyringError(Exception):\n    pass\n",
    "__init__.py": """
import os
from keyring import errors
def get_password(service, user):
    assert (service, user) == ("huggingface", "token")
    if os.environ.get("TEST_KEYRING") == "locked":
        raise errors.KeyringError("it is locked")
    return os.environ.get("TEST_KEYRING")
""",
}


class Calls:
    """The process that calls, and what it said on standard error."""

    def __init__(self, folder, url, **more):
        self.said = folder / f"said-{time.monotonic_ns()}"
        self.errors = self.said.open("w")
        online = dict(QUARTET_OFFLINE="1", HF_HUB_OFFLINE="1")  # as cli.run sets them where the user has set neither
        given = dict(HF_ENDPOINT=url, HF_HOME=str(folder), HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN)
        given |= online | dict(SSL_CERT_DIR=str(folder)) | more  # without certificates: reading them takes the longest
        kept = {
            k: v for k, v in environment().items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=kept | {k: v for k, v in given.items() if v is not None}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, cwd=folder,
        )  # fmt: skip

    def ask(self, do: str, **given) -> None:
        print(json.dumps(dict(do=do) | given, default=str), file=self.process.stdin, flush=True)

    def answer(self) -> dict:
        assert select.select([self.process.stdout], [], [], 60)[0], "it hangs"
        line = self.process.stdout.readline()
        assert line, self.said.read_text()
        assert TOKEN not in line
        return json.loads(line)

    def __call__(self, do: str, **given) -> dict:
        self.ask(do, **given)
        return self.answer()

    def upload(self, folder, **given) -> dict:
        done = self("upload", folder=folder, **{"repo": REPO} | given)
        assert done["error"] is None, done
        return done["gave"]

    def refuse(self, do: str, *words, **given) -> str:
        """It refuses soon, in these words. (In less than a second, huggingface_hub has no time to try again.)"""
        done = self(do, **{"repo": REPO, "timeout": 0.9} | given)
        assert done["error"] and done["seconds"] < 5, done
        for word in words:
            assert word in done["error"], (word, done)
        return done["error"]

    def end(self) -> str:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()  # one that hangs
        self.errors.close()
        return self.said.read_text()


@pytest.fixture(scope="module")
def server():
    made = Hub(TOKEN)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def process(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    (folder / "modules" / "keyring").mkdir(parents=True)
    for name, text in KEYRING.items():
        (folder / "modules" / "keyring" / name).write_text(text)
    made = Calls(folder, server.url, PYTHONPATH=str(folder / "modules"))
    yield made
    said = made.end()
    assert TOKEN not in said and "Traceback" not in said and "/lfs/" not in said, said


@pytest.fixture
def calls(process, server):
    server.reset()
    return process


def make(path, seed: int = 1, **more: bytes):
    """A small artifact: two large files as the Hub sees it, an empty one, a card, one in a folder."""
    noise = random.Random(seed).randbytes
    files = {
        "model-1.safetensors": noise(300_000), "model-2.safetensors": noise(200_000), "config.json": b"{}",
        "README.md": b"# A model\n", "empty.txt": b"", "more/a file.json": b"[%d]" % seed,
    } | more  # fmt: skip
    with artifact.write_artifact(path, "model", argparse.Namespace(seed=seed)) as build:
        for name, body in files.items():
            (build.path / name).parent.mkdir(exist_ok=True)
            (build.path / name).write_bytes(body)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("artifacts") / "a model")


@pytest.fixture
def model(made, tmp_path):
    return shutil.copytree(made, tmp_path / "a model")


def test_an_artifact_is_put_there_whole_and_comes_back(calls, server, model, tmp_path):
    done = calls.upload(model)
    head = server.head(REPO)
    assert done == {"repo": REPO, "revision": head, "url": f"{server.url}/{REPO}/tree/{head}", "uploaded": True}
    assert server.private[REPO] and len(server.repos[REPO]) == 2  # the Hub's own, and one
    files = [*artifact.read(model)["files"], artifact.METADATA]
    assert {name: server.content(REPO, name) for name in files} == {n: (model / n).read_bytes() for n in files}
    assert server.put_bytes == 500_000 and server.at(REPO).keys() == {*files, ".gitattributes"}
    assert all(TOKEN.encode() not in server.content(REPO, name) for name in files)

    back = calls("fetch", repo=REPO, revision=head, folder=tmp_path / "x" / "back")
    assert back["gave"] == str(tmp_path / "x" / "back") and beside(tmp_path / "x") == ["back"]
    assert artifact.read(tmp_path / "x" / "back") == artifact.read(model)
    assert beside(tmp_path / "x" / "back") == beside(model)


def test_the_same_again_sends_nothing_and_another_one_replaces_it(calls, server, model, tmp_path):
    first = calls.upload(model, public=True)
    assert not server.private[REPO]
    server.asked.clear()
    assert calls.upload(model, public=True) == first | {"uploaded": False}
    assert not {"create", "preupload", "put", "commit"} & {*server.asked}

    other = make(tmp_path / "other", seed=2)
    (other / "model-2.safetensors").unlink()
    (other / "README.md").unlink()
    with artifact.write_artifact(tmp_path / "next", "adapter", argparse.Namespace()) as build:
        shutil.copytree(other, build.path, dirs_exist_ok=True)
        (build.path / artifact.METADATA).unlink()
    second = calls.upload(tmp_path / "next", public=True)
    assert list(server.repos[REPO])[1:] == [first["revision"], second["revision"]]
    gone = {"model-2.safetensors", "README.md"}
    assert server.at(REPO).keys() == server.at(REPO, first["revision"]).keys() - gone
    assert f"{REPO}: the previous model remains in the history: {first['revision']}" in calls.said.read_text()
    assert calls("fetch", repo=REPO, revision=first["revision"], folder=tmp_path / "old")["error"] is None
    assert artifact.read(tmp_path / "old") == artifact.read(model)
    assert calls.upload(tmp_path / "next", public=True)["uploaded"] is False


def test_a_file_that_was_changed_on_the_hub_is_mended_and_a_card_kept(calls, server, model):
    done = calls.upload(make(model.parent / "plain", **{"README.md": b""}))
    server.add(REPO, server.at(REPO) | {"config.json": b"{1}"})
    assert calls.upload(model)["uploaded"]
    assert server.content(REPO, "config.json") == b"{}" and done["revision"] in server.repos[REPO]


@pytest.mark.parametrize(
    "files",
    [{"thesis.tex": b"x"}, {"metadata.json": b'{"title": "x"}', "data.csv": b"1"}, {"metadata.json": b"["}],
)
def test_other_content_is_left_alone(calls, server, model, files):
    head = server.add(REPO, files | {"README.md": b"mine"})
    calls.refuse("upload", REPO, sorted(files)[0], "contains files that Quartet did not make", folder=model)
    assert server.head(REPO) == head and "preupload" not in server.asked


def test_a_file_of_the_users_beside_an_artifact_is_left_alone(calls, server, model, tmp_path):
    calls.upload(model)
    head = server.add(REPO, server.at(REPO) | {"LICENSE": b"mine"})
    calls.refuse("upload", "LICENSE", folder=make(tmp_path / "next", seed=2))
    assert server.head(REPO) == head


def test_a_repository_with_a_card_alone_is_filled(calls, server, model):
    server.add(REPO, {".gitattributes": b"", "README.md": b"mine"})
    assert calls.upload(model)["uploaded"]


def test_what_was_meant_to_be_private_does_not_become_public(calls, server, model):
    head = server.add(REPO, {}, private=False)
    calls.refuse("upload", "is public, but private was requested", folder=model)
    server.private[REPO] = True
    calls.refuse("upload", "is private, but public was requested", folder=model, public=True)
    assert server.head(REPO) == head


def test_bad_names_are_refused_before_anything_is_sent(calls, server, model, tmp_path):
    for repo in ["model", "a b/c", "a/b'c", 'a/"b"', "a/../b", "a/..", "../b", "a/b/c", "a/" + "x" * 97, "a/b\n", "",
                 "/b", "a/", "ä/b", "a/b.git", "https://hub/a/b"]:  # fmt: skip
        calls.refuse("upload", repr(repo), "user/name", repo=repo, folder=model)
        calls.refuse("fetch", repr(repo), "user/name", repo=repo, folder=tmp_path / "x", revision="main")
    assert not server.asked


def test_an_artifact_that_is_not_whole_is_refused_before_anything_is_sent(calls, server, model):
    (model / "config.json").write_text("{ }")
    calls.refuse("upload", "checksum mismatch", folder=model)
    assert not server.asked


# --- the token ---------------------------------------------------------------------------------------------


def test_the_token_is_found_where_users_keep_it(calls, server, model):
    unset = {"HF_TOKEN": "", "TEST_KEYRING": ""}
    file = calls.said.parent / "token"
    calls.refuse("upload", "no token for the Hub", "hf auth login", "HF_TOKEN", folder=model, environment=unset)
    calls.refuse("upload", "it is locked", folder=model, environment=unset | {"TEST_KEYRING": "locked"})
    assert not server.asked
    assert calls.upload(model, environment=unset | {"TEST_KEYRING": TOKEN})["uploaded"]
    file.write_text(TOKEN + "\n")
    assert not calls.upload(model, environment=unset | {"TEST_KEYRING": "locked"})["uploaded"]
    file.unlink()
    for wrong in ("hf_wrong", "hf_not\tone", "hf_nöt"):
        said = calls.refuse("upload", "token", folder=model, environment={"HF_TOKEN": wrong})
        assert wrong not in said
    calls.refuse("upload", "HTTP 401", folder=model, environment={"HF_TOKEN": "hf_wrong"})
    assert not calls.upload(model, environment={"HF_TOKEN": TOKEN})["uploaded"]


def test_where_no_token_is_or_the_user_forbids_the_network_it_says_so(server, model, tmp_path):
    server.reset()
    none = Calls(tmp_path, server.url, HF_TOKEN=None)  # and no keyring is installed
    forbidden = Calls(tmp_path, server.url, QUARTET_OFFLINE=None)
    none.refuse("upload", "no token", folder=model)
    forbidden.refuse("upload", "HF_HUB_OFFLINE", "unset it", folder=model)
    assert "Traceback" not in none.end() + forbidden.end() and not server.asked


# --- refusals and silence ----------------------------------------------------------------------------------

# The calls in the order in which they are made: first to a repository that is missing, then to an earlier artifact's.
NEW = [("info", 0), ("create", 0), ("info", 1), ("tree", 0), ("card", 0), ("preupload", 0), ("batch", 0), ("put", 0),
       ("put", 1), ("commit", 0), ("tree", 1)]  # fmt: skip
WORDS = {401: "HF_TOKEN", 403: "no permission", 404: "check the name", 409: "changed in the meantime",
         429: "too many requests", 500: "the Hub has an internal error"}  # fmt: skip


@pytest.mark.parametrize("status", WORDS)
def test_a_refusal_at_any_call_is_said_and_nothing_is_half_there(calls, server, model, status):
    for route, spare in NEW:
        if (route, spare, status) == ("info", 0, 404):
            continue  # the repository is missing, as it is
        server.reset()
        server.trouble(route, spare=spare, status=status, headers={"Retry-After": "3600"})
        said = calls.refuse("upload", f"Hub repository {REPO}: ", WORDS[status], f"HTTP {status}", folder=model)
        assert "3600 seconds" in said or status not in (429, 500)
        whole = (route, spare) == ("tree", 1)
        assert [len(files) for files in server.repos.get(REPO, {}).values()][1:] == [8] * whole
        server.troubles.clear()
        assert status != 500 or calls.upload(model)["uploaded"] is not whole  # it goes on
    for route, spare in [("resolve", 0), ("resolve", 1)]:  # HEAD and GET of the earlier metadata.json
        server.trouble(route, spare=spare, status=status, headers={"Retry-After": "3600"})
        calls.refuse("upload", f"HTTP {status}", folder=model)
        calls.refuse("fetch", f"HTTP {status}", revision=server.head(REPO), folder=model.parent / "back")
        server.troubles.clear()
    assert beside(model.parent) == ["a model"]


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(calls, server, model):
    for route, spare in NEW:
        server.reset()
        server.trouble(route, spare=spare, hang=True)
        calls.refuse("upload", f"Hub repository {REPO}: ", "no answer in 0.3 seconds", folder=model, timeout=0.3)
        assert len(server.repos.get(REPO, {})) <= (2 if route == "tree" and spare else 1)
    server.troubles.clear()
    revision = calls.upload(model)["revision"]
    for spare in (0, 1):
        server.trouble("resolve", spare=spare, hang=True, path="model-1")
        calls.refuse("fetch", "no answer", revision=revision, folder=model.parent / "back", timeout=0.3)
        server.troubles.clear()
    assert beside(model.parent) == ["a model"]


def test_a_hub_that_hangs_up_or_is_none_is_said(calls, server, model):
    server.trouble("info", cut=0)
    calls.refuse("upload", "no answer (", folder=model)
    server.troubles.clear()
    server.add(REPO, {})
    server.trouble("tree", status=200, text="<html>")
    calls.refuse("upload", "check HF_ENDPOINT", folder=model)


def test_what_passes_is_tried_again(calls, server, model):
    server.trouble("preupload", status=429, times=1, headers={"Retry-After": "0"})
    server.trouble("batch", status=500, times=1)
    assert calls.upload(model)["uploaded"]
    assert server.asked.count("preupload") == 2


def test_a_name_that_stays_taken_by_another_operation_is_given_up(calls, server, model):
    """huggingface_hub asks again at once, for ever."""
    text = "Cannot create repo: another conflicting operation is in progress"
    server.trouble("create", status=409, text=text)
    calls.refuse("upload", text, folder=model)
    assert server.asked.count("create") == 1


def test_a_change_meanwhile_is_not_overwritten(calls, server, model):
    server.add(REPO, {})
    server.trouble("batch", meanwhile=lambda: server.add(REPO, {"thesis.tex": b"mine"}))
    calls.refuse("upload", "changed in the meantime", "HTTP 412", folder=model)
    assert server.at(REPO) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("how", [{"status": 500}, {"hang": True}])
def test_a_commit_whose_answer_was_lost_is_found(calls, server, model, how):
    server.trouble("commit", late=True, times=1, **how)
    calls.refuse("upload", "repeat the command to resume", folder=model, timeout=0.5)
    assert calls.upload(model)["uploaded"] is False and len(server.repos[REPO]) == 2


def test_a_hub_that_lists_other_content_in_the_end_is_not_believed(calls, server, model, tmp_path):
    for name in ("model-1.safetensors", "config.json"):
        server.reset()
        server.lies = {name: "0" * 40}
        calls.refuse("upload", "differs from the upload", name, folder=model)
    server.lies = {}
    head = server.add(REPO, server.at(REPO) | {"config.json": b"{1}"})
    calls.refuse("fetch", "do not match its metadata.json", revision=head, folder=tmp_path / "back")
    head = server.add(REPO, {"config.json": b"{1}"})
    calls.refuse("fetch", "no Quartet artifact", revision=head, folder=tmp_path / "back")
    calls.refuse("fetch", f"{model} already exists", revision=head, folder=model)
    assert beside(tmp_path) == ["a model"]


# --- cut off -----------------------------------------------------------------------------------------------


def test_a_killed_run_does_not_send_again_what_was_there(calls, server, model, tmp_path):
    sha = artifact.read(model)["files"]
    server.trouble("put", hang=True, path=sha["model-2.safetensors"])
    first = Calls(tmp_path, server.url)
    first.ask("upload", repo=REPO, folder=model)
    until = time.time() + 30
    while server.asked.count("put") < 2 or sha["model-1.safetensors"] not in server.blobs:
        assert time.time() < until and first.process.poll() is None
        time.sleep(0.01)
    first.process.kill()
    first.process.wait()
    assert server.put_bytes == 300_000 and len(server.repos[REPO]) == 1
    server.troubles.clear()
    assert calls.upload(model)["uploaded"] and server.put_bytes == 500_000
    assert TOKEN not in first.said.read_text()


def test_a_connection_that_breaks_off_costs_no_more_than_its_file(calls, server, model):
    sha = artifact.read(model)["files"]
    server.trouble("put", cut=1000, path=sha["model-2.safetensors"])
    calls.refuse("upload", "no answer", "repeat the command to resume", folder=model)
    assert server.put_bytes == 300_000 and len(server.repos[REPO]) == 1
    server.troubles.clear()
    assert calls.upload(model)["uploaded"] and server.put_bytes == 500_000
