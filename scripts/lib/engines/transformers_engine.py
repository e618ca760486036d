"""An engine is an opened model directory that answers. `open_engine` picks transformers or llama.cpp by its files.

Both have: name, load_seconds, batch (rows answered at once), ends, prompt_ids(chat), answer_ids(text),
reserve_context(tokens, text), generate(prompts, …), sample(prompts, seeds, settings), examine(prompts, golds, …),
answer_logprobs(prompt, answer), options_logprobs(prompt, options), answer_distributions(prompt, answer), close().
`open_sampler` picks among these and engines that can only sample.
"""

import sys
import time
from collections.abc import Iterator

from lib.core import compute, hardware
from lib.core.cli import OutOfMemory
from lib.engines.llamacpp import Generation
from lib.engines.sampling import Sample, Settings, exceeds_context
from lib.model import directory, loading
from lib.model.directory import ModelDirectory


class Transformers:
    name = "transformers"

    def __init__(
        self,
        model: ModelDirectory,
        *,
        load: str = "auto",
        threads: int = 0,
        batch: int = 8,
        **placement,
    ):
        compute.use_threads(threads)
        started = time.perf_counter()
        self.model = loading.load_model(model, load, **placement)
        # torch multiplies a slice by a frozen matrix row by row, each with a copy of the matrix. An adapter freezes the
        # other weights, which would cost 430 MB per token of eight rows.
        self.model.get_output_embeddings().requires_grad_(True)
        hardware.synchronise()
        self.load_seconds = time.perf_counter() - started
        self.tokenizer = directory.load_tokenizer(model)
        self.path, self.rows = model.path, directory.count_embedding_rows(model)
        self.longest_context = directory.context_length(model)
        self.batch = batch
        config = loading.forget_generation_settings(self.model)
        self.ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.ends)

    def prompt_ids(self, chat: list[dict]) -> list[int]:
        from lib.model import chat as chats

        return self.check_ids(chats.prompt_ids(self.tokenizer, chat))

    def answer_ids(self, text: str) -> list[int]:
        from lib.model import chat as chats

        return self.check_ids(chats.token_ids(self.tokenizer, chats.answer_space(self.tokenizer) + text))

    def check_ids(self, ids: list[int]) -> list[int]:
        directory.check_ids(self.path, self.rows, self.tokenizer, [ids])
        return ids

    def reserve_context(self, tokens: int, text: str) -> None:
        """InputError if `text` and its answer, together `tokens` long, are longer than the model's context."""
        if tokens > self.longest_context:
            raise exceeds_context(text, tokens, self.path, self.longest_context)

    def generate(self, prompts, max_new_tokens: int, *, exact: bool = False) -> list[Generation]:
        """Greedy answers in the order of the prompts, in batches of similar length. With `exact`, every answer has
        max_new_tokens tokens: EOS is ignored (to time it). A batch that runs out of memory is repeated in halves, and
        `batch` stays halved."""
        answers = [None] * len(prompts)
        waiting = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))  # the largest batch first: it fits or not
        while waiting:
            indices = waiting[: self.batch]
            result, reason = compute.call_catching_oom(
                self.generate_batch, [prompts[n] for n in indices], max_new_tokens, exact
            )
            if reason:
                self.halve(len(indices), reason)
                continue
            rows, *seconds = result
            for n, ids in zip(indices, rows):
                answers[n] = self.as_generation(ids, len(prompts[n]), exact, *seconds)
            waiting = waiting[len(indices) :]
        if len(prompts) > self.batch:  # a single batch is perhaps being timed
            hardware.return_freed_memory()
        return answers

    def sample(self, prompts: list, seeds: list, settings: Settings) -> Iterator[tuple[int, list[Sample]]]:
        """Samples of each prompt as they finish (see sampling.py), through batching.py. When memory runs out,
        unfinished rows start again with the same random numbers, half as many at once."""
        from lib.engines import batching

        ends = self.ends | ({settings.end} - {None})
        samples = [dict.fromkeys(range(len(prompt_seeds))) for prompt_seeds in seeds]
        order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
        waiting = {(n, k): (prompts[n], seeds[n][k]) for n in order for k in samples[n]}
        while waiting:
            rows = batching.sample_continuously(self.model, waiting, self.batch, self.pad, ends, settings)
            while True:
                row, reason = compute.call_catching_oom(next, rows, None)
                if row is None:
                    break
                n, k = row.key
                del waiting[n, k]
                samples[n][k] = self.as_sample(row.ids, ends)
                if None not in samples[n].values():
                    yield n, list(samples[n].values())
            if reason:
                self.halve(min(self.batch, len(waiting)), reason)

    def as_sample(self, ids: list[int], ends: set[int]) -> Sample:
        end = ids[-1] if ids[-1] in ends else None
        text_ids = ids if end is None else ids[:-1]
        return Sample(
            self.tokenizer.decode(text_ids, skip_special_tokens=True), text_ids, len(ids), end is not None, end
        )

    def merge(self) -> None:
        """Merge an adapter into the weights, which saves two products per matrix and token."""
        if hasattr(self.model, "merge_and_unload") and not getattr(self.model, "is_quantized", False):
            self.model = self.model.merge_and_unload()

    def halve(self, rows: int, reason: str) -> None:
        from tqdm import tqdm

        if rows == 1:
            raise OutOfMemory(
                f"out of memory with a single example ({reason}); use a smaller model or fewer new tokens"
            )
        self.batch = (rows + 1) // 2
        tqdm.write(f"out of memory at batch size {rows}; continuing with batch size {self.batch}", file=sys.stderr)

    def examine(self, prompts, golds: list[list[int]], max_new_tokens: int) -> list[tuple]:
        """(the greedy answer, the log-probabilities of the gold answer's tokens) of each prompt."""
        answers = self.generate(prompts, max_new_tokens)
        return [(a, self.answer_logprobs(p, gold)) for a, p, gold in zip(answers, prompts, golds)]

    def generate_batch(self, prompts, max_new_tokens: int, exact: bool) -> tuple[list[list[int]], float, float]:
        """(the new ids of each prompt, seconds until the first token, seconds from there to the last)."""
        import torch

        model, inputs = self.inputs(prompts)
        hardware.synchronise()
        ticks = [time.perf_counter()]

        def tick(ids, _scores, **_):  # transformers asks its stopping criteria after each token, and then waits for it
            hardware.synchronise()
            ticks.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=max_new_tokens, pad_token_id=self.pad,
                min_new_tokens=max_new_tokens if exact else None, stopping_criteria=[tick],
            )  # fmt: skip
        prompt_length = inputs["inputs"].shape[1] if "inputs" in inputs else 0  # embeddings are not given back
        return out[:, prompt_length:].tolist(), ticks[1] - ticks[0], ticks[-1] - ticks[1]

    def inputs(self, prompts) -> tuple:
        """(the model, its inputs): the prompts, left-padded to the longest."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (longest - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        if loading.is_soft_prompt(self.model):
            return self.model.get_base_model(), self.insert_prompt(ids, mask)
        return self.model, {"inputs": ids, "attention_mask": mask}

    def insert_prompt(self, ids, mask) -> dict:
        """The base's inputs: each text with the tuned prompt directly before it. PEFT puts the prompt before the
        padding, which would be further from a short text than in training."""
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

        if loading.is_soft_prompt(self.model):  # PEFT would put the prompt before each option as well
            return [self.answer_logprobs(prompt, ids) for ids in options]
        longest, cache = max(map(len, options)), DynamicCache()
        rows = [ids[:-1] + [self.pad] * (longest - len(ids)) for ids in options]
        with torch.inference_mode():
            inputs = torch.tensor([prompt], device=self.model.device)
            logits = self.model(inputs, past_key_values=cache, logits_to_keep=1).logits.expand(len(options), -1, -1)
            if longest > 1:
                cache.batch_repeat_interleave(len(options))
                inputs = torch.tensor(rows, device=self.model.device)
                logits = torch.cat([logits, self.model(inputs, past_key_values=cache).logits], 1)
            logprobs = logits.float().log_softmax(-1).cpu().numpy()
        return [row[np.arange(len(ids)), ids] for row, ids in zip(logprobs, options)]

    def answer_distributions(self, prompt: list[int], answer: list[int]):
        """Log-probabilities over the vocabulary at each token of a given answer; float32 [len(answer), vocabulary]."""
        import torch

        ids = torch.tensor([prompt + answer], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(ids, logits_to_keep=len(answer) + 1, use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).cpu().numpy()

    def close(self) -> None:
        self.model = None
        compute.release_memory()
