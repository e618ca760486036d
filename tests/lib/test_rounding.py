"""Calibrated rounding against plain rounding, algebra, and the format."""

import gguf as package
import numpy as np
import pytest
import torch

from lib import rounding, tiny
from lib.gguf import pack_q4_0


def inputs(width: int, rows: int = 2000, seed: int = 0):
    """Inputs whose features depend on each other, as hidden states do; in the same way for every seed."""
    mix = torch.randn(width // 4, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width // 4, generator=generator) @ mix + 0.1 * torch.randn(
        rows, width, generator=generator
    )


def values(scales, codes):
    return (codes - 8) * scales.repeat_interleave(rounding.BLOCK, 1)


def nearest(weight):
    packed = package.quants.quantize(weight.numpy(), package.GGMLQuantizationType.Q4_0)
    return torch.tensor(package.quants.dequantize(packed, package.GGMLQuantizationType.Q4_0))


def test_what_the_layer_answers_moves_less_than_by_plain_rounding():
    x, weight = inputs(128), torch.randn(48, 128, generator=torch.Generator().manual_seed(1))
    rounded = values(*rounding.calibrated(weight, x.T @ x))
    fresh = inputs(128, seed=2)  # of the same kind, but not those that it was calibrated on

    def error(other):
        return ((fresh @ (weight - other).T) ** 2).mean().item()

    assert error(rounded) < 0.5 * error(nearest(weight))


def test_independent_inputs_leave_nothing_to_compensate():
    """With H a multiple of the identity each weight goes to the nearest code of its block's scale."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    scales, codes = rounding.calibrated(weight, 7.0 * torch.eye(64))
    assert torch.equal(codes, rounding.code_of(weight, scales.repeat_interleave(32, 1)))
    plain = ((weight - nearest(weight)) ** 2).sum()
    assert ((weight - values(scales, codes)) ** 2).sum() < plain  # the scale is searched, not taken from the largest


def test_packed_blocks_say_the_same_in_the_file_format():
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(4))
    scales, codes = rounding.calibrated(weight, torch.eye(96))
    assert torch.equal(scales.half().float(), scales)  # as fp16 holds them
    packed = pack_q4_0(scales.numpy(), codes.to(torch.uint8).numpy())
    read = package.quants.dequantize(packed, package.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(read, values(scales, codes).numpy())


def test_a_weight_of_zeros_and_inputs_never_seen():
    x = inputs(64)
    x[:, 5] = 0
    weight = torch.zeros(4, 64)
    weight[1] = 1.0
    rounded = values(*rounding.calibrated(weight, x.T @ x))
    assert rounded.isfinite().all() and rounded[0].abs().max() == 0
    torch.testing.assert_close(rounded[1], weight[1], atol=0.02, rtol=0)


def test_a_whole_model_tied_or_not():
    for tied in (True, False):
        words = tiny.tokenizer()
        model = tiny.model(len(words), tie_word_embeddings=tied).eval()
        rows = [{"prompt": [{"role": "user", "content": f"area {n}"}],
                 "completion": [{"role": "assistant", "content": "north"}]} for n in range(4)]  # fmt: skip
        blocks = rounding.calibrated_blocks(model, words, rows, {2})
        assert len(blocks) == 2 * 7 + 1
        assert ("model.embed_tokens.weight" if tied else "lm_head.weight") in blocks
        name = "model.layers.1.mlp.down_proj.weight"
        read = package.quants.dequantize(blocks[name], package.GGMLQuantizationType.Q4_0)
        np.testing.assert_array_equal(read, model.state_dict()[name].numpy())  # the model holds what the file will


def test_what_cannot_be_rounded_is_named():
    layer = torch.nn.Linear(40, 8)
    with pytest.raises(ValueError, match=r"some.layer: its width 40"):
        rounding.round_layer("some.layer", layer, torch.eye(40))
    layer = torch.nn.Linear(32, 8)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"some.layer: holds weights that are not finite"):
        rounding.round_layer("some.layer", layer, torch.eye(32))
