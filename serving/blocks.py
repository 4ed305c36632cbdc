"""Block-FP8 checkpoints whose matrices do not end with a whole block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


@contextmanager
def of_size(size: tuple[int, int] | None) -> Iterator[None]:
    """While a checkpoint is dequantised: each scale is that of `size` values, fewer at the end of a matrix.

    transformers takes the matrix over its grid of scales for that size: it refuses 576 rows in blocks of 128, as of
    DeepSeek-V3's kv_a_proj_with_mqa, and reads 160 rows as two blocks of 80. Nothing changes where `size` is None, or
    for a grid that is not of such blocks.
    """
    if size is None:
        yield
        return
    plain = Fp8Dequantize._dequantize_one

    def padded(self: Any, quantized: Tensor, scales: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, columns = quantized.shape[-2:]
        more = (-rows % size[0], -columns % size[1])
        grid = ((rows + more[0]) // size[0], (columns + more[1]) // size[1])
        if not any(more) or tuple(scales.shape[-2:]) != grid:
            whole: Tensor = plain(self, quantized, scales, *args, **kwargs)
            return whole
        kind = quantized.dtype
        wide = F.pad(quantized.float(), (0, more[1], 0, more[0])).to(kind)  # float8 has no padding of its own
        found: Tensor = plain(self, wide, scales, *args, **kwargs)
        return found[..., :rows, :columns].contiguous()

    Fp8Dequantize._dequantize_one = padded
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = plain
