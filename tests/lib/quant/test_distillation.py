"""Scales that learn: the divergence falls, codes stay, and what the model holds is what the file will."""

import contextlib
import copy

import gguf as package
import numpy as np
import torch

from lib.core import hardware
from lib.model import tiny
from lib.quant import distillation, rounding
from tests.lib.quant.test_rounding import encoded


def rounded_model():
    """A tiny model, the same rounded on one row, and what it was rounded to."""
    teacher = tiny.model(len(tiny.tokenizer()), initializer_range=0.2).eval()
    student = copy.deepcopy(teacher)
    matrices = {name: "iq4_nl" for name, weights in student.named_parameters() if weights.ndim == 2}
    return teacher, student, rounding.calibrate(student, encoded(tiny.tokenizer(), 1), matrices)


def test_the_divergence_falls_and_the_codes_stay():
    teacher, student, rounded = rounded_model()
    codes = {name: one.codes.clone() for name, one in rounded.items()}
    rows = encoded(tiny.tokenizer(), 4) * 40
    with torch.no_grad():
        before = sum(distillation.mean_kl(student, teacher, row).item() for row in rows[:4])
    distillation.learn_scales(student, teacher, rows, rounded)
    with torch.no_grad():
        after = sum(distillation.mean_kl(student, teacher, row).item() for row in rows[:4])
    assert after < 0.97 * before
    assert all(torch.equal(one.codes, codes[name]) for name, one in rounded.items())
    for name, one in rounded.items():
        read = package.quants.dequantize(one.packed(), package.GGMLQuantizationType.IQ4_NL)
        np.testing.assert_array_equal(read, student.state_dict()[name].numpy())
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_the_first_step_goes_against_the_gradient_of_each_scale(monkeypatch):
    """Adam's first step is the sign of the gradient: held against a finite difference of the loss itself."""
    monkeypatch.setattr(hardware, "autocast", contextlib.nullcontext)  # a slope of 1e-3 is lost in bf16
    monkeypatch.setattr(distillation, "LEARNING_RATE", 0.05)
    teacher, student, rounded = rounded_model()
    name, (row,) = "model.layers.1.mlp.down_proj.weight", encoded(tiny.tokenizer(), 1)
    before, weight = rounded[name], student.get_parameter(name)

    def loss(factors):
        with torch.no_grad():
            weight.copy_(before.values(factors))
            return distillation.mean_kl(student, teacher, row).item()

    step, ones = 0.02, torch.ones_like(before.scales)
    slopes = {}
    for place in [(n, block) for n in range(0, 64, 8) for block in range(4)]:
        more, less = ones.clone(), ones.clone()
        more[place], less[place] = 1 + step, 1 - step
        slopes[place] = loss(more) - loss(less)
    loss(ones)
    steep = sorted(slopes, key=lambda place: -abs(slopes[place]))[:6]
    distillation.learn_scales(student, teacher, [row], rounded)
    factors = rounded[name].scales / before.scales
    for place in steep:
        assert (factors[place] - 1).sign() == -np.sign(slopes[place]), place
