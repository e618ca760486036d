"""Write requirements/core.lock and cuda.lock: all packages that requirements.txt leads to, with their files' SHA-256.

    python3 mk/lock.py    # with uv on the PATH

cuda.lock holds PyPI's torch and what only that build needs, core.lock everything else. Both are for Linux on x86_64 and
aarch64 with Python 3.11 to 3.14. The pins of requirements.txt stay; what they need comes in its newest version.
"""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
# From PyPI alone, whatever index this machine is set to.
COMMAND = "uv pip compile --universal --generate-hashes --python-version 3.11 --no-config --no-header --quiet"
COMMAND += " --default-index https://pypi.org/simple requirements.txt"
ONLY_CUDA = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")


def main() -> None:
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    lock = subprocess.run(COMMAND.split(), cwd=ROOT, env=settings, stdout=subprocess.PIPE, check=True).stdout.decode()
    entries = re.split(r"^(?=\w)", lock, flags=re.M)[1:]
    header = f"# Written by mk/lock.py from requirements.txt: {COMMAND}\n"
    for name, only_cuda in (("core", False), ("cuda", True)):
        chosen = [entry for entry in entries if bool(ONLY_CUDA.match(entry)) == only_cuda]
        (REQUIREMENTS / f"{name}.lock").write_text(header + "".join(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
