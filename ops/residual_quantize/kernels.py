"""Residual quantization in Triton: a program takes BLOCK_T tokens through all levels."""

import triton
import triton.language as tl


@triton.jit
def residual_quantize(
    x,
    codebooks,
    half_norms,
    codes,
    residual,
    x_stride,
    tokens,
    levels,
    size,
    width,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes codes, (tokens, levels), and the float32 residual, (tokens, width), which it holds between levels too."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = residual + t[:, None] * width
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (t[:, None] < tokens) & (d[None, :] < width)
        from_x = tl.load(x + t[:, None] * x_stride + d[None, :], mask=inside, other=0.0)
        tl.store(rows + d[None, :], from_x.to(tl.float32), mask=inside)

    for level in range(levels):
        # Other threads of the program read the residual than those that wrote it.
        tl.debug_barrier()
        best = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        code = tl.zeros((BLOCK_T,), tl.int32)
        for first in range(0, size, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            products = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            for start in range(0, width, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                inside = (t[:, None] < tokens) & (d[None, :] < width)
                left = tl.load(rows + d[None, :], mask=inside, other=0.0)
                inside = (c[None, :] < size) & (d[:, None] < width)
                right = tl.load(codebooks + c[None, :] * width + d[:, None], mask=inside, other=0.0)
                products = tl.dot(left, right, products, input_precision=PRECISION)
            halves = tl.load(half_norms + c, mask=c < size, other=float("inf"))
            scores = products - halves[None, :]
            scores = tl.where(scores == scores, scores, float("-inf"))
            # The first of equal scores, here and, as a later tile must be better, among tiles.
            top, at = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
            better = top > best
            best = tl.where(better, top, best)
            code = tl.where(better, first + at, code)
        tl.store(codes + t * levels + level, code.to(tl.int64), mask=t < tokens)

        # Nor may a thread overwrite what another still multiplies.
        tl.debug_barrier()
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            inside = (t[:, None] < tokens) & (d[None, :] < width)
            chosen = tl.load(codebooks + code.to(tl.int64)[:, None] * width + d[None, :], mask=inside, other=0.0)
            left = tl.load(rows + d[None, :], mask=inside, other=0.0)
            tl.store(rows + d[None, :], left - chosen, mask=inside)
        codebooks += size * width
        half_norms += size
