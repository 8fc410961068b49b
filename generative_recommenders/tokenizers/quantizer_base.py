"""The interface of quantizers: trained maps from an item's embedding to its codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from generative_recommenders.data.errors import DataError

# Values of an embedding matrix that are handled at a time, 64 MB of float32.
BLOCK_VALUES = 1 << 24


class Quantizer(nn.Module, ABC):
    """A trained map from embeddings (N, width) to codes (N, L), level l counting from 0 to sizes[l] - 1."""

    kind: ClassVar[str]
    reconstructs: ClassVar[bool] = True
    sizes: tuple[int, ...]
    width: int

    def encode(self, x_ND: Tensor) -> Tensor:
        """Codes, int64 (N, L), on the device of x. Works in blocks: a whole catalogue is one call.

        Raises:
            DataError: x is not (N, width) of floats, or a row has NaN or infinity.
        """
        check_embeddings(x_ND, self.width)
        codes_NL = torch.empty(len(x_ND), len(self.sizes), dtype=torch.int64, device=x_ND.device)
        with torch.no_grad():
            for rows in blocks(len(x_ND), self.width):
                codes_NL[rows] = self._encode(self._input(x_ND[rows])).to(x_ND.device)
        return codes_NL

    def reconstruct(self, codes_NL: Tensor) -> Tensor:
        """The embeddings that codes (N, L) stand for, float32 (N, width), on the device of the codes.

        Raises:
            DataError: the codes do not fit `sizes`, or codes of this kind stand for no embedding (`reconstructs`).
        """
        self.check_codes(codes_NL)
        result_ND = torch.empty(len(codes_NL), self.width, device=codes_NL.device)
        with torch.no_grad():
            for rows in blocks(len(codes_NL), self.width):
                codes_nL = codes_NL[rows].to(self._device(), torch.int64)
                result_ND[rows] = self._reconstruct(codes_nL).to(codes_NL.device)
        return result_ND

    def distances(self, x_nD: Tensor, codes_nL: Tensor, level: int) -> Tensor:
        """Distance of each item to each code of `level`, float32 (n, sizes[level]), on the device of x.

        Residual codes: squared, plus the code's price if it has one, to what codes_nL[:, :level] leave of the item.
        Product codes: squared, of the level's own part. Hyperplanes: squared, of the moves to the code's side of each
        of the level's planes, summed. Random codes: steps onward from the item's own, so that every code has its turn.
        The whole matrix is returned, so the caller chooses n.

        Raises:
            DataError: as `encode`.
        """
        check_embeddings(x_nD, self.width)
        with torch.no_grad():
            codes_nL = codes_nL.to(self._device(), torch.int64)
            return self._distances(self._input(x_nD), codes_nL, level).to(x_nD.device)

    def check_codes(self, codes_NL: Tensor) -> None:
        """Raises DataError unless codes are integers (N, L), each within its level's size."""
        expected = f"integers (items, {len(self.sizes)})"
        if codes_NL.dim() != 2 or codes_NL.shape[1] != len(self.sizes) or codes_NL.is_floating_point():
            raise DataError(f"codes: got {_shape(codes_NL)}, expected {expected}; encode with this tokenizer")
        if len(codes_NL) == 0:
            return
        low, high = codes_NL.amin(dim=0).tolist(), codes_NL.amax(dim=0).tolist()
        for level, size in enumerate(self.sizes):
            if low[level] < 0 or high[level] >= size:
                got = low[level] if low[level] < 0 else high[level]
                raise DataError(
                    f"codes of level {level}: got {got}, expected 0 to {size - 1}; encode with this tokenizer"
                )

    @abstractmethod
    def codebooks(self) -> list[Tensor]:
        """One (sizes[l], d) a level: the vector of each code in the quantizer's latent space."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All of the quantizer but its tensors, as plain JSON."""

    @classmethod
    @abstractmethod
    def build(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Quantizer:
        """The quantizer that had these `settings()` and this `state_dict()`."""

    @abstractmethod
    def _encode(self, x_nD: Tensor) -> Tensor: ...

    @abstractmethod
    def _distances(self, x_nD: Tensor, codes_nL: Tensor, level: int) -> Tensor: ...

    def _reconstruct(self, codes_nL: Tensor) -> Tensor:
        raise DataError(f"{self.kind} tokenizer: its codes stand for no embedding; leave reconstruction out")

    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _input(self, x_nD: Tensor) -> Tensor:
        return x_nD.detach().to(self._device(), torch.float32)


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices that cover `rows` rows of `width` values, some `BLOCK_VALUES` values each."""
    step = max(BLOCK_VALUES // max(width, 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def squared_distances(x_nD: Tensor, codebook_CD: Tensor) -> Tensor:
    """(n, C) squared Euclidean distances by one matrix product; what rounding makes negative is 0."""
    products_nC = x_nD @ codebook_CD.T
    norms_nC = x_nD.square().sum(dim=1, keepdim=True) + codebook_CD.square().sum(dim=1)
    return norms_nC.sub_(products_nC, alpha=2).clamp_(min=0)


def with_prices(codebook_CD: Tensor, prices_C: Tensor, level: int, levels: int) -> Tensor:
    """(C, D + levels): codes whose squared distance to a row that ends in `levels` zeros is raised by their prices.

    Column D + level holds the roots of the prices, which are 0 or more; each level has its own, as what is left of a
    row after a level has that level's root in it.
    """
    columns_CL = torch.zeros(len(codebook_CD), levels, device=codebook_CD.device)
    columns_CL[:, level] = prices_C.sqrt()
    return torch.cat([codebook_CD, columns_CL], dim=1)


def check_embeddings(x_ND: Tensor, width: int | None = None) -> None:
    """Raises DataError unless x is a matrix of finite floats, of `width` columns where that is given."""
    fits = x_ND.dim() == 2 and x_ND.is_floating_point() and x_ND.shape[1] == (x_ND.shape[1] if width is None else width)
    if not fits:
        expected = "floats (items, width)" if width is None else f"floats (items, {width})"
        raise DataError(f"embeddings: got {_shape(x_ND)}, expected {expected}; use those it was fitted on")
    for rows in blocks(*x_ND.shape):
        # One sum takes a fraction of the time, and is finite unless a number is not or it overflows.
        if bool(x_ND[rows].sum(dtype=torch.float32).isfinite()):
            continue
        finite_n = x_ND[rows].isfinite().all(dim=1)
        if not bool(finite_n.all()):
            row = rows.start + int(finite_n.logical_not().nonzero()[0])
            raise DataError(f"embeddings: got NaN or infinity in row {row}, expected finite numbers; embed it again")


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def kept(tensor: Tensor | None) -> Tensor | None:
    """A float32 copy of its own for a quantizer's buffer."""
    return None if tensor is None else tensor.detach().to(torch.float32, copy=True).contiguous()
