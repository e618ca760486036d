"""llama.cpp as a generation engine: its server inside this process, through the xllamacpp package.

The server listens on a port of 127.0.0.1; requests are those of llama.cpp's tools/server/README.md. Several
threads may use one engine.
"""

import http.client
import json
import os
import queue
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib.engines.sampling import EngineError, Sample, Settings, yield_as_completed
from lib.gguf import vocabulary

if TYPE_CHECKING:
    import numpy as np

# One entry of "top_logprobs". A regular expression, since json.loads takes longer than the model itself.
LOGPROB = re.compile(rb'"id":(\d+),"token":"(?:[^"\\]|\\.)*","bytes":\[[\d,]*\],"logprob":(-?[\d.e+-]+)')

FORCED = 1e4  # a logit bias that no other token overcomes


class Generation(NamedTuple):
    text: str
    ids: list[int]  # without the token that ended it
    prompt_tokens: int
    new_tokens: int  # with it
    stopped: bool  # an end-of-turn token came before max_new_tokens
    prompt_seconds: float  # until the first token; of the whole batch where rows are answered in one
    decode_seconds: float  # from the first token to the last


class LlamaCpp:
    name = "llama.cpp"

    def __init__(
        self,
        path: Path,
        adapter: Path | None = None,
        *,
        context: int = 2048,
        parallel: int = 8,
        threads: int | None = None,
    ):
        """Load a GGUF file with `parallel` slots of `context` tokens; ValueError when llama.cpp cannot."""
        import xllamacpp

        threads = threads or len(os.sched_getaffinity(0))
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = context * parallel, parallel
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = 0  # errors only; it logs to stderr, below Python
        params.fit_params = False  # else it may shrink the context to what it believes is free
        params.cache_ram_mib = params.n_ctx_checkpoints = 0  # else up to 8 GiB of old prompts are kept
        params.cache_idle_slots = params.ui = False
        if adapter:
            info = xllamacpp.CommonAdapterLoraInfo()
            info.path, info.scale = str(adapter), 1.0
            params.lora_adapters = [info]
        started = time.perf_counter()
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ValueError(f"{path}: llama.cpp cannot load it: {error}") from None
        self.load_seconds = time.perf_counter() - started
        self.path, self.context, self.batch = Path(path), context, parallel
        self.address = self.server.listening_address.removeprefix("http://")
        self.vocabulary = self.request("GET", "/v1/models")["data"][0]["meta"]["n_vocab"]
        self.ends = vocabulary.read_eos_token_ids(path)
        self.letter = self.tokenize("a")[-1]  # forced out where only the distribution is wanted
        self.slots = queue.SimpleQueue()
        for slot in range(parallel):
            self.slots.put(slot)

    def prompt_ids(self, chat: list[dict]) -> list[int]:
        """A chat as token ids up to where the answer begins, by the file's own template and tokenizer."""
        text = self.request("POST", "/apply-template", messages=chat)["prompt"]
        # llama.cpp takes a leading BOS off the text when its tokenizer puts one there.
        return self.tokenize(text, add_special=True)

    def answer_ids(self, text: str) -> list[int]:
        return self.tokenize(text)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        asked = dict(content=text, add_special=add_special, parse_special=True)
        return self.request("POST", "/tokenize", **asked)["tokens"]

    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, exact: bool = False) -> list[Generation]:
        """Greedy answers in the order of the prompts, `parallel` at a time. With `exact`, every answer has
        max_new_tokens tokens: EOS is ignored (to time it)."""
        return self.run_in_slots(lambda slot, prompt: self.answer(slot, prompt, max_new_tokens, exact), prompts)

    def examine(self, prompts: list[list[int]], golds: list[list[int]], max_new_tokens: int) -> list[tuple]:
        """Of each prompt the greedy answer, and the log-probabilities of the gold answer's tokens (see
        answer_logprobs): both in one slot, so that the prompt, which is most of the work, is read once."""

        def one(slot, prompt, gold):
            return self.answer(slot, prompt, max_new_tokens), self.logprobs(slot, prompt, gold)

        return self.run_in_slots(one, prompts, golds)

    def sample(self, prompts: list, seeds: list, settings: Settings) -> Iterator[tuple[int, list[Sample]]]:
        """Samples of each prompt as they are done (see sampling.py). Those of one prompt are drawn in one slot, one
        after the other, so that the prompt is read once. Temperature comes before top-p, as in transformers."""
        asked = dict(n_predict=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p)
        asked |= dict(samplers=["temperature", "top_p"], cache_prompt=True)

        def one(prompt, seeds):
            with self.slot() as slot:
                return [self.read_sample(self.complete(prompt, slot, seed=seed, **asked)) for seed in seeds]

        return yield_as_completed(one, self.batch, prompts, seeds)

    def read_sample(self, done: dict) -> Sample:
        ids, stopped = done["tokens"], done["stop_type"] == "eos"
        ids, end = (ids[:-1], ids[-1]) if stopped else (ids, None)
        return Sample(done["content"], ids, done["tokens_predicted"], stopped, end)

    def run_in_slots(self, work, *columns: list) -> list:
        """work(slot, …) of each row of the columns, in their order, as many at a time as there are slots."""

        def one(*row):
            with self.slot() as slot:
                return work(slot, *row)

        found = dict(yield_as_completed(one, self.batch, *columns))
        return [found[n] for n in range(len(found))]

    def answer(self, slot: int, prompt: list[int], max_new_tokens: int, exact: bool = False) -> Generation:
        asked = dict(n_predict=max_new_tokens, ignore_eos=exact, cache_prompt=False)
        done = self.complete(prompt, slot, **asked)
        stopped = done["stop_type"] == "eos"
        ids = done["tokens"][:-1] if stopped else done["tokens"]
        prompt_ms, predicted_ms = done["timings"]["prompt_ms"], done["timings"]["predicted_ms"]
        return Generation(
            done["content"], ids, len(prompt), done["tokens_predicted"], stopped, prompt_ms / 1000, predicted_ms / 1000
        )

    def answer_logprobs(self, prompt: list[int], answer: list[int]) -> "np.ndarray":
        """Log-probability of each token of a given answer after the tokens before it; float32 [len(answer)].

        A bias forces the token out; what is reported is its probability before the bias. Nothing is reported for
        a token that is a part of a character; it is then looked up in the whole distribution.
        """
        with self.slot() as slot:
            return self.logprobs(slot, prompt, answer)

    def options_logprobs(self, prompt: list[int], options: list[list[int]]) -> list["np.ndarray"]:
        """`answer_logprobs` of several answers to one prompt, which is read once."""
        with self.slot() as slot:
            return [self.logprobs(slot, prompt, ids) for ids in options]

    def logprobs(self, slot: int, prompt: list[int], answer: list[int]) -> "np.ndarray":
        import numpy as np

        found = []
        for i, token in enumerate(answer):
            asked = dict(n_probs=1, logit_bias=[[token, FORCED]])
            done = self.complete(prompt + answer[:i], slot, n_predict=1, cache_prompt=True, **asked)
            if entries := done.get("completion_probabilities"):
                if entries[0]["id"] != token:
                    raise RuntimeError(f"llama.cpp returned token {entries[0]['id']} where {token} was forced")
                found.append(entries[0]["logprob"])
            else:
                found.append(self.distribution(prompt + answer[:i], slot)[token])
        return np.array(found, dtype=np.float32)

    def answer_distributions(self, prompt: list[int], answer: list[int]) -> "np.ndarray":
        """Log-probabilities of the whole vocabulary at each token of a given answer; float32
        [len(answer), vocabulary], row i being what comes after prompt + answer[:i].

        Costs 5 MB of JSON a token: two threads working on two rows nearly halve the time.
        """
        import numpy as np

        with self.slot() as slot:
            return np.stack([self.distribution(prompt + answer[:i], slot) for i in range(len(answer))])

    def stops_at(self, token: int) -> bool:
        """Whether an answer ends when this token comes."""
        with self.slot() as slot:
            done = self.complete([self.letter], slot, n_predict=2, logit_bias=[[token, FORCED]])
        return done["stop_type"] == "eos" and done["tokens_predicted"] == 1

    def distribution(self, prompt: list[int], slot: int) -> "np.ndarray":
        """Log-probabilities of the whole vocabulary after a prompt; float32 [vocabulary]."""
        asked = dict(n_predict=1, n_probs=self.vocabulary, logit_bias=[[self.letter, FORCED]], cache_prompt=True)
        return parse_distribution(self.complete(prompt, slot, raw=True, **asked), self.vocabulary)

    def complete(self, prompt: list[int], slot: int, raw: bool = False, **asked):
        """One completion, greedy unless asked otherwise: its fields, or the response's bytes."""
        request = dict(prompt=prompt, id_slot=slot, temperature=0, seed=0, return_tokens=True) | asked
        if len(prompt) >= self.context:
            raise ValueError(
                f"{self.path}: the prompt has {len(prompt)} tokens, but the context is only {self.context} tokens"
            )
        return self.request("POST", "/completion", parse=not raw, **request)

    @contextmanager
    def slot(self):
        """A slot that no other thread uses, so that it still holds the prompt of the row it works on."""
        number = self.slots.get()
        try:
            yield number
        finally:
            self.slots.put(number)

    def request(self, method: str, path: str, parse: bool = True, **asked):
        # http.client rather than urllib: a proxy that the environment names must not be asked for 127.0.0.1.
        connection = http.client.HTTPConnection(self.address)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(asked) if asked else None, headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{self.path}: llama.cpp no longer responds: {error!r}") from None
        finally:
            connection.close()
        if response.status != 200:
            raise EngineError(f"{self.path}: llama.cpp rejected {path}: {body[:500].decode(errors='replace')}")
        return json.loads(body) if parse else body

    def close(self) -> None:
        """Stop the server and give its memory back."""
        self.server = None


def parse_distribution(body: bytes, vocabulary: int) -> "np.ndarray":
    """Log-probabilities by token id out of a completion's JSON, normalised.

    llama.cpp sums 49,152 exponentials in 32 bit and is off by 1e-4; the sum is done again here in 64.
    """
    import numpy as np

    pairs = np.array(LOGPROB.findall(body), dtype="S32").reshape(-1, 2)
    ids, values = pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.float64)
    logprobs = np.full(vocabulary, -np.inf)
    logprobs[ids] = values
    if not np.isfinite(logprobs).all():
        raise RuntimeError(f"llama.cpp returned {len(set(ids.tolist()))} of {vocabulary} log-probabilities")
    return (logprobs - np.log(np.exp(logprobs).sum())).astype(np.float32)
