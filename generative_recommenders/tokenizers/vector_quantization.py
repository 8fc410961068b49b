"""Differentiable residual quantization: codebooks that train, and how gradients pass the choice of a code.

    r_0 = z        c_l = the code of r_l        r_{l+1} = r_l - e_{l,c_l}        q = sum over l of e_{l,c_l}
    codebook_l = |sg[r_l] - e_{l,c_l}|^2        commitment_l = |r_l - sg[e_{l,c_l}]|^2        sg: no gradient

Choosing a code has no gradient. An estimator stands in for it:

    ste        q = z + sg[q - z] (van den Oord et al. 2017)
    rotation   q = sg[R] z, R the rotation and scaling that take z to q (Fifty et al. 2024, section 4.2)
    gumbel     q = softmax((g - distances) / temperature) @ codebook (Jang et al. 2017), soft and with gradients to all

`straight_through` says where it is applied. "total": once, to the sum over the levels; residuals subtract sg[e], so the
commitment of every level reaches the encoder. "per_level": to each level, and residuals subtract its result, as LC-Rec
and its descendants do. With "ste" then d r_{l+1} / d z = 0: the commitments of all levels but the first send the
encoder nothing. It is here to repeat their results.

Codes of evaluation are always the nearest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.tokenizers.quantizer_base import squared_distances
from ops.residual_quantize import residual_quantize
from ops.row_sums import row_sums

EMA_DECAY = 0.99
EMA_EPSILON = 1e-5
SINKHORN_ITERATIONS = 50
# exp(-600) is a normal float64 with room for the factors of its row and column.
_LEAST_EXPONENT = -600.0


def straight_through(z_TD: Tensor, quantized_TD: Tensor) -> Tensor:
    """The value of `quantized_TD` with the gradient of `z_TD`."""
    return z_TD + (quantized_TD - z_TD).detach()


def rotate(z_TD: Tensor, quantized_TD: Tensor) -> Tensor:
    """The value of `quantized_TD` as a fixed rotation and scaling of `z_TD`, which gradients pass backwards.

    With unit vectors a of z and b of q, and u that of a + b, R z = z - 2 u <u, z> + 2 b <a, z>; the scale is |q| / |z|.
    A zero vector has no direction: there the gradient is that of `straight_through`.
    """
    with torch.no_grad():
        lengths_T1 = z_TD.norm(dim=1, keepdim=True)
        turns_T1 = lengths_T1 > 1e-12
        scale_T1 = torch.where(turns_T1, quantized_TD.norm(dim=1, keepdim=True) / lengths_T1, 0.0)
        from_TD, to_TD = F.normalize(z_TD, dim=1), F.normalize(quantized_TD, dim=1)
        half_TD = F.normalize(from_TD + to_TD, dim=1)
    along_half_T1 = (z_TD * half_TD).sum(dim=1, keepdim=True)
    along_from_T1 = (z_TD * from_TD).sum(dim=1, keepdim=True)
    rotated_TD = scale_T1 * (z_TD - 2 * along_half_T1 * half_TD + 2 * along_from_T1 * to_TD)
    return torch.where(turns_T1, rotated_TD, straight_through(z_TD, quantized_TD))


def gumbel_weights(distances_TC: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Random weights of the codes, (T, C), rows summing to 1: the larger, the smaller the distance."""
    uniform_TC = torch.rand(distances_TC.shape, generator=generator).to(distances_TC)
    noise_TC = -(-uniform_TC.clamp(1e-20, 1 - 1e-7).log()).log()
    return ((noise_TC - distances_TC) / temperature).softmax(dim=1)


def sinkhorn_plan(distances_TC: Tensor, epsilon: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Shares of rows and codes, float64 (T, C), with rows summing to 1/T and columns to nearly 1/C.

    The entropic transport of LC-Rec (Zheng et al. 2024, section 3.2): distances are brought to [-1, 1], and columns and
    rows of exp(-distance / epsilon) are scaled in turn. The smaller epsilon, the closer to the cheapest plan and the
    more iterations the columns need. Exponents end at -600, so that no row or column of zeros, and no NaN, can occur.

    Args:
        distances_TC: floats; only their differences matter.
        epsilon: of the entropy, above 0.
    """
    costs_TC = distances_TC.detach().double()
    low, high = costs_TC.min(), costs_TC.max()
    middle = (low + high) / 2
    costs_TC = (costs_TC - middle) / (high - middle + 1e-5)
    # A factor of a row changes nothing: its scale takes it back.
    costs_TC -= costs_TC.min(dim=1, keepdim=True).values
    kernel_TC = (costs_TC / -epsilon).clamp_min_(_LEAST_EXPONENT).exp_()
    rows, columns = kernel_TC.shape
    scales_T = kernel_TC.new_full((rows,), 1 / rows)
    scales_C = kernel_TC.new_ones(columns)
    for _ in range(iterations):
        scales_C = 1 / (columns * (scales_T @ kernel_TC))
        scales_T = 1 / (rows * (kernel_TC @ scales_C))
    return scales_T[:, None] * kernel_TC * scales_C


class Codebook(nn.Module):
    """The codes of a level. This one is a parameter that the codebook loss moves.

    Args:
        size: C, number of codes.
        width: d, of a code.
    """

    # Whether codes move by gradients; otherwise by `update`.
    by_gradient = True

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.codes = nn.Parameter(torch.empty(size, width).normal_(std=width**-0.5))

    def vectors(self) -> Tensor:
        """(C, d)."""
        return self.codes

    @torch.no_grad()
    def replace(self, rows_n: Tensor, vectors_nD: Tensor) -> None:
        """Put the codes of these rows at these places."""
        self.codes[rows_n] = vectors_nD

    @torch.no_grad()
    def update(self, residual_TD: Tensor, code_T: Tensor) -> None:
        """Learn from the residuals that chose these codes; nothing where gradients do that."""


class EmaCodebook(Codebook):
    """Codes as exponential moving averages of the residuals that chose them (van den Oord et al. 2017, appendix A.1).

    N_k <- g N_k + (1 - g) n_k        m_k <- g m_k + (1 - g) sum of r        e_k = m_k / ((N_k + eps) / (N + C eps) N)
    with n_k residuals of code k in the batch and N the sum of all N_k. Every N_k starts at 1, every m_k at e_k.
    """

    by_gradient = False

    def __init__(self, size: int, width: int, decay: float = EMA_DECAY, epsilon: float = EMA_EPSILON) -> None:
        super().__init__(size, width)
        self.decay, self.epsilon = decay, epsilon
        self.codes.requires_grad_(False)
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", self.codes.detach().clone())

    @torch.no_grad()
    def replace(self, rows_n: Tensor, vectors_nD: Tensor) -> None:
        # The weight of an average code, so that neither the first batch nor the smoothing carries the new code off.
        weight = self.get_buffer("counts").mean()
        self.get_buffer("counts")[rows_n] = weight
        self.get_buffer("sums")[rows_n] = weight * vectors_nD
        self.codes[rows_n] = vectors_nD

    @torch.no_grad()
    def update(self, residual_TD: Tensor, code_T: Tensor) -> None:
        counts_C, sums_CD = self.get_buffer("counts"), self.get_buffer("sums")
        counts_C.lerp_(torch.bincount(code_T, minlength=self.size).to(counts_C), 1 - self.decay)
        sums_CD.lerp_(row_sums(code_T, residual_TD.detach(), num_rows=self.size), 1 - self.decay)
        total = counts_C.sum()
        smoothed_C = (counts_C + self.epsilon) / (total + self.size * self.epsilon) * total
        self.codes.copy_(sums_CD / smoothed_C[:, None])


class SimVqCodebook(Codebook):
    """Fixed codes behind one trained matrix, so that a gradient to any code moves all (SimVQ, Zhu et al. 2024).

    The matrix starts as the identity and the codes where initialization puts them.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__(size, width)
        self.codes.requires_grad_(False)
        self.matrix = nn.Parameter(torch.eye(width))

    def vectors(self) -> Tensor:
        return self.codes @ self.matrix

    @torch.no_grad()
    def replace(self, rows_n: Tensor, vectors_nD: Tensor) -> None:
        self.codes[rows_n] = vectors_nD @ torch.linalg.pinv(self.matrix)


CODEBOOKS: dict[str, type[Codebook]] = {"gradient": Codebook, "ema": EmaCodebook, "simvq": SimVqCodebook}
ESTIMATORS = ("ste", "rotation", "gumbel")
STRAIGHT_THROUGH = ("total", "per_level")


class Quantized(NamedTuple):
    """Of a batch: q, (T, d), with the estimator's gradient; codes, (T, L); squared errors, (L,) each, mean over rows;
    the residuals before each level, L of (T, d), without gradients."""

    q_TD: Tensor
    codes_TL: Tensor
    codebook_L: Tensor
    commitment_L: Tensor
    residuals: list[Tensor]


class ResidualVq(nn.Module):
    """Trainable codebooks of L levels.

    Args:
        sizes: codes a level.
        width: d.
        codebook: "gradient", "ema" or "simvq".
        estimator: "ste", "rotation" or "gumbel".
        straight_through: "total" or "per_level"; nothing to "gumbel", whose codes have gradients of their own.
        sinkhorn_epsilons: one a level; above 0 a batch takes its codes from `sinkhorn_plan`, otherwise the nearest.
        temperature: of "gumbel", in units of squared distances.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        width: int,
        *,
        codebook: str = "gradient",
        estimator: str = "ste",
        straight_through: str = "total",
        sinkhorn_epsilons: Sequence[float] = (),
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        self.estimator = estimator
        self.per_level = straight_through == "per_level"
        self.epsilons = tuple(sinkhorn_epsilons) or (0.0,) * len(sizes)
        self.temperature = temperature
        levels = [CODEBOOKS[codebook](size, width) for size in sizes]
        self.levels = nn.ModuleList(levels)

    def codebooks(self) -> list[Codebook]:
        return [level for level in self.levels if isinstance(level, Codebook)]

    def vectors(self) -> list[Tensor]:
        """(C_l, d) a level, without gradients."""
        return [codebook.vectors().detach() for codebook in self.codebooks()]

    def forward(self, z_TD: Tensor, generator: torch.Generator) -> Quantized:
        """Quantize a batch; `generator`, of the CPU, draws the noise of "gumbel"."""
        residual_TD, passed = z_TD, []
        codes, codebook_losses, commitments, residuals = [], [], [], []
        for codebook, epsilon in zip(self.codebooks(), self.epsilons, strict=True):
            vectors_CD = codebook.vectors()
            code_T, chosen_TD = self._chosen(residual_TD, vectors_CD, epsilon, generator)
            codes.append(code_T)
            residuals.append(residual_TD.detach())
            codebook_losses.append(_squared_error(residual_TD.detach(), chosen_TD))
            commitments.append(_squared_error(residual_TD, chosen_TD.detach()))
            level_TD = self._passed(residual_TD, chosen_TD) if self.per_level else chosen_TD
            passed.append(level_TD)
            residual_TD = residual_TD - (level_TD if self.per_level else level_TD.detach())
        sum_TD = torch.stack(passed).sum(dim=0)
        q_TD = sum_TD if self.per_level else self._passed(z_TD, sum_TD)
        losses = torch.stack(codebook_losses), torch.stack(commitments)
        return Quantized(q_TD, torch.stack(codes, dim=1), *losses, residuals)

    def _chosen(
        self, residual_TD: Tensor, vectors_CD: Tensor, epsilon: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Codes and what they stand for; the latter with gradients to the codebook alone but for "gumbel"."""
        if self.estimator == "gumbel":
            weights_TC = gumbel_weights(_distances(residual_TD, vectors_CD), self.temperature, generator)
            return weights_TC.argmax(dim=1), weights_TC @ vectors_CD
        if epsilon > 0:
            distances_TC = squared_distances(residual_TD.detach(), vectors_CD.detach())
            code_T = sinkhorn_plan(distances_TC, epsilon).argmax(dim=1)
        else:
            code_T = residual_quantize(residual_TD, [vectors_CD])[0][:, 0]
        # Its gradient, unlike that of an index, is summed in one order whatever the number of threads.
        return code_T, F.embedding(code_T, vectors_CD)

    def _passed(self, z_TD: Tensor, quantized_TD: Tensor) -> Tensor:
        if self.estimator == "gumbel":
            return quantized_TD
        return rotate(z_TD, quantized_TD) if self.estimator == "rotation" else straight_through(z_TD, quantized_TD)

    def extra_repr(self) -> str:
        return f"estimator={self.estimator}, per_level={self.per_level}, sinkhorn_epsilons={self.epsilons}"


def _distances(residual_TD: Tensor, vectors_CD: Tensor) -> Tensor:
    """As `squared_distances`, with gradients."""
    norms_TC = residual_TD.square().sum(dim=1, keepdim=True) + vectors_CD.square().sum(dim=1)
    return norms_TC - 2 * residual_TD @ vectors_CD.T


def _squared_error(residual_TD: Tensor, chosen_TD: Tensor) -> Tensor:
    return (residual_TD - chosen_TD).square().sum(dim=1).mean()
