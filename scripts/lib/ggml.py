"""llama.cpp's own rounding, called in the library that the xllamacpp package brings.

`ggml_quantize_chunk` (ggml/include/ggml.h) is what llama-quantize calls for each tensor.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def quantize(weights: "np.ndarray", kind) -> "np.ndarray":
    """Packed rows, uint8 [rows, bytes], of finite fp32 weights [rows, width], in a gguf.GGMLQuantizationType. The
    width must be a multiple of the type's block (32, or 256 for K-quants)."""
    import gguf
    import numpy as np

    weights = np.ascontiguousarray(weights, dtype=np.float32)
    packed = np.empty(gguf.quant_shape_to_byte_shape(weights.shape, kind), dtype=np.uint8)
    written = library().ggml_quantize_chunk(int(kind), weights.ctypes.data, packed.ctypes.data, 0, *weights.shape, None)
    if written != packed.size:
        raise RuntimeError(f"ggml wrote {written} bytes of {kind.name} where {packed.size} were expected")
    return packed


@cache
def library() -> ctypes.CDLL:
    import xllamacpp

    file = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    loaded = ctypes.CDLL(str(file))
    size, address = ctypes.c_int64, ctypes.c_void_p
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, size, size, size, address]
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    return loaded
