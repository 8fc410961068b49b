"""R-VQ: codebooks trained by gradient on the quantization error, level by level, without an encoder (GRID, 2025).

    loss of a level = mean over a batch of |r - e_c|^2        c the nearest code of r

With nothing before the codebook to send a gradient to, the commitment term of an RQ-VAE changes nothing and is left
out. A level starts from k-means++ seeds and is done before the next begins. Codes that no row of a whole pass chose
move to the rows farthest from theirs. The step size is in units of the level's root mean square entry, so that one
setting fits embeddings of any scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from generative_recommenders.config import configurable
from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.tokenizers.kmeans import Report, check_settings, nearest, refilled, repaired, seeds
from generative_recommenders.tokenizers.quantizer import ResidualQuantizer
from generative_recommenders.tokenizers.quantizer_base import check_embeddings
from generative_recommenders.tokenizers.rqkmeans import (
    Progress,
    check_distinct,
    level_seed,
    normalize_rows,
    of_stage,
    subtract_codes,
)
from ops.row_sums import row_sums

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


@configurable("r_vq")
@dataclass(frozen=True)
class Rvq:
    """Settings of R-VQ.

    Attributes:
        sizes: codes a level.
        steps: of the optimizer, a level.
        batch_size: rows a step.
        optimizer: "adagrad", "adam" or "sgd".
        learning_rate: in units of the root mean square entry of what the level quantizes ("sgd": as it is).
        center: subtract the mean of the embeddings first.
        normalize_residuals: bring what a level quantizes to length 1, the first level's too.
    Raises:
        ConfigError: a setting outside its range.
    """

    sizes: tuple[int, ...] = (256, 256, 256)
    steps: int = 300
    batch_size: int = 2048
    optimizer: str = "adagrad"
    learning_rate: float = 0.3
    center: bool = True
    normalize_residuals: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        check_settings("Rvq", self.sizes, "lloyd", 1, 0.0, self.batch_size, 0)
        if self.optimizer not in OPTIMIZERS:
            expected = ", ".join(OPTIMIZERS)
            raise ConfigError(f"Rvq.optimizer: got {self.optimizer!r}, expected one of {expected}; choose one of these")
        if self.steps < 0:
            raise ConfigError(f"Rvq.steps: got {self.steps}, expected 0 or more; try 300")
        if not self.learning_rate > 0:
            raise ConfigError(f"Rvq.learning_rate: got {self.learning_rate}, expected more than 0; try 0.3")

    def fit(self, x_ND: Tensor, *, seed: int, progress: Progress | None = None) -> ResidualQuantizer:
        """Train the levels one after the other; the work is done on the device of x, the result is on the CPU.

        Args:
            x_ND: embeddings, floats of any width; a float32 copy is made.
            progress: called after every pass over the rows as ("level 0", pass, {"mse", "usage"}).
        Raises:
            DataError: x is no matrix of finite floats, or has fewer distinct rows than a level has codes.
        """
        check_embeddings(x_ND)
        check_distinct(x_ND, self.sizes)
        residual_ND = x_ND.detach().to(torch.float32, copy=True)
        mean_D = residual_ND.mean(dim=0) if self.center else None
        if mean_D is not None:
            residual_ND -= mean_D
        codebooks, lengths = [], []
        with torch.no_grad():
            for level, size in enumerate(self.sizes):
                if self.normalize_residuals:
                    lengths.append(normalize_rows(residual_ND))
                generator = torch.Generator().manual_seed(level_seed(seed, level))
                codebooks.append(self._level(residual_ND, size, generator, of_stage(progress, f"level {level}")))
                subtract_codes(residual_ND, codebooks[-1], None)
        return ResidualQuantizer(
            codebooks,
            mean=mean_D,
            normalize_residuals=self.normalize_residuals,
            lengths=torch.tensor(lengths) if lengths else None,
        ).cpu()

    def _level(self, x_ND: Tensor, size: int, generator: torch.Generator, report: Report | None) -> Tensor:
        codebook = torch.nn.Parameter(seeds(x_ND, size, generator), requires_grad=True)
        # As all entries 0 leave nothing to learn, any positive unit will do.
        unit = float(x_ND.square().mean().sqrt()) or 1.0
        rate = self.learning_rate if self.optimizer == "sgd" else self.learning_rate * unit
        optimizer = OPTIMIZERS[self.optimizer]([codebook], lr=rate)
        done = passes = 0
        while done < self.steps:
            counts_C = torch.zeros(size, dtype=torch.int64, device=x_ND.device)
            error, rows_seen = 0.0, 0
            batches = torch.randperm(len(x_ND), generator=generator).to(x_ND.device).split(self.batch_size)
            for rows_b in batches[: self.steps - done]:
                x_bD = x_ND[rows_b]
                code_b, residual_bD = nearest(x_bD, codebook.detach())
                # Gradient of the mean of |r - e_c|^2, which autograd would take through a gather.
                codebook.grad = row_sums(code_b, residual_bD, num_rows=size) * (-2 / len(rows_b))
                optimizer.step()
                counts_C += torch.bincount(code_b, minlength=size)
                errors_b = residual_bD.square().sum(dim=1)
                error, rows_seen, done = error + float(errors_b.sum()), rows_seen + len(rows_b), done + 1
            passes += 1
            if rows_seen == len(x_ND):
                codebook.copy_(refilled(codebook.detach(), counts_C, x_bD, code_b, errors_b))
            if report is not None:
                report(passes, {"mse": error / rows_seen, "usage": float((counts_C > 0).float().mean())})
        return repaired(x_ND, codebook.detach().clone())
