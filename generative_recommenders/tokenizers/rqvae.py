"""RQ-VAE and RQ-KMeans+: residual codes of a trained encoding of the items' embeddings.

RQ-VAE is that of TIGER (Rajput et al. 2023, section 3.1): an autoencoder with a narrow middle, which residual codes
quantize. It differs in what keeps its codes in use without tens of thousands of epochs: encoder and decoder are trained
alone first, k-means runs over all rows and not over the first batch, unused codes are revived, and the optimizer is
AdamW. Its losses are those of the paper; `AutoencoderSettings` has the switches to those of its descendants.

RQ-KMeans+ (GPR, 2025) keeps the width of the embedding and starts from balanced RQ-KMeans: the encoder is x + MLP(x)
with a last layer of zeros, so that the first codes are those of k-means, and LC-Rec's loss moves all from there,
slowly. The decoder has the same form here; a decoder that starts at random would first pull the encoder away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from generative_recommenders.config import configurable
from generative_recommenders.tokenizers.autoencoder_settings import AutoencoderSettings
from generative_recommenders.tokenizers.autoencoder_training import Autoencoder, Training
from generative_recommenders.tokenizers.kmeans import kmeans
from generative_recommenders.tokenizers.mlp import Mlp
from generative_recommenders.tokenizers.quantizer import ResidualQuantizer
from generative_recommenders.tokenizers.quantizer_base import blocks, check_embeddings
from generative_recommenders.tokenizers.rqkmeans import Progress, check_distinct, level_seed
from generative_recommenders.tokenizers.vector_quantization import EmaCodebook, ResidualVq
from ops.residual_quantize import residual_quantize


@configurable("rq_vae")
@dataclass(frozen=True)
class RqVae(AutoencoderSettings):
    """Residual codes in the middle of an autoencoder, MLP down to `code_dim` and up again.

    Args, besides those of `AutoencoderSettings`:
        code_dim: width of the codes.
        kmeans_init: codes start as k-means of the residuals; otherwise at random.
    """

    name: ClassVar[str] = "RqVae"

    code_dim: int = 32
    kmeans_init: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.code_dim >= 1:
            self._refuse("code_dim", self.code_dim, "1 or more", "32")

    def fit(
        self, x_ND: Tensor, *, seed: int, progress: Progress | None = None, checkpoint: Path | None = None
    ) -> ResidualQuantizer:
        """Train on these items; the work is done on the device of x, the result is on the CPU.

        Args:
            x_ND: embeddings of the items to train on, floats of any width.
            seed: of all that is drawn: the same seed and rows give the same bytes.
            progress: called with ("kmeans", level, error), ("epoch", number, losses) and ("check", step, usage and
                collisions).
            checkpoint: file that holds the state every `check_every` steps until the fit ends. A fit that finds it
                goes on from there, to the same bytes.
        Raises:
            DataError: x is no matrix of finite floats, or has fewer distinct rows than a level has codes; or the
                checkpoint is another fit's or damaged.
            CodebookCollapse: a level's codes fell out of use.
            UserError: the loss is not finite.
        """
        start = "lloyd" if self.kmeans_init else None
        return _fit(self, x_ND, self.code_dim, start, seed=seed, progress=progress, checkpoint=checkpoint)


@configurable("rq_kmeans_plus")
@dataclass(frozen=True)
class RqKMeansPlus(AutoencoderSettings):
    """Residual codes of x + MLP(x), from balanced RQ-KMeans on. The settings are those of `AutoencoderSettings`."""

    name: ClassVar[str] = "RqKMeansPlus"

    reconstruction: str = "mean"
    learning_rate: float = 1e-4
    plain_share: float = 0.0

    def fit(
        self, x_ND: Tensor, *, seed: int, progress: Progress | None = None, checkpoint: Path | None = None
    ) -> ResidualQuantizer:
        """As `RqVae.fit`."""
        return _fit(self, x_ND, None, "balanced", seed=seed, progress=progress, checkpoint=checkpoint)


def _fit(
    settings: AutoencoderSettings,
    x_ND: Tensor,
    code_dim: int | None,
    start: str | None,
    *,
    seed: int,
    progress: Progress | None,
    checkpoint: Path | None,
) -> ResidualQuantizer:
    check_embeddings(x_ND)
    check_distinct(x_ND, settings.sizes)
    model = _autoencoder(settings, x_ND, code_dim, seed)
    initialize = partial(_initialize, model, x_ND, start, seed, progress)
    training = Training(
        model, x_ND, settings, seed=seed, initialize=initialize, progress=progress, checkpoint=checkpoint
    )
    training.restore()
    training.run()
    return ResidualQuantizer(
        model.quantizer.vectors(), mean=model.mean, scale=model.scale, encoder=model.encoder, decoder=model.decoder
    ).cpu()


def _autoencoder(settings: AutoencoderSettings, x_ND: Tensor, code_dim: int | None, seed: int) -> Autoencoder:
    width = x_ND.shape[1]
    skip = code_dim is None
    code_dim = width if code_dim is None else code_dim
    widths = (width, *settings.hidden_dims, code_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Mlp(widths, skip=skip, activation=settings.activation)
        decoder = Mlp(widths[::-1], skip=skip, activation=settings.activation)
        quantizer = ResidualVq(
            settings.sizes,
            code_dim,
            codebook=settings.codebook,
            estimator=settings.estimator,
            straight_through=settings.straight_through,
            sinkhorn_epsilons=settings.sinkhorn_epsilons,
            temperature=settings.temperature,
        )
    for codebook in quantizer.codebooks():
        if isinstance(codebook, EmaCodebook):
            codebook.decay = settings.ema_decay
    mean_D = scale_D = None
    if settings.input_normalization != "none":
        mean_D, scale_D = _mean_and_scale(x_ND)
        scale_D = scale_D if settings.input_normalization == "standardize" else None
    return Autoencoder(encoder, quantizer, decoder, mean=mean_D, scale=scale_D).to(x_ND.device)


def _mean_and_scale(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column; a constant one has scale 1."""
    parts = list(blocks(*x_ND.shape))
    mean_D = torch.stack([x_ND[rows].double().sum(dim=0) for rows in parts]).sum(dim=0) / len(x_ND)
    squares = [(x_ND[rows].double() - mean_D).square().sum(dim=0) for rows in parts]
    scale_D = (torch.stack(squares).sum(dim=0) / len(x_ND)).sqrt()
    return mean_D.float(), torch.where(scale_D > 1e-6 * scale_D.max(), scale_D, 1.0).float()


def _initialize(model: Autoencoder, x_ND: Tensor, algorithm: str | None, seed: int, progress: Progress | None) -> None:
    """Codebooks from k-means, level by level on what the nearest codes leave; no algorithm leaves them as they are."""
    if model.quantizer.estimator == "rotation":
        # Rotations are about the origin. Away from it the gradients of a batch no longer cancel where they should, and
        # all of z drifts off faster than its codes follow.
        model.center(x_ND)
    if algorithm is None:
        return
    residual_Nd = model.latent(x_ND)
    for level, codebook in enumerate(model.quantizer.codebooks()):
        centers_Cd = kmeans(residual_Nd, codebook.size, seed=level_seed(seed, level), algorithm=algorithm).centers_CD
        codebook.replace(torch.arange(codebook.size, device=x_ND.device), centers_Cd)
        residual_Nd = residual_quantize(residual_Nd, [centers_Cd])[1]
        if progress is not None:
            progress("kmeans", level, {"mse": float(residual_Nd.square().sum(dim=1).mean())})
