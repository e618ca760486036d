"""Processes that end with the one that started them, whatever ends it.

Only Python's standard library: mk/stage.py uses it before anything is installed.
"""

import ctypes
import signal
import subprocess
import sys


def start(command: list, **options) -> subprocess.Popen:
    """Start a process that gets SIGTERM when this one ends, even by SIGKILL: a stage then saves its progress instead of
    working on unseen. The options are Popen's."""
    return subprocess.Popen(command, preexec_fn=end_with_parent, **options)


def end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when the one that started it ends. Only Linux can do that."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
