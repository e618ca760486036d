"""Calibrated rounding against plain rounding, algebra, and the format."""

import gguf as package
import numpy as np
import pytest
import torch

from lib.gguf import packing
from lib.model import chat, tiny
from lib.quant import rounding

KINDS = {name: package.GGMLQuantizationType[name.upper()] for name in rounding.LEVELS}


def inputs(width: int, rows: int = 2000, seed: int = 0):
    """Inputs whose features depend on each other, as hidden states do; in the same way for every seed."""
    mix = torch.randn(width // 4, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width // 4, generator=generator) @ mix + 0.1 * torch.randn(
        rows, width, generator=generator
    )


def values(scales, codes, kind):
    return rounding.dequantise(codes, scales.repeat_interleave(rounding.BLOCK, 1), rounding.LEVELS[kind])


def calibrated(weight, moment, kind):
    return rounding.round_calibrated(weight, moment, rounding.LEVELS[kind])


def nearest(weight, kind):
    packed = packing.quantise_rows(weight.numpy(), KINDS[kind])
    return torch.tensor(package.quants.dequantize(packed, KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_layer_answers_moves_less_than_by_plain_rounding(kind):
    x, weight = inputs(128), torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    rounded = values(*calibrated(weight, x.T @ x, kind), kind)
    fresh = inputs(128, seed=2)  # of the same kind, but not those that it was calibrated on

    def error(other):
        return ((fresh @ (weight - other).T) ** 2).mean().item()

    assert error(rounded) < 0.5 * error(nearest(weight, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_independent_inputs_leave_nothing_to_compensate(kind):
    """With H a multiple of the identity each weight goes to the nearest code of its block's scale."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    scales, codes = calibrated(weight, 7.0 * torch.eye(64), kind)
    levels = torch.tensor(rounding.LEVELS[kind]) * scales.repeat_interleave(32, 1)[..., None]
    ours = (weight - values(scales, codes, kind)).abs()
    torch.testing.assert_close(ours, (weight[..., None] - levels).abs().amin(-1))
    if kind != "iq4_nl":  # the scale is searched, not taken from the largest weight; for IQ4_NL, ggml searches too
        assert (ours**2).sum() < ((weight - nearest(weight, kind)) ** 2).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_blocks_say_the_same_in_the_file_format(kind):
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(4))
    scales, codes = calibrated(weight, torch.eye(96), kind)
    assert torch.equal(scales.half().float(), scales)  # as fp16 holds them
    packed = rounding.Rounded(scales, codes, rounding.LEVELS[kind]).packed()
    read = package.quants.dequantize(packed, KINDS[kind])
    np.testing.assert_array_equal(read, values(scales, codes, kind).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zeros_and_inputs_never_seen(kind):
    x = inputs(64)
    x[:, 5] = 0
    weight = torch.zeros(4, 64)
    weight[1] = 1.0
    rounded = values(*calibrated(weight, x.T @ x, kind), kind)
    assert rounded.isfinite().all() and rounded[0].abs().max() == 0
    torch.testing.assert_close(rounded[1], weight[1], atol=0.02, rtol=0)


def encoded(words, count=4):
    return [
        chat.encode_row(words, {"prompt": [{"role": "user", "content": f"area {n}"}],
                            "completion": [{"role": "assistant", "content": "north"}]}, {2})
        for n in range(count)
    ]  # fmt: skip


def families():
    """Tiny random models of each family whose layers have their own names and forms."""
    from transformers import Phi3Config, Phi3ForCausalLM, PhiConfig, PhiForCausalLM, Qwen2Config, Qwen2ForCausalLM

    words = tiny.tokenizer()
    shape = dict(vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, pad_token_id=2)  # fmt: skip
    return {
        "tied": tiny.model(len(words)), "untied": tiny.model(len(words), tie_word_embeddings=False),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**shape)), "phi": PhiForCausalLM(PhiConfig(**shape)),
        "phi3": Phi3ForCausalLM(Phi3Config(**shape)),
    }  # fmt: skip


@pytest.mark.parametrize("family", ["tied", "untied", "qwen2", "phi", "phi3"])
def test_every_matrix_of_a_model_is_rounded(family):
    model = families()[family].eval()
    matrices = {name: "iq4_nl" for name, weights in model.named_parameters() if weights.ndim == 2}
    output = "lm_head.weight" in matrices
    rounded = rounding.calibrate(model, encoded(tiny.tokenizer()), matrices)
    # An embedding of its own only gives inputs: there is no output of it whose error could be weighed.
    assert set(rounded) == set(matrices) - ({"model.embed_tokens.weight"} if output else set())
    for name, one in rounded.items():
        read = package.quants.dequantize(one.packed(), KINDS["iq4_nl"])
        np.testing.assert_array_equal(read, model.state_dict()[name].numpy())  # the model holds what the file will


def test_what_the_answers_do_not_depend_on_hardly_counts():
    """In the last layer's values and MLP, only the answer's tokens matter: a prompt token's H is that of the floor."""
    words = tiny.tokenizer()
    model = tiny.model(len(words), initializer_range=0.2).eval()
    row, last = encoded(words, 1), model.model.layers[-1].mlp.gate_proj
    kept = []
    hook = last.register_forward_pre_hook(lambda layer, given: kept.append(given[0][0]))
    moment = rounding.second_moments(model, model.lm_head, [last], row, seed=0)[last]
    hook.remove()
    x, answered = kept[0].float(), torch.tensor(row[0]["labels"]).ne(-100).roll(-1)
    rest = moment - rounding.FLOOR * x[~answered].T @ x[~answered]
    assert 1 <= answered.sum() < 10 and torch.linalg.matrix_rank(rest, rtol=1e-4) <= answered.sum()


def test_what_cannot_be_rounded_is_named():
    layer = torch.nn.Linear(40, 8)
    with pytest.raises(ValueError, match=r"some.layer: its width 40"):
        rounding.round_layer("some.layer", layer, torch.eye(40), rounding.LEVELS["q4_0"])
    model = tiny.model(64)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight: contains weights that are not finite"):
        rounding.calibrate(model, [], {})
