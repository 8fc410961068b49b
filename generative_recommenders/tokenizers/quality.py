"""How good semantic IDs are, before a model is trained on them.

Two collision rates are in use and differ by up to a factor of two: the part of items that a lower row shares its tuple
with, 1 - distinct / items (LC-Rec), and the part of items whose tuple is not theirs alone (Zhang 2026). Both are given.
Entropies are in nats, so that a level's perplexity is the exponential of its entropy.
"""

from __future__ import annotations

import colorsys
import dataclasses
import importlib
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.errors import UserError
from generative_recommenders.tokenizers.embedding_quality import NEIGHBORS, neighbors, quantization, reconstruction
from generative_recommenders.tokenizers.quantizer_base import Quantizer
from generative_recommenders.tokenizers.tuple_space import TupleSpace

# Points of the map of items, so that they can be told apart.
MAP_ITEMS = 20_000


@dataclass(frozen=True)
class QualityReport:
    """Plain numbers, and lists with an entry a level; what could not be computed is None.

    Attributes:
        items, sizes: rows, and codes a level.
        distinct: tuples; p_unique is its part of the items.
        collision_rate: 1 - p_unique.
        colliding_items: part of the items whose tuple another item has too.
        largest_group: items of the most frequent tuple.
        group_sizes: (items of a tuple, number of such tuples), ascending.
        distinct_before, collision_rate_before, colliding_items_before, largest_group_before, group_sizes_before: of the
            codes before a policy.
        changed_items: part of the items that lost a code of those before.
        usage: part of the codes that an item has.
        entropy, perplexity: of the items' codes.
        branching_mean, branching_max: children of a node in the trie of tuples; of level 0 it is the root.
        quantization_error: mean squared length of what a level left over in latent space; of product codes, of the
            level's own part.
        residual_norm_ratio: mean length of what the first level left, over what the last did; residual codes only.
        reconstruction_mse: mean over items and dimensions of the squared difference of embedding and reconstruction.
        reconstruction_cosine: mean cosine of both.
        neighbor_agreement: part of an item's `NEIGHBORS` nearest embeddings that are among as many nearest of the
            reconstructions, by Euclidean distance over the whole catalogue, mean over `neighbor_queries` items.
    """

    items: int
    sizes: list[int]
    distinct: int
    p_unique: float
    collision_rate: float
    colliding_items: float
    largest_group: int
    group_sizes: list[tuple[int, int]]
    usage: list[float]
    entropy: list[float]
    perplexity: list[float]
    branching_mean: list[float]
    branching_max: list[int]
    distinct_before: int | None = None
    collision_rate_before: float | None = None
    colliding_items_before: float | None = None
    largest_group_before: int | None = None
    group_sizes_before: list[tuple[int, int]] | None = None
    changed_items: float | None = None
    quantization_error: list[float] | None = None
    residual_norm_ratio: float | None = None
    reconstruction_mse: float | None = None
    reconstruction_cosine: float | None = None
    neighbor_agreement: float | None = None
    neighbor_queries: int | None = None

    def to_json(self) -> str:
        """All attributes, as JSON that ends with a line break."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> QualityReport:
        """The report that `to_json` wrote."""
        content = json.loads(text)
        for name in ("group_sizes", "group_sizes_before"):
            if content[name] is not None:
                content[name] = [(size, count) for size, count in content[name]]
        return cls(**content)

    def scalars(self) -> dict[str, float]:
        """Numbers by name for TensorBoard; those of levels are named `usage/level_0` and so on."""
        result: dict[str, float] = {}
        for name, value in dataclasses.asdict(self).items():
            if name in ("sizes", "group_sizes", "group_sizes_before") or value is None:
                continue
            if isinstance(value, list):
                result |= {f"{name}/level_{level}": float(entry) for level, entry in enumerate(value)}
            else:
                result[name] = float(value)
        return result

    def table(self) -> str:
        """Text for a console: the whole first, then a row a level."""
        whole = [("items", f"{self.items:,}"), ("distinct tuples", self._before("distinct", "{:,}"))]
        whole += [("collision rate", self._before("collision_rate", "{:.2%}"))]
        whole += [("items that share a tuple", self._before("colliding_items", "{:.2%}"))]
        whole += [("largest group", self._before("largest_group", "{:,}"))]
        whole += [("tuples by items", _summary(self.group_sizes))]
        whole += [("  before the policy", _summary(self.group_sizes_before))] if self.group_sizes_before else []
        for label, value, form in (
            ("changed items", self.changed_items, "{:.2%}"),
            ("reconstruction MSE", self.reconstruction_mse, "{:.4g}"),
            ("reconstruction cosine", self.reconstruction_cosine, "{:.4f}"),
            ("residual norm, first/last", self.residual_norm_ratio, "{:.3f}"),
            (f"agreement of {NEIGHBORS} neighbors", self.neighbor_agreement, "{:.2%}"),
        ):
            whole += [] if value is None else [(label, form.format(value))]
        width = max(len(label) for label, _ in whole)
        lines = [f"{label:<{width}}  {value}" for label, value in whole]
        header = ["level", "codes", "usage", "perplexity", "entropy", "children", "most"]
        rows = [header + ["error"] * (self.quantization_error is not None)]
        for level, size in enumerate(self.sizes):
            row = [str(level), f"{size:,}", f"{self.usage[level]:.1%}", f"{self.perplexity[level]:.1f}"]
            row += [f"{self.entropy[level]:.3f}", f"{self.branching_mean[level]:.2f}", f"{self.branching_max[level]:,}"]
            errors = self.quantization_error or []
            rows.append(row + [f"{error:.4g}" for error in errors[level : level + 1]])
        widths = [max(len(row[place]) for row in rows if place < len(row)) for place in range(len(rows[0]))]
        lines += [
            "",
            *("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows),
        ]
        return "\n".join(lines) + "\n"

    def _before(self, name: str, form: str) -> str:
        after, before = getattr(self, name), getattr(self, f"{name}_before")
        return form.format(after) + ("" if before is None else f"  (before the policy: {form.format(before)})")


def quality_report(
    codes_NL: Tensor,
    sizes: Sequence[int],
    *,
    x_ND: Tensor | None = None,
    reconstructed_ND: Tensor | None = None,
    codes_before: Tensor | None = None,
    quantizer: Quantizer | None = None,
) -> QualityReport:
    """Measure codes; whatever an argument is missing for stays None.

    Args:
        codes_NL: integers (N, L), the final codes; a level that a policy added may follow the quantizer's.
        x_ND: embeddings. With the quantizer they give errors of quantization, with reconstructions the rest.
        reconstructed_ND: of the codes; the quantizer's by default, where it has some.
        codes_before: those of the quantizer, before a collision policy.
    Raises:
        DataError: no items, a code outside its level, or numbers of rows that differ.
    """
    codes = _as_array(codes_NL, sizes)
    for name, table in (("embeddings", x_ND), ("reconstructions", reconstructed_ND), ("codes before", codes_before)):
        if table is not None and len(table) != len(codes):
            raise DataError(f"quality report: got {len(table)} {name} for {len(codes)} rows of codes, expected equal")
    found = _collisions(codes, sizes) | _levels(codes, sizes)
    if codes_before is not None:
        before = _as_array(codes_before, sizes[: codes_before.shape[1]])
        was = _collisions(before, sizes[: before.shape[1]])
        found |= {f"{name}_before": value for name, value in was.items() if name != "p_unique"}
        found["changed_items"] = float((codes[:, : before.shape[1]] != before).any(axis=1).mean())
    if x_ND is not None and quantizer is not None:
        own_NL = codes_NL[:, : len(quantizer.sizes)].to(x_ND.device, torch.int64)
        found |= quantization(quantizer, x_ND, own_NL)
        if reconstructed_ND is None and quantizer.reconstructs:
            reconstructed_ND = quantizer.reconstruct(own_NL)
    if x_ND is not None and reconstructed_ND is not None:
        found |= reconstruction(x_ND, reconstructed_ND) | neighbors(x_ND, reconstructed_ND)
    return QualityReport(items=len(codes), sizes=[int(size) for size in sizes], **found)


def collapse_alarm(codes_NL: Tensor, sizes: Sequence[int], threshold: float = 0.2) -> None:
    """Raise a one-line UserError where items use less than `threshold` of a level's codes.

    A level with more codes than there are items is measured by the number of items.
    """
    codes = _as_array(codes_NL, sizes)
    for level, size in enumerate(sizes):
        used = len(np.unique(codes[:, level]))
        if used < threshold * min(size, len(codes)):
            raise UserError(
                f"codebook collapse: got {used} of {size} codes in use on level {level}, expected at least "
                f"{threshold:.0%}; try the reconstruction loss as a sum over features, k-means initialization, "
                "revival of dead codes, or Adagrad"
            )


def draw_quality(report: QualityReport, codes_NL: Tensor, sizes: Sequence[int], x_ND: Tensor, path: Path) -> None:
    """Write a PNG: items a code of each level, and the items on their two principal axes, a color a first code.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{path}: matplotlib is not installed; try pip install matplotlib")
    codes, levels = _as_array(codes_NL, sizes), len(sizes)
    columns = -(-levels // 4)
    rows = -(-levels // columns)
    # The figure alone, without pyplot, needs no display and no choice of one.
    make = importlib.import_module("matplotlib.figure").Figure
    figure = make(figsize=(7.5 + 3.5 * columns, max(6.5, 1.8 * rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3.5 * columns, 7.5))
    panels = left.subplots(rows, columns, squeeze=False).T.reshape(-1)
    for level, axes in enumerate(panels):
        if level < levels:
            _draw_usage(axes, report, level, np.bincount(codes[:, level], minlength=sizes[level]))
        else:
            axes.set_axis_off()
    left.supxlabel("codes by frequency (dashed: all equally frequent)", fontsize=9)
    _draw_map(right.subplots(), x_ND, codes[:, 0])
    figure.savefig(path, dpi=120, format="png")


def _draw_usage(axes: Any, report: QualityReport, level: int, counts: np.ndarray) -> None:
    axes.stairs(np.sort(counts)[::-1], fill=True, color="tab:blue", alpha=0.8)
    axes.axhline(counts.mean(), color="black", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, len(counts))
    axes.set_ylim(bottom=0)
    usage, perplexity = report.usage[level], report.perplexity[level]
    axes.set_title(f"level {level}: {usage:.0%} of {len(counts)} used, perplexity {perplexity:.3g}", fontsize=9)
    axes.set_ylabel("items", fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_map(axes: Any, x_ND: Tensor, first_N: np.ndarray) -> None:
    """A code's hue is the direction of its items' mean, its strength that mean's distance from the middle.

    First codes that stand for regions make a map of even colors, codes without meaning a gray one.
    """
    kept = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(0))[:MAP_ITEMS]
    x_nD = x_ND[kept.to(x_ND.device)].float().cpu()
    x_nD = x_nD - x_nD.mean(dim=0)
    variances, directions = torch.linalg.eigh(x_nD.T.double() @ x_nD.double() / len(x_nD))
    points = (x_nD.double() @ directions[:, -2:].flip(1)).numpy()
    shares = (variances / variances.sum().clamp(min=1e-30)).flip(0)[:2].tolist()
    _, code_n = np.unique(first_N[kept.numpy()], return_inverse=True)
    counts = np.bincount(code_n)[:, None]
    middles = np.column_stack([np.bincount(code_n, weights=axis) for axis in points.T]) / counts
    hues = np.arctan2(middles[:, -1], middles[:, 0]) / (2 * math.pi) % 1
    spread = max(float(np.hypot(points[:, 0], points[:, -1]).mean()), 1e-30)
    # Against the spread of the items, not of the codes: means that differ by chance alone stay gray.
    strengths = np.minimum(np.hypot(middles[:, 0], middles[:, -1]) / spread, 1)
    colors = [colorsys.hsv_to_rgb(hue, 0.9 * strength, 0.8) for hue, strength in zip(hues, strengths, strict=True)]
    axes.scatter(points[:, 0], points[:, -1], s=6, c=np.array(colors)[code_n], linewidths=0)
    shown = "" if len(kept) == len(x_ND) else f", {len(kept):,} of them"
    axes.set_title(f"items{shown}, colored by the mean of their first code ({len(counts)} codes)", fontsize=10)
    axes.set_xlabel(f"first principal axis ({shares[0]:.1%} of the variance)", fontsize=9)
    axes.set_ylabel(f"second ({shares[-1]:.1%})", fontsize=9)
    axes.set_aspect("equal", adjustable="datalim")


def _as_array(codes_NL: Tensor, sizes: Sequence[int]) -> np.ndarray:
    if codes_NL.dim() != 2 or codes_NL.shape[1] != len(sizes) or codes_NL.is_floating_point() or not len(codes_NL):
        raise DataError(
            f"codes: got {str(codes_NL.dtype).removeprefix('torch.')} {tuple(codes_NL.shape)}, expected integers of at "
            f"least one item at {len(sizes)} levels; pass codes and sizes of one table"
        )
    codes = codes_NL.detach().cpu().to(torch.int64).numpy()
    for level, size in enumerate(sizes):
        low, high = int(codes[:, level].min()), int(codes[:, level].max())
        if low < 0 or high >= size:
            got = low if low < 0 else high
            raise DataError(
                f"codes of level {level}: got {got}, expected 0 to {size - 1}; pass the sizes of this table"
            )
    return codes


def _collisions(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    counts = np.unique(TupleSpace(sizes, codes[:0]).keys(codes), return_counts=True)[1]
    group_sizes, groups = np.unique(counts, return_counts=True)
    return {
        "distinct": len(counts),
        "p_unique": len(counts) / len(codes),
        "collision_rate": 1 - len(counts) / len(codes),
        "colliding_items": float(counts[counts > 1].sum() / len(codes)),
        "largest_group": int(counts.max()),
        "group_sizes": list(zip(group_sizes.tolist(), groups.tolist(), strict=True)),
    }


def _levels(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    usage, entropy, means, most = [], [], [], []
    space = TupleSpace(sizes, codes[:0])
    nodes = np.unique(space.keys(codes), return_index=True)[1]
    tuples = codes[nodes]
    for level, size in enumerate(sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        share = counts[counts > 0] / len(codes)
        usage.append(len(share) / size)
        entropy.append(max(float(-(share * np.log(share)).sum()), 0.0))
        at_level = tuples[np.unique(space.keys(tuples, level + 1), return_index=True)[1]]
        children = np.unique(space.keys(at_level, level), return_counts=True)[1]
        means.append(float(children.mean()))
        most.append(int(children.max()))
    perplexity = [math.exp(value) for value in entropy]
    return {
        "usage": usage,
        "entropy": entropy,
        "perplexity": perplexity,
        "branching_mean": means,
        "branching_max": most,
    }


def _summary(group_sizes: list[tuple[int, int]]) -> str:
    """Number of tuples by their number of items, the large ones together."""
    bounds = [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, None)]
    parts = []
    for low, high in bounds:
        groups = sum(count for size, count in group_sizes if size >= low and (high is None or size <= high))
        label = f"{low}+" if high is None else f"{low}" if high == low else f"{low}-{high}"
        parts += [f"{label}: {groups:,}"] if groups else []
    return ", ".join(parts)
