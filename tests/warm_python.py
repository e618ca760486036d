#!/usr/bin/env python3
"""A Python that has imported the libraries already, for tests that run many stages: make PYTHON=tests/warm_python.py …

    WARM_PYTHON=/tmp/socket tests/warm_python.py scripts/sft.py …     runs a script as a fork of the server
    python tests/warm_python.py --serve /tmp/socket                   the server

On a tiny model, importing torch, transformers and PEFT takes nine of the ten seconds of a stage. A script runs in a
process of its own here too, with its own directory, environment, arguments and standard streams. Signals and exit
codes are passed on. SIGUSR1 becomes SIGKILL, and the script has ended before this process ends. What is read from the
environment while a library is imported is as the server has it.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

LIBRARIES = (
    "torch", "transformers", "transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "datasets",
    "trl.trainer.sft_trainer", "bitsandbytes", "accelerate", "safetensors.torch", "numpy", "gguf", "yaml",
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ask(address: str, argv: list[str]) -> int:
    """Let the server run a script in the place of this process; its exit code."""
    request = {"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        for number in SIGNALS:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        signal.signal(signal.SIGUSR1, lambda *_: server.sendall(bytes([signal.SIGKILL])))
        answer = server.recv(1)
    return answer[0] if answer else 1


def serve(address: str) -> None:
    """Fork for each request, until the process that started this one has ended."""
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, f"a fork would lack these threads: {threads}"
    starter = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(2)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who keep watch
        while os.getppid() == starter:
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                os._exit(watch(client))
            client.close()


def watch(client: socket.socket) -> int:
    """Run a request in a process of its own: pass signals on to it and its exit code back. It dies with its client."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    request = json.loads(client.makefile("rb").readline())
    script = os.fork()
    if script == 0:
        client.close()
        os._exit(run(request, streams))
    ended = os.pidfd_open(script)
    while True:
        ready, _, _ = select.select([client, ended], [], [])
        if ended in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(script, 0)[1])
            client.sendall(bytes([code if code >= 0 else 128 - code]))
            return 0
        numbers = client.recv(16) or [signal.SIGKILL]  # the client was killed
        for number in numbers:
            os.kill(script, number)
        if numbers == [signal.SIGKILL]:
            return 0


def run(request: dict, streams: list[int]) -> int:
    """Be the script that a request names."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    more = request["env"].get("PYTHONPATH", "")
    sys.path[0:1] = [os.path.dirname(os.path.abspath(sys.argv[0])), *filter(None, more.split(":"))]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    elif sys.argv[1:] and sys.argv[1].endswith(".py"):
        sys.exit(ask(os.environ["WARM_PYTHON"], sys.argv[1:]))
    else:  # -c and -m
        os.execv(os.environ["REAL_PYTHON"], [os.environ["REAL_PYTHON"], *sys.argv[1:]])
