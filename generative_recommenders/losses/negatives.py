"""Samplers of negative item ids.

A sampler draws R ids for every token, keyed per token, and knows the log-probability of each id under it, which the
logQ correction subtracts (Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations",
RecSys 2019). Ids stay int64 from end to end. Draws are with replacement; a negative that equals the positive is
masked by the loss.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from generative_recommenders.distributed.runtime import all_gather_concat, all_reduce_sum
from generative_recommenders.nn.dropout import Draws
from ops.random import uniform_ints

# Apart from every stream of an encoder's dropouts.
_STREAM = 1_000_003


class NegativesSampler(Protocol):
    def sample(self, positives_T: Tensor, count: int, draws: Draws) -> Tensor:
        """Ids (T, count), int64."""

    def log_q(self, num_positives: int, num_rows: int) -> Tensor | None:
        """Log-probability of each table row, (V,), or None where it is the same for all.

        `num_positives` are this rank's tokens, `num_rows` is V.
        """


class LocalNegativesSampler(nn.Module):
    """Uniform over the ids it is given."""

    catalog_X: Tensor

    def __init__(self, catalog_X: Tensor) -> None:
        super().__init__()
        self.register_buffer("catalog_X", catalog_X, persistent=False)

    def sample(self, positives_T: Tensor, count: int, draws: Draws) -> Tensor:
        picks = uniform_ints(draws.stream(_STREAM), draws.keys_T, count, self.catalog_X.numel())
        return self.catalog_X[picks]

    def log_q(self, num_positives: int, num_rows: int) -> Tensor | None:
        return None


class PopularitySampler(nn.Module):
    """In proportion to how often an item occurs in training, plus one so that every item can be drawn.

    With `trained_only` no item without a training event is; its log-probability counts it once all the same, as the
    target it may be in evaluation.
    """

    catalog_X: Tensor
    cumulative_X: Tensor

    def __init__(self, catalog_X: Tensor, counts_X: Tensor, trained_only: bool = False) -> None:
        super().__init__()
        weights_X = (counts_X + 1) * (counts_X > 0) if trained_only else counts_X + 1
        self.register_buffer("catalog_X", catalog_X, persistent=False)
        self.register_buffer("cumulative_X", weights_X.cumsum(0), persistent=False)

    def sample(self, positives_T: Tensor, count: int, draws: Draws) -> Tensor:
        total = int(self.cumulative_X[-1])
        picks = uniform_ints(draws.stream(_STREAM), draws.keys_T, count, total)
        return self.catalog_X[torch.searchsorted(self.cumulative_X, picks, right=True)]

    def log_q(self, num_positives: int, num_rows: int) -> Tensor | None:
        counts = self.cumulative_X.diff(prepend=self.cumulative_X.new_zeros(1)).double()
        log_q = torch.zeros(num_rows, dtype=torch.float32, device=counts.device)
        log_q[self.catalog_X] = (counts.clamp(min=1) / counts.sum()).log().float()
        return log_q


class InBatchNegativesSampler(nn.Module):
    """Uniform over the distinct items of the global batch (histories' next events and targets).

    An item is in the batch with probability 1 - (1 - f)^T, f its share of training events and T the batch's tokens; its
    log, up to a constant, is what logQ subtracts. In evaluation, where no loss may depend on how users are batched, the
    batch is without end: every item seen in training, each as likely as any other.
    """

    catalog_X: Tensor
    share_X: Tensor

    def __init__(self, catalog_X: Tensor, counts_X: Tensor) -> None:
        super().__init__()
        self.register_buffer("catalog_X", catalog_X, persistent=False)
        self.register_buffer("share_X", counts_X.double() / counts_X.sum().clamp(min=1), persistent=False)

    def sample(self, positives_T: Tensor, count: int, draws: Draws) -> Tensor:
        distinct = torch.unique(all_gather_concat(positives_T)) if self.training else self.catalog_X[self.share_X > 0]
        if distinct.numel() == 0:
            return positives_T.new_empty(0, count)
        picks = uniform_ints(draws.stream(_STREAM), draws.keys_T, count, distinct.numel())
        return distinct[picks]

    def log_q(self, num_positives: int, num_rows: int) -> Tensor | None:
        if not self.training:
            return None
        tokens = all_reduce_sum(torch.tensor(num_positives, device=self.share_X.device))
        present = -torch.expm1(tokens * torch.log1p(-self.share_X.clamp(max=1 - 1e-9)))
        log_q = torch.zeros(num_rows, dtype=torch.float32, device=self.share_X.device)
        # An item never seen in training cannot be in a batch; the floor only keeps its unused entry finite.
        log_q[self.catalog_X] = present.clamp(min=1e-12).log().float()
        return log_q
