"""Open a model directory as an engine that answers. `open_engine` picks transformers or llama.cpp by its files."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from lib.core import cli, hardware
from lib.core.cli import InputError
from lib.engines.llamacpp import LlamaCpp
from lib.engines.transformers_engine import Transformers
from lib.engines.vllm_engine import Vllm
from lib.model import directory, loading
from lib.model.directory import ModelDirectory

SAMPLERS = ("auto", "transformers", "llamacpp", "vllm")


def open_engine(
    model: ModelDirectory,
    *,
    load: str = "auto",
    threads: int = 0,
    batch: int = 8,
    context: int = 2048,
    **placement,
):
    """The engine for a model directory: llama.cpp for a GGUF, or an adapter on one; transformers for all others. `load`
    and `placement` are for transformers (see loading.load_model). InputError if it cannot be loaded."""
    if files := find_gguf_files(model):
        try:
            return LlamaCpp(*files, context=context, parallel=batch, threads=threads or None)
        except ValueError as error:
            raise InputError(str(error)) from None
    return Transformers(model, load=load, threads=threads, batch=batch, **placement)


def context_for(rows: list[dict], new_tokens: int) -> int:
    """Tokens of context that the longest row needs, at two characters per token. Every text here has more per token."""
    return max(sum(len(turn["content"]) for turn in row["prompt"]) for row in rows) // 2 + new_tokens + 256


def find_gguf_files(model: ModelDirectory) -> list[Path]:
    """The files of a model directory that llama.cpp loads: the model, and an adapter. [] if transformers runs it."""
    if model.kind == "gguf":
        return [model.gguf]
    return [model.base.gguf, model.gguf] if model.base and model.base.kind == "gguf" else []


def add_sampler_flags(group, *engines: str) -> None:
    group.add_argument(
        "--engine", choices=[*SAMPLERS, *engines], default="auto",
        help="sampling engine; auto: llama.cpp for a GGUF, vLLM if it is installed, else transformers",
    )  # fmt: skip
    group.add_argument("--batch-size", type=cli.integer(1), help="concurrent sequences; halved when memory runs out")
    group.add_argument(
        "--checkpoint-interval", type=cli.integer(1), help="examples between saves: the most that a kill can lose"
    )
    loading.add_load_flags(group)


def check_memory(
    model: ModelDirectory, args, need: Callable, context: int, new: int, engine: str = "auto"
) -> int | None:
    """Print the memory that an engine will take for a batch of texts of at most `context` tokens, `new` of them
    generated. Raises OutOfMemory if there is clearly less. For transformers it is need(config, adapter, how, batch,
    new)."""
    from lib.budget import memory

    def halves(words: str, name: str, value: int) -> list[tuple[str, dict]]:
        return [(words.format(value >> n), {name: value >> n}) for n in range(1, value.bit_length())]

    fewer, shorter = halves("--batch-size {}", "batch", args.batch_size), halves("at most {} new tokens", "new", new)
    if engine != "transformers" and (files := find_gguf_files(model)):
        size, values = sum(file.stat().st_size for file in files), memory.count_key_values_of_gguf(files[0])
        prompt_tokens = context - new

        def in_llamacpp(batch: int = args.batch_size, new: int = new) -> dict:
            return memory.estimate_llamacpp(size, values, batch, prompt_tokens + new)

        return memory.check_fits(in_llamacpp, [fewer, shorter], hardware.free_memory("cpu"))
    config, adapter, precision = (
        directory.load_config(model),
        directory.read_adapter_shape(model),
        directory.stored_precision(model, args.precision),
    )

    def in_transformers(batch: int = args.batch_size, new: int = new, how: str = precision) -> dict:
        return need(config, adapter, how, batch, new)

    quantized = [
        [("--precision nf4", {"how": "nf4"})],
        [("--precision nf4 --batch-size 1", {"how": "nf4", "batch": 1})],
    ]
    changes = [fewer, *(quantized if hardware.device() == "cuda" else []), shorter]
    return memory.check_fits(in_transformers, changes, hardware.free_memory(spread=args.device_map != "none"))


def longest_prompt(model: ModelDirectory, chats: list[list[dict]]) -> int:
    """Tokens of the longest chat, by transformers' tokenizer; 0 for a GGUF, for which `context_for` is exact enough."""
    from lib.model import chat

    if find_gguf_files(model):
        return 0
    tokenizer = directory.load_tokenizer(model)
    return max((len(chat.prompt_ids(tokenizer, turns)) for turns in chats), default=0)


def open_sampler(
    model: ModelDirectory, args, context: int, prompt: int, new: int, texts: int, of_each: int = 1
) -> tuple:
    """(the engine for sampling from a model directory by --engine, the bytes that it is expected to take or None).
    `texts` are to be sampled, `of_each` of one prompt, each of at most `context` tokens: about `prompt` tokens in the
    prompt and `new` generated.

    `auto`: llama.cpp for a GGUF; vLLM if it is installed and there is a GPU; else transformers, whose large batches are
    faster than llama.cpp's on a CPU as well (docs/log.md)."""
    if model.kind == "adapter":
        directory.check_lora(model)
    on_gguf, engine = bool(find_gguf_files(model)), args.engine
    if engine == "auto":
        vllm = find_spec("vllm") and hardware.gpu() and model.kind != "adapter"
        engine = "llamacpp" if on_gguf else "vllm" if vllm else "transformers"
    if engine == "vllm":
        return Vllm(model, context), None
    if engine == "llamacpp" and not on_gguf:
        raise InputError(
            f"{model.path}: llama.cpp needs a GGUF file; write one with `python scripts/quantize.py --method "
            "gguf-f16`, or use --engine transformers"
        )

    def need(config, adapter, how, batch, new):
        from lib.budget import memory

        rows = min(batch, texts)
        return memory.estimate_sampling(config, adapter, how, rows, -(-rows // of_each), prompt, new)

    expected = check_memory(model, args, need, context, new, engine)
    if engine == "llamacpp":
        return open_engine(model, threads=args.threads, batch=args.batch_size, context=context), expected
    sampler = Transformers(
        model, load=args.precision, threads=args.threads, batch=args.batch_size, **loading.placement_arguments(args)
    )
    sampler.merge()
    return sampler, expected
