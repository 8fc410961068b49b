"""AdamW with the published settings and a linear warm-up."""

from __future__ import annotations

import torch
from torch import nn

_BETAS = (0.9, 0.98)


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters, weight decay on embeddings and biases too, as published."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=_BETAS, weight_decay=weight_decay, fused=True)


def warmed_up(learning_rate: float, step: int, num_warmup_steps: int) -> float:
    """Rate of step 0, 1, …: rises to `learning_rate` over `num_warmup_steps`, constant after."""
    if step >= num_warmup_steps:
        return learning_rate
    return learning_rate * (step + 1) / num_warmup_steps
