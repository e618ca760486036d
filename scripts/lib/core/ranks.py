"""The rank of this process among those that train together. torchrun and accelerate set RANK and WORLD_SIZE. RANK alone
may be left over in a shell, and must not keep a script from writing its artifact."""

import os


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes artifacts, runs and log lines, and prints."""
    return rank() == 0
