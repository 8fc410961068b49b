"""Matchings of items to free codes, for many groups of items at once.

`first_choices` and `nearest_with_room` give what going through the items one by one would give, each item taking the
best that those before it left. They find it by deferred acceptance (Gale and Shapley 1962): all items propose at once,
a code keeps its earliest proposers, and the others propose anew. With one order of precedence for all codes the outcome
is unique, so that it does not depend on how the rounds are cut. `min_cost_codes` is the optimum over a group instead
(shortest augmenting paths: Jonker and Volgenant 1987), and `sinkhorn_codes` its entropic relative.
"""

from __future__ import annotations

import numpy as np

# Log of the smallest entry of a Sinkhorn kernel: scaling factors of both sides then stay within float64.
_MIN_EXPONENT = -300.0
# Times the kernel is computed anew from the potentials so far.
_ABSORPTIONS = 5
_TINY, _HUGE = 1e-300, 1e300
# A code belongs to an item that has more than half of its mass; rounding must not make two halves of equals differ.
_MAJORITY = 0.5 + 1e-6


def first_choices(keys_nm: np.ndarray, blocked_nm: np.ndarray) -> np.ndarray:
    """Column of the first key that is neither blocked nor taken by a row before, -1 where there is none, int64 (n,)."""
    rows = len(keys_nm)
    order_nm = np.argsort(blocked_nm, axis=1, kind="stable")
    open_n = (~blocked_nm).sum(axis=1)
    distinct, ids_nm = np.unique(np.take_along_axis(keys_nm, order_nm, axis=1), return_inverse=True)
    ids_nm = ids_nm.reshape(keys_nm.shape)
    holder_U = np.full(len(distinct), rows)
    tried_n = np.zeros(rows, dtype=np.int64)
    active = np.flatnonzero(open_n > 0)
    while len(active):
        wanted = ids_nm[active, tried_n[active]]
        before = holder_U[wanted]
        # Of equal indices the last assignment holds, which is the first row's when written backward.
        holder_U[wanted[::-1]] = active[::-1]
        best = np.minimum(holder_U[wanted], before)
        holder_U[wanted] = best
        won = best == active
        active = np.sort(np.concatenate([active[~won], before[won & (before < rows)]]))
        tried_n[active] += 1
        active = active[tried_n[active] < open_n[active]]
    placed_n = tried_n < open_n
    chosen_n = order_nm[np.arange(rows), np.where(placed_n, tried_n, 0)]
    return np.where(placed_n, chosen_n, -1)


def nearest_with_room(distances_nC: np.ndarray, groups_n: np.ndarray, room_GC: np.ndarray) -> np.ndarray:
    """Code of each row: the nearest of its group that rows before left room at, the lower of equals, int64 (n,).

    Args:
        distances_nC: overwritten.
        groups_n: which row of `room_GC` is the item's, any order.
        room_GC: items that each code may take, of a group at least as many as it has rows.
    """
    rows, size = distances_nC.shape
    room = room_GC.reshape(-1)
    if (room == 0).any():
        np.putmask(distances_nC, room_GC[groups_n] == 0, np.inf)
    slots_n = np.full(rows, -1)
    touched = np.zeros(len(room), dtype=bool)
    active = np.arange(rows)
    while len(active):
        wanted = groups_n[active] * size + distances_nC[active].argmin(axis=1)
        slots_n[active] = wanted
        touched[wanted] = True
        rivals = np.flatnonzero(touched[slots_n] & (slots_n >= 0))
        touched[wanted] = False
        rivals = rivals[np.argsort(slots_n[rivals], kind="stable")]
        slots = slots_n[rivals]
        starts = np.flatnonzero(np.concatenate([[True], slots[1:] != slots[:-1]]))
        ranks = np.arange(len(slots)) - np.repeat(starts, np.diff(np.append(starts, len(slots))))
        active = np.sort(rivals[ranks >= room[slots]])
        distances_nC[active, slots_n[active] % size] = np.inf
        slots_n[active] = -1
    return slots_n - groups_n * size


def min_cost_codes(distances_nC: np.ndarray, counts_G: np.ndarray, free_GC: np.ndarray) -> np.ndarray:
    """Codes of least total distance in each group, no two rows of a group the same, int64 (n,).

    Groups take their steps together: row i of every group that has one enters by a shortest augmenting path.

    Args:
        distances_nC: rows of a group follow each other.
        counts_G: rows a group, at most as many as it has free codes.
        free_GC: bool.
    """
    size = distances_nC.shape[1]
    by_count = np.argsort(-counts_G, kind="stable")
    counts_G, starts_G = counts_G[by_count], (np.cumsum(counts_G) - counts_G)[by_count]
    price_GC = np.where(free_GC[by_count], 0.0, np.inf)
    row_of_GC = np.full(price_GC.shape, -1)
    for entering in range(int(counts_G.max(initial=0))):
        groups = int(np.searchsorted(-counts_G, -entering, side="left"))
        _augment(distances_nC, starts_G[:groups] + entering, price_GC[:groups], row_of_GC[:groups])
    codes_n = np.empty(len(distances_nC), dtype=np.int64)
    _, code = np.divmod(np.flatnonzero(row_of_GC >= 0), size)
    codes_n[row_of_GC[row_of_GC >= 0]] = code
    return codes_n


def _augment(distances_nC: np.ndarray, row_G: np.ndarray, price_GC: np.ndarray, row_of_GC: np.ndarray) -> None:
    """Add one row to each group's matching; `price_GC` and `row_of_GC` are updated."""
    groups, size = price_GC.shape
    path_GC = distances_nC[row_G] + price_GC
    from_GC = np.full((groups, size), -1)
    visited_GC = np.zeros((groups, size), dtype=bool)
    end_G, length_G = np.empty(groups, dtype=np.int64), np.empty(groups)
    active = np.arange(groups)
    path, came, visited = path_GC, from_GC, visited_GC
    while len(active):
        at = np.arange(len(active))
        code = np.where(visited, np.inf, path).argmin(axis=1)
        length = path[at, code]
        row = row_of_GC[active, code]
        done = row < 0
        finished = active[done]
        end_G[finished], length_G[finished] = code[done], length[done]
        path_GC[finished], from_GC[finished], visited_GC[finished] = path[done], came[done], visited[done]
        keep = ~done
        active, code, length, row = active[keep], code[keep], length[keep], row[keep]
        path, came, visited, at = path[keep], came[keep], visited[keep], np.arange(len(active))
        visited[at, code] = True
        offset = distances_nC[row, code] + price_GC[active, code] - length
        onward = distances_nC[row] + price_GC[active] - offset[:, None]
        shorter = (onward < path) & ~visited
        np.copyto(path, onward, where=shorter)
        np.copyto(came, np.broadcast_to(code[:, None], came.shape), where=shorter)
    price_GC += np.where(visited_GC, length_G[:, None] - path_GC, 0.0)
    active, code = np.arange(groups), end_G
    while len(active):
        before = from_GC[active, code]
        first = before < 0
        row_of_GC[active, code] = np.where(first, row_G[active], row_of_GC[active, before])
        active, code = active[~first], before[~first]


def sinkhorn_codes(
    distances_GBC: np.ndarray, counts_G: np.ndarray, free_GC: np.ndarray, *, epsilon: float, steps: int
) -> np.ndarray:
    """Code of each row of each group, no two rows of a group the same, -1 where no code is mostly a row's, (G, B).

    Mass flows from the rows of a group, equal parts each, to its free codes, equal parts each (LC-Rec's uniform
    mapping); a row takes the nearest of the codes most of whose mass is its own. Scaling factors are absorbed into
    logarithmic potentials, so that no epsilon gives NaN.

    Args:
        distances_GBC: float64; what is in rows from counts_G on, and at codes that are not free, does not matter.
        counts_G: rows a group, at least 1.
        free_GC: bool, at least one a group.
        epsilon: of the entropy, where distances of a group run from -1 to 1.
        steps: scalings of rows and codes.
    """
    rows_GB = np.arange(distances_GBC.shape[1]) < counts_G[:, None]
    valid_GBC = rows_GB[:, :, None] & free_GC[:, None, :]
    low_G11 = distances_GBC.min(axis=(1, 2), where=valid_GBC, initial=np.inf, keepdims=True)
    high_G11 = distances_GBC.max(axis=(1, 2), where=valid_GBC, initial=-np.inf, keepdims=True)
    span_G11 = np.where(high_G11 > low_G11, high_G11 - low_G11, 1.0)
    cost_GBC = np.where(valid_GBC, (distances_GBC - low_G11) / span_G11, np.inf) * (2 / epsilon)
    row_mass_GB1 = (rows_GB / counts_G[:, None])[:, :, None]
    code_mass_G1C = (free_GC / free_GC.sum(axis=1, keepdims=True))[:, None]
    code_log_G1C = np.zeros_like(code_mass_G1C)
    for _ in range(_ABSORPTIONS):
        kernel_GBC = code_log_G1C - cost_GBC
        kernel_GBC -= np.maximum(kernel_GBC.max(axis=2, keepdims=True), -_HUGE)
        np.exp(np.maximum(kernel_GBC, _MIN_EXPONENT, out=kernel_GBC), out=kernel_GBC)
        kernel_GBC *= valid_GBC
        code_G1C = np.ones_like(code_mass_G1C)
        for _ in range(max(steps // _ABSORPTIONS, 1)):
            row_GB1 = row_mass_GB1 / np.maximum(kernel_GBC @ code_G1C.swapaxes(1, 2), _TINY)
            code_G1C = code_mass_G1C / np.maximum(row_GB1.swapaxes(1, 2) @ kernel_GBC, _TINY)
        code_log_G1C = code_log_G1C + np.log(np.maximum(code_G1C, _TINY))
    mass_GBC = kernel_GBC * row_GB1 * code_G1C
    owned_GBC = mass_GBC > _MAJORITY * mass_GBC.sum(axis=1, keepdims=True)
    nearest_GB = np.where(owned_GBC, distances_GBC, np.inf).argmin(axis=2)
    return np.where(owned_GBC.any(axis=2), nearest_GB, -1)
