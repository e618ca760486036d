"""How far one model is from another: their next-token distributions on the answer positions of held-out rows.

A mean over all positions hides a lost fine-tuning : the prompt's own tokens are many and hardly
move. So both models read the same prompt and gold answer, and only the positions
that predict the answer and its end are compared.
"""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from lib.cli import OutOfMemory


def compare(reference: Path, other: Path, rows: list[dict], threads: int = 0) -> dict:
    """Divergence of `other` from `reference` on the answers of `rows`, both through their own engine in fp32.

    kl_*: KL(reference ‖ other) in nats a position; top1_agreement: share of positions with the same most
    likely token; nll_*: mean negative log-likelihood of the gold answer's tokens, in nats a token.
    """
    import numpy as np

    from lib.generation import open_engine

    asked = [(row["prompt"], row["gold"][0]) for row in rows]
    engine = open_engine(reference, dtype="fp32", threads=threads)
    end = min(engine.ends)
    places = [(engine.prompt_ids(prompt), [*engine.answer_ids(gold), end]) for prompt, gold in asked]
    expected = [engine.answer_distributions(*place) for place in places]
    engine.close()
    context = max(len(prompt) + len(answer) for prompt, answer in places) + 8
    engine = open_engine(other, dtype="fp32", threads=threads, batch=2, context=context)
    with ThreadPoolExecutor(2 if engine.name == "llama.cpp" else 1) as pool:  # one parses while one computes
        found = list(pool.map(lambda place: engine.answer_distributions(*place), places))
    engine.close()
    kl, agree, nll = [], [], {"reference": [], "other": []}
    for (_, answer), p, q in zip(places, expected, found, strict=True):
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
        at = np.arange(len(answer) - 1), answer[:-1]  # the end's own likelihood would dilute the answer's
        nll["reference"] += (-p[at]).tolist()
        nll["other"] += (-q[at]).tolist()
    return {
        "rows": len(rows),
        "answer_positions": len(kl),
        "kl_mean": float(np.mean(kl)),
        "kl_p99": float(np.percentile(kl, 99)),
        "top1_agreement": float(np.mean(agree)),
        "nll_reference": float(np.mean(nll["reference"])),
        "nll": float(np.mean(nll["other"])),
    }


def in_fresh_process(function, *given):
    """Call a function in a new process: what it measures then owes nothing to what this one has in memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *given).result()
        except BrokenProcessPool:  # only the kernel kills it, and out of memory is why
            raise OutOfMemory("the measuring process was killed; it ran out of memory") from None
