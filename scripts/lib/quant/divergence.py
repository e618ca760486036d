"""How far one model is from another: their next-token distributions on the answer positions of held-out rows.

A mean over all positions hides a lost fine-tuning: the prompt's own tokens are many and hardly move. So both models
read the same prompt and gold answer, and only the positions that predict the answer and its end are compared: on rows
of the task, and on a few general questions, where a file that computes something else shows whatever the task is.
"""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from lib.core.cli import InputError, OutOfMemory
from lib.data import records
from lib.model.directory import ModelDirectory

LEAST_GAIN = 0.05  # nats a token: a fine-tuning that gained less has nothing whose loss could be told from noise

# One user turn each, which every chat template can render; short, since llama.cpp takes 0.15 s for a position.
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

    kl_*: KL(reference ‖ other) in nats a position; top1_agreement: share of positions with the same most
    likely token; nll_*: mean negative log-likelihood of the gold answers' tokens, in nats a token. With `base`, the
    model before its fine-tuning, gain_kept is the share of the likelihood gained by it that `other` still has.
    The same figures of the general questions are apart, in "general"; without rows there are no others. InputError
    where the two read the same prompts as other tokens.
    """
    from lib.engines.opening import open_engine

    engine = open_engine(reference, load="fp32", threads=threads)
    end = min(engine.ends)
    asked = [(row["prompt"], row["gold"][0]) for row in [*rows, *GENERAL]]
    places = [(engine.prompt_ids(prompt), [*engine.answer_ids(gold), end]) for prompt, gold in asked]
    expected = answer_distributions(engine, places)
    context = max(len(prompt) + len(answer) for prompt, answer in places) + 8
    engine = open_engine(other, load="fp32", threads=threads, batch=2, context=context)
    check_tokens(engine, asked, places, f"{other.path} and {reference.path}")
    found = answer_distributions(engine, places)
    answers = [answer[:-1] for _, answer in places]  # the end's own likelihood would dilute the answer's
    task, general = slice(len(rows)), slice(len(rows), None)
    measured = summarise(expected[task], found[task], answers[task]) if rows else {}
    if base is not None and rows:
        before = answer_distributions(open_engine(base, load="fp32", threads=threads), places[task])
        measured["nll_base"] = mean_nll(before, answers[task])
        gained = measured["nll_base"] - measured["nll_reference"]
        kept = measured["nll_base"] - measured["nll"]
        measured["gain_kept"] = kept / gained if gained > LEAST_GAIN else None
    return measured | {"general": summarise(expected[general], found[general], answers[general])}


def count_positions(tokenizer, rows: list[dict]) -> int:
    """How many positions `compare` looks at on these rows and the general questions."""
    return sum(len(tokenizer(row["gold"][0], add_special_tokens=False)["input_ids"]) + 1 for row in [*rows, *GENERAL])


def check_tokens(engine, asked: list, places: list, models: str) -> None:
    for (prompt, gold), (ids, answer) in zip(asked, places, strict=True):
        if engine.prompt_ids(prompt) != ids or engine.answer_ids(gold) != answer[:-1]:
            raise InputError(
                f"{models} cannot be compared: they tokenise {prompt[-1]['content'][-60:]!r} differently (their "
                "vocabularies, chat templates or BOS differ)"
            )


def summarise(expected: list, found: list, answers: list[list[int]]) -> dict:
    """What `compare` says of one set of rows."""
    import numpy as np

    kl, agree = [], []
    for p, q in zip(map(normalise, expected), map(normalise, found), strict=True):
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    return {
        "rows": len(answers),
        "answer_positions": len(kl),
        "kl_mean": float(np.mean(kl)),
        "kl_p99": float(np.percentile(kl, 99)),
        "top1_agreement": float(np.mean(agree)),
        "nll_reference": mean_nll(expected, answers),
        "nll": mean_nll(found, answers),
    }


def normalise(logprobs):
    """In float64, summing to 1: rounded to 32 bit they need not, and the divergence of near models strays below 0."""
    import numpy as np

    exact = logprobs.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


def answer_distributions(engine, places: list[tuple[list[int], list[int]]]) -> list:
    """Log-probabilities at the answers of (prompt, answer) pairs; the engine is closed afterwards."""
    try:
        with ThreadPoolExecutor(2 if engine.name == "llama.cpp" else 1) as pool:  # one parses while one computes
            return list(pool.map(lambda place: engine.answer_distributions(*place), places))
    finally:
        engine.close()


def mean_nll(logprobs: list, answers: list[list[int]]) -> float:
    import numpy as np

    return float(-np.mean(np.concatenate([p[np.arange(len(a)), a] for p, a in zip(logprobs, answers, strict=True)])))


def describe(found: dict) -> str:
    """What `compare` found, in a line."""
    kept = found.get("gain_kept")
    return (
        f"on {found['answer_positions']} answer tokens of {found['rows']} validation examples: mean KL "
        f"{found['kl_mean']:.3f}, same top token {found['top1_agreement']:.0%}, "
        f"NLL {found['nll_reference']:.3f} -> {found['nll']:.3f}"
        + ("" if kept is None else f", {kept:.0%} of the fine-tuning gain retained")
        + f"; on {found['general']['rows']} general questions: mean KL {found['general']['kl_mean']:.3f}"
    )


def find_objections(measured: dict, max_kl: float, max_general_kl: float, min_gain_kept: float) -> list[str]:
    """Why a model must not be released: it has left its parent, or fallen back to what it was before fine-tuning."""
    found = []
    for one, most, where in ((measured, max_kl, ""), (measured["general"], max_general_kl, " of general questions")):
        if "kl_mean" in one and not one["kl_mean"] <= most:  # also where it is not a number
            found.append(f"mean KL {one['kl_mean']:.3g} nats on answer tokens{where} (limit {most:g})")
    kept = measured.get("gain_kept")
    if kept is not None and not kept >= min_gain_kept:
        found.append(f"{kept:.0%} of the fine-tuning gain retained (minimum {min_gain_kept:.0%})")
    return found


def run_in_fresh_process(function, *given):
    """Call a function in a new process: what it measures then owes nothing to what this one has in memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *given).result()
        except BrokenProcessPool:  # only the kernel kills it, and out of memory is why
            raise OutOfMemory("the process that compares the models was killed: out of memory") from None
