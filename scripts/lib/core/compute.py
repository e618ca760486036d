"""CPU threads, running out of memory, and giving freed memory back."""

import os
import sys
from functools import cache

from lib.core import cli, hardware


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def release_memory() -> None:
    """Give the memory of deleted models back before the next model is loaded."""
    import gc

    import torch

    gc.collect()
    hardware.return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def call_catching_oom(work, *arguments) -> tuple:
    """(work(*arguments), None), or (None, the reason) if it ran out of memory; what it held is freed then."""
    try:
        return work(*arguments), None
    except Exception as error:
        if not cli.is_out_of_memory(error):
            raise
        reason = first_line(error)
    release_memory()  # outside of `except`, where the exception's traceback would still hold the tensors
    return None, reason


@cache
def warn_if_busy() -> None:
    """Print once if other programs have kept cores busy since the script started, a time that imports fill."""
    cores, busy = hardware.count_cores(), hardware.count_busy_cores(cli.LOAD)
    if busy > cores / 4:
        print(
            f"other programs keep {busy:.1f} of {cores} cores busy: this takes longer, and speeds that are measured "
            "meanwhile are lower than on a quiet machine",
            file=sys.stderr,
        )


def use_threads(count: int) -> None:
    """Let torch compute on `count` CPU threads; 0: all cores that this process may use."""
    import torch

    warn_if_busy()

    # oneDNN caches compiled kernels for 1,024 shapes, and rows of many lengths have many: 0.3 GB more after 64 rows.
    # 64 entries hold all shapes of one row, and no layer has to wait for a kernel (docs/log.md).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    torch.set_num_threads(count or hardware.count_cores())
