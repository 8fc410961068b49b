"""Exact top-K of a catalogue under a model whose positions are independent: every item's score is a sum of L numbers.

    score(item) = sum over positions l of log p_l(code_l(item))        p_l: one row of C_l numbers a request

So a catalogue is scored without a search: numbers are gathered by the items' codes and added. Prefixes that many items
share are summed once, and the rest is added to them in one pass, item-major, so that a gather reads the numbers of all
requests side by side. Of a block of leaves only the largest score is kept; the K best leaves lie in the K best blocks,
which are scored again. Memory is that of a chunk, whatever the catalogue. Sums go from the first position to the last,
as a beam search adds them. RPG (KDD 2025) sums logits over codes too, but walks a graph of items instead of all.

Letters: N leaves of the trie (distinct IDs), in order of their codes; P distinct prefixes; X leaves of a request.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.generative.trie import ItemFilter, Trie
from ops.random import lane_bits, token_hash

# A prefix is summed once where it has so many leaves on average.
_LEAVES_A_PREFIX = 4
# Leaves of a block, the powers of two between these; chunks are a multiple of the largest.
_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 256
# Scores that are in memory at a time: what a core's cache holds, and what fills a GPU.
_CHUNK_SCORES = 1 << 20
_CHUNK_SCORES_ON_GPU = 1 << 24


class LeafScores(Protocol):
    """Scores of the leaves of a catalogue for B requests."""

    def over(self, first: int, last: int) -> Tensor:
        """(last - first, B); -inf from N on."""
        ...

    def at(self, leaves_BX: Tensor) -> Tensor:
        """(B, X); -inf from N on."""
        ...


class CodeSums:
    """The leaves of a catalogue as bags of rows, whose sum is a leaf's score: a prefix's row, then one a position.

    Args:
        codes_NL: codes of N leaves, int64.
        sizes: codes a level.
    """

    def __init__(self, codes_NL: Tensor, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        count = len(codes_NL)
        prefix_N = torch.zeros(count, dtype=torch.int64, device=codes_NL.device)
        self.depth, kept_N = 0, prefix_N
        for depth, size in enumerate(self.sizes, start=1):
            distinct, prefix_N = torch.unique(prefix_N * size + codes_NL[:, depth - 1], return_inverse=True)
            if depth == 1 or distinct.numel() * _LEAVES_A_PREFIX <= count:
                self.depth, kept_N = depth, prefix_N
        prefixes = int(kept_N.max()) + 1
        starts = torch.tensor([0, *self.sizes[:-1]], device=codes_NL.device).cumsum(0)
        # All leaves of a prefix agree on its codes, so whichever is written last will do.
        holder_P = torch.empty(prefixes, dtype=torch.int64, device=codes_NL.device)
        holder_P[kept_N] = torch.arange(count, device=codes_NL.device)
        self.prefix_bags_PX = (codes_NL[holder_P, : self.depth] + starts[: self.depth]).to(torch.int32)
        shift = prefixes - sum(self.sizes[: self.depth])
        rest = codes_NL[:, self.depth :] + starts[self.depth :] + shift
        bags_NX = torch.cat([kept_N[:, None], rest], 1).to(torch.int32)
        # The row after all others is -inf: bags that fill up the last block hold it.
        self.nothing = prefixes + sum(self.sizes[self.depth :])
        filled = -count % _LARGEST_BLOCK
        self.bags_NX = F.pad(bags_NX, (0, 0, 0, filled), value=self.nothing)

    def under(self, log_probs: Sequence[Tensor]) -> SummedScores:
        """Scores under log-probabilities (B, C_l) of each level."""
        columns = [log_probs_BC.T for log_probs_BC in log_probs]
        prefix_PB = F.embedding_bag(self.prefix_bags_PX, torch.cat(columns[: self.depth]), mode="sum")
        nothing_1B = torch.full_like(prefix_PB[:1], -math.inf)
        return SummedScores(self.bags_NX, torch.cat([prefix_PB, *columns[self.depth :], nothing_1B]))


@dataclass(frozen=True)
class SummedScores:
    """`CodeSums` of one batch: the rows to sum, and the rows themselves, (rows, B)."""

    bags_NX: Tensor
    rows_RB: Tensor

    def over(self, first: int, last: int) -> Tensor:
        return F.embedding_bag(self.bags_NX[first:last], self.rows_RB, mode="sum")

    def at(self, leaves_BX: Tensor) -> Tensor:
        requests = self.rows_RB.shape[1]
        # Numbers one by one, of which request b owns every B-th from b on.
        first_B11 = torch.arange(requests, device=leaves_BX.device)[:, None, None]
        numbers_BXJ = self.bags_NX[leaves_BX].to(torch.int64) * requests + first_B11
        summed = F.embedding_bag(numbers_BXJ.flatten(0, 1), self.rows_RB.view(-1, 1), mode="sum")
        return summed.view(leaves_BX.shape)


@dataclass(frozen=True)
class MixedScores:
    """log sum_m exp(score_m + shift_m) over several scores of the same leaves, shifts (B,)."""

    parts: Sequence[LeafScores]
    shifts: Sequence[Tensor]

    def over(self, first: int, last: int) -> Tensor:
        shifted = [part.over(first, last) + shift_B for part, shift_B in zip(self.parts, self.shifts, strict=True)]
        return torch.stack(shifted).logsumexp(0)

    def at(self, leaves_BX: Tensor) -> Tensor:
        shifted = [part.at(leaves_BX) + shift_B[:, None] for part, shift_B in zip(self.parts, self.shifts, strict=True)]
        return torch.stack(shifted).logsumexp(0)


@dataclass(frozen=True)
class NoisyScores:
    """Scores plus Gumbel noise, whose K largest are a sample without replacement, by keys (B, 1) and leaf.

    A leaf's noise is the same in any batch, chunk and catalogue order of requests.
    """

    scores: LeafScores
    keys_B1: Tensor

    def over(self, first: int, last: int) -> Tensor:
        leaves_1X = torch.arange(first, last, device=self.keys_B1.device)[None]
        return self.scores.over(first, last) + self._noise(leaves_1X).T

    def at(self, leaves_BX: Tensor) -> Tensor:
        return self.scores.at(leaves_BX) + self._noise(leaves_BX)

    def _noise(self, leaves_BX: Tensor) -> Tensor:
        bits_BX = lane_bits(token_hash(2, self.keys_B1), leaves_BX)
        return -torch.log(-torch.log((bits_BX.double() + 0.5) / 2.0**32)).float()


class Catalogue:
    """The leaves of a trie that may be returned to each of `requests` requests.

    Raises:
        DataError: a filter of another trie.
    """

    def __init__(self, trie: Trie, requests: int, allowed: ItemFilter | None) -> None:
        self.trie = trie
        self.requests = requests
        self.leaves = len(trie.leaf_codes())
        # Whoever asks with a filter that does not fit is told so.
        trie.item_counts(trie.root(requests), allowed=allowed)
        own = trie.base if allowed is None else allowed
        # bool (N,) or (B, N): leaves with an item that may be returned.
        self.open = None if own is None else own.levels[-1]

    def chunks(self) -> Sequence[tuple[int, int]]:
        """Spans of leaves that are scored at a time, from block to block, past the last leaf in the last one."""
        end = self.leaves + -self.leaves % _LARGEST_BLOCK
        scores = _CHUNK_SCORES if self.trie.device.type == "cpu" else _CHUNK_SCORES_ON_GPU
        size = max(1, scores // max(1, self.requests) // _LARGEST_BLOCK) * _LARGEST_BLOCK
        return [(first, min(first + size, end)) for first in range(0, end, size)]

    def over(self, scores: LeafScores, first: int, last: int) -> Tensor:
        """(last - first, B); -inf where nothing may be returned."""
        scores_XB = scores.over(first, last)
        if self.open is not None:
            closed_BX = ~self.open[..., first:last]
            inside = closed_BX.shape[-1]
            scores_XB[:inside].masked_fill_(closed_BX.view(-1, inside).T, -math.inf)
        return scores_XB

    def at(self, scores: LeafScores, leaves_BX: Tensor) -> Tensor:
        """(B, X), as `over`."""
        scores_BX = scores.at(leaves_BX)
        if self.open is None:
            return scores_BX
        known_BX = leaves_BX.clamp(max=self.leaves - 1)
        open_BX = self.open[known_BX] if self.open.dim() == 1 else self.open.gather(1, known_BX)
        return scores_BX.masked_fill(~open_BX, -math.inf)

    def best(self, scores: LeafScores, k: int) -> tuple[Tensor, Tensor]:
        """The k best leaves of each request, fewer only where there are fewer, and their scores: (B, k).

        Equal scores go to the lower leaf. Leaves that may not be returned have -inf.
        """
        k = min(k, self.leaves)
        block = _block_of(self.leaves, k)
        highest = [self.over(scores, first, last).unflatten(0, (-1, block)).amax(1).T for first, last in self.chunks()]
        blocks_BK = best_places(torch.cat(highest, 1), k).sort(1).values
        within = torch.arange(block, device=blocks_BK.device)
        leaves_BX = (blocks_BK[..., None] * block + within).flatten(1)
        scores_BX = self.at(scores, leaves_BX)
        places_BK = best_places(scores_BX, k)
        # Places past the last leaf have -inf, and are reached only where all else has it too.
        return leaves_BX.gather(1, places_BK).clamp(max=self.leaves - 1), scores_BX.gather(1, places_BK)

    def log_mass(self, scores: LeafScores) -> Tensor:
        """log of the sum of exp(score) over all items of the catalogue, allowed or not, (B,)."""
        leaves_1N = torch.arange(self.leaves, device=self.trie.device)[None]
        counts_N = self.trie.item_counts(leaves_1N)[0].float()
        found: list[Tensor] = []
        for first, last in self.chunks():
            counts_X = counts_N[first:last].log()
            found.append((scores.over(first, last)[: len(counts_X)] + counts_X[:, None]).logsumexp(0))
        return torch.stack(found).logsumexp(0)


def _block_of(leaves: int, k: int) -> int:
    """Leaves a block: below sqrt(N / k), where there are as many blocks as leaves to score again, which costs more."""
    block = 1 << max(0, round(math.log2(max(1.0, leaves / k)) / 2 - 1))
    return min(max(block, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def best_places(values_BX: Tensor, k: int) -> Tensor:
    """Places of the k largest values of each row, best first, equal ones by place: int64 (B, min(k, X)).

    Values and places in one integer, so that ties have one answer everywhere without a sort of the whole row.
    """
    # Adding zero turns -0 into 0, whose bits differ.
    bits = (values_BX.float() + 0.0).contiguous().view(torch.int32)
    # Floats in order are integers in order once the negative ones are mirrored.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    count = values_BX.shape[1]
    places = torch.arange(count, device=values_BX.device)
    keys_BX = (ordered << 32) + (count - 1 - places)
    best_BK = keys_BX.topk(min(k, count), dim=1).values
    return count - 1 - (best_BK & 0xFFFFFFFF)
