"""What this machine is and can do: cores, memory, accelerator, the dtype to compute in."""

import ctypes
import os
import platform
import resource
import sys
from pathlib import Path


def machine() -> dict:
    """The machine's description for metadata.json; asks torch only when a script has loaded it already."""
    known = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "ram_bytes": ram_bytes(), "gpu": None}
    torch = sys.modules.get("torch")
    if torch is not None:
        known["threads"] = torch.get_num_threads()
        known["compute_dtype"] = str(compute_dtype()).removeprefix("torch.")
        if torch.cuda.is_available():
            known["gpu"] = torch.cuda.get_device_name(0)
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
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype():
    """bfloat16 where the hardware multiplies it natively, else float16 on a GPU and float32 on a CPU.

    A CPU without bf16 units emulates it (0.3 GFLOP/s against 142 in fp32 on a Zen 3; with AVX-512
    bf16 on a Zen 5 it is 869 against 168), and `is_bf16_supported()` says yes on a T4, which
    emulates it too: hence the compute capability (Ampere, 8.0) rather than that call.
    """
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
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


def rss_bytes() -> int:
    """This process's resident set now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int:
    """GPU memory that torch has allocated in this process, in bytes; 0 without a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.memory_allocated() if torch is not None and torch.cuda.is_available() else 0
