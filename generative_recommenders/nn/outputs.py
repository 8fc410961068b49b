"""What turns an encoder state into a query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class L2NormOutput(nn.Module):
    """x / max(|x|, eps)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        return F.normalize(states, dim=-1, eps=self.eps)


class LayerNormOutput(nn.Module):
    """Layer norm over the last dimension, without learned scale or shift."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        return F.layer_norm(states, states.shape[-1:], eps=self.eps)


OUTPUTS: dict[str, type[L2NormOutput] | type[LayerNormOutput]] = {
    "l2_norm": L2NormOutput,
    "layer_norm": LayerNormOutput,
}


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps) along the last dimension."""
    return x / torch.clamp(torch.linalg.vector_norm(x, dim=-1, keepdim=True), min=eps)
