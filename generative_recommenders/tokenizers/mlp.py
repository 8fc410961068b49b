"""Multi-layer perceptron of a tokenizer's encoder and decoder, which its own settings rebuild.

TIGER's encoder has widths D, 512, 256, 128, 32 and ReLU between the layers (Rajput et al. 2023, section 4.1); with
`skip` it is x + MLP(x), the form of RQ-KMeans+ (GPR, 2025), whose last layer starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from torch import Tensor

from generative_recommenders.config_syntax import ConfigError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


class Mlp(nn.Module):
    """Linear layers of `widths` with `activation` between them, (n, widths[0]) -> (n, widths[-1]).

    Args:
        widths: of the input, of each hidden layer, and of the output.
        skip: add the input to the output; the last layer starts at zero, so that the whole starts as the identity.
        activation: "relu", "silu" or "gelu".
    Raises:
        ConfigError: fewer than two widths, a width below 1, unequal ends with `skip`, an unknown activation.
    """

    def __init__(self, widths: Sequence[int], *, skip: bool = False, activation: str = "relu") -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.skip = skip
        self.activation = activation
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ConfigError(f"Mlp.widths: got {self.widths}, expected those of the input and the output; add layers")
        if skip and self.widths[0] != self.widths[-1]:
            raise ConfigError(f"Mlp.widths: got {self.widths} with skip, expected equal ends; change the last width")
        if activation not in ACTIVATIONS:
            expected = ", ".join(ACTIVATIONS)
            raise ConfigError(f"Mlp.activation: got {activation!r}, expected one of {expected}; choose one of these")
        layers: list[nn.Module] = []
        last = len(self.widths) - 2
        for index, (before, after) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            linear = nn.Linear(before, after)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            if skip and index == last:
                nn.init.zeros_(linear.weight)
            layers += [linear] if index == last else [linear, ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_nD: Tensor) -> Tensor:
        y_nD = self.layers(x_nD)
        return x_nD + y_nD if self.skip else y_nD

    def settings(self) -> dict[str, Any]:
        """What `Mlp(**settings)` takes, as plain JSON."""
        return {"widths": list(self.widths), "skip": self.skip, "activation": self.activation}
