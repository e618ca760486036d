"""This machine: cores, memory, accelerator, the dtype to compute in."""

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
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

# (least compute capability, least GB of memory, profile). A GPU gets the first profile whose minima it reaches.
PROFILES = (
    ((9, 0), 60, "h100"), ((8, 9), 20, "rtx4090"), ((8, 9), 7, "rtx4060"), ((8, 6), 20, "rtx3090"),
    ((8, 6), 7, "rtx3070"), ((8, 0), 30, "a100"), ((7, 5), 14, "t4"),
)  # fmt: skip


class GPU(NamedTuple):
    name: str
    capability: tuple[int, int]  # of CUDA: 7.5 is a Turing, 8.0 an Ampere
    memory_bytes: int


CGROUP_LISTING, CGROUP_MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def count_cores(listing: Path = CGROUP_LISTING, mount: Path = CGROUP_MOUNT) -> int:
    """The cores that this process may use: those of its affinity, or fewer if a cgroup limits its time. With `docker
    --cpus=2`, all cores of the host are visible, and a thread on each would wait for its turn."""
    quotas = [len(os.sched_getaffinity(0))]
    for cgroup, version in list_cgroups("cpu", listing, mount):
        with suppress(OSError, ValueError):  # "max" is no number, and the root has no such file
            if version == 2:
                quota, period = map(int, (cgroup / "cpu.max").read_text(encoding="utf-8").split())
            else:
                quota, period = (
                    int((cgroup / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")) for name in ("quota", "period")
                )
            if quota > 0:  # version 1 has -1 for no limit
                quotas.append(quota // period)
    return max(1, min(quotas))


def list_cgroups(controller: str, listing: Path, mount: Path) -> list[tuple[Path, int]]:
    """(directory, version 1 or 2) of this process's cgroup and those above it.

    In a container, the mount's root is its own cgroup, whatever name /proc/self/cgroup has for it.
    """
    cgroups = []
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            top, version = (mount, 2) if controllers == "" else (mount / controller, 1)
            below = top / name.lstrip("/")
            cgroups += [(cgroup, version) for cgroup in (below, *below.parents) if cgroup.is_relative_to(top)]
    return cgroups


class Load(NamedTuple):
    """A reading of the clocks, from which `count_busy_cores` counts."""

    seconds: float
    ours: float  # CPU seconds of this process and of its children that have ended
    everyone: float  # CPU seconds of all programs, and what a hypervisor took, on the cores of our affinity


def read_load(stat: Path = Path("/proc/stat")) -> Load:
    times, cores = os.times(), {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in stat.read_text(encoding="utf-8").splitlines()] if stat.is_file() else []
    # user, nice, system, [idle, iowait,] irq, softirq, steal; guest time is part of user time
    ticks = sum(int(line[column]) for line in lines if line[0] in cores for column in (1, 2, 3, 6, 7, 8))
    return Load(time.monotonic(), sum(times[:4]), ticks / os.sysconf("SC_CLK_TCK"))


def count_busy_cores(since: Load) -> float:
    """The cores that other programs have kept busy since a reading, on average. Over less than a second, whose ticks of
    10 ms tell little, 0."""
    now = read_load()
    seconds = now.seconds - since.seconds
    others = (now.everyone - since.everyone) - (now.ours - since.ours)
    return round(max(0.0, others) / seconds, 2) if seconds > 1 else 0.0


def has_gpu_driver() -> bool:
    return any(Path(path).exists() for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


@cache
def gpu() -> GPU | None:
    """The GPU that torch computes on. Not tried: the development machines have none.

    Without a driver torch is not asked, since importing it takes seconds, too long for `--help`.
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
    """Treat this machine as one with that GPU, for estimates. Nothing can be computed on it."""
    real = globals()["gpu"]
    globals()["gpu"] = lambda: simulated
    try:
        yield
    finally:
        globals()["gpu"] = real


def recognise_profile() -> tuple[str, str]:
    """The profile for this machine, and the reason."""
    card = gpu()
    if card is None:
        return "cpu", f"no GPU; {count_cores()} cores, {ram_bytes() / 1e9:.0f} GB"
    size = card.memory_bytes / 1e9
    description = f"{card.name}, compute capability {card.capability[0]}.{card.capability[1]}, {size:.0f} GB"
    for capability, gigabytes, name in PROFILES:
        if card.capability >= capability and size >= gigabytes:
            return name, description
    return "conservative", f"{description}; older or smaller than any GPU that has a profile"


def machine() -> dict:
    """The machine's description for metadata.json. It asks torch only if a script has already imported it."""
    description = {"cpu": cpu_name(), "cores": count_cores(), "ram_bytes": ram_bytes(), "gpu": None}
    torch = sys.modules.get("torch")
    if torch is not None:
        description["threads"] = torch.get_num_threads()
        description["compute_dtype"] = str(compute_dtype()).removeprefix("torch.")
        description["gpu"] = gpu() and gpu().name
    return description


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name() -> str:
    return gpu().name if gpu() else cpu_name()


def ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limits() -> dict[str, int]:
    """{limit: bytes that this process can still allocate below it}, for each limit that exists."""
    rooms = {"free RAM": meminfo("MemAvailable")}
    rooms |= {f"the cgroup's limit ({cgroup})": room for cgroup, room in cgroup_limits().items()}
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        mapped = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        rooms["ulimit -v"] = limit - mapped
    return {name: max(0, room) for name, room in rooms.items()}


def available_ram_bytes() -> int:
    """Bytes that this process can still allocate: the free RAM, or less if a cgroup or `ulimit -v` limits it."""
    return min(memory_limits().values())


def free_memory(device_type: str | None = None, spread: bool = False) -> tuple[int, str]:
    """Bytes that this process may use in total, and the name of that memory: of `device_type` ("cpu", "cuda"; None: the
    device that computes) or, if a model is spread, of all GPUs and main memory. What it uses already counts as free."""
    if (device_type or device()) == "cpu":
        return available_ram_bytes() + rss_bytes(), "RAM"
    import torch  # not tried: there was no GPU

    if not spread:
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved(), gpu().name
    free = sum(torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count()))
    return free + available_ram_bytes(), "all GPUs and RAM"


def cgroup_limits(listing: Path = CGROUP_LISTING, mount: Path = CGROUP_MOUNT) -> dict[Path, int]:
    """{cgroup: limit minus usage} of this process's cgroup and those above it, for versions 1 and 2.

    Cached files that the kernel would drop (inactive_file) count as free: reading a model fills the cgroup with them.
    """
    names = {2: ("memory.max", "memory.current", "inactive_file"),
             1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip
    rooms = {}
    for cgroup, version in list_cgroups("memory", listing, mount):
        limit_file, usage_file, cache_key = names[version]
        try:
            limit_text, usage_text = (
                (cgroup / file).read_text(encoding="utf-8").strip() for file in (limit_file, usage_file)
            )
            stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines())
        except OSError:
            continue  # the root of version 2 has no limit, and a container cannot read its parents
        if limit_text != "max" and int(limit_text) < ram_bytes():  # "no limit" is a number near 2**63 in version 1
            rooms[cgroup] = int(limit_text) - int(usage_text) + int(stat.get(cache_key, 0))
    return rooms


def meminfo(name: str) -> int:
    """A value of /proc/meminfo, in bytes: MemAvailable, SwapTotal, SwapFree …"""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(fields[name].split()[0]) * 1024


def memory_bytes() -> int:
    """Bytes that a process may use: the GPU's memory, else RAM, or less if `ulimit` allows less."""
    if gpu():
        return gpu().memory_bytes
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return min([ram_bytes(), *(limit for limit in limits if limit != resource.RLIM_INFINITY)])


def peak_memory_bytes() -> int:
    """The largest resident set of this process or of a child that has ended, in bytes."""
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kib * 1024


def used_gpus() -> list[int]:
    """The GPUs on which torch holds memory in this process. To ask another one would take memory there."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [n for n in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(n)]


def synchronise() -> None:
    """Wait for the GPUs to finish what they were given, before a clock is read: kernels run in the background."""
    for number in used_gpus():
        sys.modules["torch"].cuda.synchronize(number)


def reset_gpu_peak() -> None:
    """Let `peak_gpu_memory_bytes` begin here. A new process need not."""
    for number in used_gpus():
        sys.modules["torch"].cuda.reset_peak_memory_stats(number)


def peak_gpu_memory_bytes() -> int | None:
    """The most memory that torch has allocated on each GPU, added up, in bytes; None without a GPU. What llama.cpp and
    vLLM allocate by themselves is not in it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return sum(torch.cuda.max_memory_allocated(n) for n in range(torch.cuda.device_count()))


def device() -> str:
    return "cuda" if gpu() else "cpu"


def compute_dtype():
    """bfloat16 if the hardware multiplies it natively, else float16 on a GPU and float32 on a CPU.

    A CPU without bf16 units emulates it: 0.3 GFLOP/s against 142 in fp32 on a Zen 3. (A Zen 5 with AVX-512 bf16 reaches
    869 against 168.) A T4 emulates it too, although `is_bf16_supported()` returns True there, so the compute capability
    decides (Ampere, 8.0).
    """
    import torch

    if card := gpu():
        return torch.bfloat16 if card.capability >= (8, 0) else torch.float16
    units = torch.cpu.get_capabilities()
    return torch.bfloat16 if units.get("avx512_bf16") or units.get("amx_bf16") else torch.float32


def why_compute_dtype() -> str:
    """The reason for the dtype that `compute_dtype` returns on this machine."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"the GPU's compute capability is {major}.{minor}; bf16 units need 8.0 or newer"
    units = torch.cpu.get_capabilities()
    names = [name for name in ("avx512_bf16", "amx_bf16") if units.get(name)]
    return f"the CPU has {' and '.join(names)}" if names else "the CPU has no bf16 units (avx512_bf16, amx_bf16)"


def query_gpus() -> list[dict]:
    """The name, driver, memory_bytes and capability of each GPU according to nvidia-smi; None for unknown values.

    [] without nvidia-smi, RuntimeError if it fails. Not tried, since no machine with a GPU was available: the format of
    its output is taken from its manual.
    """
    if not shutil.which("nvidia-smi"):
        return []
    fields = ["driver_version", "memory.total", "compute_cap", "name"]
    for columns in (fields, [field for field in fields if field != "compute_cap"]):  # unknown to old drivers
        command = ["nvidia-smi", f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits"]
        process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
        if process.returncode == 0:
            break
    else:
        raise RuntimeError(" ".join((process.stdout + process.stderr).split()) or f"exit code {process.returncode}")
    cards = []
    for line in filter(None, map(str.strip, process.stdout.splitlines())):
        values = dict(zip(columns, (word.strip() for word in line.split(",", len(columns) - 1))))
        memory, capability = values.get("memory.total", ""), values.get("compute_cap", "").split(".")
        cards.append({
            "name": values.get("name"), "driver": values["driver_version"],
            "memory_bytes": int(memory) * 2**20 if memory.isdigit() else None,
            "capability": [int(part) for part in capability] if all(map(str.isdigit, capability)) else None,
        })  # fmt: skip
    return cards


def runs_on(capability: list[int], architectures: list[str]) -> bool:
    """Whether a GPU runs code for the architectures that torch was built for. sm_86 runs on 8.6 to 8.9, compute_86 on
    all later ones as well, sm_90a only on 9.0. Not tried on a GPU."""
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        version = [int(match[2]), int(match[3])] if match else None
        same_family = version and (match[1] == "compute" or version[0] == capability[0])
        if version and (version == capability or (same_family and match[4] == "" and version <= capability)):
            return True
    return not architectures  # unknown: assume that it does


def probe_torch() -> dict:
    """Torch's view of this machine and the speed of its matrix products, as plain data. `doctor.py` calls this in a
    process of its own. Not tried with a GPU.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:  # a warning says why CUDA cannot be used
        warnings.simplefilter("always")
        device_type = device()
    cards = range(torch.cuda.device_count() if device_type == "cuda" else 0)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {
        "version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "device": device_type,
        "gpus": [
            {"name": torch.cuda.get_device_name(n), "capability": list(torch.cuda.get_device_capability(n))}
            for n in cards
        ],
        "architectures": torch.cuda.get_arch_list(), "warnings": [str(warning.message) for warning in caught],
        "compute_dtype": next(name for name, dtype in dtypes.items() if dtype == compute_dtype()),
        "why": why_compute_dtype(),
        "products": {name: time_matmul(dtype, device_type) for name, dtype in dtypes.items()},
    }  # fmt: skip


def time_matmul(dtype, device_type: str) -> dict:
    """A matrix product in `dtype`: {error (relative to the largest value), tolerance, gflops (median)}, or {failed: the
    reason}.

    256 rows take 0.1 s if bf16 is emulated; a GPU needs more rows to be busy.
    """
    import torch

    side = 2048 if device_type == "cuda" else 256
    random = torch.Generator().manual_seed(0)
    try:
        left, right = (torch.randn(side, side, generator=random).to(device_type, dtype) for _ in range(2))
        expected = left[:8].cpu().double() @ right.cpu().double()
        seconds, began = [], time.perf_counter()
        while not seconds or time.perf_counter() - began < 0.1:
            started = time.perf_counter()
            product = left @ right
            product[0, 0].item()  # waits for a GPU
            seconds.append(time.perf_counter() - started)
        error = (product[:8].cpu().double() - expected).abs().max() / expected.abs().max()
    except RuntimeError as error:  # "not implemented for 'Half'", out of memory, no kernel for this GPU
        return {"failed": str(error).strip().splitlines()[0]}
    median = statistics.median(seconds[1:] or seconds)  # the first one also sets up
    return {
        "error": error.item(), "tolerance": 16 * torch.finfo(dtype).eps,
        "gflops": 2 * side**3 / median / 1e9,
    }  # fmt: skip


def autocast():
    """Matrix products in `compute_dtype`, sums and losses in fp32. Has no effect if `compute_dtype` is fp32."""
    import torch

    return torch.autocast(device(), compute_dtype(), enabled=compute_dtype() != torch.float32)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that training frees instead of giving it back to the kernel after each tensor.

    Otherwise large tensors come from mmap and are paged in anew each time, which took a quarter of the time of LoRA
    steps of two rows on two cores (26.8 s against 19.8 s for 32 rows). It costs 13 % more peak memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # from malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def return_freed_memory(above: int = 0) -> None:
    """Give freed memory that glibc holds back to the kernel, if this process holds more than `above` bytes. Otherwise
    the gaps that rows of different lengths leave would grow."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim") and rss_bytes() > above:
        libc.malloc_trim(0)


def rss_bytes() -> int:
    """This process's resident set now, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int:
    """GPU memory that torch has allocated in this process, in bytes; 0 without a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.memory_allocated() if torch is not None and torch.cuda.is_available() else 0
