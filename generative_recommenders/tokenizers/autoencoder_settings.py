"""Settings that RQ-VAE and RQ-KMeans+ have in common, and their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.tokenizers.mlp import ACTIVATIONS
from generative_recommenders.tokenizers.vector_quantization import (
    CODEBOOKS,
    EMA_DECAY,
    ESTIMATORS,
    STRAIGHT_THROUGH,
)


@dataclass(frozen=True)
class AutoencoderSettings:
    """How the codes, losses and steps of an autoencoder are chosen.

    Args:
        sizes: codes a level.
        hidden_dims: widths between those of the embedding and of the codes; the decoder has them in reverse.
        activation: between layers: "relu", "silu" or "gelu".
        input_normalization: each column less its mean and over its standard deviation ("standardize"), less its mean
            ("center"), or as it is ("none").
        codebook: codes learn by their gradient ("gradient"), as moving averages ("ema"), or as fixed codes behind one
            trained matrix ("simvq").
        estimator: of the gradient through the choice of a code: "ste", "rotation" or "gumbel". "rotation" goes with
            "ema": codes that learn by gradient fall behind what it moves, and become uneven.
        straight_through: "total" or, as LC-Rec has it, "per_level". With the latter and "ste" no level but the first
            sends the encoder a commitment.
        sinkhorn_epsilons: one a level, or none. Above 0, codes of a training batch are balanced by that much entropy;
            LC-Rec has 0.003 on the last level.
        temperature: of "gumbel", in units of squared distances.
        ema_decay: of "ema".
        reconstruction: "sum" over columns, with quantization losses summed over columns and levels (TIGER), or "mean"
            of each (LC-Rec).
        commitment, codebook_weight: of the two quantization losses; the second is nothing to "ema".
        optimizer: "adamw" or "adagrad". The published rates of Adagrad are 1e-3 (GRID, SpecGR) to 0.4 (TIGER).
        learning_rate: reached after `warmup_steps`, then constant.
        weight_decay: of encoder and decoder.
        batch_size: rows a step.
        steps: of the whole training.
        epochs: passes over the rows, in the place of `steps` unless 0.
        warmup_steps: over which the learning rate rises from 0.
        plain_share: part of the steps, the first ones, that train encoder and decoder without codes.
        revive_every: steps after which a code that no row has chosen moves to a random residual; 0 is never.
        check_every: steps between checks of usage and collisions, and between checkpoints.
        keep: "best", with the fewest collisions of the checks in the second half of the training, or "last".
    Raises:
        ConfigError: a setting outside its range.
    """

    name: ClassVar[str]

    sizes: tuple[int, ...] = (256, 256, 256)
    hidden_dims: tuple[int, ...] = (512, 256, 128)
    activation: str = "relu"
    input_normalization: str = "standardize"
    codebook: str = "gradient"
    estimator: str = "ste"
    straight_through: str = "total"
    sinkhorn_epsilons: tuple[float, ...] = ()
    temperature: float = 0.2
    ema_decay: float = EMA_DECAY
    reconstruction: str = "sum"
    commitment: float = 0.25
    codebook_weight: float = 1.0
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 512
    steps: int = 2000
    epochs: int = 0
    warmup_steps: int = 50
    plain_share: float = 0.25
    revive_every: int = 100
    check_every: int = 200
    keep: str = "best"

    def __post_init__(self) -> None:
        # gin writes lists where tuples are meant.
        for field in ("sizes", "hidden_dims", "sinkhorn_epsilons"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.sizes or not all(isinstance(size, int) and size >= 2 for size in self.sizes):
            self._refuse("sizes", self.sizes, "2 codes or more a level", "(256, 256, 256)")
        if not all(isinstance(width, int) and width >= 1 for width in self.hidden_dims):
            self._refuse("hidden_dims", self.hidden_dims, "widths of 1 or more", "(512, 256, 128)")
        if self.sinkhorn_epsilons and len(self.sinkhorn_epsilons) != len(self.sizes):
            example = (0.0,) * (len(self.sizes) - 1) + (0.003,)
            self._refuse("sinkhorn_epsilons", self.sinkhorn_epsilons, f"{len(self.sizes)} values or none", str(example))
        if not all(epsilon >= 0 for epsilon in self.sinkhorn_epsilons):
            self._refuse("sinkhorn_epsilons", self.sinkhorn_epsilons, "0 (off) or more", "0.003")
        self._one_of("activation", ACTIVATIONS)
        self._one_of("input_normalization", ("standardize", "center", "none"))
        self._one_of("codebook", CODEBOOKS)
        self._one_of("estimator", ESTIMATORS)
        self._one_of("straight_through", STRAIGHT_THROUGH)
        self._one_of("reconstruction", ("sum", "mean"))
        self._one_of("optimizer", ("adagrad", "adamw"))
        self._one_of("keep", ("best", "last"))
        for field in ("temperature", "learning_rate"):
            if not getattr(self, field) > 0:
                self._refuse(field, getattr(self, field), "more than 0", "the default")
        for field in ("batch_size", "steps", "check_every"):
            if not getattr(self, field) >= 1:
                self._refuse(field, getattr(self, field), "1 or more", "the default")
        for field in ("commitment", "codebook_weight", "weight_decay", "epochs", "warmup_steps", "revive_every"):
            if not getattr(self, field) >= 0:
                self._refuse(field, getattr(self, field), "0 or more", "the default")
        if not 0 <= self.plain_share < 1:
            self._refuse("plain_share", self.plain_share, "0 to less than 1", "0.25")
        if not 0 < self.ema_decay < 1:
            self._refuse("ema_decay", self.ema_decay, "between 0 and 1", str(EMA_DECAY))
        if self.estimator == "gumbel" and any(self.sinkhorn_epsilons):
            self._refuse("sinkhorn_epsilons", self.sinkhorn_epsilons, 'none with estimator="gumbel"', '"ste"')

    def _one_of(self, field: str, names: Any) -> None:
        if getattr(self, field) not in names:
            self._refuse(field, repr(getattr(self, field)), f"one of {', '.join(names)}", f'"{next(iter(names))}"')

    def _refuse(self, field: str, got: object, expected: str, example: str) -> None:
        raise ConfigError(f"{self.name}.{field}: got {got}, expected {expected}; try {example}")
