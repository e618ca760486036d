"""Which of the processes that train together this one is, as its launcher says: torchrun and accelerate set RANK and
WORLD_SIZE. A RANK alone, left over in a shell, must not make a script write nothing."""

import os


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def is_main_process() -> bool:
    """Whether this process is the one that writes artifacts, runs and log lines, and prints."""
    return rank() == 0
