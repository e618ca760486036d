"""The command line that all scripts share: layers of defaults, errors, exit codes."""

import argparse
import ast
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.core import cli, hardware
from tests.conftest import REPOSITORY, SCRIPTS, Done, call, call_main, environment, refused, script

STAGES = sorted(SCRIPTS.glob("*.py"))
CONFIGS = sorted(p for p in (REPOSITORY / "configs").glob("*.yaml") if p.stem not in ("assets", "prices"))
HEAVY = {"torch", "numpy", "transformers", "datasets", "pyarrow", "pandas", "safetensors", "huggingface_hub"}

# A script with one flag of each type, as the real ones have them; it does what a test tells it to.
STAGE = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, {scripts!r})
from lib.core import cli
cli.ROOT = Path(__file__).parents[1]

def make_parser():
    parser = cli.parser(__doc__, __file__)
    parser.add_argument("--samples", type=cli.integer(1), default=1)
    parser.add_argument("--rate", type=cli.number(0, 1), default=0.1)
    parser.add_argument("--name", default="parser")
    parser.add_argument("--how", choices=["fast", "slow"], default="slow")
    parser.add_argument("--shuffle", action=cli.OnOff, default=False)
    return parser

def main(args):
    print(sorted((k, v) for k, v in vars(args).items() if k != "threads"))

if __name__ == "__main__":
    cli.run(main, make_parser)
"""
PLAIN = dict(how="slow", name="parser", profile="none", rate=0.1, samples=1, shuffle=False)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A function: write the YAML layers, run the stage in this process, say what it resolved."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "configs" / "profiles").mkdir(parents=True)
    file = tmp_path / "scripts" / "stage.py"
    file.write_text(STAGE.format(scripts=str(SCRIPTS)))
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    space = {"__file__": str(file), "__name__": "stage", "__doc__": "A stage."}
    exec(compile(file.read_text(), file, "exec"), space)

    def run(*argv, own=None, profile=None) -> Done:
        if own is not None:
            write(tmp_path / "configs" / "stage.yaml", own)
        if profile is not None:
            write(tmp_path / "configs" / "profiles" / "box.yaml", profile)
        return call_main(space["main"], space["make_parser"], file, *argv, run=cli.run)

    return run


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def resolved(done: Done) -> dict:
    assert done.code == 0, done
    return dict(eval(done.out))


# --- layers ------------------------------------------------------------------------------------------------


def test_each_layer_covers_the_one_below_and_only_what_it_names(stage):
    assert resolved(stage()) == PLAIN
    own = "samples: 2\nname: own\nrate: 5.0e-1\n"
    assert resolved(stage(own=own)) == PLAIN | {"samples": 2, "name": "own", "rate": 0.5}
    profile = "stage:\n  samples: 3\n  shuffle: true\n"
    assert resolved(stage("--profile", "box", profile=profile)) == PLAIN | {
        "samples": 3, "name": "own", "rate": 0.5, "shuffle": True, "profile": "box",
    }  # fmt: skip
    line = resolved(stage("--samples", "4", "--profile=box", "--no-shuffle", "--name", ""))
    assert line["samples"] == 4 and line["shuffle"] is False and line["name"] == ""
    assert resolved(stage())["samples"] == 2, "a profile that is not asked for must not apply"


def test_a_profile_can_be_the_default_of_a_machine(stage):
    assert resolved(stage(own="profile: box\n", profile="stage: {samples: 9}\n"))["samples"] == 9


def test_yaml_gives_what_the_command_line_gives(stage):
    typed = resolved(stage("--rate", "5e-1", "--samples", "7", "--how", "fast", "--name", "12"))
    own = "rate: 5e-1\nsamples: '7'\nhow: fast\nname: 12\n"  # YAML reads 5e-1 as a text and 12 as a number
    assert resolved(stage(own=own)) == typed


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("sample: 3\n", ["stage.yaml", "unknown key 'sample'", "did you mean 'samples'"]),
        ("samples: many\n", ["stage.yaml", "samples", "'many'"]),
        ("samples: 1.5\n", ["stage.yaml", "samples", "1.5"]),
        ("samples: 0\n", ["stage.yaml", "samples", "at least 1"]),
        ("samples: [1, 2]\n", ["stage.yaml", "samples"]),
        ("samples:\n", ["stage.yaml", "samples"]),
        ("samples: true\n", ["stage.yaml", "samples"]),
        ("rate: .nan\n", ["stage.yaml", "rate"]),
        ("rate: 1.01\n", ["stage.yaml", "rate", "0 to 1"]),
        ("shuffle: 'no'\n", ["stage.yaml", "shuffle"]),
        ("shuffle: 1\n", ["stage.yaml", "shuffle"]),
        ("how: medium\n", ["stage.yaml", "how", "fast, slow"]),
        ("name: [a, b]\n", ["stage.yaml", "name"]),
        ("name: {a: b}\n", ["stage.yaml", "name"]),
        ("name:\n", ["stage.yaml", "name"]),
        ("help: 5\n", ["stage.yaml", "help"]),
        ("1: 2\n", ["stage.yaml", "1"]),
        ("- samples\n", ["stage.yaml", "key: value"]),
        ("samples: [\n", ["stage.yaml", "YAML"]),
        ("# Größe\nsamples: 3\n".encode("latin-1"), ["stage.yaml"]),
    ],
)
def test_a_mistake_in_a_yaml_names_file_and_key(stage, own, words):
    refused(stage(own=own), *words)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("stage:\n  sampels: 3\n", ["box.yaml", "'sampels'", "did you mean 'samples'"]),
        ("stage: 5\n", ["box.yaml", "stage"]),
        ("stage: [samples]\n", ["box.yaml", "stage"]),
        ("stge:\n  samples: 3\n", ["box.yaml", "'stge'", "did you mean 'stage'"]),
        ("samples: 3\n", ["box.yaml", "'samples'"]),
    ],
)
def test_a_mistake_in_a_profile_names_file_and_key(stage, profile, words):
    refused(stage("--profile", "box", profile=profile), *words)


def test_auto_takes_the_profile_of_this_machine_and_says_why(stage, monkeypatch):
    monkeypatch.setattr(hardware, "recognise_profile", lambda: ("box", "a box of 5 GB"))
    done = stage(profile="stage: {samples: 3}\n")
    assert resolved(done) == PLAIN | {"samples": 3, "profile": "box"} and "profile box: a box of 5 GB" in done.err
    assert resolved(stage("--samples", "4"))["samples"] == 4
    assert resolved(stage("--profile", "none")) == PLAIN
    monkeypatch.setattr(
        hardware, "recognise_profile", lambda: ("other", "another box")
    )  # nothing is known to differ there
    assert resolved(stage()) == PLAIN | {"profile": "other"}
    done = stage(profile="# nothing\n")
    assert resolved(done) == PLAIN and "box" not in done.err  # no profile differs in this stage: nothing to recognise


def test_a_path_may_begin_with_the_users_home(monkeypatch):
    """No shell fills it in everywhere: not zsh in MIRROR_TO=~/x, not the sh of a notebook."""
    monkeypatch.setenv("HOME", "/home/someone")
    made = cli.parser("", "other.py")
    made.add_argument("--keep", type=Path)
    made.add_argument("--models", type=Path, nargs="+")
    made.add_argument("--to", type=cli.expand_home)
    args = cli.parse(made, ["--keep", "~/x", "--models", "~/a", "b/~/c", "--to", "~/y z"])
    assert args.keep == Path("/home/someone/x") and args.to == "/home/someone/y z"
    assert args.models == [Path("/home/someone/a"), Path("b/~/c")]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:secret@host/v1", "http://***@host/v1"),
        ("--source=https://secret@host:80/a?x=1 and ftp://a:b@c", "--source=https://***@host:80/a?x=1 and ftp://***@c"),
        ("http://user:a@b@host", "http://***@host"),
        ("http://user:a/b#c@host/v1", "http://***@host/v1"),
        ("https:/user:secret@host/x", "https:/***@host/x"),  # as pathlib writes it
        ("http://host/v1?api_key=secret&n=2&access_token=secret", "http://host/v1?api_key=***&n=2&access_token=***"),
        ("hf_" + "aB3" * 12, "***"),
        ("http://host:8080/p@th and http://host/@scope/x", None),
        ("models/x-base@2", None),
        ("mailto:a@b", None),
        ("http://[::1]:8080/v1", None),
    ],
)
def test_what_opens_a_door_is_not_shown(text, shown):
    assert cli.hide_secrets(text) == (text if shown is None else shown)
    assert cli.hide_secrets({"a": [text, 1]}) == {"a": [text if shown is None else shown, 1]}


def test_a_url_keeps_its_login_to_itself():
    url = cli.Url(cli.Url("http://user:sec%40ret@host/v1"))
    assert (url, url.login, cli.Url("http://host").login) == ("http://host/v1", "user:sec%40ret", "")


def test_a_stage_can_go_by_the_profiles_of_others(stage, monkeypatch):
    monkeypatch.setattr(hardware, "recognise_profile", lambda: ("box", "a box"))
    stage(own="samples: 2\nname: own\n", profile="stage: {samples: 3}\n")
    assert cli.parse(cli.parser("", "other.py"), []).profile == "none"
    assert cli.parse(cli.parser("", "other.py", also=("stage",)), []).profile == "box"
    assert cli.yaml_defaults("stage", "box") == {"samples": 3, "name": "own"}
    assert (
        cli.yaml_defaults("stage", "none") == {"samples": 2, "name": "own"} and cli.yaml_defaults("other", "box") == {}
    )


def test_an_unknown_profile_says_which_there_are(stage):
    refused(stage("--profile", "boxx", profile="stage: {}\n"), "boxx", "no such profile", "box")


def test_an_empty_yaml_and_an_empty_section_change_nothing(stage):
    done = stage("--profile", "box", own="# nothing\n", profile="stage:\n")
    assert resolved(done) == PLAIN | {"profile": "box"}


def test_flags_are_not_guessed_from_their_beginnings(stage):
    refused(stage("--sampl", "3"), "--sampl")


# --- what is shipped ---------------------------------------------------------------------------------------


def filled(made: argparse.ArgumentParser) -> list[str]:
    """The required arguments with some value, so that only the YAML can be at fault."""
    needed = [a for a in made._actions if a.required]
    values = [
        [*a.option_strings[-1:], *[next(iter(a.choices or "x"))] * (a.nargs if isinstance(a.nargs, int) else 1)]
        for a in needed
    ]
    return [word for pair in values for word in pair]


def parser_of(stem: str) -> argparse.ArgumentParser:
    import importlib

    return importlib.import_module(stem).make_parser()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_parses_and_each_value_arrives(config):
    values = cli.read_yaml(config)
    made = parser_of(config.stem)
    args = vars(cli.parse(made, filled(made)))
    assert values
    for key, value in values.items():
        assert args[key] == value or str(args[key]) == str(value), key


@pytest.mark.parametrize("stage", [p.stem for p in STAGES])
def test_every_profile_parses_with_every_script(stage):
    for profile in sorted((REPOSITORY / "configs" / "profiles").glob("*.yaml")):
        made = parser_of(stage)
        args = vars(cli.parse(made, ["--profile", profile.stem, *filled(made)]))
        for key, value in (cli.read_yaml(profile).get(stage) or {}).items():
            assert args[key] == value or str(args[key]) == str(value), (profile.name, key)


def test_a_profile_holds_only_what_differs_from_the_defaults():
    profiles = sorted((REPOSITORY / "configs" / "profiles").glob("*.yaml"))
    assert {p.stem for p in profiles} == {"cpu", "conservative", *(name for _, _, name in hardware.PROFILES)}
    for profile in profiles:
        for stage, values in cli.read_yaml(profile).items():
            made = parser_of(stage)
            plain = vars(cli.parse(made, ["--profile", "none", *filled(made)]))
            assert not {key: value for key, value in values.items() if plain[key] == value}, (profile.name, stage)


@pytest.mark.parametrize("stage", [p.stem for p in STAGES])
def test_each_script_without_its_yaml_default_is_complete(stage):
    """After the layers no number or choice is left None that the help does not explain as such."""
    made = parser_of(stage)
    args = vars(cli.parse(made, filled(made)))
    for action in made._actions:
        if action.dest in args and args[action.dest] is None:
            assert "default" in (action.help or ""), f"{stage}: {action.dest} is None and help says no default"


def test_help_is_instant_and_loads_nothing_heavy():
    """Best of three for each script; 0.3 s is the promise, twice that is granted to a busy machine."""
    for path in STAGES:
        best, listed = 9.0, ""
        for _ in range(3):
            began = time.perf_counter()
            command = [sys.executable, "-X", "importtime", str(path), "--help"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
            best, listed = min(best, time.perf_counter() - began), done.stderr
            if best < 0.3:
                break
        assert best < 0.6, f"{path.name} --help took {best:.2f} s"
        loaded = {line.rpartition("|")[2].strip() for line in listed.splitlines()}
        assert not loaded & HEAVY, f"{path.name} --help imports {loaded & HEAVY}"
        assert f"python scripts/{path.name}" in done.stdout, "the docstring shows a command to paste"


def test_no_script_has_a_boolean_that_takes_a_value():
    for path in STAGES:
        for action in parser_of(path.stem)._actions:
            assert action.type is not bool, f"{path.name}: {action.dest}"
            if isinstance(action.default, bool):
                assert isinstance(action, argparse.BooleanOptionalAction), f"{path.name}: {action.dest}"


# --- what --help shows -------------------------------------------------------------------------------------


def read_help(printed: str) -> dict[str, str]:
    """{flag: what --help prints about it, on one line}."""
    entries = re.findall(r"^  --.*(?:\n {3,}.*)*", printed, re.M)
    return {entry.split()[0].strip(",").removeprefix("--"): " ".join(entry.split()) for entry in entries}


def test_help_shows_each_default_and_its_layer(stage, tmp_path, capsys):
    def read(*argv) -> dict[str, str]:
        made = cli.parser("A stage.", "stage.py")
        made.add_argument("--samples", type=cli.integer(1), default=1, help="rows")
        made.add_argument("--rate", type=cli.number(0, 1), default=0.1, help="0: none")
        made.add_argument("--name", default="parser", help="its name")
        made.add_argument("--shuffle", action=cli.OnOff, default=False, help="in any order")
        made.add_argument("--to", type=Path, help="where to (default: runs/<name>)")
        made.add_argument("--needed", required=True, help="which one")
        with pytest.raises(SystemExit):
            cli.parse(made, [*argv, "--help"])
        return read_help(capsys.readouterr().out)

    write(tmp_path / "configs" / "stage.yaml", "samples: 2\nname: 5 %\n")
    write(tmp_path / "configs" / "profiles" / "box.yaml", "stage: {rate: 2e-1, shuffle: true}\n")
    shown = read()
    assert shown["profile"].endswith("(default: auto)")
    assert shown["samples"].endswith("rows (default: 2; configs/stage.yaml)")
    assert shown["rate"].endswith("0: none (default: 0.1)")
    assert shown["name"].endswith("its name (default: 5 %; configs/stage.yaml)")
    assert shown["shuffle"] == "--shuffle, --no-shuffle in any order (default: no)"
    assert shown["to"].endswith("where to (default: runs/<name>)")
    assert shown["needed"].endswith("which one (required)")
    write(tmp_path / "configs" / "stage.yaml", "samples: 2\nto: x\nneeded: y\nname: ''\n")
    shown = read("--profile", "box")
    assert shown["samples"].endswith("rows (default: 2; configs/stage.yaml)")
    assert shown["rate"].endswith("0: none (default: 0.2; configs/profiles/box.yaml)")
    assert shown["name"].endswith("its name (default: ''; configs/stage.yaml)")
    assert shown["shuffle"].endswith("in any order (default: yes; configs/profiles/box.yaml)")
    assert shown["to"].endswith("where to (default: x; configs/stage.yaml)")
    assert shown["needed"].endswith("which one (default: y; configs/stage.yaml)")


@pytest.mark.parametrize("profile", ["auto", "t4", "conservative"])
@pytest.mark.parametrize("name", [path.stem for path in STAGES])
def test_each_script_shows_every_default_once_and_its_layer(name, profile):
    done = call(name, "--profile", profile, "--help")
    assert done.code == 0, done
    shown, layers = read_help(done.out), {}
    own, machine = (REPOSITORY / "configs" / f"{part}.yaml" for part in (name, f"profiles/{profile}"))
    for file, values in ((own, read_layer(own)), (machine, read_layer(machine).get(name) or {})):
        layers |= {key: (str(file.relative_to(REPOSITORY)), value) for key, value in values.items()}
    flags = [action for action in parser_of(name)._actions if action.option_strings and action.dest != "help"]
    assert len(shown) == len(flags)
    for action in flags:
        entry = shown[action.option_strings[0].removeprefix("--")]
        assert entry.count("(default: ") + entry.count("(required)") == 1, entry
        source, value = layers.get(action.dest, (None, action.default))
        if action.required and source is None:
            assert entry.endswith("(required)"), entry
        elif value in (None, [], ""):
            assert entry.endswith(")"), entry
        else:
            where = f"; {re.escape(source)}" if source else ""
            default = re.search(rf"\(default: (.*){where}\)$", entry)
            assert default, entry
            if isinstance(value, bool):
                value = "yes" if value else "no"
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            assert default[1] == str(value) or float(default[1]) == float(value), entry


def read_layer(file: Path) -> dict:
    return cli.read_yaml(file) if file.is_file() else {}


# --- exit codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", ["0", "-1", "abc", "1.5", "", "1e3"])
@pytest.mark.parametrize("name", ["sft", "quantize", "evaluate"])
def test_samples_that_are_no_count_are_refused(name, samples):
    needed = {"sft": "model data", "quantize": "model data", "evaluate": "model data"}[name].split()
    given = [word for flag in needed for word in (f"--{flag}", "x")]
    done = call(name, *given, "--output", "x", f"--samples={samples}")
    refused(done, "--samples", "at least 1" if samples in ("0", "-1") else repr(samples))


def ending(main) -> Done:
    return call_main(main, lambda: cli.parser("A stage.", "stage.py"), "stage.py", run=cli.run)


def test_exit_codes_of_errors_that_really_happen(tmp_path):
    def no_memory(_):
        bytearray(10**17)

    def no_torch_memory(_):
        import torch

        torch.empty(10**15)

    def user(_):
        raise cli.InputError("rows.jsonl:3: field 'prompt': is empty")

    def below_a_file(_):
        (tmp_path / "file").write_text("")
        (tmp_path / "file" / "below").mkdir(parents=True)

    def long_name(_):
        (tmp_path / ("x" * 300)).mkdir()

    assert ending(lambda _: None).code == 0
    for short in (no_memory, no_torch_memory):
        done = ending(short)
        assert done.code == 3
        assert "memory" in done.err
    refused(ending(user), "stage: error: rows.jsonl:3: field 'prompt': is empty")
    refused(ending(below_a_file), "file/below")
    refused(ending(long_name), "xxx")
    with pytest.raises(ZeroDivisionError):  # a defect of ours shows its traceback: exit code 1
        ending(lambda _: 1 / 0)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "),
            True,
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN's, met under a limit of memory
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (OSError(errno.ENOENT, "no such file"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_memory_that_was_refused_is_told_from_other_errors(error, found):
    assert cli.is_out_of_memory(error) is found


def test_torchs_own_errors_of_memory_are_known():
    import torch

    assert cli.is_out_of_memory(torch.OutOfMemoryError())
    assert not cli.is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_script_ends_with_4_and_leaves_nothing(tmp_path, sent):
    """Both Ctrl-C and kill, while an artifact is half written."""
    code = f"""
import sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
from lib.core import artifact, cli
def main(args):
    with artifact.write_artifact({str(tmp_path / "out")!r}, "data", args) as build:
        (build.path / "half").write_text("x")
        print("writing", flush=True)
        time.sleep(60)
cli.run(main, lambda: cli.parser("", "stage.py"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stdout.readline() == "writing\n"
    assert any(".tmp-" in p.name for p in tmp_path.iterdir())
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 4
    assert "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_input_names_the_goal_that_makes_it(tmp_path):
    models, rows, out = tmp_path / "models", tmp_path / "rows.jsonl", ["--output", tmp_path / "out"]
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    refused(
        call("merge_lora", "--adapter", models / "tiny-lora", *out), str(models / "tiny-lora"), "`make lora` makes it"
    )
    for name in ("sft", "evaluate", "quantize"):
        refused(call(name, "--model", models / "tiny-base", "--data", rows, *out), "tiny-base", "`make base` makes it")
    refused(call("evaluate", "--model", models / "x-lora", "--data", rows, *out), "x-lora", "`make lora` makes it")
    models.mkdir()
    (models / "config.json").write_text("{}")
    gone = tmp_path / "data" / "x" / "raw"
    refused(call("quantize", "--model", models, "--data", gone, *out), str(gone), "`make data` makes it")
    done = call("merge_lora", "--adapter", tmp_path / "my own", *out)  # no goal makes that
    refused(done, "my own does not exist")
    assert "make" not in done.err.partition("error")[2]
    done = call("evaluate", "--model", "someone/a-model", "--data", rows, *out)
    refused(done, "`make base MODEL=someone/a-model` fetches a model of this name from the Hub")


def test_resolved_values_are_printed_once_and_stdout_ends_with_the_path(tiny_artifacts):
    said = tiny_artifacts["data said"]
    assert said.err.count("generate_data: api_key_env=") == 1 and "seed=42" in said.err
    assert said.out.splitlines()[-1] == str(tiny_artifacts["data"])
    assert tiny_artifacts["base said"].out.splitlines()[-1] == str(tiny_artifacts["base"])


def test_relative_paths_count_from_where_the_user_stands(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(5)))
    done = script("generate_data", "--source", "rows.jsonl", "--output", "out", cwd=tmp_path)
    assert done.code == 0 and done.out.splitlines()[-1] == "out"
    assert (tmp_path / "out" / "metadata.json").is_file()


def test_the_network_is_off_unless_the_user_decides(tmp_path):
    """A local script never waits for a hub; HF_HUB_OFFLINE of the user's own is never overruled."""
    code = (
        f"import os, sys; sys.path.insert(0, {str(SCRIPTS)!r}); from lib.core import cli\n"
        "def main(args):\n"
        "    print(os.environ.get('HF_HUB_OFFLINE')); cli.go_online(); print(os.environ.get('HF_HUB_OFFLINE'))\n"
        "cli.run(main, lambda: cli.parser('', 'stage.py'))"
    )
    free = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    for env, said in ((free, "1\nNone\n"), (environment(), "1\n1\n")):
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True, stderr=-3) == said


def test_the_compiler_is_loaded_only_where_there_is_a_gpu():
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); from lib.core import cli\n"
        "def main(args):\n"
        "    import bitsandbytes; print('torch._inductor.compile_fx' in sys.modules)\n"
        "cli.run(main, lambda: cli.parser('', 'stage.py'))"
    )
    there = hardware.has_gpu_driver()
    free = {k: v for k, v in environment().items() if k != "TORCHDYNAMO_DISABLE"}
    assert subprocess.check_output([sys.executable, "-c", code], env=free, text=True, stderr=-3) == f"{there}\n"


# --- output --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", ["verify.py {}", "verify.py {} 2>&1", "verify.py missing 2>&1", "verify.py --help"])
def test_a_closed_pipe_ends_a_script_in_silence(base, argv, unbuffered):
    """As `| head` closes it: whether the first line meets it, or what the buffer holds at the end."""
    command = argv.format(f"'{base}'")
    code = f"(sleep 0.5; exec '{sys.executable}' '{SCRIPTS}/'{command}) | true; exit ${{PIPESTATUS[0]}}"
    env = environment(PYTHONUNBUFFERED=unbuffered)
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=env)
    expected = (0, 141) if "--help" in argv else (141,)  # argparse swallows an error of its own output
    assert done.returncode in expected and "Error" not in done.stderr, done


def test_a_pipe_of_ones_own_that_breaks_is_no_closed_output():
    def main(_):
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"x")

    with pytest.raises(BrokenPipeError):
        ending(main)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_cannot_be_written_is_said(base, unbuffered):
    command, env = [sys.executable, SCRIPTS / "verify.py", base], environment(PYTHONUNBUFFERED=unbuffered)
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    refused(Done(done.returncode, "", done.stderr), "disk is full")
    assert "Exception ignored" not in done.stderr


ASCII = [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]


@pytest.mark.parametrize("settings", ASCII, ids=["locale", "output"])
def test_no_character_ends_a_script_and_no_path_changes(settings, tmp_path):
    stage = tmp_path / "stage.py"
    stage.write_text(
        f"import sys\nsys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from pathlib import Path\n"
        "from lib.core import cli\n"
        "from lib.quant import divergence\n"
        "def make_parser():\n"
        "    parser = cli.parser('', 'stage.py')\n"
        "    parser.add_argument('--path', type=Path)\n"
        "    return parser\n"
        "def main(args):\n"
        "    print('\u2026')\n"
        "    divergence.run_in_fresh_process(print, 'child \u2026')\n"
        "    print(args.path)\n"
        "if __name__ == '__main__':\n"
        "    cli.run(main, make_parser)\n",
        encoding="utf-8",
    )
    path = b"sm\xf8rgas"  # bytes that are no UTF-8
    done = subprocess.run([sys.executable, stage, "--path", path], capture_output=True, env=environment(**settings))
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert sorted(lines) == [b"\\u2026", b"child \\u2026"] and last == path


def test_files_are_read_and_written_in_an_encoding_that_is_named():
    """Not in the locale's, which another machine or a container may not share."""
    for path in [*SCRIPTS.rglob("*.py"), *(REPOSITORY / "mk").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and is_text(node):
                assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path}:{node.lineno}"


def is_text(node: ast.Call) -> bool:
    """Whether a call opens a file, or starts a process, whose bytes Python then turns into text."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name == "open" and isinstance(node.func, ast.Name):
        mode = next((word.value for word in node.keywords if word.arg == "mode"), (node.args[1:] or [None])[0])
        return not (isinstance(mode, ast.Constant) and "b" in mode.value)
    if name == "read_text" and node.args:  # ours, of lib/data/records.py
        return False
    starts = name in ("run", "Popen", "check_output", "start")
    return name in ("read_text", "write_text") or (starts and any(word.arg == "text" for word in node.keywords))


def test_a_link_to_itself_is_said_wherever_it_is_given(base, data, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    given = {"--model": base, "--data": data, "--output": tmp_path / "out", "--run-dir": tmp_path / "run"}
    for flag in given:
        for path in (loop, loop / "below"):
            argv = [word for pair in (given | {flag: path}).items() for word in pair]
            refused(call("sft", *argv), str(path), "a link leads back to itself")
    assert list(tmp_path.iterdir()) == [loop]
