"""AdamW with the published settings, a linear warm-up and what may follow it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["constant", "cosine", "inverse_sqrt"]
_BETAS = (0.9, 0.98)


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters, weight decay on embeddings and biases too, as published."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=_BETAS, weight_decay=weight_decay, fused=True)


def learning_rate_at(
    learning_rate: float, step: int, num_warmup_steps: int, schedule: Schedule = "constant", num_steps: int = 0
) -> float:
    """Rate of step 0, 1, …: rises linearly to `learning_rate` over `num_warmup_steps`, then follows the schedule.

    "constant" stays; "cosine" falls along half a cosine to 0 at `num_steps`; "inverse_sqrt" falls with the root of the
    number of the step, from the end of the warm-up (T5; at least one step of it).
    """
    if step < num_warmup_steps:
        return learning_rate * (step + 1) / num_warmup_steps
    if schedule == "cosine":
        share = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
        return learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    if schedule == "inverse_sqrt":
        return learning_rate * math.sqrt(max(1, num_warmup_steps) / (step + 1))
    return learning_rate
