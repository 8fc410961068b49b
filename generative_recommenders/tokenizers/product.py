"""Product quantization: the embedding is cut into parts, and k-means is run on each part (Jegou et al. 2011).

Codes of different levels say nothing of each other, unlike those of a residual quantizer. OPQ (Ge et al. 2013) turns
the embedding first, so that the parts carry equal shares of its variance and as little as possible in common; RPG takes
16 to 64 levels of it. The rotation starts from the principal axes, dealt out to the parts so that the products of their
variances are even (section 4 of that paper), and is refined in turns with the codes (section 3): given what the codes
stand for, the best rotation is the solution of an orthogonal Procrustes problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from generative_recommenders.config import configurable
from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.kmeans import (
    ITERATIONS,
    ROWS_PER_CODE,
    TOLERANCE,
    check_settings,
    kmeans,
    moved,
    nearest,
    seeds,
)
from generative_recommenders.tokenizers.quantizer import ProductQuantizer
from generative_recommenders.tokenizers.quantizer_base import blocks, check_embeddings
from generative_recommenders.tokenizers.rqkmeans import Progress, check_distinct, level_seed, of_stage


@configurable("pq")
@dataclass(frozen=True)
class Pq:
    """Settings of product quantization.

    Attributes:
        sizes: codes a level. The parts differ in width by one at most.
        algorithm: "lloyd" or "minibatch", of k-means.
        iterations: passes over the rows at most, a level.
        tolerance: move of the centers that ends a level's fit; see `kmeans.kmeans`.
        rows_per_code: rows a code that a level is fitted on at most; 0 is all.
        center: subtract the mean of the embeddings first.
        components: principal components to keep, the first in the first part; 0 leaves the embedding as it is.
    Raises:
        ConfigError: a setting outside its range.
    """

    sizes: tuple[int, ...] = (256, 256, 256)
    algorithm: str = "lloyd"
    iterations: int = ITERATIONS
    tolerance: float = TOLERANCE
    rows_per_code: int = ROWS_PER_CODE
    center: bool = True
    components: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        owner = type(self).__name__
        if self.algorithm == "balanced":
            raise ConfigError(f"{owner}.algorithm: got 'balanced', expected lloyd or minibatch; use RqKMeans for that")
        check_settings(owner, self.sizes, self.algorithm, self.iterations, self.tolerance, 1, self.rows_per_code)
        if self.components and self.components < len(self.sizes):
            expected = f"0 (all columns) or at least the {len(self.sizes)} of the sizes"
            raise ConfigError(f"{owner}.components: got {self.components}, expected {expected}; raise it")

    def fit(self, x_ND: Tensor, *, seed: int, progress: Progress | None = None) -> ProductQuantizer:
        """Fit rotation and levels; the work is done on the device of x, the result is on the CPU.

        Args:
            x_ND: embeddings, floats of any width; a float32 copy is made.
            progress: called as ("rotation", round, {"mse"}) and ("level 0", pass, {"mse", "shift", "usage"}).
        Raises:
            DataError: x is no matrix of finite floats, has fewer distinct rows than a level has codes, or fewer columns
                than there are levels or `components`.
        """
        check_embeddings(x_ND)
        check_distinct(x_ND, self.sizes)
        _check_columns(x_ND, len(self.sizes), self.components)
        z_ND = x_ND.detach().to(torch.float32, copy=True)
        mean_D = z_ND.mean(dim=0) if self.center else None
        if mean_D is not None:
            z_ND -= mean_D
        rotation = self._rotation(z_ND, seed, progress)
        if rotation is not None:
            z_ND = z_ND @ rotation
        codebooks = []
        for level, part_Nd in enumerate(z_ND.split(part_widths(z_ND.shape[1], len(self.sizes)), dim=1)):
            found = kmeans(
                part_Nd.contiguous(),
                self.sizes[level],
                seed=level_seed(seed, level),
                algorithm=self.algorithm,
                iterations=self.iterations,
                tolerance=self.tolerance,
                rows_per_code=self.rows_per_code,
                report=of_stage(progress, f"level {level}"),
            )
            codebooks.append(found.centers_CD)
        quantizer = ProductQuantizer(codebooks, mean=mean_D, rotation=rotation)
        return quantizer.cpu()

    def _rotation(self, z_ND: Tensor, seed: int, progress: Progress | None) -> Tensor | None:
        return principal_axes(z_ND)[0][:, : self.components] if self.components else None


@configurable("opq")
@dataclass(frozen=True)
class Opq(Pq):
    """Settings of product quantization under an optimized rotation.

    Attributes:
        rounds: of the rotation and the codes in turns; 0 is the dealt-out principal axes alone.
        components: principal components that the rotation turns; 0 is all.
    """

    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0:
            raise ConfigError(f"Opq.rounds: got {self.rounds}, expected 0 or more; try 20")

    def _rotation(self, z_ND: Tensor, seed: int, progress: Progress | None) -> Tensor:
        axes_DD, variances_D = principal_axes(z_ND)
        kept = self.components or z_ND.shape[1]
        widths = part_widths(kept, len(self.sizes))
        start_Dd = axes_DD[:, :kept][:, dealt_out(variances_D[:kept], widths)]
        generator = torch.Generator().manual_seed(level_seed(seed, len(self.sizes)))
        sample_nD = z_ND
        rows = (self.rows_per_code or len(z_ND)) * max(self.sizes)
        if rows < len(z_ND):
            drawn_n = torch.randperm(len(z_ND), generator=generator)[:rows].sort().values
            sample_nD = z_ND[drawn_n.to(z_ND.device)]
        # Within the kept axes the rotation is square.
        turned_nd = sample_nD @ start_Dd
        codebooks = [
            seeds(part_nd.contiguous(), size, generator)
            for part_nd, size in zip(turned_nd.split(widths, dim=1), self.sizes, strict=True)
        ]
        turn_dd = torch.eye(kept, device=z_ND.device)
        report = of_stage(progress, "rotation")
        for done in range(1, self.rounds + 1):
            parts, stood_for = (turned_nd @ turn_dd).split(widths, dim=1), []
            error = 0.0
            for level, part_nd in enumerate(parts):
                code_n, residual_nd = nearest(part_nd.contiguous(), codebooks[level])
                codebooks[level], _ = moved(codebooks[level], code_n, residual_nd)
                stood_for.append(codebooks[level][code_n])
                error += float(residual_nd.square().sum(dim=1).mean())
            left_dd, _, right_dd = torch.linalg.svd((turned_nd.T @ torch.cat(stood_for, dim=1)).double())
            turn_dd = (left_dd @ right_dd).to(torch.float32)
            if report is not None:
                report(done, {"mse": error})
        return start_Dd @ turn_dd


def part_widths(width: int, levels: int) -> list[int]:
    """Columns of each part, the wider ones first, different by one at most."""
    return [width // levels + (level < width % levels) for level in range(levels)]


def principal_axes(z_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Unit axes (D, D), a column each, and the second moments along them (D,), both float32, the largest first.

    The largest entry of an axis is positive, so that axes do not depend on the library that computes them.
    """
    moments_DD = torch.zeros(z_ND.shape[1], z_ND.shape[1], dtype=torch.float64, device=z_ND.device)
    for rows in blocks(*z_ND.shape):
        z_nD = z_ND[rows].double()
        moments_DD += z_nD.T @ z_nD
    variances_D, axes_DD = torch.linalg.eigh(moments_DD / max(len(z_ND), 1))
    largest_D = axes_DD.gather(0, axes_DD.abs().argmax(dim=0, keepdim=True))
    axes_DD = axes_DD * torch.where(largest_D < 0, -1.0, 1.0)
    return axes_DD.flip(1).to(torch.float32).contiguous(), variances_D.flip(0).clamp(min=0).to(torch.float32)


def dealt_out(variances_d: Tensor, widths: list[int]) -> list[int]:
    """Order of the columns that puts them in parts of `widths` with products of variances as even as can be.

    The largest first, each goes to the part with room whose product is the smallest so far.
    """
    parts: list[list[int]] = [[] for _ in widths]
    logs = [0.0] * len(widths)
    # Factors above 1, so that a product grows with every column.
    floor = max(float(variances_d.max()) * 1e-9, 1e-30)
    for column, log in enumerate((variances_d.double().clamp(min=floor) / floor).log().tolist()):
        open_parts = [part for part, width in enumerate(widths) if len(parts[part]) < width]
        part = min(open_parts, key=logs.__getitem__)
        parts[part].append(column)
        logs[part] += log
    return [column for part in parts for column in part]


def _check_columns(x_ND: Tensor, levels: int, components: int) -> None:
    columns = x_ND.shape[1]
    if columns < levels:
        raise DataError(f"embeddings: got {columns} columns for {levels} levels, expected one each; use fewer levels")
    if columns < components:
        raise DataError(f"components: got {components}, expected at most the {columns} columns; lower it")
