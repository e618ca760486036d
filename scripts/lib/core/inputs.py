"""Which artifacts are stale: the content of an input is no longer what they were made from.

    python3 scripts/lib/core/inputs.py . --remember

Prints the stale artifacts of a root, models/x-base …, for Make. It compares times, but a file that replaces another may
be older: cp -p, rsync and unzip keep the time, and a link can be set to another file. metadata.json has the digest of
each input. With --remember, digests are kept in .make/inputs.json, and a file is read again only if its inode, size or
times change.

Runs whenever Make starts, perhaps before anything is installed: with few imports, and on any Python from 3.9.
"""

import hashlib
import json
import os
import sys
import time

METADATA = "metadata.json"
BUILDING = ".building"  # a file in an artifact that is being built, and no part of it
READ = {}  # {path: [its inode, size and times, sha256]} of the files that this process has read


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def remembered_sha256(path, known: dict) -> str:
    status = os.stat(path)
    state = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    if str(path) in known and known[str(path)][0] == state:
        return known[str(path)][1]
    digest = sha256(path)
    if time.time() - status.st_ctime > 1:  # one that was just written may be written again within a tick of the clock
        known[str(path)] = [state, digest]
    return digest


def file_digests(path, known: dict = READ) -> dict:
    """{relative path: sha256} of the files of an artifact or another directory, without metadata.json; for a single
    file, {name: sha256}."""
    path = os.fspath(path)
    if os.path.isfile(path):
        return {os.path.basename(path): remembered_sha256(path, known)}
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    names = sorted((os.path.relpath(file, path), file) for file in files if os.path.isfile(file))
    return {name: remembered_sha256(file, known) for name, file in names if name not in (METADATA, BUILDING)}


def digest_of(files: dict) -> str:
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_digest(path: str, known: dict):
    """The digest of a file or directory; of an artifact, the one that its metadata.json says, None if it says none.
    Whether that is true is checked by whoever reads the artifact."""
    file = os.path.join(path, METADATA)
    if os.path.isfile(file):
        meta = read_json(file)
        return meta.get("digest") if isinstance(meta, dict) else None
    return digest_of(file_digests(path, known))


def find_changed(meta: dict, artifacts: dict, known: dict = READ) -> list:
    """The paths of the inputs whose content is no longer what an artifact was made from. One that is gone counts as
    unchanged, since it may lie elsewhere on the machine that made the artifact.

    `artifacts` are {real path: digest} of inputs that are known without reading them."""
    changed = []
    for source in meta.get("inputs", {}).values():
        path = source["path"]
        if os.path.exists(path):
            try:
                digest = artifacts.get(os.path.realpath(path)) or read_digest(path, known)
            except OSError:
                digest = None  # the stage that reads it says why it cannot be read
            if digest != source["digest"]:
                changed.append(path)
    return changed


def read_artifacts(root: str) -> dict:
    """{path: metadata} of the artifacts of a root. Those that cannot be read are left out: verify.py reports them."""
    folders, metas = [os.path.join(root, "models"), os.path.join(root, "reports")], {}
    folders += list_folder(os.path.join(root, "data"))
    for path in [path for folder in folders for path in list_folder(folder)]:
        meta = read_json(os.path.join(path, METADATA))
        sources = meta.get("inputs") if isinstance(meta, dict) else None
        if isinstance(sources, dict) and all(is_identity(source) for source in sources.values()):
            metas[path] = meta
    return metas


def is_identity(source) -> bool:
    return isinstance(source, dict) and all(isinstance(source.get(key), str) for key in ("path", "digest"))


def read_json(file: str):
    try:
        with open(file, encoding="utf-8") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None


def list_folder(folder: str) -> list:
    return sorted(os.path.join(folder, name) for name in os.listdir(folder)) if os.path.isdir(folder) else []


def list_digests(metas: dict) -> dict:
    """{real path: digest} of artifacts."""
    return {os.path.realpath(path): meta.get("digest") for path, meta in metas.items()}


def main(root: str, remember: bool) -> None:
    file = os.path.join(root, ".make", "inputs.json")
    known = read_json(file) or {}
    before, metas = dict(known), read_artifacts(root)
    artifacts = list_digests(metas)
    for path, meta in metas.items():
        name = os.path.relpath(path, root)
        # Make builds no artifact with another character in its name, and could not read such a name.
        if all(letter.isalnum() or letter in "/._-+@,=" for letter in name) and find_changed(meta, artifacts, known):
            print(name)
    if remember and known != before and os.access(root, os.W_OK):
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(f"{file}.{os.getpid()}", "w", encoding="utf-8") as stream:
            json.dump(known, stream)
        os.replace(f"{file}.{os.getpid()}", file)


if __name__ == "__main__":
    main(sys.argv[1], "--remember" in sys.argv[2:])
