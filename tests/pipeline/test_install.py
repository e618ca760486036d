"""What mk/install.py does with real venvs and pip, on wheels of a few bytes; and the locks that it installs from."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

LOCKS = {name: (REPOSITORY / "requirements" / f"{name}.lock").read_text() for name in ("core", "cuda")}
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")


def read_lock(text: str) -> list[tuple[str, str, int]]:
    """(name, version, number of hashes) of each entry."""
    entries = re.split(r"^(?=\w)", text, flags=re.M)[1:]
    return [(*re.match(r"([\w.-]+)==([^\s;]+)", entry).groups(), len(HASH.findall(entry))) for entry in entries]


def test_the_locks_hold_every_pin_with_its_hashes():
    locked = {name: read_lock(text) for name, text in LOCKS.items()}
    versions = {(name, version) for entries in locked.values() for name, version, _ in entries}
    pins = re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / "requirements.txt").read_text(), re.M)
    assert len(pins) > 15
    assert {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in pins} <= versions
    assert all(hashes for entries in locked.values() for *_, hashes in entries)
    core, cuda = ({name for name, *_ in locked[lock]} for lock in ("core", "cuda"))
    assert {"torch", "triton", "nvidia-cublas"} <= cuda and not core & cuda
    assert not [name for name in core if name.startswith(("nvidia-", "cuda-"))]


# --- mk/install.py -----------------------------------------------------------------------------------------


def write_wheel(folder: Path, name: str, version: str, *needs: str) -> str:
    """A wheel with one module, and its SHA-256."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}.py": f"version = '{version}'\n",
    }
    digest = {path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()) for path, text in files.items()}
    record = [f"{path},sha256={digest[path].decode().rstrip('=')},{len(text)}" for path, text in files.items()]
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in (files | {f"{about}/RECORD": "\n".join([*record, f"{about}/RECORD,,"])}).items():
            archive.writestr(path, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of two packages. pip finds their wheels in a folder: no test asks an index."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(REPOSITORY / "mk", root / "mk")
    shutil.copytree(REPOSITORY / "scripts" / "lib" / "core", root / "scripts" / "lib" / "core")
    wheels, requirements = root / "wheels", root / "requirements"
    wheels.mkdir(), requirements.mkdir()
    (root / "requirements.txt").write_text("# the core\ntorch==2.13.0\nlearner==1.0\n")
    digest = write_wheel(wheels, "learner", "1.0", "torch>=2")
    (requirements / "core.lock").write_text(
        f"learner==1.0 \\\n    --hash=sha256:{digest}\n    # via -r requirements.txt\n"
    )
    digests = [write_wheel(wheels, name, version) for name, version in (("torch", "2.13.0"), ("triton", "3.0"))]
    lines = (f"{pin} --hash=sha256:{digest}\n" for pin, digest in zip(("torch==2.13.0", "triton==3.0"), digests))
    (requirements / "cuda.lock").write_text("".join(lines))
    write_wheel(wheels, "torch", "2.13.0+cpu")
    return root


def install(project: Path, *words: str, site: str = "") -> subprocess.CompletedProcess:
    """`site` is run before the script."""
    (project / "sitecustomize.py").write_text(site)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project / "wheels")}
    environment = clean | settings | ({"PYTHONPATH": str(project)} if site else {})
    command = [sys.executable, project / "mk" / "install.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=project)
    assert "Traceback" not in done.stderr
    return done


def installed(project: Path) -> dict[str, str]:
    found = (project / ".venv" / "lib").glob("python*/site-packages/*.dist-info")
    versions = dict(path.name.removesuffix(".dist-info").split("-", 1) for path in found)
    return {name: version for name, version in versions.items() if name in ("torch", "triton", "learner", "extra")}


CPU = {"torch": "2.13.0+cpu", "learner": "1.0"}
CUDA = {"torch": "2.13.0", "triton": "3.0", "learner": "1.0"}


@pytest.fixture(scope="module")
def venv(project):
    """The site-packages of a first installation, where creating .venv had been interrupted."""
    (project / ".venv" / "lib" / "python3.1").mkdir(parents=True)
    done = install(project, "--torch", "cpu")
    assert done.returncode == 0 and "installing torch 2.13.0+cpu, for CPUs only: " in done.stderr, done.stderr
    (site,) = (project / ".venv" / "lib").glob("python*/site-packages")
    return site


def test_the_build_for_cpus_is_installed_without_what_only_gpus_need(project, venv):
    assert installed(project) == CPU


def test_what_an_interruption_left_half_installed_is_installed_again(project, venv):
    (venv / "learner.py").unlink()
    (venv / "learner-1.0.dist-info" / "INSTALLER").unlink()
    (venv / "mine.py").touch()
    assert install(project).returncode == 0 and installed(project) == CPU
    assert (venv / "learner.py").is_file() and (venv / "mine.py").is_file()  # the rest was not done again


def test_an_extra_does_not_change_what_is_pinned(project, venv):
    write_wheel(project / "wheels", "learner", "2.0", "torch>=2")
    write_wheel(project / "wheels", "extra", "1.0", "learner>=2")
    (project / "requirements" / "dev.txt").write_text("extra==1.0\n")
    done = install(project, "--extra", "dev")
    assert done.returncode == 2 and "Cannot install" in done.stderr
    assert installed(project) == CPU


@pytest.mark.slow
def test_without_the_index_of_the_build_for_cpus_the_one_for_gpus_is_installed_and_its_size_named(project):
    (project / "wheels" / "torch-2.13.0+cpu-py3-none-any.whl").rename(project / "hidden.whl")
    done = install(project, "--torch", "auto")  # another choice: .venv is created anew
    assert done.returncode == 0 and installed(project) == CUDA, done.stderr
    assert "https://download.pytorch.org/whl/cpu cannot be reached, or has no torch" in done.stderr
    assert re.search(
        r"installing torch 2\.13\.0 with CUDA.*: [\d.]+ GB to download, [\d.]+ GB on the disk", done.stderr
    )
    shutil.rmtree(project / "wheels")
    assert install(project).returncode == 0  # nothing is fetched again


def test_an_index_that_cannot_be_reached_is_named_with_what_to_do(project):
    (project / "requirements" / "core.lock").write_text(f"absent==1.0 --hash=sha256:{'0' * 64}\n")
    done = install(project)
    assert done.returncode == 2 and "absent==1.0" in done.stderr
    assert "the package index cannot be reached" in done.stderr and "PIP_INDEX_URL" in done.stderr


def test_a_python_that_cannot_create_a_venv_or_is_too_old_is_refused_with_what_to_install(project):
    shutil.rmtree(project / ".venv", ignore_errors=True)
    done = install(project, site="import sys; sys.modules['ensurepip'] = None")
    assert done.returncode == 2 and "has no ensurepip" in done.stderr and "apt install python3-venv" in done.stderr
    code = "import runpy, sys; sys.version_info = (3, 10, 12, 'final', 0); runpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, project / "mk" / "install.py"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "" and "the packages need 3.11 to 3.14" in done.stdout
    assert not (project / ".venv").exists()


# --- the rules of Make -------------------------------------------------------------------------------------


def test_make_installs_again_only_for_other_requirements_or_another_torch(tmp_path):
    for name in ("Makefile", "mk", "scripts", "configs", "requirements", "requirements.txt"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)

    def would_install(*words: str) -> list[str]:
        command = ["make", "-n", "lint", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return re.findall(r"^python3 mk/install\.py (.*) && touch", done.stdout, re.M)

    assert would_install() == ["--torch 'auto'", "--extra dev"]
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "torch").write_text("cuda")
    for name in ("core", "dev"):
        (tmp_path / ".venv" / name).touch()
    assert would_install() == would_install("TORCH=cuda") == []
    assert would_install("TORCH=cpu") == ["--torch 'cpu'", "--extra dev"]
    os.utime(tmp_path / "requirements" / "core.lock", (2**32, 2**32))
    assert would_install() == ["--torch 'cuda'", "--extra dev"]
