"""Sampling with any engine: the settings, the samples, and how they are saved during a run.

An engine's sample(prompts, seeds, settings) yields (n, samples) of each prompt as they finish, in any order: one sample
per seed of seeds[n]. A prompt has the form that the engine's prompt_ids and answer_ids return.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from lib.core import hardware, runlog
from lib.core.cli import InputError, OutOfMemory
from lib.core.kept import Kept
from lib.data import records


class Settings(NamedTuple):
    max_new_tokens: int
    temperature: float  # 0: the likeliest token
    top_p: float  # sample from the fewest likeliest tokens with this total probability (arXiv 1904.09751)
    end: int | None = None  # a token that ends a text, besides the model's own
    end_text: str = ""  # the same as text, for a server that takes no token ids


class Sample(NamedTuple):
    text: str
    ids: list[int]  # without the end token; [] from a server
    new_tokens: int  # with the end token
    stopped: bool  # it ended before max_new_tokens
    end: int | None = None  # the end token, if it is known


class EngineError(InputError):
    """An engine, or the server behind it, that does not answer as it should."""


def exceeds_context(text: str, tokens: int, model: Path, limit: int) -> InputError:
    return InputError(
        f"{text}: takes {tokens:,} tokens together with its answer, longer than the context of {model}, {limit:,} "
        "tokens; shorten it, or ask for fewer new tokens"
    )


def derive_seed(seed: int, name: str) -> int:
    """The seed of one text. It depends on the text's name alone, so that other texts may be added or removed."""
    return int(records.shuffle_key(seed, name)[:8], 16) % (2**32 - 1)  # llama.cpp takes 2**32 - 1 for "any"


def yield_as_completed(work: Callable, workers: int, *columns: list) -> Iterator[tuple[int, object]]:
    """(n, work(…)) of each row of the columns as it finishes, `workers` at a time. After an error no new one starts."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(work, *row): n for n, row in enumerate(zip(*columns, strict=True))}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_samples(
    kept: Kept, engine, jobs: list[tuple], settings: Settings, line: Callable, *, run, interval: int, done: int = 0
) -> None:
    """Add line(key, samples) of each job (key, prompt, seeds) to `kept`. Every `interval` lines they are written to the
    disk, and an event with the speed to the run's log. `done` lines of this stage are there already.

    Raises InputError if the engine fails, OutOfMemory if not even one row fits. Both say what is saved.
    """
    from tqdm import tqdm

    pending, tokens, started = [], 0, time.perf_counter()

    def flush():
        if pending:
            kept.add(pending)
            seconds = time.perf_counter() - started  # since the start, as the rows of a batch finish in bursts
            event = {"step": bar.n, "stage": kept.file.stem, "tokens_per_second": round(tokens / seconds, 2)}
            event |= {"rss_bytes": hardware.rss_bytes(), "gpu_bytes": hardware.gpu_bytes(), "time": time.time()}
            runlog.append_event(run.log, event)
            pending.clear()

    if not jobs:
        return
    keys, prompts, seeds = (list(column) for column in zip(*jobs))
    with tqdm(total=done + len(jobs), initial=done, unit="row", desc=kept.file.stem) as bar:
        try:
            for n, samples in engine.sample(prompts, seeds, settings):
                pending.append(line(keys[n], samples))
                tokens += sum(sample.new_tokens for sample in samples)
                bar.update()
                if len(pending) >= interval:
                    flush()
        except (OutOfMemory, EngineError) as error:
            kind = OutOfMemory if isinstance(error, OutOfMemory) else InputError
            raise kind(f"{error}. {bar.n} {kept.file.stem} are finished and saved in {run.path}") from None
        finally:
            flush()
