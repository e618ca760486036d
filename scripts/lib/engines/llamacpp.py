"""llama.cpp as a generation engine: its server inside this process, through the xllamacpp package.

The server listens on a port of 127.0.0.1; requests are those of llama.cpp's tools/server/README.md. Several
threads may use one engine.
"""

import http.client
import json
import queue
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib.core import hardware
from lib.core.cli import InputError
from lib.engines.sampling import EngineError, Sample, Settings, exceeds_context, yield_as_completed
from lib.gguf import vocabulary
from lib.model import chat as chats

if TYPE_CHECKING:
    import numpy as np

# One entry of "top_logprobs". A regular expression, since json.loads takes longer than the model itself.
LOGPROB = re.compile(rb'"id":(\d+),"token":"(?:[^"\\]|\\.)*","bytes":\[[\d,]*\],"logprob":(-?[\d.e+-]+)')

FORCED = 1e4  # a logit bias that no other token overcomes


class Generation(NamedTuple):
    text: str
    ids: list[int]  # without the end token
    prompt_tokens: int
    new_tokens: int  # with the end token
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
        self.path, self.adapter, self.batch = Path(path), adapter, parallel
        self.threads = threads or hardware.count_cores()
        self.key = secrets.token_urlsafe()  # every user of this host can reach the port, but reads no prompts
        self.start(context)
        self.ends = vocabulary.read_eos_token_ids(path)
        self.template = make_template(**self.request("GET", "/props"))
        self.letter = self.tokenize("a")[-1]  # forced out where only the distribution is wanted
        self.slots = queue.SimpleQueue()
        for slot in range(parallel):
            self.slots.put(slot)

    def start(self, context: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx, params.n_parallel = context * self.batch, self.batch
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self.threads
        params.verbosity = 0  # errors only; it logs to stderr, below Python
        params.fit_params = False  # else it may shrink the context to what it believes is free
        params.cache_ram_mib = params.n_ctx_checkpoints = 0  # else up to 8 GiB of old prompts are kept
        params.cache_idle_slots = params.ui = params.endpoint_slots = params.endpoint_props = False
        params.api_keys = [self.key]
        if self.adapter:
            info = xllamacpp.CommonAdapterLoraInfo()
            info.path, info.scale = str(self.adapter), 1.0
            params.lora_adapters = [info]
        started = time.perf_counter()
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            beside = f" together with {self.adapter}, which may be another model's adapter" if self.adapter else ""
            raise ValueError(f"{self.path}: llama.cpp cannot load it{beside}: {error}") from None
        self.load_seconds = time.perf_counter() - started
        self.context = context
        self.address = self.server.listening_address.removeprefix("http://")
        facts = self.request("GET", "/v1/models")["data"][0]["meta"]
        self.vocabulary, self.longest_context = facts["n_vocab"], facts["n_ctx_train"]

    def reserve_context(self, tokens: int, text: str) -> None:
        """Make room for `text` and its answer, together `tokens` long. Its length in tokens is known only now; where it
        was guessed too short, the file is loaded again. InputError if it is longer than the model's context."""
        if tokens > self.longest_context:
            raise exceeds_context(text, tokens, self.path, self.longest_context)
        if tokens > self.context:
            from lib.budget import memory

            size, values = self.path.stat().st_size, memory.count_key_values_of_gguf(self.path)
            free = hardware.free_memory("cpu")
            memory.check_fits(lambda: memory.estimate_llamacpp(size, values, self.batch, tokens), [], free)
            self.close()
            try:
                self.start(tokens)
            except ValueError as error:
                raise InputError(str(error)) from None

    def prompt_ids(self, chat: list[dict]) -> list[int]:
        """A chat's token ids up to the start of the answer, by the file's own template and tokenizer. The template is
        rendered here, since llama.cpp cannot show what it puts before an answer."""
        text, bos = chats.prompt_text(self.template, chat), self.template.bos_token
        if bos and self.tokenize("", add_special=True)[:1] == self.tokenize(bos):
            text = text.removeprefix(bos)
        return self.tokenize(text, add_special=True)

    def rendered_ids(self, chat: list[dict]) -> list[int]:
        """The ids of the prompt as llama.cpp renders it, which its server gives to the model."""
        text = self.request("POST", "/apply-template", messages=chat)["prompt"]
        # llama.cpp takes a leading BOS off the text when its tokenizer puts one there.
        return self.tokenize(text, add_special=True)

    def answer_ids(self, text: str) -> list[int]:
        return self.tokenize(chats.answer_space(self.template) + text)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        fields = dict(content=text, add_special=add_special, parse_special=True)
        return self.request("POST", "/tokenize", **fields)["tokens"]

    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, exact: bool = False) -> list[Generation]:
        """Greedy answers in the order of the prompts, `parallel` at a time. With `exact`, every answer has
        max_new_tokens tokens: EOS is ignored (to time it)."""
        return self.run_in_slots(lambda slot, prompt: self.answer(slot, prompt, max_new_tokens, exact), prompts)

    def examine(self, prompts: list[list[int]], golds: list[list[int]], max_new_tokens: int) -> list[tuple]:
        """(the greedy answer, the log-probabilities of the gold answer's tokens) of each prompt (see answer_logprobs).
        Both use one slot, so that the prompt, which is most of the work, is read once."""

        def one(slot, prompt, gold):
            return self.answer(slot, prompt, max_new_tokens), self.logprobs(slot, prompt, gold)

        return self.run_in_slots(one, prompts, golds)

    def sample(self, prompts: list, seeds: list, settings: Settings) -> Iterator[tuple[int, list[Sample]]]:
        """Samples of each prompt as they finish (see sampling.py). Those of one prompt are drawn one after another in
        one slot, so that the prompt is read once. Temperature is applied before top-p, as in transformers."""
        fields = dict(n_predict=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p)
        fields |= dict(samplers=["temperature", "top_p"], cache_prompt=True)

        def one(prompt, seeds):
            with self.slot() as slot:
                return [self.read_sample(self.complete(prompt, slot, seed=seed, **fields)) for seed in seeds]

        return yield_as_completed(one, self.batch, prompts, seeds)

    def read_sample(self, completion: dict) -> Sample:
        ids, stopped = completion["tokens"], completion["stop_type"] == "eos"
        ids, end = (ids[:-1], ids[-1]) if stopped else (ids, None)
        return Sample(completion["content"], ids, completion["tokens_predicted"], stopped, end)

    def run_in_slots(self, work, *columns: list) -> list:
        """work(slot, …) of each row of the columns, in order. As many run at a time as there are slots."""

        def one(*row):
            with self.slot() as slot:
                return work(slot, *row)

        results = dict(yield_as_completed(one, self.batch, *columns))
        return [results[n] for n in range(len(results))]

    def answer(self, slot: int, prompt: list[int], max_new_tokens: int, exact: bool = False) -> Generation:
        fields = dict(n_predict=max_new_tokens, ignore_eos=exact, cache_prompt=False)
        completion = self.complete(prompt, slot, **fields)
        if completion["stop_type"] == "limit" and completion["tokens_predicted"] < max_new_tokens:
            raise EngineError(
                f"{self.path}: an answer was cut after {completion['tokens_predicted']} of {max_new_tokens} tokens, "
                f"since the context is only {self.context} tokens"
            )
        stopped = completion["stop_type"] == "eos"
        ids = completion["tokens"][:-1] if stopped else completion["tokens"]
        prompt_ms, predicted_ms = completion["timings"]["prompt_ms"], completion["timings"]["predicted_ms"]
        return Generation(
            completion["content"],
            ids,
            len(prompt),
            completion["tokens_predicted"],
            stopped,
            prompt_ms / 1000,
            predicted_ms / 1000,
        )

    def answer_logprobs(self, prompt: list[int], answer: list[int]) -> "np.ndarray":
        """Log-probability of each token of a given answer after the tokens before it; float32 [len(answer)].

        A bias forces the token; the server reports its probability before the bias. It reports none for a token that is
        a part of a character; such a token is looked up in the whole distribution.
        """
        with self.slot() as slot:
            return self.logprobs(slot, prompt, answer)

    def options_logprobs(self, prompt: list[int], options: list[list[int]]) -> list["np.ndarray"]:
        """`answer_logprobs` of several answers to one prompt, which is read once."""
        with self.slot() as slot:
            return [self.logprobs(slot, prompt, ids) for ids in options]

    def logprobs(self, slot: int, prompt: list[int], answer: list[int]) -> "np.ndarray":
        import numpy as np

        logprobs = []
        for i, token in enumerate(answer):
            fields = dict(n_probs=1, logit_bias=[[token, FORCED]])
            completion = self.complete(prompt + answer[:i], slot, n_predict=1, cache_prompt=True, **fields)
            if entries := completion.get("completion_probabilities"):
                if entries[0]["id"] != token:
                    raise RuntimeError(f"llama.cpp returned token {entries[0]['id']} where {token} was forced")
                logprobs.append(entries[0]["logprob"])
            else:
                logprobs.append(self.distribution(prompt + answer[:i], slot)[token])
        return np.array(logprobs, dtype=np.float32)

    def answer_distributions(self, prompt: list[int], answer: list[int]) -> "np.ndarray":
        """Log-probabilities of the whole vocabulary at each token of a given answer; float32
        [len(answer), vocabulary]. Row i is the distribution after prompt + answer[:i].

        This takes 5 MB of JSON per token; two threads with a row each nearly halve the time.
        """
        import numpy as np

        with self.slot() as slot:
            return np.stack([self.distribution(prompt + answer[:i], slot) for i in range(len(answer))])

    def stops_at(self, token: int) -> bool:
        """Whether this token ends an answer."""
        with self.slot() as slot:
            completion = self.complete([self.letter], slot, n_predict=2, logit_bias=[[token, FORCED]])
        return completion["stop_type"] == "eos" and completion["tokens_predicted"] == 1

    def distribution(self, prompt: list[int], slot: int) -> "np.ndarray":
        """Log-probabilities of the whole vocabulary after a prompt; float32 [vocabulary]."""
        fields = dict(n_predict=1, n_probs=self.vocabulary, logit_bias=[[self.letter, FORCED]], cache_prompt=True)
        return parse_distribution(self.complete(prompt, slot, raw=True, **fields), self.vocabulary)

    def complete(self, prompt: list[int], slot: int, raw: bool = False, **fields):
        """One completion, greedy unless `fields` say otherwise: its fields, or with `raw` the response's bytes. The
        samplers are named, since a GGUF may hold settings of its own (general.sampling.*), such as penalties."""
        request = dict(prompt=prompt, id_slot=slot, seed=0, return_tokens=True)
        request |= dict(temperature=0, samplers=["temperature"], mirostat=0) | fields
        if len(prompt) >= self.context:
            raise ValueError(
                f"{self.path}: the prompt has {len(prompt)} tokens, but the context is only {self.context} tokens"
            )
        return self.request("POST", "/completion", parse=not raw, **request)

    @contextmanager
    def slot(self):
        """A slot for this thread alone, so that it keeps the prompt of the thread's row."""
        number = self.slots.get()
        try:
            yield number
        finally:
            self.slots.put(number)

    def request(self, method: str, path: str, parse: bool = True, **fields):
        # http.client rather than urllib, which would send requests for 127.0.0.1 to a proxy from the environment.
        connection = http.client.HTTPConnection(self.address)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
            connection.request(method, path, json.dumps(fields) if fields else None, headers)
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


def make_template(chat_template: str, bos_token: str, eos_token: str, **_):
    """A tokenizer of transformers without a vocabulary, which renders a chat template (see lib/model/chat.py)."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()),
        chat_template=chat_template,
        bos_token=bos_token or None,
        eos_token=eos_token or None,
    )


def parse_distribution(body: bytes, vocabulary: int) -> "np.ndarray":
    """Log-probabilities by token id from a completion's JSON, normalised.

    llama.cpp sums 49,152 exponentials in 32 bit and is off by 1e-4; the sum is repeated here in 64 bit.
    """
    import numpy as np

    pairs = np.array(LOGPROB.findall(body), dtype="S32").reshape(-1, 2)
    ids, values = pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.float64)
    logprobs = np.full(vocabulary, -np.inf)
    logprobs[ids] = values
    if not np.isfinite(logprobs).all():
        raise RuntimeError(f"llama.cpp returned {len(set(ids.tolist()))} of {vocabulary} log-probabilities")
    return (logprobs - np.log(np.exp(logprobs).sum())).astype(np.float32)
