"""What several tests share: scripts as a user runs them, and tiny artifacts that are made once a session.

`script` starts a process of its own, a fork of one that has imported the libraries. `call` runs the same `cli.run` in
this process, where torch is loaded already: an uncaught exception then fails the test, as its traceback would have
failed the user.
"""

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest

# No test asks a hub. Set here, since huggingface_hub reads it when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# What `make test` was given is not meant for the make that tests run.
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
    os.environ.pop(name, None)

# Files of tests that run side by side keep to a core each, with all that they start: processes of two threads each on
# two cores wait for each other.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = REPOSITORY / "scripts"

Done = namedtuple("Done", "code out err")


def environment(**more) -> dict:
    """A process of the tests computes on one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


WARM_PYTHON = Path(__file__).with_name("warm_python.py")


@functools.cache
def warm() -> dict:
    """What a process needs in its environment to run WARM_PYTHON, whose server is started here."""
    address = Path(tempfile.mkdtemp()) / "socket"
    settings = dict(TOKENIZERS_PARALLELISM="false", TORCHDYNAMO_DISABLE="1")  # as lib/core/cli.py sets them
    server = subprocess.Popen([sys.executable, WARM_PYTHON, "--serve", address], env=environment(**settings))
    atexit.register(shutil.rmtree, address.parent)
    atexit.register(server.kill)
    until = time.time() + 120
    while not address.exists():
        assert time.time() < until and server.poll() is None, "no warm Python"
        time.sleep(0.05)
    return {"WARM_PYTHON": str(address), "REAL_PYTHON": sys.executable}


def script(name: str, *argv, **how) -> Done:
    """Run scripts/<name>.py in a process of its own. With an environment or limits, it imports the libraries itself."""
    python = WARM_PYTHON if how.keys() <= {"cwd", "timeout"} else sys.executable
    how = {"timeout": 120, "env": environment(**warm())} | how
    command = [str(python), str(SCRIPTS / f"{name}.py"), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, **how)
    return Done(done.returncode, done.stdout, done.stderr)


def call(name: str, *argv) -> Done:
    """Run scripts/<name>.py in this process: parser, YAML layers, main and exit code are the real ones."""
    from lib.core import cli

    module = importlib.import_module(name)
    return call_main(module.main, module.make_parser, module.__file__, *argv, run=cli.run)


def call_main(main, make_parser, file, *argv, run) -> Done:
    out, err = io.StringIO(), io.StringIO()
    before, handler, arguments = dict(os.environ), signal.getsignal(signal.SIGTERM), sys.argv
    os.environ.update(environment())
    sys.argv = [str(file), *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(main, make_parser)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGTERM, handler)
    return Done(code, out.getvalue(), err.getvalue())


def start(name: str, argv) -> subprocess.Popen:
    """Start scripts/<name>.py, to be killed with `kill`."""
    command = [str(WARM_PYTHON), str(SCRIPTS / f"{name}.py"), *map(str, argv)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, env=environment(**warm()), **quiet)


def kill(process: subprocess.Popen) -> None:
    """`kill -9` of a script that `start` started."""
    process.send_signal(signal.SIGUSR1)
    process.wait()


def killed_at_checkpoint(name: str, argv, run: Path, steps: str) -> Path:
    """Start a script that trains and `kill -9` it once a checkpoint of a step in `steps` is whole; the newest one."""
    process = start(name, argv)
    until = time.time() + 90
    while not list(run.glob(f"checkpoint-{steps}/whole.json")):
        assert time.time() < until and process.poll() is None, f"it never reached step {steps}"
        time.sleep(0.01)
    kill(process)
    return max(run.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


def killed(name: str, argv: list, file: Path, lines: int) -> int:
    """Start scripts/<name>.py, kill it once so many lines stand in a file, and leave half a line there as a kill in the
    middle of one does. How many whole lines there are."""
    process = start(name, argv)
    until = time.time() + 90
    while not (file.is_file() and file.read_text().count("\n") >= lines):
        assert time.time() < until and process.poll() is None
        time.sleep(0.001)
    kill(process)
    with open(file, "a") as whole:
        whole.write('{"n": 7, "i')
    return file.read_text().count("\n")


def refused(done: Done, *words: str) -> None:
    """Exit code 2, a reason that holds all the words, and no traceback."""
    assert done.code == 2, done
    assert "Traceback" not in done.err + done.out, done.err
    for word in words:
        assert word in done.err, (word, done.err)


def beside(path: Path) -> list[str]:
    """The names in a directory: what a test compares to prove that nothing was left behind."""
    return sorted(p.name for p in path.iterdir()) if path.is_dir() else []


def row(n: int) -> dict:
    return {
        "question": f"What is the capital of country {n}?",
        "documents": [f"Document {n}. The capital of country {n} is town {n % 7}."],
        "gold": [f"town {n % 7}"],
    }


@pytest.fixture(scope="session")
def tiny_artifacts(tmp_path_factory) -> dict:
    """What the real scripts said when they made the tiny artifacts, and where those lie: base, data, rows."""
    folder = tmp_path_factory.mktemp("made with spaces")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(n)) + "\n" for n in range(60)))
    base = script("fetch_base", "--model", "tiny-random", "--output", folder / "tiny-base")
    data = script("generate_data", "--source", rows, "--output", folder / "data" / "raw")
    assert base.code == 0, base.err
    assert data.code == 0, data.err
    return {
        "rows": rows, "base": folder / "tiny-base", "data": folder / "data" / "raw",
        "base said": base, "data said": data,
    }  # fmt: skip


@pytest.fixture(scope="session")
def base(tiny_artifacts) -> Path:
    """A tiny base model, made by fetch_base.py; to be read, not changed."""
    return tiny_artifacts["base"]


@pytest.fixture(scope="session")
def data(tiny_artifacts) -> Path:
    """A data artifact of 60 rows, made by generate_data.py; to be read, not changed."""
    return tiny_artifacts["data"]


@pytest.fixture(scope="session")
def clara_data(data, tmp_path_factory):
    """CLaRa's rows, made of `data` by generate_data.py; to be read, not changed."""
    folder = tmp_path_factory.mktemp("clara data") / "clara"
    done = call("generate_data", "--source", "clara", "--data", data, "--output", folder, "--candidates", 6)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def plain(base, tmp_path) -> Path:
    """A model directory of the user's own, no artifact of ours: to be changed at will."""
    folder = tmp_path / "my model"
    shutil.copytree(base, folder)
    (folder / "metadata.json").unlink()
    return folder


@pytest.fixture
def bundled(tmp_path, monkeypatch) -> Path:
    """A store of assets that holds two small evaluation packages of the real ones' form."""
    from lib.core import assets

    monkeypatch.setattr(
        assets, "fetch_asset", functools.partial(assets.fetch_asset, store=write_sets(tmp_path / "assets"))
    )
    return tmp_path / "assets"


def write_sets(store: Path) -> Path:
    from lib.core import assets, cli
    from lib.data import evaluation_sets

    sets = {
        "boolq": [
            {"question": "is the first series of notes still legal tender", "answer": "True", "title": "Notes",
             "passage": "A new series of notes will be issued next year, and until then the old one stays."},
            {"question": "can cows sleep while they stand", "answer": "False", "title": "Cows",
             "passage": "They lie down."},
        ],
        "commonsense_qa": [
            {"question": "Where do people live?", "answer": "B. apartment",
             "options": "\nA. mars\nB. apartment\nC. england\nD. pond\nE. houses"},
            {"question": "What is important?\nA. newness\nB. innocence", "answer": "D. open mind",
             "options": "\nC. enlightenment\nD. open mind\nE. smartness?"},
        ],
        "mmlu": [
            {"question": "Which question drives philosophy?", "answer": "D. Are they?",
             "options": "A. Why should we?\nB. How do you know?\nC. Who\n does?\nD. Are they?"},
        ],
        "mt_bench": [
            {"question_id": 81, "category": "writing",
             "turns": ["Write about Hawaii.", "Start every sentence of it with the letter A."]},
        ],
    }  # fmt: skip
    for name, (asset, file) in evaluation_sets.FILES.items():
        known = cli.read_yaml(assets.CONFIG)[asset]
        path = store / f"{asset}-{known['version']}" / (file or known["inside"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in sets[name]))
    return store


@pytest.fixture(scope="session")
def talker(tmp_path_factory) -> Path:
    """A tiny chat model whose texts end: after each token with a probability of 7 %, whatever came before."""
    import torch

    from lib.model import tiny

    folder = tmp_path_factory.mktemp("talkers") / "talker"
    words = tiny.tokenizer()
    model = tiny.model(len(words), tie_word_embeddings=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.normal_()[:, 0] = 8  # which the norm makes 5.7 at each position
        model.lm_head.weight.normal_(std=0.3)[:, 0] = 0
        model.lm_head.weight[:3] = 0
        model.lm_head.weight[:3, 0] = torch.tensor([-9, -9, 0.9])  # <|im_end|> is the third
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
