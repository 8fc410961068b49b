"""Sampling prefixes without replacement: Gumbel noise whose best k, level by level, are a sample of the model.

The sum of a log-probability and Gumbel noise is largest for a sample of the distribution, its k largest are a sample
without replacement, and the noise of a prefix is the largest of its continuations' (Kool, van Hoof, Welling,
"Stochastic Beams and Where to Find Them", 2019). So the noise is drawn top down: that of a prefix first, then that of
its continuations, given their maximum.

The noise of a prefix is a function of (seed, request, prefix) alone. A wider search therefore extends the sample of a
narrower one, and no request depends on its batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from ops.random import fold, lane_bits, token_hash

# A user's histories are told apart by their lengths, which lie below this.
_MAX_LENGTH = 1 << 20


def request_keys(batch: SequenceBatch, seed: int) -> Tensor:
    """Where each request's noise begins, int64 (B, 1): by user and length of the history, not by place in the batch."""
    return token_hash(fold(seed), batch.user_ids_B * _MAX_LENGTH + batch.lengths_B)[:, None]


def children_keys(keys_BM: Tensor, size: int) -> Tensor:
    """Keys of all continuations, int64 (B, M, C), each 32 random bits."""
    return lane_bits(token_hash(1, keys_BM)[..., None], torch.arange(size, device=keys_BM.device))


def perturbed(log_probs_BMC: Tensor, noisy_BM: Tensor, keys_BMC: Tensor) -> Tensor:
    """Noisy log-probabilities of the continuations, given that the largest is their prefix's `noisy_BM`.

    `log_probs_BMC` are those of the whole prefix and its continuation; -inf stays -inf.
    """
    uniform = (keys_BMC.double() + 0.5) / 2.0**32
    free_BMC = log_probs_BMC.double() - torch.log(-torch.log(uniform))
    highest_BM1 = free_BMC.amax(-1, keepdim=True)
    # Where nothing continues, any finite number keeps the arithmetic free of NaN.
    highest_BM1 = torch.where(highest_BM1.isfinite(), highest_BM1, 0.0)
    limit_BM1 = noisy_BM.double()[..., None]
    limit_BM1 = torch.where(limit_BM1.isfinite(), limit_BM1, 0.0)
    # -log(exp(-limit) - exp(-highest) + exp(-free)), in the form that neither overflows nor cancels.
    below = limit_BM1 - free_BMC + _log1mexp(free_BMC - highest_BM1)
    noisy_BMC = limit_BM1 - below.clamp(min=0.0) - torch.log1p(torch.exp(-below.abs()))
    dead_BMC = log_probs_BMC.isneginf() | noisy_BM.isneginf()[..., None]
    return noisy_BMC.masked_fill(dead_BMC, -math.inf)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x <= 0; the form with expm1 is accurate near 0, that with log1p far from it."""
    near = x > -math.log(2.0)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(x)))
