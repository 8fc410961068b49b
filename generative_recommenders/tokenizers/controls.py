"""Controls: tokenizers that learn no codes, random hyperplanes and random codes (see `hash_quantizers`).

What a model gains with learned semantic IDs over `Lsh` is due to learning them, over `Random` to their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from generative_recommenders.config import configurable
from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.tokenizers.hash_quantizers import LshQuantizer, RandomQuantizer, plane_counts
from generative_recommenders.tokenizers.quantizer_base import check_embeddings
from generative_recommenders.tokenizers.rqkmeans import Progress

# A hash's high half times the size must stay below 2^63.
_MAX_RANDOM_SIZE = 1 << 31


@configurable("lsh")
@dataclass(frozen=True)
class Lsh:
    """Settings of random hyperplanes.

    Attributes:
        sizes: codes a level, powers of two.
        center: put the planes through the mean of the embeddings instead of 0.
    Raises:
        ConfigError: a size is no power of two.
    """

    sizes: tuple[int, ...] = (256, 256, 256)
    center: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        _check_levels("Lsh", self.sizes)
        plane_counts(self.sizes)

    def fit(self, x_ND: Tensor, *, seed: int, progress: Progress | None = None) -> LshQuantizer:
        """Planes drawn from `seed`; of x, floats of any width, only the mean is used.

        Raises:
            DataError: x is no matrix of finite floats.
        """
        check_embeddings(x_ND)
        generator = torch.Generator().manual_seed(seed)
        planes = torch.randn(sum(plane_counts(self.sizes)), x_ND.shape[1], generator=generator)
        mean_D = x_ND.to(torch.float32).mean(dim=0).cpu() if self.center and len(x_ND) else None
        return LshQuantizer(self.sizes, planes, mean=mean_D)


@configurable("random_codes")
@dataclass(frozen=True)
class Random:
    """Settings of random codes.

    Attributes:
        sizes: codes a level.
    Raises:
        ConfigError: a size below 1 or above 2^31.
    """

    sizes: tuple[int, ...] = (256, 256, 256)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        _check_levels("Random", self.sizes)
        if min(self.sizes) < 1 or max(self.sizes) > _MAX_RANDOM_SIZE:
            raise ConfigError(f"Random.sizes: got {self.sizes}, expected 1 to 2^31 codes a level; try (256, 256, 256)")

    def fit(self, x_ND: Tensor, *, seed: int, progress: Progress | None = None) -> RandomQuantizer:
        """Keys of the hash drawn from `seed`; of x, floats of any width, only the width is used.

        Raises:
            DataError: x is no matrix of finite floats.
        """
        check_embeddings(x_ND)
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.sizes), x_ND.shape[1] + 1)
        high, low = (torch.randint(1 << 32, shape, generator=generator) for _ in range(2))
        return RandomQuantizer(self.sizes, high << 32 | low)


def _check_levels(owner: str, sizes: tuple[int, ...]) -> None:
    if not sizes:
        raise ConfigError(f"{owner}.sizes: got no level, expected at least one; try (256, 256, 256)")
