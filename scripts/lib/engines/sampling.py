"""Texts drawn at random, by any engine: what is asked, what comes back, and how it is kept on the way.

An engine's sample(prompts, seeds, settings) yields (n, samples) of each prompt as they are done, in any order: one
sample for each seed of seeds[n]. A prompt is what that engine's prompt_ids and answer_ids make.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

from lib.core import hardware, runlog
from lib.core.cli import InputError, OutOfMemory
from lib.core.kept import Kept
from lib.data import records


class Settings(NamedTuple):
    max_new_tokens: int
    temperature: float  # 0: the likeliest token
    top_p: float  # of the likeliest tokens, as few as have this probability together (arXiv 1904.09751)
    end: int | None = None  # a token that ends a text, besides the model's own
    end_text: str = ""  # and as text, for a server that knows no tokens


class Sample(NamedTuple):
    text: str
    ids: list[int]  # without the token that ended it; [] from a server
    new_tokens: int  # with it
    stopped: bool  # it ended before max_new_tokens
    end: int | None = None  # the token that ended it, where that is known


class EngineError(RuntimeError):
    """An engine, or the server behind it, that does not answer as it should."""


def derive_seed(seed: int, name: str) -> int:
    """The seed of one text, which depends on its name alone: others may come or go."""
    return int(records.shuffle_key(seed, name)[:8], 16) % (2**32 - 1)  # llama.cpp takes 2**32 - 1 for "any"


def yield_as_completed(work: Callable, workers: int, *columns: list) -> Iterator[tuple[int, object]]:
    """(n, work(…)) of each row of the columns as it is done, `workers` at a time. After an error no new one begins."""
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
    """Add line(key, samples) of each job (key, prompt, seeds) to what a run has kept: every `interval` lines are on the
    disk, and a line in the run's log says how fast it goes. `done` lines of the file's stage stand there already.

    InputError where the engine fails, OutOfMemory where not one row fits: both say what is kept.
    """
    from tqdm import tqdm

    pending, tokens, since = [], 0, time.perf_counter()

    def flush():
        if pending:
            kept.add(pending)
            seconds = time.perf_counter() - since  # of all so far: rows of one batch are done in bursts
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
