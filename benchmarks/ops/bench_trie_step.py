"""A level of a search over a trie, and building the trie, beside dictionaries and dense masks.

python benchmarks/ops/bench_trie_step.py [--device cuda] [--shape "million 8x2048"]

Tuples are random. Times are of `steps` equal steps, one after the other, but "build" and "build dictionary" make the
tries once, from rows in any order; their memory is that of the trie and of building it. Log-probabilities are given, as
where the published figures for 140 beams (STATIC, arXiv 2602.22647) time a mask and a gather; "ops" chooses the k best
as well, "ops softmax" also takes the softmax that comes before. "padded" is the published way, a fixed number of slots
a state, without its selection per beam; "dictionary" asks a trie of dictionaries for the tokens after each prefix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import Benchmark, Sizes
from generative_recommenders.generative.trie import Trie
from ops.trie_step import NORMALIZATIONS, trie_step

Found = tuple[Tensor, Tensor, Tensor]


def dictionary_of(codes_NL: Tensor) -> dict[int, Any]:
    root: dict[int, Any] = {}
    for row in codes_NL.tolist():
        node = root
        for code in row:
            node = node.setdefault(code, {})
    return root


class Inputs:
    """Beams that stand at prefixes of random items, and log-probabilities of what comes next."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.codes_NL = torch.randint(sizes["codes"], (sizes["items"], sizes["levels"]))
        self.code_sizes, self.level = (sizes["codes"],) * sizes["levels"], sizes["level"]
        self.steps = sizes["steps"]
        rows_BM = torch.randint(sizes["items"], (sizes["batch"], sizes["beams"]))
        self.prefixes_BMl = self.codes_NL[rows_BM][..., : self.level].to(device)
        self.log_probs_BMC = torch.randn(*rows_BM.shape, sizes["codes"], device=device).log_softmax(-1).to(dtype)
        self.scores_BM = torch.randn(rows_BM.shape, device=device).sort(dim=1, descending=True).values

    @property
    def k(self) -> int:
        return self.scores_BM.shape[1]

    @cached_property
    def trie(self) -> Trie:
        return Trie.build(self.codes_NL, self.code_sizes).to(self.scores_BM.device)

    @cached_property
    def states_BM(self) -> Tensor:
        states_BM = self.trie.root(len(self.scores_BM)).expand_as(self.scores_BM)
        for level in range(self.level):
            states_BM = self.trie.advance(states_BM, self.prefixes_BMl[..., level], level)
        return states_BM.contiguous()

    @cached_property
    def dictionary(self) -> dict[int, Any]:
        return dictionary_of(self.codes_NL)


def ours(inputs: Inputs, normalization: str = "none", backend: str | None = None) -> Found:
    beams = inputs.log_probs_BMC, inputs.states_BM, inputs.scores_BM
    found = inputs.trie.step(*beams, inputs.level, inputs.k, normalization=normalization, backend=backend)
    return found.scores_BK, found.parents_BK, found.tokens_BK


def best_of(total_BMX: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    scores_BK, place_BK = total_BMX.flatten(1).topk(k, dim=1)
    return scores_BK, place_BK // total_BMX.shape[2], place_BK


def padded(inputs: Inputs) -> Found:
    """As many slots for every state as the widest has children."""
    trie, level, slots = inputs.trie, inputs.level, torch.arange(inputs.trie.widest[inputs.level])
    offset, tokens = trie.offsets[level], trie.tokens[level]
    first_BM1, last_BM1 = (offset[inputs.states_BM + i][:, :, None] for i in (0, 1))
    node_BMX = first_BM1 + slots.to(first_BM1.device)
    legal_BMX = node_BMX < last_BM1
    token_BMX = tokens[node_BMX.clamp_max(len(tokens) - 1)].long()
    total_BMX = inputs.log_probs_BMC.float().gather(2, token_BMX) + inputs.scores_BM[:, :, None]
    scores_BK, parents_BK, place_BK = best_of(total_BMX.where(legal_BMX, float("-inf")), inputs.k)
    return scores_BK, parents_BK, token_BMX.flatten(1).gather(1, place_BK)


def by_dictionary(inputs: Inputs) -> Found:
    """Asks for the tokens after each prefix and masks its row."""
    mask_BMC = torch.full(inputs.log_probs_BMC.shape, float("-inf"))
    for mask_MC, prefixes in zip(mask_BMC, inputs.prefixes_BMl.tolist(), strict=True):
        for mask_C, prefix in zip(mask_MC, prefixes, strict=True):
            node = inputs.dictionary
            for code in prefix:
                node = node[code]
            mask_C[list(node)] = 0.0
    total_BMC = inputs.log_probs_BMC.float() + inputs.scores_BM[:, :, None] + mask_BMC.to(inputs.scores_BM.device)
    scores_BK, parents_BK, place_BK = best_of(total_BMC, inputs.k)
    return scores_BK, parents_BK, place_BK % total_BMC.shape[2]


def repeated(step: Callable[[Inputs], Found], inputs: Inputs) -> Found:
    for _ in range(inputs.steps - 1):
        step(inputs)
    return step(inputs)


def build(inputs: Inputs) -> tuple[Tensor, ...]:
    trie = Trie.build(inputs.codes_NL, inputs.code_sizes)
    return (*trie.tokens, *trie.offsets, trie.rows)


# Kept until the next, so that what it takes is seen.
_built: list[dict[int, Any]] = []


def build_dictionary(inputs: Inputs) -> Tensor:
    _built[:] = [dictionary_of(inputs.codes_NL)]
    return torch.tensor(len(_built[0]))


# Those of the published figures.
SIZES = {"steps": 100, "items": 1_000_000, "batch": 2, "beams": 70}

BENCHMARK = Benchmark(
    op="trie_step",
    shapes={
        "beauty": SIZES | {"items": 12_101, "levels": 4, "codes": 256, "level": 2, "batch": 32, "beams": 20},
        "million 4x256": SIZES | {"levels": 4, "codes": 256, "level": 2},
        "million 8x2048": SIZES | {"levels": 8, "codes": 2048, "level": 1},
        "million 8x2048 deep": SIZES | {"levels": 8, "codes": 2048, "level": 4},
    },
    make=Inputs,
    providers={
        "ops": partial(repeated, ours),
        "reference": partial(repeated, partial(ours, backend="reference")),
        "padded": partial(repeated, padded),
        "dictionary": partial(repeated, by_dictionary),
        "ops softmax": partial(repeated, partial(ours, normalization="vocabulary")),
        "build": build,
        "build dictionary": build_dictionary,
    },
    # Millions of dictionaries: minutes and gigabytes.
    skip=lambda provider, shape, device: "dictionary" in provider and "8x2048" in shape,
    unlike=("ops softmax", "build", "build dictionary"),
)


def variants() -> Iterator[tuple[str, Callable[[], object]]]:
    def call(dtype: torch.dtype, codes: int, normalization: str, filtered: int) -> None:
        offsets, tokens = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 0], dtype=torch.int32)
        allowed = (None, torch.ones(3).bool(), torch.ones(2, 3).bool())[filtered]
        beams = torch.zeros(2, 3, codes, dtype=dtype), torch.zeros(2, 3).long(), torch.zeros(2, 3)
        options: dict[str, Any] = {"normalization": normalization, "allowed": allowed, "backend": "triton"}
        trie_step(*beams, offsets, tokens, 5, **options)

    for dtype in (torch.float32, torch.bfloat16):
        for codes in (256, 2048):
            for normalization in NORMALIZATIONS:
                for filtered, words in enumerate(("", " filter", " filter a request")):
                    name = f"{str(dtype).removeprefix('torch.')} {codes} {normalization}{words}"
                    yield name, partial(call, dtype, codes, normalization, filtered)
    yield "float16 256 legal filter", partial(call, torch.float16, 256, "legal", 1)


if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
