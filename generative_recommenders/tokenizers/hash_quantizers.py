"""Quantizers without learning: random hyperplanes, and random codes.

They are the controls of an experiment: hyperplanes keep neighborhoods without fitting a code, random codes keep
nothing, and what a trained tokenizer gains over each is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.quantizer_base import Quantizer, kept


class LshQuantizer(Quantizer):
    """Sides of random hyperplanes through `mean`, log2(size) of them a level (Charikar 2002).

    Bit b of a code, the lowest first, is 1 on the positive side of the level's plane b.

    Args:
        sizes: powers of two; 1 is a level without planes.
        planes: (sum of log2(sizes), width), the planes' normals, level after level.
        mean: (width,), a point on all planes; none is 0.
    Raises:
        ConfigError: a size is no power of two.
    """

    kind = "lsh"
    reconstructs = False
    planes: Tensor
    mean: Tensor | None

    def __init__(self, sizes: Sequence[int], planes: Tensor, *, mean: Tensor | None = None) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.bits = plane_counts(self.sizes)
        self.width = planes.shape[1]
        if sum(self.bits) != len(planes):
            raise ValueError(f"LshQuantizer planes: got {len(planes)}, expected {sum(self.bits)}")
        self.register_buffer("planes", kept(planes))
        self.register_buffer("mean", kept(mean))

    def codebooks(self) -> list[Tensor]:
        """Sum of the level's unit normals, each on the code's side: (sizes[l], width)."""
        units = torch.nn.functional.normalize(self.planes, dim=1).split(self.bits)
        return [self._signs(bits) @ units_bD for bits, units_bD in zip(self.bits, units, strict=True)]

    def _encode(self, x_nD: Tensor) -> Tensor:
        positive = (self._sides(x_nD) > 0).to(torch.int64).split(self.bits, dim=1)
        weighted = [bits_nb << torch.arange(bits_nb.shape[1], device=x_nD.device) for bits_nb in positive]
        return torch.stack([bits_nb.sum(dim=1) for bits_nb in weighted], dim=1)

    def _distances(self, x_nD: Tensor, codes_nL: Tensor, level: int) -> Tensor:
        sides_nb = self._sides(x_nD).split(self.bits, dim=1)[level]
        signs_Cb = self._signs(self.bits[level])
        # A code's planes that the item is on the right side of cost nothing.
        return (sides_nb.clamp(min=0).square() @ (signs_Cb < 0).float().T) + (
            sides_nb.clamp(max=0).square() @ (signs_Cb > 0).float().T
        )

    def _sides(self, x_nD: Tensor) -> Tensor:
        """Signed distance to each plane, (n, planes)."""
        centered_nD = x_nD if self.mean is None else x_nD - self.mean
        return centered_nD @ torch.nn.functional.normalize(self.planes, dim=1).T

    def _signs(self, bits: int) -> Tensor:
        """(2^bits, bits): -1 or 1, the side of each plane that a code stands for."""
        code_C = torch.arange(1 << bits, device=self.planes.device)
        bit_Cb = code_C[:, None] >> torch.arange(bits, device=self.planes.device) & 1
        return bit_Cb.to(torch.float32) * 2 - 1

    def settings(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes)}

    @classmethod
    def build(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> LshQuantizer:
        return cls(settings["sizes"], tensors["planes"], mean=tensors.get("mean"))


class RandomQuantizer(Quantizer):
    """A keyed hash of the embedding's bytes: equal embeddings share codes, near ones do not.

    The hash is multilinear over the 32-bit words of the embedding in float32 (Lemire and Kaser 2014): the high half of
    k_L + sum_d k_d w_d modulo 2^64 is strongly universal for random 64-bit k.

    Args:
        sizes: codes a level, each at most 2^31.
        keys: int64 (L, width + 1), random.
    """

    kind = "random"
    reconstructs = False
    keys: Tensor

    def __init__(self, sizes: Sequence[int], keys: Tensor) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.width = keys.shape[1] - 1
        if len(self.sizes) != len(keys):
            raise ValueError(f"RandomQuantizer keys: got {len(keys)} levels, expected {len(self.sizes)}")
        self.register_buffer("keys", keys.detach().clone())

    def codebooks(self) -> list[Tensor]:
        raise DataError("random tokenizer: its codes have no vectors; initialize the model's tokens without codebooks")

    def _encode(self, x_nD: Tensor) -> Tensor:
        # Adding 0 makes -0 and 0, which are equal, the same bytes.
        words_nD = (x_nD + 0.0).contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        codes = []
        for size, keys_D in zip(self.sizes, self.keys, strict=True):
            hash_n = (words_nD * keys_D[:-1]).sum(dim=1) + keys_D[-1]
            high_n = hash_n >> 32 & 0xFFFFFFFF
            codes.append(high_n * size >> 32)
        return torch.stack(codes, dim=1)

    def _distances(self, x_nD: Tensor, codes_nL: Tensor, level: int) -> Tensor:
        own_n = self._encode(x_nD)[:, level]
        code_C = torch.arange(self.sizes[level], device=x_nD.device)
        return ((code_C - own_n[:, None]) % self.sizes[level]).to(torch.float32)

    def settings(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes)}

    @classmethod
    def build(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> RandomQuantizer:
        return cls(settings["sizes"], tensors["keys"])


def plane_counts(sizes: Sequence[int]) -> list[int]:
    """log2 of each size; raises ConfigError where one is no power of two."""
    for level, size in enumerate(sizes):
        if size < 1 or size & (size - 1):
            raise ConfigError(f"Lsh.sizes: got {size} at level {level}, expected powers of two; try {_near(size)}")
    return [size.bit_length() - 1 for size in sizes]


def _near(size: int) -> int:
    return 1 << max(size, 1).bit_length() - 1
