"""Engines: a model directory that answers. `open_engine` picks transformers or llama.cpp by what is there.

Both have: name, load_seconds, batch (rows answered at once), ends, prompt_ids(chat), answer_ids(text),
generate(prompts, …), sample(prompts, seeds, settings), examine(prompts, golds, …), answer_logprobs(prompt, answer),
options_logprobs(prompt, options), answer_distributions(prompt, answer), close(). `open_sampler` picks among those and
others that can only sample.
"""

import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from lib import cli, hardware, models
from lib.cli import InputError, OutOfMemory
from lib.llamacpp import Generation, LlamaCpp
from lib.sampling import Sample, Settings

SAMPLERS = ("auto", "transformers", "llamacpp", "vllm")


def open_engine(
    path: Path,
    *,
    load: str = "auto",
    threads: int = 0,
    batch: int = 8,
    context: int = 2048,
    adapter_base: Path | None = None,
    **placement,
):
    """The engine for a model directory: llama.cpp for a GGUF, or for an adapter on one; transformers for all else.
    `adapter_base` is the base to put an adapter on instead of the one that it names; `load` and `placement` are for
    transformers (see models.load)."""
    if files := gguf_files(path, adapter_base):
        return LlamaCpp(*files, context=context, parallel=batch, threads=threads or None)
    return Transformers(Path(path), load=load, threads=threads, batch=batch, adapter_base=adapter_base, **placement)


def context_for(rows: list[dict], new_tokens: int) -> int:
    """Tokens of context that the longest row needs, at two characters a token: more than any text here."""
    return max(sum(len(turn["content"]) for turn in row["prompt"]) for row in rows) // 2 + new_tokens + 256


def gguf_files(path: Path, adapter_base: Path | None = None) -> list[Path]:
    """What llama.cpp runs of a model directory: its file, and an adapter's file; [] where transformers runs it."""
    if models.is_gguf(path):
        return [models.gguf_file(path)]
    base = models.is_adapter(path) and (adapter_base or models.base_of(path))
    return [models.gguf_file(base), models.gguf_file(path)] if base and models.is_gguf(base) else []


def add_sampler_flags(group, *others: str) -> None:
    group.add_argument(
        "--engine", choices=[*SAMPLERS, *others], default="auto",
        help="what draws; auto: llama.cpp for a GGUF, vLLM where it is installed, else transformers "
             "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--batch", type=cli.whole(1), help="rows at once; halved when memory runs out")
    group.add_argument("--checkpoint-interval", type=cli.whole(1), help="rows between writes: what a kill can lose")
    models.add_load_flags(group)


def check_memory(path: Path, args, need: Callable, context: int, new: int, through: str = "auto") -> int | None:
    """Say what an engine will take for a batch of texts of at most `context` tokens, `new` of them its own; OutOfMemory
    where there is clearly less. Through transformers it takes need(config, adapter, how, batch, new)."""
    from lib import budget

    def halves(words: str, name: str, most: int) -> list[tuple[str, dict]]:
        return [(words.format(most >> n), {name: most >> n}) for n in range(1, most.bit_length())]

    fewer, shorter = halves("--batch {}", "batch", args.batch), halves("at most {} new tokens", "new", new)
    if through != "transformers" and (files := gguf_files(path)):
        size, values = sum(file.stat().st_size for file in files), budget.key_values_in(files[0])
        rest = context - new

        def in_llamacpp(batch: int = args.batch, new: int = new) -> dict:
            return budget.answering_in_llamacpp(size, values, batch, rest + new)

        return budget.check(in_llamacpp, [fewer, shorter], hardware.free_memory("cpu"))
    config, adapter, held = models.config(path), models.adapter_of(path), models.held_as(path, args.load)

    def in_transformers(batch: int = args.batch, new: int = new, how: str = held) -> dict:
        return need(config, adapter, how, batch, new)

    rounded = [[("--load nf4", {"how": "nf4"})], [("--load nf4 --batch 1", {"how": "nf4", "batch": 1})]]
    changes = [fewer, *(rounded if hardware.device() == "cuda" else []), shorter]
    return budget.check(in_transformers, changes, hardware.free_memory(spread=args.device_map != "none"))


def longest(path: Path, chats: list[list[dict]]) -> int:
    """Tokens of the longest chat, by transformers' tokenizer; 0 for a GGUF, for which `context_for` is exact enough."""
    from lib import chat

    if gguf_files(path):
        return 0
    tokenizer = models.tokenizer(path)
    return max((len(chat.prompt_ids(tokenizer, turns)) for turns in chats), default=0)


def open_sampler(path: Path, args, context: int, prompt: int, new: int, texts: int, of_each: int = 1) -> tuple:
    """(the engine that draws from a model directory by --engine, the bytes that it is expected to take or None). There
    are so many texts to draw, `of_each` prompt so many: of at most `context` tokens, about `prompt` and `new` of them.

    `auto`: llama.cpp for a GGUF; vLLM where it is installed beside a GPU; transformers for all else, whose large
    batches are faster than llama.cpp's on a CPU as well (docs/log.md)."""
    if models.is_adapter(path):
        models.check_lora(path)
    on_gguf, engine = bool(gguf_files(path)), args.engine
    if engine == "auto":
        vllm = find_spec("vllm") and hardware.gpu() and not models.is_adapter(path)
        engine = "llamacpp" if on_gguf else "vllm" if vllm else "transformers"
    if engine == "vllm":
        return Vllm(path, context), None
    if engine == "llamacpp" and not on_gguf:
        raise InputError(
            f"{path}: llama.cpp needs a GGUF file: `python scripts/quantize.py --method gguf-f16` writes one; --engine "
            "transformers takes the directory as it is"
        )

    def need(config, adapter, how, batch, new):
        from lib import budget

        rows = min(batch, texts)
        return budget.sampling(config, adapter, how, rows, -(-rows // of_each), prompt, new)

    expected = check_memory(path, args, need, context, new, engine)
    if engine == "llamacpp":
        try:
            return open_engine(path, threads=args.threads, batch=args.batch, context=context), expected
        except ValueError as error:
            raise InputError(str(error)) from None
    made = Transformers(path, load=args.load, threads=args.threads, batch=args.batch, **models.placement(args))
    made.merge()
    return made, expected


class Transformers:
    name = "transformers"

    def __init__(
        self,
        path: Path,
        *,
        load: str = "auto",
        threads: int = 0,
        batch: int = 8,
        adapter_base: Path | None = None,
        **placement,
    ):
        models.use_threads(threads)
        started = time.perf_counter()
        self.model = models.load(path, load, adapter_base=adapter_base, **placement)
        # By a frozen matrix torch multiplies a slice row by row, each with a copy of the matrix: beside an adapter,
        # which freezes what it does not train, 430 MB a token of eight rows.
        self.model.get_output_embeddings().requires_grad_(True)
        self.load_seconds = time.perf_counter() - started
        self.tokenizer = models.tokenizer(adapter_base or path)  # an adapter from elsewhere may come without
        self.batch = batch
        config = self.model.generation_config
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        self.ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.ends)

    def prompt_ids(self, chat: list[dict]) -> list[int]:
        from lib import chat as chats

        return chats.prompt_ids(self.tokenizer, chat)

    def answer_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def generate(self, prompts, max_new_tokens: int, *, exact: bool = False) -> list[Generation]:
        """Greedy answers in the order of the prompts, in batches of like length. With `exact`, every answer has
        max_new_tokens tokens: EOS is ignored (to time it). A batch that runs out of memory is repeated in halves, and
        `batch` stays at the half."""
        answers = [None] * len(prompts)
        waiting = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))  # the largest batch first: it fits or not
        while waiting:
            chosen = waiting[: self.batch]
            done, reason = models.tried(self.generate_batch, [prompts[n] for n in chosen], max_new_tokens, exact)
            if reason:
                self.halve(len(chosen), reason)
                continue
            rows, *seconds = done
            for n, ids in zip(chosen, rows):
                answers[n] = self.as_generation(ids, len(prompts[n]), exact, *seconds)
            waiting = waiting[len(chosen) :]
        if len(prompts) > self.batch:  # a single batch is perhaps being timed
            hardware.return_freed_memory()
        return answers

    def sample(self, prompts: list, seeds: list, settings: Settings) -> Iterator[tuple[int, list[Sample]]]:
        """Samples of each prompt as they are done (see lib/sampling.py), through lib/batching.py. When memory runs out,
        the rows that are not done begin again with the same random numbers, and half of them at once."""
        from lib import batching

        ends = self.ends | ({settings.end} - {None})
        samples = [dict.fromkeys(range(len(of_prompt))) for of_prompt in seeds]
        order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
        waiting = {(n, k): (prompts[n], seeds[n][k]) for n in order for k in samples[n]}
        while waiting:
            rows = batching.continued(self.model, waiting, self.batch, self.pad, ends, settings)
            while True:
                done, reason = models.tried(next, rows, None)
                if done is None:
                    break
                n, k = done.key
                del waiting[n, k]
                samples[n][k] = self.as_sample(done.ids, ends)
                if None not in samples[n].values():
                    yield n, list(samples[n].values())
            if reason:
                self.halve(min(self.batch, len(waiting)), reason)

    def as_sample(self, ids: list[int], ends: set[int]) -> Sample:
        end = ids[-1] if ids[-1] in ends else None
        kept = ids if end is None else ids[:-1]
        return Sample(self.tokenizer.decode(kept, skip_special_tokens=True), kept, len(ids), end is not None, end)

    def merge(self) -> None:
        """An adapter's products into the weights, which spares two more products a matrix and token."""
        if hasattr(self.model, "merge_and_unload") and not getattr(self.model, "is_quantized", False):
            self.model = self.model.merge_and_unload()

    def halve(self, rows: int, reason: str) -> None:
        from tqdm import tqdm

        if rows == 1:
            raise OutOfMemory(
                f"out of memory with a single row ({reason}); a smaller model or fewer new tokens need less"
            )
        self.batch = (rows + 1) // 2
        tqdm.write(f"out of memory with {rows} rows at once: continuing with {self.batch}", file=sys.stderr)

    def examine(self, prompts, golds: list[list[int]], max_new_tokens: int) -> list[tuple]:
        """Of each prompt the greedy answer, and the log-probabilities of the gold answer's tokens."""
        answers = self.generate(prompts, max_new_tokens)
        return [(a, self.answer_logprobs(p, gold)) for a, p, gold in zip(answers, prompts, golds)]

    def generate_batch(self, prompts, max_new_tokens: int, exact: bool) -> tuple[list[list[int]], float, float]:
        """New ids of each prompt, seconds until the first token and from there to the last."""
        import torch

        model, given = self.inputs(prompts)
        ticks = [time.perf_counter()]

        def tick(ids, _scores, **_):  # transformers asks its stopping criteria after each token
            ticks.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with torch.inference_mode():
            out = model.generate(
                **given, max_new_tokens=max_new_tokens, pad_token_id=self.pad,
                min_new_tokens=max_new_tokens if exact else None, stopping_criteria=[tick],
            )  # fmt: skip
        read = given["inputs"].shape[1] if "inputs" in given else 0  # embeddings are not given back
        return out[:, read:].tolist(), ticks[1] - ticks[0], ticks[-1] - ticks[1]

    def inputs(self, prompts) -> tuple:
        """(the model that reads, what it is given): the prompts, left-padded to the longest."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        if models.is_tuned_prompt(self.model):
            return self.model.get_base_model(), self.behind_padding(ids, mask)
        return self.model, {"inputs": ids, "attention_mask": mask}

    def behind_padding(self, ids, mask) -> dict:
        """What the base generates from: each text with the tuned prompt right before it. PEFT puts it before the
        padding, from where a short text in a batch is further away than it was in training."""
        import torch

        embedded = self.model.get_input_embeddings()(ids)
        prompt = self.model.get_prompt(1)[0].to(embedded.dtype)
        padding = (mask == 0).sum(1).tolist()
        rows = [torch.cat([row[:n], prompt, row[n:]]) for row, n in zip(embedded, padding)]
        mask = torch.nn.functional.pad(mask, (0, len(prompt)), value=1)
        return {"inputs_embeds": torch.stack(rows), "attention_mask": mask}

    def as_generation(self, ids: list[int], prompt_tokens: int, exact: bool, *seconds: float) -> Generation:
        end = len(ids) if exact else next((n for n, token in enumerate(ids) if token in self.ends), len(ids))
        stopped = end < len(ids)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Generation(text, ids[:end], prompt_tokens, end + stopped, stopped, *seconds)

    def answer_logprobs(self, prompt: list[int], answer: list[int]):
        """Log-probability of each token of a given answer after those before it; float32 [len(answer)]."""
        import numpy as np

        return self.answer_distributions(prompt, answer)[np.arange(len(answer)), answer]

    def options_logprobs(self, prompt: list[int], options: list[list[int]]) -> list:
        """`answer_logprobs` of several answers to one prompt, which is read once."""
        import numpy as np
        import torch
        from transformers import DynamicCache

        if models.is_tuned_prompt(self.model):  # PEFT would put it before each option as well
            return [self.answer_logprobs(prompt, ids) for ids in options]
        most, cache = max(map(len, options)), DynamicCache()
        padded = [ids[:-1] + [self.pad] * (most - len(ids)) for ids in options]
        with torch.inference_mode():
            given = torch.tensor([prompt], device=self.model.device)
            logits = self.model(given, past_key_values=cache, logits_to_keep=1).logits.expand(len(options), -1, -1)
            if most > 1:
                cache.batch_repeat_interleave(len(options))
                given = torch.tensor(padded, device=self.model.device)
                logits = torch.cat([logits, self.model(given, past_key_values=cache).logits], 1)
            found = logits.float().log_softmax(-1).cpu().numpy()
        return [each[np.arange(len(ids)), ids] for each, ids in zip(found, options)]

    def answer_distributions(self, prompt: list[int], answer: list[int]):
        """Log-probabilities over the vocabulary at each token of a given answer; float32 [len(answer), vocabulary]."""
        import torch

        ids = torch.tensor([prompt + answer], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(ids, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).cpu().numpy()

    def close(self) -> None:
        self.model = None
        models.free_memory()


class Vllm:
    """vLLM draws from a plain model directory. Not measured here: it wants CUDA."""

    name = "vllm"

    def __init__(self, path: Path, context: int):
        if not find_spec("vllm"):
            raise InputError("--engine vllm: the package vllm is not installed; `pip install vllm`, or --engine auto")
        if models.is_adapter(path):
            raise InputError(f"{path}: --engine vllm takes a merged model (`make lora-merged`), not an adapter")
        from vllm import LLM

        self.tokenizer = models.tokenizer(path)
        self.llm = LLM(model=str(path), max_model_len=context)

    def sample(self, prompts: list, seeds: list, settings: Settings) -> Iterator[tuple[int, list[Sample]]]:
        """Samples of each prompt, 256 prompts at a time, which is also what a kill can lose."""
        from vllm import SamplingParams

        asked = dict(temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_new_tokens)
        ends = [] if settings.end is None else [settings.end]
        for start in range(0, len(prompts), 256):
            some = range(start, min(start + 256, len(prompts)))
            rows = [(n, seed) for n in some for seed in seeds[n]]
            found = self.llm.generate(
                [{"prompt_token_ids": prompts[n]} for n, _ in rows],
                [SamplingParams(seed=seed, stop_token_ids=ends, **asked) for _, seed in rows],
                use_tqdm=False,
            )
            outputs = iter([request.outputs[0] for request in found])
            for n in some:
                yield n, [self.as_sample(next(outputs)) for _ in seeds[n]]

    def as_sample(self, output) -> Sample:
        ids, stopped = list(output.token_ids), output.finish_reason == "stop"
        kept, end = (ids[:-1], ids[-1]) if stopped else (ids, None)
        return Sample(self.tokenizer.decode(kept, skip_special_tokens=True), kept, len(ids), stopped, end)

    def close(self) -> None:
        self.llm = None
        models.free_memory()
