"""How far one model is from another: their next-token distributions on the answer positions of held-out rows.

A mean over all positions hides a lost fine-tuning: the prompt's own tokens are many and hardly move. So both models
read the same prompt and gold answer, and only the positions that predict the answer and its end are compared: on rows
of the task, and on a few general questions, where a file that computes something else shows whatever the task is.
"""

import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

from lib.core import cli
from lib.core.cli import InputError, OutOfMemory
from lib.data import records
from lib.model import directory
from lib.model.directory import ModelDirectory

LEAST_GAIN = 0.05  # nats per token: of a smaller fine-tuning gain, a loss could not be told from noise

# One user turn each, which every chat template can render; short, since llama.cpp takes 0.15 s per position.
GENERAL = records.parse_rows(
    (
        (f"general question {n}", {"prompt": question, "completion": answer})
        for n, (question, answer) in enumerate(
            (
                ("What colour is the sky on a clear day?", "The sky is blue."),
                ("How many days does a week have?", "A week has seven days."),
                ("Which animal barks?", "A dog barks."),
                ("What is frozen water called?", "It is called ice."),
                ("What do I need to cut paper?", "You need a pair of scissors."),
                ("When does the sun rise?", "It rises in the morning."),
                ("What is two plus three?", "Two plus three is five."),
                ("How do I say that I am grateful?", "You can say thank you."),
            )
        )
    ),
    "general",
)


def compare(
    reference: ModelDirectory,
    other: ModelDirectory,
    rows: list[dict],
    base: ModelDirectory | None = None,
    threads: int = 0,
) -> dict:
    """Divergence of `other` from `reference` on the answers of `rows`, each through its own engine, in fp32.

    kl_*: KL(reference ‖ other) in nats per position; top1_agreement: share of positions with the same most
    likely token; nll_*: mean negative log-likelihood of the gold answers' tokens, in nats per token. `base` is the
    model before its fine-tuning: with it, gain_kept is the share of the gain in likelihood that `other` still has.
    The same figures for the general questions are in "general"; without rows they are the only ones. InputError if
    the two models tokenise the same prompts differently.
    """
    from lib.engines.opening import open_engine

    engine = open_engine(reference, load="fp32", threads=threads)
    end = min(engine.ends)
    examples = [(row["prompt"], row["gold"][0]) for row in [*rows, *GENERAL]]
    encoded = [(engine.prompt_ids(prompt), [*engine.answer_ids(gold), end]) for prompt, gold in examples]
    limit = min(engine.longest_context, directory.context_length(other))
    fits = [len(prompt) + len(answer) <= limit for prompt, answer in encoded]
    if not all(fits):
        kept = [row for row, fit in zip(rows, fits) if fit]
        print(f"{len(rows) - len(kept)} of {len(rows)} examples exceed the context of {limit:,} tokens; not compared")
        rows = kept
        examples, encoded = ([one for one, fit in zip(column, fits) if fit] for column in (examples, encoded))
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    engine.reserve_context(longest, "an example")
    reference_logprobs = answer_distributions(engine, encoded)
    engine = open_engine(other, load="fp32", threads=threads, batch=2, context=longest + 8)
    check_tokens(engine, examples, encoded, f"{other.path} and {reference.path}")
    other_logprobs = answer_distributions(engine, encoded)
    answers = [answer[:-1] for _, answer in encoded]  # the end's own likelihood would dilute the answer's
    task, general = slice(len(rows)), slice(len(rows), None)
    figures = summarise(reference_logprobs[task], other_logprobs[task], answers[task]) if rows else {}
    if base is not None and rows:
        base_logprobs = answer_distributions(open_engine(base, load="fp32", threads=threads), encoded[task])
        figures["nll_base"] = mean_nll(base_logprobs, answers[task])
        gain = figures["nll_base"] - figures["nll_reference"]
        kept_gain = figures["nll_base"] - figures["nll"]
        figures["gain_kept"] = kept_gain / gain if gain > LEAST_GAIN else None
    return figures | {"general": summarise(reference_logprobs[general], other_logprobs[general], answers[general])}


def count_positions(tokenizer, rows: list[dict]) -> int:
    """How many positions `compare` measures on these rows and the general questions."""
    return sum(len(tokenizer(row["gold"][0], add_special_tokens=False)["input_ids"]) + 1 for row in [*rows, *GENERAL])


def check_tokens(engine, examples: list, encoded: list, models: str) -> None:
    for (prompt, gold), (ids, answer) in zip(examples, encoded, strict=True):
        if engine.prompt_ids(prompt) != ids or engine.answer_ids(gold) != answer[:-1]:
            raise InputError(
                f"{models} cannot be compared: they tokenise {prompt[-1]['content'][-60:]!r} differently (their "
                "vocabularies, chat templates or BOS differ)"
            )


def summarise(reference_logprobs: list, other_logprobs: list, answers: list[list[int]]) -> dict:
    """The figures of `compare` for one set of rows."""
    import numpy as np

    kl, agree = [], []
    for p, q in zip(map(normalise, reference_logprobs), map(normalise, other_logprobs), strict=True):
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    return {
        "rows": len(answers),
        "answer_positions": len(kl),
        "kl_mean": float(np.mean(kl)),
        "kl_p99": float(np.percentile(kl, 99)),
        "top1_agreement": float(np.mean(agree)),
        "nll_reference": mean_nll(reference_logprobs, answers),
        "nll": mean_nll(other_logprobs, answers),
    }


def normalise(logprobs):
    """Log-probabilities in float64 whose probabilities sum to 1. Rounded to 32 bit they need not, and the divergence of
    similar models could fall below 0."""
    import numpy as np

    exact = logprobs.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def answer_distributions(engine, encoded: list[tuple[list[int], list[int]]]) -> list:
    """Log-probabilities at the answers of (prompt, answer) pairs; the engine is closed afterwards."""
    try:
        with ThreadPoolExecutor(2 if engine.name == "llama.cpp" else 1) as pool:  # one parses while one computes
            return list(pool.map(lambda pair: engine.answer_distributions(*pair), encoded))
    finally:
        engine.close()


def mean_nll(logprobs: list, answers: list[list[int]]) -> float:
    import numpy as np

    return float(-np.mean(np.concatenate([p[np.arange(len(a)), a] for p, a in zip(logprobs, answers, strict=True)])))


def describe(figures: dict) -> str:
    """The result of `compare` in one line."""
    gain_kept = figures.get("gain_kept")
    return (
        f"on {figures['answer_positions']} answer tokens of {figures['rows']} validation examples: mean KL "
        f"{figures['kl_mean']:.3f}, same top token {figures['top1_agreement']:.0%}, "
        f"NLL {figures['nll_reference']:.3f} -> {figures['nll']:.3f}"
        + ("" if gain_kept is None else f", {gain_kept:.0%} of the fine-tuning gain retained")
        + f"; on {figures['general']['rows']} general questions: mean KL {figures['general']['kl_mean']:.3f}"
    )


def find_objections(figures: dict, max_kl: float, max_general_kl: float, min_gain_kept: float) -> list[str]:
    """Why a model must not be released: it differs too much from its parent, or has lost its fine-tuning gain."""
    objections = []
    for part, limit, suffix in ((figures, max_kl, ""), (figures["general"], max_general_kl, " of general questions")):
        if "kl_mean" in part and not part["kl_mean"] <= limit:  # also where it is not a number
            objections.append(f"mean KL {part['kl_mean']:.3g} nats on answer tokens{suffix} (limit {limit:g})")
    gain_kept = figures.get("gain_kept")
    if gain_kept is not None and not gain_kept >= min_gain_kept:
        objections.append(f"{gain_kept:.0%} of the fine-tuning gain retained (minimum {min_gain_kept:.0%})")
    return objections


def run_in_fresh_process(function, *arguments):
    """Call a function in a new process, so that its measurements do not depend on what this one has in memory. A plain
    pipe brings the result: the semaphores of a process pool would need a writable /dev/shm."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, function, arguments))
    try:
        process.start()
        sender.close()  # only the new process writes, so its end is seen here
        result, error = receiver.recv()
    except EOFError:  # only the kernel kills it, and out of memory is why
        raise OutOfMemory("the process that compares the models was killed: out of memory") from None
    finally:
        if process.pid:
            process.kill()
            process.join()
    if error is not None:
        raise error
    return result


def send_result(sender, function, arguments: tuple) -> None:
    """Send (the function's result, None), or (None, the exception that it raised)."""
    cli.let_any_character_out()
    try:
        sender.send((function(*arguments), None))
    except Exception as error:
        error.add_note(traceback.format_exc())  # of this process, for a defect of ours
        sender.send((None, error))
