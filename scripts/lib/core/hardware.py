"""What this machine is and can do: cores, memory, accelerator, the dtype to compute in."""

import ctypes
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
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


def has_gpu_driver() -> bool:
    return any(Path(sign).exists() for sign in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


@cache
def gpu() -> GPU | None:
    """The GPU that torch computes on. Not measured here: the machines that this was written on have none.

    Without a driver torch is not asked: to import it takes seconds, which `--help` does not have.
    """
    if not has_gpu_driver():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return GPU(properties.name, (properties.major, properties.minor), properties.total_memory)


@contextmanager
def simulate(simulated: GPU):
    """Let this machine pass for one with that GPU: to reckon what would be there, not to compute."""
    real = globals()["gpu"]
    globals()["gpu"] = lambda: simulated
    try:
        yield
    finally:
        globals()["gpu"] = real


def recognise_profile() -> tuple[str, str]:
    """The profile for this machine, and why."""
    found = gpu()
    if found is None:
        return "cpu", f"no GPU; {len(os.sched_getaffinity(0))} cores, {ram_bytes() / 1e9:.0f} GB"
    size = found.memory_bytes / 1e9
    said = f"{found.name}, compute capability {found.capability[0]}.{found.capability[1]}, {size:.0f} GB"
    for capability, least, name in PROFILES:
        if found.capability >= capability and size >= least:
            return name, said
    return "conservative", f"{said}; older or smaller than any GPU that has a profile"


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


def device_name() -> str:
    return gpu().name if gpu() else cpu_name()


def ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limits() -> dict[str, int]:
    """{what sets it: bytes that this process can still take}, for each bound that there is."""
    rooms = {"free RAM": meminfo("MemAvailable")}
    rooms |= {f"the cgroup's limit ({place})": room for place, room in cgroup_limits().items()}
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        rooms["ulimit -v"] = limit - taken
    return {what: max(0, room) for what, room in rooms.items()}


def available_ram_bytes() -> int:
    """What this process can still take: what the machine has free, or less where a cgroup or `ulimit -v` says so."""
    return min(memory_limits().values())


def free_memory(where: str | None = None, spread: bool = False) -> tuple[int, str]:
    """Bytes that this process may have in all, and where: on `where` ("cpu", "cuda"; None: what is computed on), or, if
    a model is spread, on all GPUs and in main memory. What it has there already counts as free."""
    if (where or device()) == "cpu":
        return available_ram_bytes() + rss_bytes(), "RAM"
    import torch  # not measured here

    if not spread:
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved(), gpu().name
    free = sum(torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count()))
    return free + available_ram_bytes(), "all GPUs and RAM"


def cgroup_limits(listing: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> dict[Path, int]:
    """{cgroup: limit minus usage} of this process's cgroup and those above it, for versions 1 and 2.

    Cached files that the kernel would drop (inactive_file) count as free: who has read a model fills its cgroup
    with them. A container sees its own cgroup as the mount's root, whatever /proc/self/cgroup calls it.
    """
    rooms = {}
    for line in listing.read_text().splitlines() if listing.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, limit, usage, cached = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        for place in [top / name.lstrip("/"), *(top / name.lstrip("/")).parents]:
            try:
                bound, used = ((place / file).read_text().strip() for file in (limit, usage))
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            except OSError:
                continue  # the root of version 2 has no limit, and a container's parents are not there to be read
            if bound != "max" and int(bound) < ram_bytes():  # version 1 says "none" with a number near 2**63
                rooms[place] = int(bound) - int(used) + int(stat.get(cached, 0))
    return rooms


def meminfo(name: str) -> int:
    """A value of /proc/meminfo, in bytes: MemAvailable, SwapTotal, SwapFree …"""
    said = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(said[name].split()[0]) * 1024


def memory_bytes() -> int:
    """What a process may use here: the GPU's memory, else RAM, or less where `ulimit` allows less; in bytes."""
    if gpu():
        return gpu().memory_bytes
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([ram_bytes(), *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


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


def why_compute_dtype() -> str:
    """The reason for what `compute_dtype` says here."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU's compute capability is {major}.{minor}; bf16 units need 8.0 or newer"
    units = torch.cpu.get_capabilities()
    found = [name for name in ("avx512_bf16", "amx_bf16") if units.get(name)]
    return f"the CPU has {' and '.join(found)}" if found else "the CPU has no bf16 units (avx512_bf16, amx_bf16)"


def query_gpus() -> list[dict]:
    """What nvidia-smi says of each GPU: name, driver, memory_bytes, capability; None where it does not say.

    [] where there is no nvidia-smi, RuntimeError where it fails. Not measured here: no machine with a GPU was at
    hand, and the form of the answer is that of its manual.
    """
    if not shutil.which("nvidia-smi"):
        return []
    fields = ["driver_version", "memory.total", "compute_cap", "name"]
    for asked in (fields, [field for field in fields if field != "compute_cap"]):  # which old drivers do not know
        command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
        if done.returncode == 0:
            break
    else:
        raise RuntimeError(" ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}")
    found = []
    for line in filter(None, map(str.strip, done.stdout.splitlines())):
        said = dict(zip(asked, (word.strip() for word in line.split(",", len(asked) - 1))))
        memory, capability = said.get("memory.total", ""), said.get("compute_cap", "").split(".")
        found.append({
            "name": said.get("name"), "driver": said["driver_version"],
            "memory_bytes": int(memory) * 2**20 if memory.isdigit() else None,
            "capability": [int(part) for part in capability] if all(map(str.isdigit, capability)) else None,
        })  # fmt: skip
    return found


def runs_on(capability: list[int], architectures: list[str]) -> bool:
    """Whether a GPU runs what torch was built for: sm_86 runs on 8.6 to 8.9, compute_86 on all later ones as well,
    sm_90a on 9.0 alone. Not measured here."""
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        built = [int(match[2]), int(match[3])] if match else None
        same_family = built and (match[1] == "compute" or built[0] == capability[0])
        if built and (built == capability or (same_family and match[4] == "" and built <= capability)):
            return True
    return not architectures  # it does not say


def probe_torch() -> dict:
    """What torch says of this machine, and how fast it multiplies, as plain data: `doctor.py` asks for it in a process
    of its own. What it says of a GPU was not measured here.
    """
    import torch

    with warnings.catch_warnings(record=True) as said:  # why CUDA cannot be used stands in a warning
        warnings.simplefilter("always")
        where = device()
    cards = range(torch.cuda.device_count() if where == "cuda" else 0)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {
        "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "device": where,
        "gpus": [
            {"name": torch.cuda.get_device_name(n), "capability": list(torch.cuda.get_device_capability(n))}
            for n in cards
        ],
        "architectures": torch.cuda.get_arch_list(), "warnings": [str(one.message) for one in said],
        "compute_dtype": next(name for name, dtype in dtypes.items() if dtype == compute_dtype()),
        "why": why_compute_dtype(),
        "products": {name: time_matmul(dtype, where) for name, dtype in dtypes.items()},
    }  # fmt: skip


def time_matmul(dtype, where: str) -> dict:
    """A matrix product in `dtype`: {error (of the largest value), tolerance, gflops (median)}, or {failed: why}.

    256 rows take 0.1 s where bf16 is emulated; a GPU needs more of them to be busy.
    """
    import torch

    side = 2048 if where == "cuda" else 256
    random = torch.Generator().manual_seed(0)
    try:
        one, other = (torch.randn(side, side, generator=random).to(where, dtype) for _ in range(2))
        wanted = one[:8].cpu().double() @ other.cpu().double()
        seconds, began = [], time.perf_counter()
        while not seconds or time.perf_counter() - began < 0.1:
            started = time.perf_counter()
            found = one @ other
            found[0, 0].item()  # waits for a GPU
            seconds.append(time.perf_counter() - started)
        error = (found[:8].cpu().double() - wanted).abs().max() / wanted.abs().max()
    except RuntimeError as error:  # "not implemented for 'Half'", out of memory, no kernel for this GPU
        return {"failed": str(error).strip().splitlines()[0]}
    median = statistics.median(seconds[1:] or seconds)  # the first one also sets up
    return {
        "error": error.item(), "tolerance": 16 * torch.finfo(dtype).eps,
        "gflops": 2 * side**3 / median / 1e9,
    }  # fmt: skip


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


def return_freed_memory(above: int = 0) -> None:
    """Give the kernel what was freed and is held for later, where this process holds more than `above` bytes: the
    holes that rows of other lengths leave would grow."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim") and rss_bytes() > above:
        libc.malloc_trim(0)


def rss_bytes() -> int:
    """This process's resident set now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int:
    """GPU memory that torch has allocated in this process, in bytes; 0 without a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.memory_allocated() if torch is not None and torch.cuda.is_available() else 0
