"""Training of an autoencoder with residual codes in its middle, and what keeps its codes in use.

    z = E((x - mean) / scale)        codes and q of z (see `vector_quantization`)        x' = D(q)
    loss = |x - x'|^2 + sum over l of (a codebook_l + b commitment_l)

A level collapses when its codes fall out of use. Against that:

* The first `plain_share` of the steps train encoder and decoder alone. The scale of z grows most in the beginning, and
  codes that are there by then are left behind.
* Codebooks then start as k-means of the residuals, level by level.
* Codes that no row chose for `revive_every` steps move to random residuals of a batch.
* Checks every `check_every` steps stop a training whose level stays below a fifth of its codes.

Of the checks in the second half of the training that with the fewest collisions can be kept, as in LC-Rec; before, an
encoder that has hardly been trained may have fewer.

Everything drawn after initialization depends on the seed and the number of its step or epoch alone. So a training that
goes on from a checkpoint gives the same bytes as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_file
from generative_recommenders.errors import UserError
from generative_recommenders.tokenizers.autoencoder_settings import AutoencoderSettings
from generative_recommenders.tokenizers.mlp import Mlp
from generative_recommenders.tokenizers.quantizer_base import blocks
from generative_recommenders.tokenizers.rqkmeans import Progress
from generative_recommenders.tokenizers.vector_quantization import ResidualVq
from ops.residual_quantize import residual_quantize

# A level below this part of its codes at two checks in a row, or at the end, has collapsed.
LEAST_USAGE = 0.2
# A check before the last looks at no more rows than these.
_CHECKED_ROWS = 1 << 16


class CodebookCollapse(UserError):
    """A level of the codebook fell out of use."""


class Autoencoder(nn.Module):
    """Encoder, codes and decoder of embeddings (T, D) less `mean` and over `scale`, where these are given."""

    mean: Tensor | None
    scale: Tensor | None

    def __init__(
        self, encoder: Mlp, quantizer: ResidualVq, decoder: Mlp, *, mean: Tensor | None, scale: Tensor | None
    ) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def inputs(self, x_TD: Tensor) -> Tensor:
        """float32 (T, D), normalized."""
        x_TD = x_TD.to(torch.float32)
        x_TD = x_TD if self.mean is None else x_TD - self.mean
        return x_TD if self.scale is None else x_TD / self.scale

    @torch.no_grad()
    def latent(self, x_ND: Tensor) -> Tensor:
        """z of all rows, float32 (N, d), in blocks and without gradients."""
        return torch.cat([self.encoder(self.inputs(x_ND[rows])) for rows in blocks(*x_ND.shape)])

    @torch.no_grad()
    def center(self, x_ND: Tensor) -> None:
        """Move z of these rows to mean 0 by the biases of the layers before and after it; the decoded stay the same."""
        mean_d = self.latent(x_ND).mean(dim=0)
        before, after, last = self.encoder.layers[-1], self.decoder.layers[0], self.decoder.layers[-1]
        assert isinstance(before, nn.Linear) and isinstance(after, nn.Linear) and isinstance(last, nn.Linear)
        before.bias.sub_(mean_d)
        after.bias.add_(after.weight @ mean_d)
        if self.decoder.skip:
            last.bias.add_(mean_d)

    def codes(self, x_ND: Tensor) -> Tensor:
        """(N, L): the nearest ones."""
        return residual_quantize(self.latent(x_ND), self.quantizer.vectors())[0]


@dataclass
class _State:
    """What a training has besides its model and optimizer."""

    step: int = 0
    collisions: float = math.inf
    best: dict[str, Tensor] | None = None
    low: tuple[int, ...] = ()


class Training:
    """One fit: the steps that remain, from the start or from the checkpoint.

    Args:
        model: trained in place.
        x_ND: embeddings, on the device of the model.
        settings: of the fit.
        seed: of all that is drawn.
        progress: called with ("epoch", number, losses) and ("check", step, usage and collisions).
        initialize: puts the codes in their first places, after the steps without codes.
        checkpoint: file that the state is kept in at every check, whole or absent, until the fit ends.
    """

    def __init__(
        self,
        model: Autoencoder,
        x_ND: Tensor,
        settings: AutoencoderSettings,
        *,
        seed: int,
        initialize: Callable[[], None],
        progress: Progress | None,
        checkpoint: Path | None,
    ) -> None:
        self.model, self.x_ND, self.settings, self.seed = model, x_ND, settings, seed
        self.initialize, self.progress, self.checkpoint = initialize, progress, checkpoint
        self.batches = max(math.ceil(len(x_ND) / settings.batch_size), 1)
        self.steps = settings.epochs * self.batches if settings.epochs else settings.steps
        self.optimizer = _optimizer(model, settings)
        self.counts = [torch.zeros(size, dtype=torch.int64, device=x_ND.device) for size in settings.sizes]
        self.state = _State()
        self.plain_steps = int(settings.plain_share * self.steps)
        # Collisions of all checks are those among the same rows.
        drawn_n = torch.randperm(len(x_ND), generator=self._generator("check", 0))[:_CHECKED_ROWS]
        self.checked_n = drawn_n.sort().values.to(x_ND.device)

    def run(self) -> Autoencoder:
        """The trained model.

        Raises:
            CodebookCollapse: a level's codes are not in use; the message says what to change.
            UserError: the loss is not finite.
        """
        self.model.train()
        for epoch in range(self.state.step // self.batches, math.ceil(self.steps / self.batches)):
            self._epoch(epoch)
        self._check(last=True)
        if self.state.best is not None and self.settings.keep == "best":
            self.model.load_state_dict(self.state.best)
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return self.model.eval()

    def _epoch(self, epoch: int) -> None:
        losses: dict[str, list[Tensor]] = {}
        for step, rows_T in self._batches(epoch):
            if step == self.plain_steps:
                self._means(losses)
                self.initialize()
            for name, value in self._step(step, rows_T).items():
                losses.setdefault(name, []).append(value)
            self.state.step = step + 1
            if (step + 1) % self.settings.check_every == 0 and step + 1 < self.steps:
                self._means(losses)
                if step >= self.plain_steps:
                    self._check(last=False)
                self._save()
        means = self._means(losses)
        if self.progress is not None and means:
            self.progress("epoch", epoch, means)

    def _means(self, losses: dict[str, list[Tensor]]) -> dict[str, float]:
        means = {name: float(torch.stack(values).mean()) for name, values in losses.items()}
        if not all(math.isfinite(value) for value in means.values()):
            got, rate = f"a loss that is not finite by step {self.state.step}", self.settings.learning_rate
            raise UserError(f"{self.settings.name}: got {got}, expected it to fall; lower learning_rate, now {rate:g}")
        return means

    def _batches(self, epoch: int) -> Iterator[tuple[int, Tensor]]:
        """Step and rows of the batches of an epoch that are still to be done, of sizes as equal as can be."""
        order_N = torch.randperm(len(self.x_ND), generator=self._generator("order", epoch)).to(self.x_ND.device)
        for batch, rows_T in enumerate(order_N.tensor_split(self.batches)):
            step = epoch * self.batches + batch
            if self.state.step <= step < self.steps:
                yield step, rows_T

    def _step(self, step: int, rows_T: Tensor) -> dict[str, Tensor]:
        settings, quantizer = self.settings, self.model.quantizer
        generator = self._generator("step", step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min((step + 1) / max(settings.warmup_steps, 1), 1.0)
        x_TD = self.model.inputs(self.x_ND[rows_T])
        z_Td = self.model.encoder(x_TD)
        if step < self.plain_steps:
            return self._plain_step(x_TD, z_Td)
        quantized = quantizer(z_Td, generator)
        errors_TD = (self.model.decoder(quantized.q_TD) - x_TD).square()
        if settings.reconstruction == "sum":
            terms = errors_TD.sum(dim=1).mean(), quantized.codebook_L.sum(), quantized.commitment_L.sum()
        else:
            width = z_Td.shape[1]
            terms = errors_TD.mean(), quantized.codebook_L.mean() / width, quantized.commitment_L.mean() / width
        reconstruction, codebook, commitment = terms
        loss = reconstruction + settings.commitment * commitment
        if settings.codebook != "ema":
            loss = loss + settings.codebook_weight * codebook
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        for level, (counts_C, code_T) in enumerate(zip(self.counts, quantized.codes_TL.T, strict=True)):
            quantizer.codebooks()[level].update(quantized.residuals[level], code_T)
            counts_C += torch.bincount(code_T, minlength=len(counts_C))
        if settings.revive_every and (step + 1 - self.plain_steps) % settings.revive_every == 0:
            self.revive(quantized.residuals, generator)
        names = ("loss", "reconstruction", "codebook", "commitment")
        return {name: value.detach() for name, value in zip(names, (loss, *terms), strict=True)}

    def _plain_step(self, x_TD: Tensor, z_Td: Tensor) -> dict[str, Tensor]:
        errors_TD = (self.model.decoder(z_Td) - x_TD).square()
        loss = errors_TD.sum(dim=1).mean() if self.settings.reconstruction == "sum" else errors_TD.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"reconstruction": loss.detach()}

    def revive(self, residuals: list[Tensor], generator: torch.Generator) -> None:
        """Move each code that no row has chosen since the last call to a random one of its level's residuals."""
        for codebook, counts_C, residual_TD in zip(
            self.model.quantizer.codebooks(), self.counts, residuals, strict=True
        ):
            dead_n = (counts_C == 0).nonzero()[:, 0]
            counts_C.zero_()
            if len(dead_n) == 0:
                continue
            order_T = torch.randperm(len(residual_TD), generator=generator).to(residual_TD.device)
            # A batch smaller than the number of dead codes revives as many as it has rows.
            drawn_n = order_T[: len(dead_n)]
            dead_n = dead_n[: len(drawn_n)]
            codebook.replace(dead_n, residual_TD[drawn_n])
            for key, value in self.optimizer.state.get(codebook.codes, {}).items():
                if value.dim() == 2:
                    # No momentum of its own, and steps as long as those of the other codes.
                    value[dead_n] = 0.0 if key == "exp_avg" else value.mean(dim=0)

    def _check(self, *, last: bool) -> None:
        """Note usage and collisions, of all rows at the end; keep the model if it is the best so far."""
        codes_nL = self.model.codes(self.x_ND if last else self.x_ND[self.checked_n])
        usage = usage_of(codes_nL, self.settings.sizes)
        codes_nL = codes_nL[self.checked_n] if last else codes_nL
        collisions = 1 - distinct(codes_nL) / len(codes_nL)
        low = tuple(level for level, part in enumerate(usage) if part < LEAST_USAGE)
        stuck = low if last else tuple(level for level in low if level in self.state.low)
        if stuck:
            raise CodebookCollapse(_advice(self.settings, stuck[0], usage[stuck[0]], self.state.step))
        self.state.low = low
        if self.progress is not None:
            metrics = {f"usage_{level}": part for level, part in enumerate(usage)}
            self.progress("check", self.state.step, metrics | {"collisions": collisions})
        if 2 * self.state.step >= self.steps and not low and collisions < self.state.collisions:
            self.state.collisions = collisions
            self.state.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {purpose} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    @cached_property
    def _identity(self) -> str:
        """Of the fit that a checkpoint belongs to."""
        digest = hashlib.sha256(repr((sorted(asdict(self.settings).items()), self.seed, self.x_ND.shape)).encode())
        for rows in blocks(*self.x_ND.shape):
            digest.update(self.x_ND[rows].to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        content = {
            "fit": self._identity,
            "state": dict(vars(self.state)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.counts,
        }
        with whole_file(self.checkpoint) as partial:
            torch.save(content, partial)

    def restore(self) -> bool:
        """Whether there was a checkpoint to go on from.

        Raises:
            DataError: it belongs to another fit or is damaged.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        try:
            content: dict[str, Any] = torch.load(self.checkpoint, map_location=self.x_ND.device, weights_only=True)
            found = content["fit"]
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
            raise DataError(f"{self.checkpoint}: got a damaged checkpoint; delete it to start over") from e
        if found != self._identity:
            expected = "one of these settings, seed and embeddings"
            raise DataError(f"{self.checkpoint}: got another fit's checkpoint, expected {expected}; delete or move it")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.counts = content["counts"]
        self.state = _State(**content["state"])
        return True


def usage_of(codes_NL: Tensor, sizes: tuple[int, ...]) -> list[float]:
    """Part of the codes of each level that some row has."""
    return [len(codes_NL[:, level].unique()) / size for level, size in enumerate(sizes)]


def distinct(codes_NL: Tensor) -> int:
    """Number of distinct rows."""
    key_N = torch.zeros(len(codes_NL), dtype=torch.int64, device=codes_NL.device)
    for code_N in codes_NL.T:
        key_N = (key_N * (int(code_N.max()) + 1) + code_N).unique(return_inverse=True)[1]
    return int(key_N.max()) + 1


def _optimizer(model: Autoencoder, settings: AutoencoderSettings) -> torch.optim.Optimizer:
    layers = [*model.encoder.parameters(), *model.decoder.parameters()]
    codes = [parameter for parameter in model.quantizer.parameters() if parameter.requires_grad]
    # Decay would draw codes away from the rows they stand for.
    groups = [{"params": layers, "weight_decay": settings.weight_decay}, {"params": codes, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adagrad":
        return torch.optim.Adagrad(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _advice(settings: AutoencoderSettings, level: int, usage: float, step: int) -> str:
    """What is most likely to help, of what is not set already."""
    steps = [
        ("kmeans_init=True", getattr(settings, "kmeans_init", True)),
        ("revive_every=100", settings.revive_every > 0),
        ('reconstruction="sum"', settings.reconstruction == "sum"),
        ('straight_through="total"', settings.straight_through == "total"),
        ('optimizer="adagrad"', settings.optimizer == "adagrad"),
        ('codebook="ema"', settings.codebook == "ema"),
    ]
    left = [*[text for text, done in steps if not done][:3], "a lower learning_rate", "fewer codes in `sizes`"]
    got = f"{usage:.1%} of the codes of level {level} in use at step {step}"
    return f"{settings.name}: got {got}, expected at least {LEAST_USAGE:.0%}; try {', '.join(left)}"
