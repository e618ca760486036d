"""vLLM as an engine that samples."""

from collections.abc import Iterator
from importlib.util import find_spec

from lib.core import compute
from lib.core.cli import InputError
from lib.engines.sampling import Sample, Settings
from lib.model import directory
from lib.model.directory import ModelDirectory


class Vllm:
    """vLLM samples from a plain model directory. Not measured here, since it needs CUDA."""

    name = "vllm"

    def __init__(self, model: ModelDirectory, context: int):
        if not find_spec("vllm"):
            raise InputError(
                "--engine vllm: the package vllm is not installed; run `pip install vllm`, or use --engine auto"
            )
        if model.kind == "adapter":
            raise InputError(f"{model.path}: --engine vllm takes a merged model (`make lora-merged`), not an adapter")
        from vllm import LLM

        self.tokenizer = directory.load_tokenizer(model)
        self.llm = LLM(model=str(model.path), max_model_len=context)

    def sample(self, prompts: list, seeds: list, settings: Settings) -> Iterator[tuple[int, list[Sample]]]:
        """Samples of each prompt, 256 prompts at a time, which are the most that a kill can lose."""
        from vllm import SamplingParams

        params = dict(temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_new_tokens)
        ends = [] if settings.end is None else [settings.end]
        for start in range(0, len(prompts), 256):
            indices = range(start, min(start + 256, len(prompts)))
            rows = [(n, seed) for n in indices for seed in seeds[n]]
            results = self.llm.generate(
                [{"prompt_token_ids": prompts[n]} for n, _ in rows],
                [SamplingParams(seed=seed, stop_token_ids=ends, **params) for _, seed in rows],
                use_tqdm=False,
            )
            outputs = iter([request.outputs[0] for request in results])
            for n in indices:
                yield n, [self.as_sample(next(outputs)) for _ in seeds[n]]

    def as_sample(self, output) -> Sample:
        ids, stopped = list(output.token_ids), output.finish_reason == "stop"
        text_ids, end = (ids[:-1], ids[-1]) if stopped else (ids, None)
        return Sample(self.tokenizer.decode(text_ids, skip_special_tokens=True), text_ids, len(ids), stopped, end)

    def close(self) -> None:
        self.llm = None
        compute.release_memory()
