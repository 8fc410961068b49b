"""The (token, item) pairs whose weighted queries sum to the table's gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def pairs(
    scale_T: Tensor, losses_T: Tensor, positive_ids_T: Tensor, negative_ids_TR: Tensor, probabilities_TR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Item ids, tokens and weights (T * R + T,) for `row_sums`, the positives last.

    A pair's weight is scale[t] times the derivative of loss[t] by its logit: the probability, of the positive minus
    one. That is -(1 - exp(-loss)), which does not cancel for a token whose loss is small.
    """
    tokens, negatives = negative_ids_TR.shape
    every_T = torch.arange(tokens, device=negative_ids_TR.device)
    tokens_TR = every_T[:, None].expand(tokens, negatives)
    weights_TR = probabilities_TR * scale_T[:, None]
    return (
        torch.cat([negative_ids_TR.flatten(), positive_ids_T]),
        torch.cat([tokens_TR.flatten(), every_T]),
        torch.cat([weights_TR.flatten(), torch.expm1(-losses_T) * scale_T]),
    )
