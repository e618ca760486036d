"""Create .venv and install the pinned packages into it; what is installed already stays.

    python3 mk/install.py                  # with the build of torch for this machine
    python3 mk/install.py --torch cuda     # with the build for NVIDIA GPUs; cpu: the one for CPUs, which is far smaller
    python3 mk/install.py --extra dev      # the packages of requirements/dev.txt, into the .venv that exists

`--torch auto` takes the build for CPUs unless there is an NVIDIA device. Where PyTorch's index does not provide it, the
build for GPUs replaces it, because that one runs on CPUs too. Versions and SHA-256 of the packages are in
requirements/core.lock and cuda.lock, which mk/lock.py writes. .venv/torch holds the choice that .venv was created with;
another choice creates it anew. After an interruption, the same command continues.

Uses only Python's standard library, because it runs before anything is installed.
"""

import sys

if not (3, 11) <= sys.version_info < (3, 15):  # the imports below would end in a traceback
    print(f"Python {sys.version.split()[0]} ({sys.executable}) cannot be used: the packages need 3.11 to 3.14.")
    print("Install one of these (`apt install python3.12-venv`), run `python3.12 mk/install.py`, then make again")
    sys.exit(2)

import argparse
import importlib.util
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NoReturn

import kept  # noqa: F401  which finds the modules of scripts/lib/core

import children  # isort: skip
import hardware  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
CHOICE = VENV / "torch"  # which the Makefile reads too
REQUIREMENTS = ROOT / "requirements"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Of all packages, on x86_64 with Python 3.11: docs/results/install.json.
CPU_GIGABYTES = {"download": 0.43, "disk": 1.9}
CUDA_GIGABYTES = {"download": 2.97, "disk": 5.9}


def main(args: argparse.Namespace) -> None:
    if args.extra:
        install_extra(args.extra)
        return
    create_venv(args.torch)
    torch = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)[1]
    locks = ["-r", REQUIREMENTS / "core.lock"]
    if not chooses_cpu(args.torch) or not install_cpu_torch(torch):
        say(f"installing torch {torch} with CUDA, for GPUs and CPUs: {describe(CUDA_GIGABYTES)} in a new .venv")
        locks += ["-r", REQUIREMENTS / "cuda.lock"]
    install("--require-hashes", *locks)


def chooses_cpu(choice: str) -> bool:
    return choice == "cpu" or (choice == "auto" and not hardware.has_gpu_driver())


def read_choice() -> str:
    return CHOICE.read_text(encoding="utf-8") if CHOICE.is_file() else ""


def create_venv(choice: str) -> None:
    """Create .venv, unless it is there for the same choice of torch and the same Python. One whose creation was
    interrupted has no .venv/torch yet."""
    if choice == read_choice() and (VENV / "lib" / "python{}.{}".format(*sys.version_info)).is_dir():
        return
    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):  # Debian and Ubuntu keep them in a package apart
        fail(f"{sys.executable} has no ensurepip, which .venv needs. Run `apt install python3-venv`, then repeat")
    command = [sys.executable, "-m", "venv", "--clear", VENV]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if process.returncode:
        fail(f"{VENV} could not be created: {(process.stdout + process.stderr).strip()}")
    CHOICE.write_text(choice, encoding="utf-8")


def install_cpu_torch(version: str) -> bool:
    """Install the build of torch for CPUs; False if it cannot be had. It comes without a hash: PyPI does not have this
    build, and PyTorch's index could not be reached when the locks were written."""
    say(f"installing torch {version}+cpu, for CPUs only: {describe(CPU_GIGABYTES)} in a new .venv")
    # Without an answer, pip's own six attempts would be a long wait.
    index = ("--index-url", CPU_INDEX, "--retries", "2", "--timeout", "15")
    process = run_pip("--no-deps", *index, f"torch=={version}+cpu")
    if process.returncode and not is_missing(process.stderr):
        fail(f"torch {version}+cpu could not be installed: {process.stderr.strip()}")
    if process.returncode:
        say(f"{CPU_INDEX} cannot be reached, or has no torch {version}+cpu for this machine")
    return process.returncode == 0


def install_extra(name: str) -> None:
    """Install requirements/<name>.txt without changing what is installed already."""
    files = REQUIREMENTS / "core.lock", ROOT / "requirements.txt"
    pins = "".join(file.read_text(encoding="utf-8") for file in files)
    constraints = VENV / "constraints.txt"  # the locks themselves would demand a hash of each package
    lines = "".join(f"{pin}\n" for pin in re.findall(r"^(\w.*?)(?: \\)?$", pins, re.M))
    constraints.write_text(lines, encoding="utf-8")
    install("--constraint", constraints, "-r", REQUIREMENTS / f"{name}.txt")


def install(*what) -> None:
    process = run_pip(*what)
    if process.returncode and is_missing(process.stderr):
        say(process.stderr.strip().splitlines()[-1])
        fail("the package index cannot be reached, or lacks this package; check the network, or name another index in "
             "PIP_INDEX_URL, then repeat. What is installed already stays")  # fmt: skip
    if process.returncode:
        fail(f"the packages could not be installed: {process.stderr.strip()}")


def run_pip(*what) -> subprocess.CompletedProcess:
    for package in (VENV / "lib").glob("python*/site-packages/*.dist-info"):
        if not (package / "INSTALLER").is_file():  # pip writes it after a package's other files: it was interrupted
            shutil.rmtree(package)
    command = [VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *what]
    with children.start(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
        _, said = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, stderr=said)


def is_missing(said: str) -> bool:
    """Whether pip failed because an index or a file of it could not be reached, or is not there."""
    return bool(re.search("No matching distribution|Max retries exceeded|HTTP error|timed out", said))


def describe(gigabytes: dict) -> str:
    return "{download} GB to download, {disk} GB on the disk".format(**gigabytes)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    say(message)
    sys.exit(2)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", choices=("auto", "cpu", "cuda"), default=read_choice() or "auto",
                        help="the build of torch; default: the one of the .venv that exists, else auto")  # fmt: skip
    parser.add_argument("--extra", metavar="NAME", help="install requirements/NAME.txt into the .venv that exists")
    return parser


if __name__ == "__main__":
    try:
        main(make_parser().parse_args())
    except KeyboardInterrupt:
        say("interrupted; the same command continues")
        sys.exit(128 + signal.SIGINT)
