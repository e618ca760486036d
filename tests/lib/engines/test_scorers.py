"""The bundled embedding on real sentences; reward models are tested through filter_data.py."""

import pytest

from lib.engines import scorers
from tests.test_filter_data import PASSING


@pytest.mark.slow
def test_an_embedding_tells_an_answer_from_one_to_another_question():
    score = scorers.open_scorer("embedding")
    prompts = [[{"role": "user", "content": asked}] for asked, _ in PASSING]
    answers = [answer for _, answer in PASSING]
    own, others = score(prompts, answers), score(prompts, answers[1:] + answers[:1])
    assert sum(a > b for a, b in zip(own, others)) >= len(PASSING) - 1
    assert score(prompts, [asked for asked, _ in PASSING]) == pytest.approx([1.0] * len(PASSING), abs=1e-5)
    assert score(prompts[3:4], answers[3:4]) == pytest.approx(own[3:4], abs=1e-5), "batches change nothing"
