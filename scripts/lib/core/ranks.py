"""The rank of this process among those that train together. torchrun and accelerate set RANK and WORLD_SIZE. RANK alone
may be left over in a shell, and must not keep a script from writing its artifact."""

import os


def rank() -> int:
    return int(os.environ["RANK"]) if "WORLD_SIZE" in os.environ and is_number("RANK") else 0


def is_number(variable: str) -> bool:
    return os.environ.get(variable, "").isdecimal()


def find_missing_variables() -> list[str]:
    """The variables that every launcher sets and that are missing or malformed, if WORLD_SIZE announces several
    processes."""
    if os.environ.get("WORLD_SIZE", "") in ("", "0", "1"):
        return []
    missing = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if not is_number(name)]
    return missing + ["MASTER_ADDR"] * (not os.environ.get("MASTER_ADDR"))


def is_main_process() -> bool:
    """Whether this process is the one that writes artifacts, runs and log lines, and prints."""
    return rank() == 0
