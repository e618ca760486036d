"""An artifact as a Hugging Face Hub model repository: uploaded whole in one commit, and read back.

huggingface_hub's own client speaks to the Hub (HF_ENDPOINT) and decides how large files are sent. If an upload is
interrupted, the repository is unchanged, the large files already sent stay there, and the same command resumes.
"""

import hashlib
import json
import logging
import re
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from lib.core import artifact, cli, compute
from lib.core.cli import InputError

BESIDE = {".gitattributes", "README.md"}  # what the Hub, or a user on its pages, puts beside an artifact
BUSY = (408, 429, 500, 502, 503, 504)  # the answers on which huggingface_hub tries again

RESUME = "repeat the command to resume"
CHANGED = "it was changed in the meantime, or is being changed now; nothing was replaced. Check it, then repeat"
ADVICE = {
    401: "the token was rejected; run `hf auth login`, or set HF_TOKEN to a token with write access",
    403: "the token has no permission for this; create one with write access at https://huggingface.co/settings/tokens",
    404: "the repository or revision does not exist, or the token has no access to it; check the name",
    409: CHANGED,
    412: CHANGED,
    429: f"too many requests; wait, then {RESUME}",
}


def upload(folder: Path, repo: str, public: bool = False, timeout: float = 60) -> dict:
    """Upload an artifact to a Hub repository, which is created (private unless `public`) if it is missing.

    An earlier artifact there is replaced by one more commit and stays in the history; the same one is not sent again.
    `timeout` is in seconds, per answer. Returns {"repo", "revision": the commit's hash, "url", "uploaded"}. Raises
    InputError if the artifact is not whole, the repository contains other files or is not as private as requested, the
    Hub refuses or does not answer, or in the end lists other files than were sent.
    """
    with connect(repo, timeout) as api:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        meta = artifact.read(folder)
        head = revision = find_head(api, repo, public)
        entries = list_files(api, repo, head)
        old_meta = read_earlier_metadata(api, repo, head) if artifact.METADATA in entries else {}
        own_files = {artifact.METADATA, *old_meta["files"]} if old_meta else set()
        if foreign := sorted(entries.keys() - own_files - BESIDE):
            raise InputError(
                f"Hub repository {repo}: contains files that Quartet did not make ({', '.join(foreign[:5])}); choose "
                "another name, or delete them there. Nothing was changed"
            )
        sends = old_meta.get("digest") != meta["digest"] or bool(find_differing(folder, meta["files"], entries))
        if sends:
            files = meta["files"] | {artifact.METADATA: artifact.sha256(folder / artifact.METADATA)}
            obsolete = sorted(own_files & entries.keys() - files.keys())
            operations = [CommitOperationDelete(name, is_folder=False) for name in obsolete]
            operations += [CommitOperationAdd(name, folder / name) for name in files]
            message = f"{meta['kind']} {meta['digest'][:12]}"
            revision = api.create_commit(repo, operations, commit_message=message, parent_commit=head).oid
            entries = list_files(api, repo, revision)
            if wrong := find_differing(folder, files, entries) or sorted(entries.keys() - files.keys() - BESIDE):
                raise InputError(
                    f"Hub repository {repo}: commit {revision} differs from the upload: {', '.join(wrong[:5])}; "
                    f"repeat the command, or revert to {head} there"
                )
            if old_meta:
                print(f"{repo}: the previous {old_meta['kind']} remains in the history: {head}", file=sys.stderr)
    url = cli.hide_secrets(f"{api.endpoint}/{repo}/tree/{revision}")
    return {"repo": repo, "revision": revision, "url": url, "uploaded": sends}


def fetch(repo: str, revision: str, folder: Path, timeout: float = 60) -> Path:
    """The artifact at a revision of a Hub repository, in a new or empty directory.

    Raises InputError if `folder` is not empty, the Hub refuses or does not answer, there is no artifact of ours at that
    revision, or the downloaded files do not match its digest.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} already exists; move it or choose another destination")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with artifact.make_scratch(folder) as scratch:
        with connect(repo, timeout) as api:
            api.snapshot_download(repo, revision=revision, local_dir=scratch)
        if not artifact.is_ours(scratch):
            raise InputError(f"Hub repository {repo}: contains no Quartet artifact at {revision}")
        meta = artifact.read_metadata(scratch)
        shutil.rmtree(scratch / ".cache", ignore_errors=True)  # huggingface_hub's notes
        for name in BESIDE - meta["files"].keys():
            (scratch / name).unlink(missing_ok=True)
        if artifact.digest_of(artifact.file_digests(scratch)) != meta["digest"]:
            raise InputError(f"Hub repository {repo}: the files at {revision} do not match its metadata.json")
        artifact.replace(scratch, folder)
    return folder


@contextmanager
def connect(repo: str, timeout: float):
    """The Hub's client, with the user's token and a bound to each wait. Any failure of talking to the Hub is an
    InputError, which does not contain the token."""
    cli.go_online()
    import httpx2
    from huggingface_hub import HfApi, is_offline_mode, set_client_factory

    check_name(repo)
    if is_offline_mode():
        raise InputError(f"{repo}: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) disables the Hub; unset it and repeat")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings hold signed addresses
    set_client_factory(make_client_factory(repo, timeout))
    token = find_token()
    try:
        yield HfApi(token=token)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        if getattr(error, "errno", None):  # this machine's disk: cli.run knows what to say
            raise
        while not isinstance(error, (httpx2.HTTPError, InputError)) and error.__cause__ is not None:
            error = error.__cause__  # of an upload in a thread, of a download that looked for a copy in the cache
        if isinstance(error, InputError):
            raise error from None
        raise InputError(f"Hub repository {repo}: {explain_error(error, timeout)}".replace(token, "[token]")) from None


def check_name(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
        valid = "/" in repo
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(
            f"{repo!r} is not a valid name of a Hub repository; expected user/name, each of at most 96 letters, "
            "digits, '-', '_' and '.', without '--' and '..', and without '-' or '.' at either end"
        )


def explain_error(error: Exception, timeout: float) -> str:
    """What went wrong and what to do, for an error that huggingface_hub or its HTTP client raised."""
    import httpx2

    if isinstance(error, httpx2.TimeoutException):
        return f"no answer in {timeout:g} seconds; {RESUME}"
    response = getattr(error, "response", None)
    if response is None and isinstance(error, (httpx2.HTTPError, httpx2.InvalidURL)):
        return f"no answer ({compute.first_line(error)}); {RESUME}"
    if response is None:
        return f"not the response of a Hub ({compute.first_line(error)}); check HF_ENDPOINT"
    details = [" ".join((getattr(error, "server_message", None) or "").split())[:300]]
    details += [f"it asks to wait {read_retry_seconds(response)} seconds"] * (read_retry_seconds(response) > 0)
    advice = ADVICE.get(response.status_code, f"the Hub has an internal error; wait, then {RESUME}")
    advice = advice if response.status_code in ADVICE or response.status_code >= 500 else "the Hub rejected the request"
    request = f"{response.request.method} {response.request.url.path}"  # a signed address is signed behind its path
    return f"{advice} (HTTP {response.status_code} to {request}: {', '.join(filter(None, details)) or 'no details'})"


def make_client_factory(repo: str, timeout: float):
    """A factory of HTTP clients in which every wait ends. huggingface_hub sends some requests without a timeout, and it
    tries again for as long as a Retry-After says, or (to create a repository) for ever."""
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status

    since = {}  # for each request without a good answer yet: when it was first sent

    class Bounded(httpx2.Client):
        def send(self, request, **options):
            key = (request.method, str(request.url))
            start, timeouts = since.setdefault(key, time.monotonic()), request.extensions["timeout"]
            request.extensions["timeout"] = {phase: min(timeouts[phase] or timeout, timeout) for phase in timeouts}
            try:
                response = super().send(request, **options)
            except httpx2.TransportError as error:
                if time.monotonic() + 1 - start > timeout:  # the next try is a second away, at least
                    raise InputError(f"Hub repository {repo}: {explain_error(error, timeout)}") from None
                raise
            next_try = time.monotonic() + max(1, read_retry_seconds(response))
            if response.status_code not in BUSY:
                since.pop(key, None)
            if response.status_code in (409, 412) or (response.status_code in BUSY and next_try - start > timeout):
                response.read()
                hf_raise_for_status(response)
            return response

    return lambda: Bounded(follow_redirects=True, timeout=timeout)


def read_retry_seconds(response) -> int:
    """For how long a response asks the client to wait, if it is one after which huggingface_hub would wait."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if response.status_code not in BUSY:
        return 0
    after, limit = response.headers.get("retry-after", ""), parse_ratelimit_headers(response.headers)
    reset = limit.reset_in_seconds if limit and not limit.remaining else 0
    return max(int(after) if after.isdecimal() else 0, reset)


def find_token() -> str:
    """From the environment, or what `hf auth login` left, or the system's keyring."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import OIDCError

    try:
        token = get_token() or read_keyring()
    except (OIDCError, UnicodeDecodeError) as error:
        raise InputError(f"the Hub's token cannot be read: {compute.first_line(error)}") from None
    if not token:
        raise InputError(
            "no token for the Hub; run `hf auth login`, or set HF_TOKEN to a token with write access from "
            "https://huggingface.co/settings/tokens"
        )
    if not re.fullmatch(r"[!-~]+", token):  # an HTTP library would show it in its error
        raise InputError("the Hub's token contains a space or an invalid character; set HF_TOKEN again")
    return token


def read_keyring() -> str | None:
    try:
        import keyring
        import keyring.errors
    except ImportError:  # the keyring is optional
        return None
    try:
        return keyring.get_password("huggingface", "token")
    except keyring.errors.KeyringError as error:
        raise InputError(
            f"no token for the Hub: the keyring cannot be read ({compute.first_line(error)}); run `hf auth login`, or "
            "set HF_TOKEN"
        ) from None


def find_head(api, repo: str, public: bool) -> str:
    """The hash of a repository's newest commit; a missing repository is created."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # over TLS, a refused token counts as one too
            raise
        api.create_repo(repo, private=not public)
        info = api.model_info(repo)
    if info.private is public:
        current, requested = ("private", "public") if public else ("public", "private")
        raise InputError(
            f"Hub repository {repo}: is {current}, but {requested} was requested; change its settings or the command. "
            "Nothing was changed"
        )
    return info.sha


def list_files(api, repo: str, revision: str) -> dict:
    """{path: entry} of the files that the Hub lists."""
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def read_earlier_metadata(api, repo: str, revision: str) -> dict:
    """metadata.json of an artifact of ours in a repository, or {} where it is another tool's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(api.hf_hub_download(repo, artifact.METADATA, revision=revision, local_dir=folder))
        meta = json.loads(file.read_text(encoding="utf-8")) if artifact.is_ours(Path(folder)) else {}
    return meta if isinstance(meta.get("files"), dict) else {}


def find_differing(folder: Path, files: dict[str, str], entries: dict) -> list[str]:
    """The files that the Hub does not list, or lists with other content."""
    return [
        name for name, sha in files.items() if name not in entries or not is_same(folder / name, sha, entries[name])
    ]


def is_same(file: Path, sha: str, entry) -> bool:
    """The Hub knows a large file by its sha256, and any other by its git hash."""
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha
    if entry.size != file.stat().st_size:
        return False
    body = file.read_bytes()
    return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
