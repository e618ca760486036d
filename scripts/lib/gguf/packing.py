"""Weights as packed GGUF blocks: by llama.cpp's own rounding, or from codes that were calibrated.

Blocks hold 32 weights of a row (ggml/src/ggml-common.h). `block_q4_0` is an fp16 scale d and 32 codes of 4 bits,
w = d·(code - 8), 18 bytes. `block_iq4_nl` is the same with w = d·level[code]. `block_q5_0` has the codes' fifth bits
before them, w = d·(code - 16), 22 bytes. All other types are packed by `ggml_quantize_chunk` (ggml/include/ggml.h), the
function that llama-quantize calls for each tensor. It is in the library of the xllamacpp package.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

QUANTISATIONS = ("iq4_nl", "q4_0", "q4_1", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0", "f16")
CALIBRATED = ("iq4_nl", "q4_0", "q5_0")  # those that lib/quant/rounding.py can calibrate
BLOCK = 32


def pack_weights(weights: "np.ndarray", name: str, kind) -> "np.ndarray":
    import gguf
    import numpy as np

    # Every block has a 16-bit scale, and rounding to 16 bit turns a weight that is too large into infinity.
    if kind != gguf.GGMLQuantizationType.F32 and np.abs(weights).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name}: contains weights beyond ±65504, the range of 16-bit floats")
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return gguf.quants.quantize(weights, kind)
    return quantise_rows(weights, kind)


def pack_codes(scales: "np.ndarray", codes: "np.ndarray", bits: int = 4) -> "np.ndarray":
    """Packed rows of `block_q4_0` or `block_iq4_nl`, or with 5 bits of `block_q5_0`. `scales` are [rows, width / 32],
    `codes` [rows, width] from 0 to 15, or to 31."""
    import numpy as np

    rows, width = codes.shape
    codes = codes.astype(np.uint8).reshape(rows, width // BLOCK, BLOCK)
    first, second = np.split(codes & 15, 2, axis=2)
    fifth = [np.packbits(codes >> 4, axis=2, bitorder="little")] if bits == 5 else []
    d = scales.astype("<f2")[..., None].view(np.uint8)
    return np.concatenate([d, *fifth, first | second << 4], axis=2).reshape(rows, -1)


def quantise_rows(weights: "np.ndarray", kind) -> "np.ndarray":
    """Packed rows, uint8 [rows, bytes], of finite fp32 weights [rows, width], in a gguf.GGMLQuantizationType. The
    width must be a multiple of the type's block (32, or 256 for K-quants)."""
    import gguf
    import numpy as np

    weights = np.ascontiguousarray(weights, dtype=np.float32)
    packed = np.empty(gguf.quant_shape_to_byte_shape(weights.shape, kind), dtype=np.uint8)
    size = load_library().ggml_quantize_chunk(
        int(kind), weights.ctypes.data, packed.ctypes.data, 0, *weights.shape, None
    )
    if size != packed.size:
        raise RuntimeError(f"ggml wrote {size} bytes of {kind.name} where {packed.size} were expected")
    return packed


@cache
def load_library() -> ctypes.CDLL:
    import xllamacpp

    file = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    library = ctypes.CDLL(str(file))
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
