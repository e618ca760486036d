"""A stand-in for the Hugging Face Hub on this machine: what huggingface_hub's client asks of a model repository.

Everything is in memory. Large files go through plain LFS (the client is told so with HF_HUB_DISABLE_XET). A test makes
a route fail, hang, break off or be preceded by something with `Hub.trouble`; every refusal repeats the token that it
was sent, as a careless server might.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ROUTES = [
    ("info", "GET", r"/api/models/(\w+/[\w.-]+)()"),
    ("tree", "GET", r"/api/models/(\w+/[\w.-]+)/tree/([^/]+)"),
    ("create", "POST", r"/api/repos/create"),
    ("card", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/(\w+/[\w.-]+)/preupload/([^/]+)"),
    ("batch", "POST", r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch()"),
    ("put", "PUT", r"/lfs/(\w{64})"),
    ("commit", "POST", r"/api/models/(\w+/[\w.-]+)/commit/([^/]+)"),
    ("resolve", "(?:HEAD|GET)", r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)"),
]


@dataclass
class Trouble:
    route: str
    status: int = 0  # the answer; 0: none of its own
    times: int = 10**6
    spare: int = 0  # so many requests go well before
    headers: dict = None
    text: str = "not today"
    hang: bool = False  # never answers
    cut: int = -1  # takes so many bytes of the request, and hangs up
    late: bool = False  # does what it was asked, and fails then
    meanwhile: object = None  # called before
    path: str = ""  # only requests whose path holds this


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.url = token, f"http://127.0.0.1:{self.server_address[1]}"
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self) -> None:
        self.repos, self.private, self.blobs, self.troubles = {}, {}, {}, []
        self.asked, self.put_bytes, self.lies = [], 0, {}

    def stop(self) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def trouble(self, route: str, **how) -> None:
        self.troubles.append(Trouble(route, **how))

    def add(self, repo: str, files: dict[str, bytes], private: bool = True) -> str:
        """A commit by someone else: the files of the repository are these; its hash."""
        self.private.setdefault(repo, private)
        return self.commit(repo, dict(files))

    def commit(self, repo: str, files: dict) -> str:
        """Files are bytes, or the sha256 of a large file as a text."""
        commits = self.repos.setdefault(repo, {})
        sha = hashlib.sha1(repr((repo, len(commits), sorted(files))).encode()).hexdigest()
        commits[sha] = files
        return sha

    def head(self, repo: str) -> str:
        return list(self.repos[repo])[-1]

    def at(self, repo: str, revision: str = "main") -> dict:
        commits = self.repos[repo]
        return commits[self.head(repo) if revision == "main" else revision]

    def content(self, repo: str, path: str, revision: str = "main") -> bytes:
        kept = self.at(repo, revision)[path]
        return self.blobs[kept] if isinstance(kept, str) else kept

    def entry(self, repo: str, path: str, revision: str) -> dict:
        kept, body = self.at(repo, revision)[path], self.content(repo, path, revision)
        large = {"oid": self.lies.get(path, kept), "size": len(body), "pointerSize": 134}
        stored = kept.encode() if isinstance(kept, str) else body
        oid = self.lies.get(path) or hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        made = {"type": "file", "path": path, "size": len(body), "oid": oid}
        return made | ({"lfs": large} if isinstance(kept, str) else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *given) -> None:
        pass

    def respond(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        found = ((name, re.fullmatch(line, path)) for name, verb, line in ROUTES if re.fullmatch(verb, self.command))
        route, match = next(((name, match) for name, match in found if match), ("unknown", None))
        with hub.lock:
            hub.asked.append(route)
            trouble = next((t for t in hub.troubles if t.route == route and t.path in path and t.times > 0), None)
            if trouble and trouble.spare:
                trouble.spare, trouble = trouble.spare - 1, None
            if trouble:
                trouble.times -= 1
        if trouble and trouble.cut >= 0:
            self.rfile.read(trouble.cut)
            self.close_connection = True
            return
        body = b"" if trouble and trouble.hang and not trouble.late else self.body()
        if trouble and trouble.meanwhile:
            trouble.meanwhile()
        if trouble and trouble.late:
            self.work(route, match, body)
        if trouble and trouble.hang:
            hub.stopped.wait()
            self.close_connection = True
        elif trouble and trouble.status:
            token = self.headers.get("Authorization", "")
            said = {"error": f"{trouble.text} with {token}"}
            self.answer(said, trouble.status, {"X-HF-Warning": f"{time.time()}; {token}"} | (trouble.headers or {}))
        elif match is None:
            self.answer({"error": f"no such route: {path}"}, 404)
        elif route != "put" and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        else:
            self.answer(*self.work(route, match, body))

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def body(self) -> bytes:
        """Sent whole with its length, or (a file) in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value, status: int = 200, headers: dict | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def work(self, route: str, match: re.Match, body: bytes) -> tuple:
        hub, given = self.server, match.groups()
        if route == "put":
            with hub.lock:
                hub.blobs[given[0]] = body
                hub.put_bytes += len(body)
            return {}, 200
        if route == "card":
            return {"errors": [], "warnings": []}, 200
        if route == "create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in hub.repos:
                return {"error": "You already created this model repo"}, 409
            hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, asked["visibility"] == "private")
            return {"url": f"{hub.url}/{repo}"}, 200
        if given[0] not in hub.repos:
            return {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"}
        repo, revision = given[0], given[1] or "main"
        if revision != "main" and revision not in hub.repos[repo]:
            return {"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"}
        files = hub.at(repo, revision)
        if route == "info":
            return {"id": repo, "sha": hub.head(repo), "private": hub.private[repo]}, 200
        if route == "tree":
            folders = {path.rpartition("/")[0] for path in files} - {""}
            found = [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
            return found + [hub.entry(repo, path, revision) for path in files], 200
        if route == "preupload":
            known = {path: hub.entry(repo, path, revision) for path in files}
            return {"files": [upload_mode(file, known) for file in json.loads(body)["files"]]}, 200
        if route == "batch":
            return {"objects": [self.upload_action(file) for file in json.loads(body)["objects"]]}, 200
        if route == "commit":
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])
        held = hub.entry(repo, given[2], revision)
        headers = {"X-Repo-Commit": revision, "ETag": json.dumps(held.get("lfs", held)["oid"])}
        return hub.content(repo, given[2], revision), 200, headers | {"Content-Length": str(held["size"])}

    def upload_action(self, file: dict) -> dict:
        known, oid = self.server.blobs, file["oid"]
        return file | ({} if oid in known else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{oid}"}}})

    def commit(self, repo: str, lines: list[dict]) -> tuple:
        """All of it or nothing."""
        hub = self.server
        with hub.lock:
            head, files = hub.head(repo), dict(hub.at(repo))
            if lines[0]["value"].get("parentCommit", head) != head:
                return {"error": "A commit has happened since. Please refresh and try again."}, 412
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif value["oid"] in hub.blobs:
                    files[value["path"]] = value["oid"]
                else:
                    return {"error": f"LFS pointer to a file that is not there: {value['path']}"}, 400
            sha = hub.commit(repo, files)
        return {"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha}, 200


def upload_mode(file: dict, known: dict) -> dict:
    """Weights are large files, whatever their size; `oid` is what the client holds unchanged files against."""
    path = file["path"]
    there = known[path].get("lfs", known[path])["oid"] if path in known else None
    mode = "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there}
