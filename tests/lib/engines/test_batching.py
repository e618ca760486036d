"""Rows that come and go in one batch, against transformers' own generate and against the distribution itself."""

import random

import pytest
import torch

from lib.engines import batching
from lib.engines.sampling import EngineError, Settings
from lib.model import tiny

PROMPTS = [[1, 300, 17], [1, 40], [1, 5, 260, 33, 7, 90, 91, 92], [1, 260, 261], [1, 99, 98, 97, 96, 95], [1, 12]]
ENDS = {2, *range(3, 60)}  # a random model ends often enough with so many ends


@pytest.fixture(scope="module")
def model():
    return tiny.model(512, initializer_range=0.2).eval()


def drawn(model, jobs, batch, settings) -> dict:
    return {row.key: row.ids for row in batching.sample_continuously(model, jobs, batch, 2, ENDS, settings)}


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_greedy_rows_are_those_of_generate_however_they_share_a_batch(model, batch):
    found = drawn(model, {n: (p, 0) for n, p in enumerate(PROMPTS)}, batch, Settings(24, 0, 1))
    for n, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=sorted(ENDS)
        )[0, len(prompt) :].tolist()
        assert found[n] == expected, n
    assert len({len(ids) for ids in found.values()}) > 2  # they did leave at different times


def test_what_a_row_draws_depends_on_its_seed_alone(model):
    settings = Settings(24, 1.0, 0.95)
    jobs = {(n, seed): (prompt, seed) for n, prompt in enumerate(PROMPTS) for seed in (5, 6)}
    together = drawn(model, jobs, 5, settings)
    alone = {key: drawn(model, {key: job}, 1, settings)[key] for key, job in jobs.items()}
    assert together == alone
    assert together[0, 5] != together[0, 6]


def test_a_prompt_in_a_row_that_was_empty_for_long_reads_itself_alone(model):
    batch, alone = batching.Batch(model, 2), batching.Batch(model, 1)
    batch.read([0, 1], PROMPTS[:2], 2)
    batch.leave([1])
    for _ in range(12):
        batch.step([70, 2])
    for reader, row in ((batch, 1), (alone, 0)):
        reader.read([row], [PROMPTS[5]], 2)
        reader.step([70] * (row + 1))
    torch.testing.assert_close(batch.logits[1], alone.logits[0])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.5, 0.6), (1.0, 1.0), (1.5, 0.2)])
def test_tokens_are_drawn_from_the_nucleus_as_often_as_they_are_likely(temperature, top_p):
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    probabilities = (logits / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    expected = torch.zeros(12)
    expected[order[before < top_p]] = probabilities[order[before < top_p]]
    expected /= expected.sum()
    rows = 20_000
    tokens = batching.draw_tokens(logits.expand(rows, -1), [random.Random(n) for n in range(rows)], temperature, top_p)
    frequency = torch.bincount(torch.tensor(tokens), minlength=12) / rows
    assert (frequency[expected == 0] == 0).all()
    assert (frequency - expected).abs().max() < 0.015  # four standard deviations


def test_probabilities_that_are_none_are_an_error():
    """They are what weights that overflow in fp16 give; to draw again until it fits would never end."""
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    with pytest.raises(EngineError, match="--precision fp32"):
        batching.draw_tokens(logits, [random.Random(0), random.Random(1)], 1.0, 0.95)
