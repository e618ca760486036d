"""What this machine is and can do: cores, memory, accelerator, the dtype to compute in."""

import ctypes
import os
import platform
import resource
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Which profile a GPU gets: (compute capability, GB of memory, both at least), the first that fits.
PROFILES = (
    ((9, 0), 60, "h100"), ((8, 9), 20, "rtx4090"), ((8, 9), 7, "rtx4060"), ((8, 6), 20, "rtx3090"),
    ((8, 6), 7, "rtx3070"), ((8, 0), 30, "a100"), ((7, 5), 14, "t4"), ((7, 0), 14, "v100"),
)  # fmt: skip


class GPU(NamedTuple):
    name: str
    capability: tuple[int, int]  # of CUDA: 7.5 is a Turing, 8.0 an Ampere
    memory_bytes: int


@cache
def gpu() -> GPU | None:
    """The GPU that torch computes on. Not measured here: the machines that this was written on have none.

    Without a driver torch is not asked: to import it takes seconds, which `--help` does not have.
    """
    if not any(Path(sign).exists() for sign in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return GPU(properties.name, (properties.major, properties.minor), properties.total_memory)


def recognise() -> tuple[str, str]:
    """The profile for this machine, and why."""
    found = gpu()
    if found is None:
        return "cpu", f"no GPU; {len(os.sched_getaffinity(0))} cores, {ram_bytes() / 1e9:.0f} GB"
    size = found.memory_bytes / 1e9
    said = f"{found.name}, compute capability {found.capability[0]}.{found.capability[1]}, {size:.0f} GB"
    for capability, least, name in PROFILES:
        if found.capability >= capability and size >= least:
            return name, said
    return "conservative", f"{said}: older or smaller than what there are profiles for"


def machine() -> dict:
    """The machine's description for metadata.json; asks torch only when a script has loaded it already."""
    known = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "ram_bytes": ram_bytes(), "gpu": None}
    torch = sys.modules.get("torch")
    if torch is not None:
        known["threads"] = torch.get_num_threads()
        known["compute_dtype"] = str(compute_dtype()).removeprefix("torch.")
        known["gpu"] = gpu() and gpu().name
    return known


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """The largest resident set of this process or of a child that has ended, in bytes."""
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kib * 1024


def device() -> str:
    return "cuda" if gpu() else "cpu"


def compute_dtype():
    """bfloat16 where the hardware multiplies it natively, else float16 on a GPU and float32 on a CPU.

    A CPU without bf16 units emulates it (0.3 GFLOP/s against 142 in fp32 on a Zen 3; with AVX-512
    bf16 on a Zen 5 it is 869 against 168), and `is_bf16_supported()` says yes on a T4, which
    emulates it too: hence the compute capability (Ampere, 8.0) rather than that call.
    """
    import torch

    if found := gpu():
        return torch.bfloat16 if found.capability >= (8, 0) else torch.float16
    units = torch.cpu.get_capabilities()
    return torch.bfloat16 if units.get("avx512_bf16") or units.get("amx_bf16") else torch.float32


def autocast():
    """Matrix products in `compute_dtype`, sums and losses in fp32; nothing changes where that is fp32."""
    import torch

    return torch.autocast(device(), compute_dtype(), enabled=compute_dtype() != torch.float32)


def keep_freed_memory() -> None:
    """Let glibc keep what training frees instead of giving it back to the kernel after each tensor.

    Large tensors otherwise come from mmap and are paged in anew each time: a quarter of the time of LoRA
    steps of two rows on two cores went there (26.8 s against 19.8 s for 32 rows), for 13 % more peak memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # from malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Give the kernel what `keep_freed_memory` has piled up: the holes that rows of other lengths leave would grow."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def rss_bytes() -> int:
    """This process's resident set now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int:
    """GPU memory that torch has allocated in this process, in bytes; 0 without a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.memory_allocated() if torch is not None and torch.cuda.is_available() else 0
