"""What a machine is taken for. GPUs are simulated: this was written on machines that have none."""

import os
import subprocess
import sys
import time

import pytest
import torch

from lib.core import cli, compute, hardware
from lib.model import loading
from tests.conftest import REPOSITORY

GB = 10**9
SIMULATED = {
    ("Tesla T4", (7, 5), 15.8): "t4", ("Tesla V100-SXM2-16GB", (7, 0), 16.9): "conservative",
    ("NVIDIA A100-SXM4-40GB", (8, 0), 42.3): "a100", ("NVIDIA A100-SXM4-80GB", (8, 0), 84.9): "a100",
    ("NVIDIA H100 80GB HBM3", (9, 0), 84.9): "h100", ("NVIDIA GeForce RTX 3070", (8, 6), 8.4): "rtx3070",
    ("NVIDIA GeForce RTX 3090", (8, 6), 25.3): "rtx3090", ("NVIDIA GeForce RTX 4060", (8, 9), 8.2): "rtx4060",
    ("NVIDIA GeForce RTX 4090", (8, 9), 25.3): "rtx4090", ("NVIDIA L4", (8, 9), 23.6): "rtx4090",
    ("NVIDIA B200", (10, 0), 191.0): "h100", ("NVIDIA GeForce GTX 1080", (6, 1), 8.5): "conservative",
    ("NVIDIA GeForce RTX 3050", (8, 6), 4.2): "conservative",
}  # fmt: skip


@pytest.fixture
def simulated(monkeypatch):
    def be(name, capability, size):
        monkeypatch.setattr(hardware, "gpu", lambda: hardware.GPU(name, capability, int(size * GB)))

    return be


@pytest.mark.parametrize(("gpu", "profile"), SIMULATED.items(), ids=lambda given: str(given))
def test_a_gpu_gets_the_profile_of_its_capability_and_memory(simulated, gpu, profile):
    simulated(*gpu)
    name, why = hardware.recognise_profile()
    assert name == profile and gpu[0] in why and (REPOSITORY / "configs" / "profiles" / f"{name}.yaml").is_file()


def test_without_a_gpu_it_is_a_cpu(monkeypatch):
    monkeypatch.setattr(hardware, "gpu", lambda: None)
    name, why = hardware.recognise_profile()
    assert name == "cpu" and "no GPU" in why and hardware.device() == "cpu"


def test_bf16_is_for_ampere_and_newer(simulated):
    for gpu in SIMULATED:
        simulated(*gpu)
        assert hardware.device() == "cuda"
        expected = torch.bfloat16 if gpu[1] >= (8, 0) else torch.float16
        assert hardware.compute_dtype() == expected == loading.torch_dtype("auto") == loading.torch_dtype("nf4")
        assert loading.torch_dtype("fp32") == torch.float32


def test_flash_attention_falls_back_and_says_so_once(simulated, monkeypatch, capsys):
    for gpu, installed, expected, words in (
        (("Tesla T4", (7, 5), 15.8), True, None, "8.0"),
        (("NVIDIA A100", (8, 0), 42.3), False, None, "not installed"),
        (("NVIDIA A100", (8, 0), 42.3), True, "flash_attention_2", ""),
    ):
        simulated(*gpu)
        monkeypatch.setattr(loading, "find_spec", lambda name, installed=installed: installed)
        loading.choose_attention.cache_clear()
        assert [loading.choose_attention("flash_attention_2") for _ in range(2)] == [expected] * 2
        said = capsys.readouterr().err
        assert said.count("sdpa instead") == (expected is None) and words in said
    loading.choose_attention.cache_clear()
    assert loading.choose_attention("auto") is None and loading.choose_attention("eager") == "eager"


def test_the_gpu_peak_is_that_of_all_gpus_and_begins_anew(monkeypatch):
    """Only GPUs that hold something are asked to finish: to ask another one would take memory there."""
    assert hardware.peak_gpu_memory_bytes() is None
    hardware.synchronise()  # nothing, without a GPU
    asked = {"synchronize": [], "reset_peak_memory_stats": []}
    for name, numbers in asked.items():
        monkeypatch.setattr(torch.cuda, name, numbers.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", [4 * GB, 0, 2 * GB].__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", [3 * GB, 0, GB].__getitem__)
    assert hardware.peak_gpu_memory_bytes() == 4 * GB
    hardware.synchronise()
    hardware.reset_gpu_peak()
    assert asked == {"synchronize": [0, 2], "reset_peak_memory_stats": [0, 2]}


# --- cores -------------------------------------------------------------------------------------------------


def test_the_quota_of_a_cgroup_limits_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    listing, mount = tmp_path / "cgroup", tmp_path / "mount"
    (mount / "a" / "b").mkdir(parents=True)

    def cores(cgroup: str) -> int:
        listing.write_text(cgroup)
        return hardware.count_cores(listing, mount)

    assert cores("0::/a/b\n") == 64  # no file, no limit
    (mount / "a" / "cpu.max").write_text("max 100000\n")
    assert cores("0::/a/b\n") == 64
    (mount / "a" / "b" / "cpu.max").write_text("800000 100000\n")
    (mount / "a" / "cpu.max").write_text("250000 100000\n")
    assert cores("0::/a/b\n") == 2  # the group above has less
    (mount / "a" / "cpu.max").write_text("50000 100000\n")
    assert cores("0::/a/b\n") == 1
    (mount / "cpu" / "x").mkdir(parents=True)
    (mount / "cpu" / "x" / "cpu.cfs_quota_us").write_text("-1\n")
    (mount / "cpu" / "x" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores("5:cpu,cpuacct:/x\n4:memory:/x\n") == 64
    (mount / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")  # of a container, whose own group is the root
    (mount / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores("5:cpu,cpuacct:/docker/123\n") == 4


def test_other_programs_are_noticed_and_our_own_work_is_not_one_of_them():
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(hardware.count_cores())]
    try:
        since = hardware.read_load()
        time.sleep(1.5)
        assert hardware.count_busy_cores(since) > hardware.count_cores() / 3
    finally:
        for process in busy:
            process.kill()
            process.wait()
    before = hardware.Load(time.monotonic() - 10, 0, 0)
    now = hardware.read_load()
    assert now.everyone >= now.ours > 0
    assert hardware.count_busy_cores(before._replace(ours=now.ours - 10, everyone=now.everyone - 10)) < 0.5
    assert hardware.count_busy_cores(before._replace(ours=now.ours, everyone=now.everyone - 10)) == pytest.approx(
        1, 0.2
    )
    assert hardware.count_busy_cores(since._replace(seconds=time.monotonic())) == 0  # too short to tell


def test_a_busy_machine_is_said(monkeypatch, capsys):
    now = hardware.read_load()
    monkeypatch.setattr(cli, "LOAD", now._replace(seconds=now.seconds - 100, everyone=now.everyone - 1000))
    compute.warn_if_busy.__wrapped__()
    assert "other programs keep 10.0 of" in capsys.readouterr().err
