"""Assignments of rows to clusters of equal size, for the balanced variant of k-means.

A price a cluster is added to its squared distances, and each row goes to the cheapest cluster. The prices that make the
clusters equally large are the dual of the transport problem between rows and clusters. They are found by Sinkhorn's
iterations (Cuturi 2013) on the kernel exp(-(distance + price) / epsilon): two matrix-vector products each. Entropy
blurs that dual, and rows that tie cannot be told apart by any price, so `even_out` then moves the rows that lose the
least until cluster sizes differ by one at most. It is greedy: exact in sizes, near the optimum in distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from generative_recommenders.tokenizers.quantizer_base import blocks, squared_distances

# A cluster's mass is taken to change by no more than this factor before the kernel is computed anew.
_MAX_FACTOR = 1e4
# Of the kernel: what is smaller counts for nothing, and products of denormal numbers are slow.
_MIN_EXPONENT = -60.0


def balancing_prices(distances_nC: Tensor, prices_C: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Prices, float32 (C,), nearer to those under which every cluster gets as many rows; the mean price is 0.

    Args:
        distances_nC: float32, squared.
        prices_C: to start from.
        epsilon: of the entropy, in units of distances; the smaller, the closer soft and hard assignments are.
        iterations: of Sinkhorn.
    """
    rows, size = distances_nC.shape
    kernel_nC = torch.add(distances_nC, prices_C)
    kernel_nC.sub_(kernel_nC.amin(dim=1, keepdim=True)).div_(-epsilon).clamp_(min=_MIN_EXPONENT).exp_()
    factor_C = torch.ones_like(prices_C)
    for _ in range(iterations):
        mass_C = kernel_nC.T @ (kernel_nC @ factor_C).reciprocal_()
        # Columns get rows / size each; rows get 1 by the reciprocal above.
        factor_C = (rows / size / mass_C.clamp_(min=1e-30)).clamp_(1 / _MAX_FACTOR, _MAX_FACTOR)
    prices_C = prices_C - epsilon * factor_C.log()
    return prices_C - prices_C.mean()


def even_out(x_ND: Tensor, centers_CD: Tensor, prices_C: Tensor, codes_N: Tensor) -> Tensor:
    """Codes, int64 (N,), with cluster sizes N // C or one more, changed from `codes_N` where that is least dear.

    From each cluster that is too large the rows leave whose way to the cheapest cluster with room costs least; each of
    these goes to its cheapest cluster that still has room, the least dear first, equal ones in the order of rows.
    """
    size = len(centers_CD)
    counts_C = torch.bincount(codes_N, minlength=size)
    wanted_C = torch.full_like(counts_C, len(codes_N) // size)
    # The clusters that are largest as it is keep the one row more.
    wanted_C[counts_C.argsort(descending=True, stable=True)[: len(codes_N) % size]] += 1
    surplus_C = counts_C - wanted_C
    if not bool((surplus_C > 0).any()):
        return codes_N
    open_U = (surplus_C < 0).nonzero()[:, 0]
    room_U = -surplus_C[open_U]
    rows_m = (surplus_C[codes_N] > 0).nonzero()[:, 0]
    dear_m = torch.empty(len(rows_m), dtype=torch.float32, device=x_ND.device)
    for block in blocks(len(rows_m), max(size, x_ND.shape[1])):
        cost_bC = squared_distances(x_ND[rows_m[block]], centers_CD).add_(prices_C)
        own_b = cost_bC.gather(1, codes_N[rows_m[block]][:, None])[:, 0]
        dear_m[block] = cost_bC[:, open_U].amin(dim=1) - own_b
    leaving_m = _rank_in_group(codes_N[rows_m], dear_m, size) < surplus_C[codes_N[rows_m]]
    rows_S = rows_m[leaving_m]

    result_N = codes_N.clone()
    cost_SU = squared_distances(x_ND[rows_S], centers_CD[open_U]).add_(prices_C[open_U])
    own_S = squared_distances_to(x_ND[rows_S], centers_CD[codes_N[rows_S]]) + prices_C[codes_N[rows_S]]
    cost_SU.sub_(own_S[:, None])
    while len(rows_S):
        dear_S, chosen_S = cost_SU.min(dim=1)
        accepted_S = _rank_in_group(chosen_S, dear_S, len(open_U)) < room_U[chosen_S]
        result_N[rows_S[accepted_S]] = open_U[chosen_S[accepted_S]]
        room_U = room_U - torch.bincount(chosen_S[accepted_S], minlength=len(open_U))
        rows_S, cost_SU = rows_S[~accepted_S], cost_SU[~accepted_S]
        cost_SU[:, room_U == 0] = torch.inf
    return result_N


def squared_distances_to(x_nD: Tensor, targets_nD: Tensor) -> Tensor:
    """(n,): squared distance of each row to its own target."""
    return (x_nD - targets_nD).square().sum(dim=1)


def _rank_in_group(groups_n: Tensor, values_n: Tensor, groups: int) -> Tensor:
    """Place of each row among the rows of its group by ascending value, equal ones in order, int64 (n,)."""
    order_n = values_n.argsort(stable=True)
    order_n = order_n[groups_n[order_n].argsort(stable=True)]
    counts_G = torch.bincount(groups_n, minlength=groups)
    starts_G = counts_G.cumsum(0) - counts_G
    ranks_n = torch.empty_like(order_n)
    ranks_n[order_n] = torch.arange(len(order_n), device=order_n.device) - starts_G[groups_n[order_n]]
    return ranks_n
