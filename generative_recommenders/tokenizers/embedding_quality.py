"""How well codes keep the embeddings they stand for: errors a level, reconstruction, and who is near whom.

Each function returns attributes of `quality.QualityReport` by their names.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.tokenizers.quantizer import ProductQuantizer, Quantizer, ResidualQuantizer
from generative_recommenders.tokenizers.quantizer_base import blocks

NEIGHBORS = 10
MAX_QUERIES = 2000
# Products of floats that the search of neighbors may cost: a larger catalogue has fewer queries, down to the least.
MAX_NEIGHBOR_WORK = 4e11
MIN_QUERIES = 200
_SEED = 0


def quantization(quantizer: Quantizer, x_ND: Tensor, codes_NL: Tensor) -> dict[str, object]:
    """Errors by level, of the kinds that have vectors."""
    if not isinstance(quantizer, ResidualQuantizer | ProductQuantizer):
        return {}
    squares_L = torch.zeros(len(quantizer.sizes), dtype=torch.float64)
    lengths_L = torch.zeros(len(quantizer.sizes), dtype=torch.float64)
    for rows in blocks(len(x_ND), quantizer.width):
        for level, left_nd in enumerate(_left_over(quantizer, x_ND[rows], codes_NL[rows])):
            square_n = left_nd.double().square().sum(dim=1)
            squares_L[level] += square_n.sum().cpu()
            lengths_L[level] += square_n.sqrt().sum().cpu()
    found: dict[str, object] = {"quantization_error": (squares_L / len(x_ND)).tolist()}
    if isinstance(quantizer, ResidualQuantizer) and float(lengths_L[-1]) > 0:
        found["residual_norm_ratio"] = float(lengths_L[0] / lengths_L[-1])
    return found


def _left_over(quantizer: ResidualQuantizer | ProductQuantizer, x_nD: Tensor, codes_nL: Tensor) -> list[Tensor]:
    """What each level leaves of the items, (n, d) a level."""
    with torch.no_grad():
        latent_nD = quantizer.latent(x_nD)
    codes_nL, codebooks = codes_nL.to(latent_nD.device), quantizer.codebooks()
    chosen = [codebook_CD[codes_nL[:, level]] for level, codebook_CD in enumerate(codebooks)]
    if isinstance(quantizer, ProductQuantizer):
        parts = latent_nD.split(quantizer.parts, dim=1)
        return [part_nd - code_nd for part_nd, code_nd in zip(parts, chosen, strict=True)]
    left = []
    for code_nD in chosen:
        latent_nD = F.normalize(latent_nD, dim=1) if quantizer.normalize_residuals else latent_nD
        latent_nD = latent_nD - code_nD
        left.append(latent_nD)
    return left


def reconstruction(x_ND: Tensor, reconstructed_ND: Tensor) -> dict[str, object]:
    square, cosine = 0.0, 0.0
    for rows in blocks(*x_ND.shape):
        x_nD, other_nD = x_ND[rows].float(), reconstructed_ND[rows].to(x_ND.device, torch.float32)
        square += float((x_nD - other_nD).double().square().sum())
        cosine += float(F.cosine_similarity(x_nD, other_nD, dim=1).double().sum())
    return {"reconstruction_mse": square / x_ND.numel(), "reconstruction_cosine": cosine / len(x_ND)}


def neighbors(x_ND: Tensor, reconstructed_ND: Tensor) -> dict[str, object]:
    count = min(NEIGHBORS, len(x_ND) - 1)
    if not count:
        return {}
    queries = min(len(x_ND), MAX_QUERIES, max(MIN_QUERIES, int(MAX_NEIGHBOR_WORK / x_ND.numel())))
    order_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(_SEED))
    rows_q = order_N[:queries].sort().values.to(x_ND.device)
    near_qk, other_qk = (_nearest(table, rows_q, count) for table in (x_ND, reconstructed_ND.to(x_ND.device)))
    agreed = (near_qk[:, :, None] == other_qk[:, None, :]).any(dim=2).double().mean()
    return {"neighbor_agreement": float(agreed), "neighbor_queries": queries}


def _nearest(x_ND: Tensor, rows_q: Tensor, count: int) -> Tensor:
    """Rows of the `count` nearest other rows, int64 (q, count)."""
    query_qD = x_ND[rows_q].float()
    best_qk = torch.full((len(rows_q), count), torch.inf, device=x_ND.device)
    found_qk = torch.full_like(best_qk, -1, dtype=torch.int64)
    for rows in blocks(len(x_ND), max(len(rows_q), x_ND.shape[1])):
        x_nD = x_ND[rows].float()
        # The query's own length is the same for all rows.
        distance_qn = torch.addmm(x_nD.square().sum(dim=1), query_qD, x_nD.T, alpha=-2)
        inside = ((rows_q >= rows.start) & (rows_q < rows.stop)).nonzero()[:, 0]
        distance_qn[inside, rows_q[inside] - rows.start] = torch.inf
        best, place = distance_qn.topk(min(count, len(x_nD)), dim=1, largest=False)
        best_qk, kept = torch.cat([best_qk, best], dim=1).topk(count, dim=1, largest=False)
        found_qk = torch.cat([found_qk, place + rows.start], dim=1).gather(1, kept)
    return found_qk
