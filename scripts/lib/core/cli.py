"""The command line that all scripts share: layered defaults, checked types, exit codes.

Defaults come from the parser, then `configs/<script>.yaml`, then that script's section of
`configs/profiles/<profile>.yaml`, then the command line.
"""

import argparse
import codecs
import errno
import io
import json
import logging
import os
import re
import select
import signal
import sys
import time
import warnings
from difflib import get_close_matches
from pathlib import Path

from lib.core import file_errors, hardware
from lib.core.ranks import find_missing_variables, is_main_process

ROOT = Path(__file__).resolve().parents[3]
LOAD = hardware.read_load()  # when the script started
STARTED = time.time()  # start of the recipe; an artifact's metadata.json gets it as its modification time

DONE, DEFECT, BAD_INPUT, OUT_OF_MEMORY, INTERRUPTED = 0, 1, 2, 3, 4
CLOSED_PIPE = 141  # as shells report a program that SIGPIPE has ended


class InputError(Exception):
    """An error that the user can fix: its message says what is wrong, where, and what to do. Exit code 2."""


class OutOfMemory(Exception):
    """The work does not fit into this machine's memory. Exit code 3."""


# What in a text opens a door: the user and password of a URL (pathlib leaves one slash of its two; a password may have
# slashes, but what follows a colon may also be a port), a key in its query, a token of the Hub, a key of an API.
LOGIN = re.compile(r"(\w:/+)(?:([^/?#\s]*)|([^/?#\s@]*:(?!\d+(?:[/?#\s]|$))\S*))@")
KEY = re.compile(r"([?&][\w-]*(?:key|token|secret|password|sig|signature)=)[^&#\s]+", re.I)
TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,})")


def hide_secrets(value):
    """An argument, or another value made of texts, as it may be printed and stored."""
    if isinstance(value, dict):
        return {key: hide_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(hide_secrets, value)]
    return TOKEN.sub("***", KEY.sub(r"\1***", LOGIN.sub(r"\1***@", value))) if isinstance(value, str) else value


class Url(str):
    """An argparse type: a URL without its user and password. They are in `login`, which nothing prints or stores."""

    __slots__ = ("login",)

    def __new__(cls, text: str):
        if isinstance(text, Url):  # argparse converts a default once more
            return text
        match = LOGIN.search(text)
        url = super().__new__(cls, LOGIN.sub(r"\1", text, count=1))
        url.login = (match[2] or match[3]) if match else ""
        return url


def variable_name(text: str) -> str:
    """An argparse type: the name of an environment variable. A key in its place is refused before it is printed."""
    if not re.fullmatch(r"[A-Za-z_]\w*", text):
        raise argparse.ArgumentTypeError("expected the name of an environment variable, not its content")
    return text


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        super().error(hide_secrets(message))  # it quotes what it cannot read


def parser(doc: str, script: str, also: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """A parser with the common flags that shows the script's docstring as it was written. `also` names other scripts
    whose sections in the profiles affect this one."""
    arg_parser = Parser(
        prog=Path(script).name,
        description=doc,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    common = arg_parser.add_argument_group("common")
    common.add_argument(
        "--profile", default="auto",
        help="machine profile: a name from configs/profiles; auto: the one for this machine; none: no profile. It "
             "overrides the defaults shown here, and the command line overrides it; --profile NAME --help shows it",
    )  # fmt: skip
    common.add_argument("--threads", type=integer(0), default=0, help="CPU threads; 0: all available cores")
    arg_parser.scripts = (Path(script).stem, *also)
    return arg_parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it was written, and after each flag its default and the layer that sets it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default == argparse.SUPPRESS or not action.option_strings:
            return action.help
        if action.required:
            return f"{action.help} (required)"
        layer = getattr(action, "source", None)
        if layer is None and action.default in (None, [], ""):
            return action.help  # which describes the default in words: "(default: none)", "(default: as --model)"
        text = re.sub(r" \(default: .*\)$", "", action.help)
        default = format_default(action.default) + (f"; {layer}" if layer else "")
        return f"{text} (default: {default.replace('%', '%%')})"


def format_default(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def integer(least: int, or_minus_one: bool = False, most: float = float("inf")):
    """An argparse type: a whole number from `least` to `most` (or -1, where -1 has a meaning)."""

    def convert(text: str) -> int:
        try:
            value = int(str(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least and not (or_minus_one and value == -1):
            alternative = " (or -1)" if or_minus_one else ""
            raise argparse.ArgumentTypeError(f"{value} is too small: expected at least {least}{alternative}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is too large: expected at most {most}")
        return value

    return convert


def number(least: float, most: float = float("inf")):
    """An argparse type: a finite number from `least` to `most`, both included."""

    def convert(text: str) -> float:
        try:
            value = float(str(text))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not least <= value <= most or value == float("inf"):
            expected = f"at least {least:g}" if most == float("inf") else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{value:g} is out of range: expected {expected}")
        return value

    return convert


class Arguments(argparse.Namespace):
    """Arguments, and in `parsed`, which is none of them, what they were before the script replaced some."""

    __slots__ = ("parsed",)


def parse(arg_parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse with the YAML layers as defaults. A key that is no flag's name is an error, which names the file."""
    own, argv = argv is None, sys.argv[1:] if argv is None else argv
    stage = Path(arg_parser.prog).stem
    apply_yaml(arg_parser, ROOT / "configs" / f"{stage}.yaml")
    profile_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    profile_parser.add_argument("--profile", default=arg_parser.get_default("profile"))
    profile = profile_parser.parse_known_args(argv)[0].profile
    folder, reason = ROOT / "configs" / "profiles", ""
    if profile == "auto" and not {"-h", "--help"} & set(argv):
        # If no profile has a section for this stage, it looks for no GPU, and doctor.py needs no YAML.
        section = rf"^({'|'.join(arg_parser.scripts)}):"
        differs = any(re.search(section, path.read_text(encoding="utf-8"), re.M) for path in folder.glob("*.yaml"))
        profile, reason = hardware.recognise_profile() if differs else ("none", "")
    path = folder / f"{profile}.yaml"
    if not path.is_file() and profile not in ("auto", "none") and not reason:
        names = ", ".join(["auto", "none", *sorted(p.stem for p in folder.glob("*.yaml"))])
        arg_parser.error(f"--profile {profile}: no such profile; available: {names}")
    apply_yaml(arg_parser, path, section=stage)
    args = arg_parser.parse_args(argv, Arguments())
    args.profile = profile
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, expand_home(value))
        elif isinstance(value, list) and value and isinstance(value[0], Path):
            setattr(args, name, [*map(expand_home, value)])
    args.parsed = dict(vars(args))
    if own and reason and is_main_process():
        print(f"{stage}: profile {profile}: {reason}", file=sys.stderr)
    return args


def expand_home(path):
    """A path, or a string that may be one, with a leading ~/ expanded. In `make all MIRROR_TO=~/x` bash expands it,
    but neither zsh nor the sh behind a notebook's `!`; copies in a directory named ~ would be lost with the machine."""
    return type(path)(os.path.expanduser(path)) if str(path).startswith("~/") else path


def yaml_defaults(script: str, profile: str) -> dict:
    """The values that the YAML layers set for a script. For scripts that compute with the settings of others."""
    layers = ROOT / "configs" / f"{script}.yaml", ROOT / "configs" / "profiles" / f"{profile}.yaml"
    own, machine = (read_yaml(path) if path.is_file() else {} for path in layers)
    return own | (machine.get(script) or {})


def apply_yaml(arg_parser: argparse.ArgumentParser, path: Path, section: str | None = None) -> None:
    """Make the values in a YAML file the defaults of the flags that its keys name (learning_rate: 5e-4)."""
    if not path.is_file():
        return
    values = read_yaml(path)
    if section is not None:
        stages = [p.stem for p in (ROOT / "scripts").glob("*.py")]
        for key in values:
            if key not in stages:
                reject_key(arg_parser, path, key, stages)
        values = values.get(section)
        values = {} if values is None else values
        if not isinstance(values, dict):
            arg_parser.error(f"{path}: {section}: expected `key: value` lines, found {values!r}")
    flags = {a.dest: a for a in arg_parser._actions if a.option_strings and a.dest != "help"}
    for key, value in values.items():
        action = flags.get(key)
        if action is None:
            reject_key(arg_parser, path, key, flags)
        switch = isinstance(action, argparse.BooleanOptionalAction)
        if switch != isinstance(value, bool):
            expected = "true or false" if switch else "a value other than true or false"
            arg_parser.error(f"{path}: {key}: expected {expected}, found {value!r}")
        if value is None or isinstance(value, (list, dict)):
            description = "nothing" if value is None else repr(value)
            arg_parser.error(f"{path}: {key}: expected one value, found {description}")
        if not isinstance(value, bool):
            try:
                value = (action.type or str)(str(value))
            except (argparse.ArgumentTypeError, ValueError) as error:
                arg_parser.error(f"{path}: {key}: {error}")
        if action.choices is not None and value not in action.choices:
            arg_parser.error(f"{path}: {key}: {value!r} is none of {', '.join(map(str, action.choices))}")
        action.default, action.required, action.source = value, False, path.relative_to(ROOT).as_posix()


def reject_key(arg_parser: argparse.ArgumentParser, path: Path, key: object, names) -> None:
    matches = get_close_matches(str(key), names, 1)
    arg_parser.error(f"{path}: unknown key {key!r}" + (f"; did you mean {matches[0]!r}?" if matches else ""))


def add_training_flags(group, rows: str) -> None:
    """The flags of a script that trains on `rows`; `loop.trainer_settings` hands them to the Trainer."""
    group.add_argument("--samples", type=integer(1), help=f"training {rows}, drawn at random; all if there are fewer")
    group.add_argument("--epochs", type=number(0.01), help=f"passes over the training {rows}; 0.5: half of them")
    group.add_argument("--batch-size", type=integer(1), help=f"{rows} per forward pass (micro-batch)")
    group.add_argument("--accumulation-steps", type=integer(1), help="gradient accumulation steps per optimiser step")
    group.add_argument(
        "--max-length", type=integer(16),
        help="maximum tokens per example, with its prompt; of those drawn, longer ones are dropped, not truncated",
    )  # fmt: skip
    group.add_argument(
        "--learning-rate",
        type=number(0),
        help="peak learning rate, after warm-up; decays to 0 along a cosine. In "
        "sft.py, 0 stands for the rate that suits --method",
    )
    group.add_argument("--warmup-ratio", type=number(0, 1), help="fraction of steps used for learning-rate warm-up")
    group.add_argument("--seed", type=integer(0), help="random seed for sampling, order, initialisation and dropout")
    group.add_argument("--checkpoint-steps", type=integer(1), help="optimiser steps between checkpoints")
    group.add_argument(
        "--gradient-checkpointing", action=OnOff, default=False,
        help="recompute activations in the backward pass: less memory, more time",
    )  # fmt: skip


class OnOff(argparse.BooleanOptionalAction):
    """The action of a `--flag/--no-flag` pair, without the default that Python before 3.13 adds to its help text."""

    def __init__(self, *args, help: str | None = None, **options):
        super().__init__(*args, **options)
        self.help = help


def read_yaml(path: Path) -> dict:
    try:
        import yaml
    except ImportError:
        raise InputError(
            f"PyYAML is needed to read {path} and is not installed; `make doctor` lists what is missing"
        ) from None

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    return values


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def run(main, make_parser) -> None:
    """Run a script and exit. If nobody reads its output any more, it ends in silence, as `cat` does."""
    let_any_character_out()
    try:
        code = run_script(main, make_parser)
        flush_output()
    except BrokenPipeError:
        if not any(map(is_closed, (sys.stdout, sys.stderr))):  # another pipe, or a connection
            raise
        for stream in filter(None, (sys.stdout, sys.stderr)):
            silence_output(stream)
        code = CLOSED_PIPE
    sys.exit(code)


def run_script(main, make_parser) -> int:
    """Parse, print the resolved values once, do the work, and turn errors into exit codes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` is handled like Ctrl-C
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours are enough; transformers reads it too
    if not hardware.has_gpu_driver():
        # While it is imported, bitsandbytes compiles functions that only GPUs run. For that it loads torch's compiler,
        # which takes 2.5 of the 12 seconds that the imports of a stage take. Read by torch when it is imported.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads of OpenMP wait for each other after every product. By default they spin for milliseconds. If a thread
        # has to share its core with another program, the spinning one computes nothing meanwhile: beside one busy
        # process per core, training took more than 6 times as long. With 1,000 spins it keeps almost half of its speed,
        # and loses none on a quiet machine; bench_busy.py measures both. Read by libgomp when it is loaded.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # The libraries are pinned, so a user need not know which names will change one day, nor that bitsandbytes could
    # fetch a kernel from a hub.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if "HF_HUB_OFFLINE" not in os.environ:  # local work must not wait for a network; see go_online
        os.environ.update(HF_HUB_OFFLINE="1", QUARTET_OFFLINE="1")
    if not is_main_process():  # its errors still appear on stderr
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        os.environ["TQDM_DISABLE"] = "1"  # read by tqdm when it is imported
    script, args = Path(sys.argv[0]).stem, argparse.Namespace()
    hardware.reset_gpu_peak()
    for path in [*file_errors.IN_USE]:  # another script's, in the same process
        file_errors.leave_directory(path)
    try:
        try:
            args = parse(make_parser())
            check_launcher()
            for value in vars(args).values():
                if isinstance(value, Path):
                    value.resolve()  # fails for a link to itself: now, and not after hours of work
            values = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in sorted(vars(args).items())}
            if is_main_process():
                print(
                    f"{script}: " + " ".join(f"{k}={hide_secrets(str(v))}" for k, v in values.items()), file=sys.stderr
                )
            if args.threads:
                os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read by torch when it is imported
            code = main(args) or DONE
        except SystemExit as end:  # argparse's, after --help and after a wrong flag
            code = end.code
        flush_output()
        return code
    except InputError as error:
        return report_error(script, error, BAD_INPUT)
    except (OutOfMemory, MemoryError) as error:
        return report_error(script, str(error) or "out of memory", OUT_OF_MEMORY)
    except KeyboardInterrupt:
        resumes = hasattr(args, "run_dir")
        outcome = "progress is saved. Repeat the command to resume" if resumes else "repeat the command; it starts over"
        return report_error(script, f"interrupted; {outcome}", INTERRUPTED)
    except Exception as error:
        if reason := file_errors.explain_removal() or file_errors.explain(error, args):
            return report_error(script, reason, BAD_INPUT)
        if is_out_of_memory(error):
            return report_error(script, f"out of memory: {error}", OUT_OF_MEMORY)
        raise


# --- output ------------------------------------------------------------------------------------------------------


def let_any_character_out() -> None:
    """Print characters that the encoding of the output lacks as escapes: no work may end at a "…" or at a user's text.
    Bytes of file names that are not text stay as they are, so that a printed path can be used."""

    def escape(error: UnicodeError) -> tuple[bytes, int]:
        characters = error.object[error.start : error.end]
        return b"".join(
            bytes([ord(c) - 0xDC00]) if 0xDC80 <= ord(c) <= 0xDCFF else c.encode("ascii", "backslashreplace")
            for c in characters
        ), error.end

    codecs.register_error("escape", escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="escape")


def flush_output() -> None:
    """Write what was printed. Python would do so after `run`, where an error could not be handled."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):  # which `run` handles
                silence_output(stream)
            raise


def is_closed(stream) -> bool:
    """Whether nobody reads from the other end of an output."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):  # there is no such stream, or it is a test's
        return False
    poll = select.poll()
    poll.register(number, 0)  # reports POLLERR and POLLHUP
    return bool(poll.poll(0))


def silence_output(stream) -> None:
    """Lead an output to nowhere: what its buffer holds would fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report_error(script: str, error: object, code: int) -> int:
    print(f"{script}: error: {hide_secrets(str(error))}", file=sys.stderr)
    return code


def check_launcher() -> None:
    """InputError if WORLD_SIZE announces several processes and no launcher started this one: left over in a shell, it
    would make a training wait for the others and ignore signals, or keep a script from writing its artifact."""
    if missing := find_missing_variables():
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} announces several processes that train together, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing or malformed, so no launcher started "
            "this one and it would wait for the others forever; run `unset WORLD_SIZE RANK LOCAL_RANK`, or start it "
            "with `torchrun --nproc_per_node 2 scripts/…`"
        )


def check_directory(path: Path) -> None:
    """InputError if a directory that this process works in was deleted."""
    if reason := file_errors.explain_removal(path.absolute()):
        raise InputError(reason)


# The messages of torch and Triton, torch's CPU allocator, cuBLAS and similar libraries, C++ and oneDNN when memory runs
# out. (bitsandbytes' kernels end the process instead, which cannot be caught.)
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_STATUS_ALLOC_FAILED|std::bad_alloc"
    r"|could not create a primitive(?! descriptor)"
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out. torch raises a subclass of RuntimeError for CUDA, and a bare
    RuntimeError for everything else."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    is_torch_error = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError) and bool(is_torch_error or NO_MEMORY.search(str(error)))


def go_online() -> None:
    """Allow requests to the Hub, unless the user has forbidden them. Call it before huggingface_hub is imported."""
    if os.environ.pop("QUARTET_OFFLINE", None):
        os.environ.pop("HF_HUB_OFFLINE", None)
