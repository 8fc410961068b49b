"""Full softmax through the whole (T, X) matrix of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy(queries_TD: torch.Tensor, items_XD: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Queries carry the temperature already; positions are the targets' rows in `items_XD`."""
    return F.cross_entropy(queries_TD @ items_XD.T, positions_T, reduction="none")
