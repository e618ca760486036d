"""A model behind an OpenAI-compatible HTTP server, as an engine that samples: llama.cpp's server, vLLM's, a hosted one.

A prompt that is a text goes to /completions unchanged, a prompt that is a chat to /chat/completions. The server renders
such a chat by its own template, settings and clock. So its answers need not begin where ours do (lib/model/chat.py): a
model that thinks by default does so there, and the thoughts are in the answer unless the server takes them out.
"""

import base64
import http.client
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from urllib.parse import unquote, urlsplit

from lib.core.cli import Url
from lib.engines.sampling import EngineError, Sample, Settings, yield_as_completed

LONGEST_WAIT = 60  # seconds


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Returns error responses instead of raising, and follows no redirect, which would receive the key."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class OpenAiClient:
    name = "openai"

    def __init__(self, url: str, *, model: str | None, key: str | None, batch: int, timeout: float, retries: int):
        """`model` is the server's name for it (None: its first); `timeout` is in seconds. EngineError when the server
        does not answer."""
        url = Url(url)
        self.url, self.batch, self.timeout, self.retries = url.rstrip("/"), batch, timeout, retries
        self.headers = {"Content-Type": "application/json"} | authorise(url.login, key)
        local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")  # these bypass the proxy
        self.opener = urllib.request.build_opener(AnyStatus, *[urllib.request.ProxyHandler({})] * local)
        self.model = model or self.request("/models", lambda reply: reply["data"][0]["id"])

    def sample(self, prompts: list, seeds: list, settings: Settings) -> Iterator[tuple[int, list[Sample]]]:
        """Samples of each prompt as they finish (see lib/engines/sampling.py)."""

        def one(prompt, seeds):
            return [self.ask(prompt, seed, settings) for seed in seeds]

        return yield_as_completed(one, self.batch, prompts, seeds)

    def ask(self, prompt: str | list[dict], seed: int, settings: Settings) -> Sample:
        fields = dict(model=self.model, max_tokens=settings.max_new_tokens, seed=seed)
        fields |= dict(temperature=settings.temperature, top_p=settings.top_p)
        if isinstance(prompt, str):
            return self.complete(prompt, settings, **fields)
        return self.request(
            "/chat/completions",
            lambda reply: parse_sample(reply, reply["choices"][0]["message"]["content"]),
            messages=prompt,
            **fields,
        )

    def complete(self, prompt: str, settings: Settings, **fields) -> Sample:
        """The text up to the end of `settings`. Servers leave special tokens out of texts, where no stop string finds
        them. So vLLM and SGLang get the token's id, and llama.cpp's server is told to leave it in the text."""
        if settings.end_text:
            fields["stop"] = [settings.end_text]
        if settings.end is not None:
            fields |= dict(stop_token_ids=[settings.end], preserved_tokens=[settings.end_text])
        return self.request(
            "/completions", lambda reply: parse_sample(reply, reply["choices"][0]["text"]), prompt=prompt, **fields
        )

    def stops_at_end(self, prompt: str, settings: Settings) -> bool:
        """Whether a text ends at the token settings.end, which a bias forces here."""
        forced = dict(logit_bias={str(settings.end): 100}, max_tokens=2, temperature=0)
        return self.complete(prompt, settings, model=self.model, **forced).stopped

    def request(self, path: str, parse: Callable, **fields):
        """parse(the response's JSON). Failures that may be temporary are retried after 1, 2, 4 … seconds: a busy server
        (429), a broken one (5xx), no server, a timeout, an invalid response."""
        body = json.dumps(fields).encode() if fields else None
        request = urllib.request.Request(self.url + path, body, self.headers)
        for attempt in range(self.retries + 1):
            wait, body = 2**attempt, b""
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    body = response.read()
                retry_after = response.headers.get("Retry-After", "")
                wait = int(retry_after) if retry_after.isdigit() else wait
                if response.status == 200:
                    return parse(json.loads(body))
                reason = f"HTTP {response.status}: {shorten(body)}"
                if response.status != 429 and response.status < 500:
                    raise EngineError(f"{self.url}{path}: the server rejected the request: {reason}")
            except TimeoutError:
                reason = f"no answer in {self.timeout:g} seconds (--timeout)"
            except (OSError, http.client.HTTPException) as error:
                reason = f"no answer: {error}"
            except (ValueError, LookupError, TypeError):
                reason = f"not the response of an OpenAI-compatible server: {shorten(body)}"
            if attempt < self.retries:
                time.sleep(min(wait, LONGEST_WAIT))
        raise EngineError(f"{self.url}{path}: {reason}; tried {self.retries + 1} times")

    def close(self) -> None:
        pass


def authorise(login: str, key: str | None) -> dict[str, str]:
    """The header that identifies the user: by a URL's user and password, or by a key. One with a colon is user:password
    as well, since a Bearer token has none (RFC 6750)."""
    if not login and ":" not in (key or ""):
        return {"Authorization": f"Bearer {key}"} if key else {}
    user, _, password = map(unquote, login.partition(":")) if login else key.partition(":")
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def parse_sample(reply: dict, text: str) -> Sample:
    if not isinstance(text, str):
        raise TypeError("expected a text")
    return Sample(text, [], reply["usage"]["completion_tokens"] + 0, reply["choices"][0]["finish_reason"] == "stop")


def shorten(body: bytes) -> str:
    return repr(body[:200].decode(errors="replace"))
