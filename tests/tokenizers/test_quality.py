"""The report of semantic IDs against small tables whose numbers are known, and what it prints and draws."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.errors import UserError
from generative_recommenders.tokenizers import embedding_quality
from generative_recommenders.tokenizers.collisions import resolve
from generative_recommenders.tokenizers.quality import collapse_alarm, draw_quality, quality_report
from generative_recommenders.tokenizers.quantizer import LshQuantizer, ProductQuantizer, Quantizer, ResidualQuantizer

# Two items share (0, 1, 2), three share (1, 0, 0).
CODES = torch.tensor([[0, 1, 2], [1, 0, 0], [0, 1, 2], [1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [3, 1, 0]])
SIZES = (4, 2, 3)


def fitted(count: int = 400, width: int = 4) -> tuple[Tensor, ResidualQuantizer]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(count, width, generator=generator)
    return x_ND, ResidualQuantizer([torch.randn(8, width, generator=generator) / 2**level for level in range(3)])


def test_both_collision_rates_and_group_sizes() -> None:
    report = quality_report(CODES, SIZES)
    assert (report.items, report.distinct, report.largest_group) == (8, 5, 3)
    assert report.p_unique == 5 / 8
    assert report.collision_rate == 3 / 8
    assert report.colliding_items == 5 / 8
    assert report.group_sizes == [(1, 3), (2, 1), (3, 1)]


def test_usage_entropy_and_branching_of_each_level() -> None:
    report = quality_report(CODES.int(), SIZES)
    assert report.usage == [3 / 4, 1.0, 1.0]
    shares = [4 / 8, 3 / 8, 1 / 8]
    assert report.entropy[0] == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert report.perplexity[1] == pytest.approx(2.0)
    # Nodes: root -> 0, 1, 3; 0 -> 0, 1; 1 -> 0; 3 -> 1; (0, 0) -> 1; (0, 1) -> 0, 2; (1, 0) -> 0; (3, 1) -> 0.
    assert report.branching_mean == pytest.approx([3, 4 / 3, 5 / 4])
    assert report.branching_max == [3, 2, 2]


def test_one_item_and_one_level_are_legal() -> None:
    report = quality_report(torch.tensor([[0]]), (1,), x_ND=torch.ones(1, 2), reconstructed_ND=torch.ones(1, 2))
    assert (report.collision_rate, report.usage, report.perplexity, report.entropy) == (0, [1.0], [1.0], [0.0])
    assert report.reconstruction_mse == 0
    assert report.neighbor_agreement is None


def test_codes_before_a_policy_are_reported_beside_those_after() -> None:
    x_ND, quantizer = fitted()
    before = quantizer.encode(x_ND)
    result = resolve("greedy", quantizer, x_ND, before)
    report = quality_report(result.codes_NL, result.sizes, codes_before=before)
    plain = quality_report(before, quantizer.sizes)
    assert (report.distinct, report.collision_rate, report.colliding_items) == (400, 0, 0)
    assert report.distinct_before == plain.distinct < 400
    assert report.collision_rate_before == plain.collision_rate
    assert report.colliding_items_before == plain.colliding_items
    assert report.group_sizes_before == plain.group_sizes
    assert report.changed_items == result.changed / 400
    counted = resolve("dedup", quantizer, x_ND, before)
    assert quality_report(counted.codes_NL, counted.sizes, codes_before=before).changed_items == 0


def test_errors_of_residual_codes_end_in_that_of_the_reconstruction() -> None:
    x_ND, quantizer = fitted()
    codes = quantizer.encode(x_ND)
    report = quality_report(codes, quantizer.sizes, x_ND=x_ND, quantizer=quantizer)
    assert report.quantization_error is not None and report.reconstruction_mse is not None
    assert report.quantization_error[-1] == pytest.approx(report.reconstruction_mse * 4, rel=1e-5)
    own = [quantizer.distances(x_ND, codes, level).gather(1, codes[:, [level]]) for level in range(3)]
    assert report.quantization_error == pytest.approx([float(level.mean()) for level in own], rel=1e-4)
    ratio = float(own[0].sqrt().mean() / own[-1].sqrt().mean())
    assert report.residual_norm_ratio == pytest.approx(ratio, rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(x_ND, quantizer.reconstruct(codes)).mean()
    assert report.reconstruction_cosine == pytest.approx(float(cosine), rel=1e-5)


def test_normalized_residuals_and_prices_do_not_distort_the_errors() -> None:
    x_ND, plain = fitted()
    quantizer = ResidualQuantizer(
        plain.codebooks(), normalize_residuals=True, prices=[torch.rand(8) for _ in range(3)], lengths=torch.ones(3)
    )
    codes = quantizer.encode(x_ND)
    report = quality_report(codes, quantizer.sizes, x_ND=x_ND, quantizer=quantizer)
    unit_ND = torch.nn.functional.normalize(x_ND, dim=1)
    first = (unit_ND - plain.codebooks()[0][codes[:, 0]]).square().sum(dim=1).mean()
    assert report.quantization_error is not None
    assert report.quantization_error[0] == pytest.approx(float(first), rel=1e-5)


def test_product_codes_have_errors_of_their_parts_and_a_digit_may_follow() -> None:
    x_ND = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    quantizer = ProductQuantizer([x_ND[:8, :2], x_ND[8:16, 2:]])
    codes = quantizer.encode(x_ND)
    counted = resolve("dedup", quantizer, x_ND, codes)
    report = quality_report(counted.codes_NL, counted.sizes, x_ND=x_ND, quantizer=quantizer)
    assert report.quantization_error is not None and report.reconstruction_mse is not None
    assert len(report.quantization_error) == 2 and len(report.usage) == 3
    assert sum(report.quantization_error) == pytest.approx(report.reconstruction_mse * 4, rel=1e-5)
    assert report.residual_norm_ratio is None
    assert len(report.table().splitlines()[-1].split()) == len(report.table().splitlines()[-2].split()) - 1


def test_codes_that_stand_for_nothing_have_no_errors() -> None:
    x_ND = fitted()[0]
    quantizer: Quantizer = LshQuantizer((4, 4), torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    report = quality_report(quantizer.encode(x_ND), quantizer.sizes, x_ND=x_ND, quantizer=quantizer)
    assert report.quantization_error is report.reconstruction_mse is report.neighbor_agreement is None


def test_neighbors_agree_with_a_search_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    x_ND, quantizer = fitted()
    other_ND = x_ND + torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    agreed = 0
    for table in (x_ND, other_ND):
        distances = torch.cdist(table.double(), table.double()).fill_diagonal_(torch.inf)
        near = distances.topk(10, largest=False).indices
        agreed = near if table is x_ND else sum(len(set(a) & set(b)) for a, b in zip(agreed.tolist(), near.tolist()))  # type: ignore[attr-defined]  # noqa: B905
    codes = quantizer.encode(x_ND)
    report = quality_report(codes, quantizer.sizes, x_ND=x_ND, reconstructed_ND=other_ND)
    assert report.neighbor_queries == 400
    assert report.neighbor_agreement == pytest.approx(agreed / 4000)
    monkeypatch.setattr("generative_recommenders.tokenizers.quantizer_base.BLOCK_VALUES", 400 * 7)
    blockwise = quality_report(codes, quantizer.sizes, x_ND=x_ND, reconstructed_ND=other_ND)
    assert blockwise.neighbor_agreement == pytest.approx(report.neighbor_agreement)
    monkeypatch.setattr(embedding_quality, "MAX_NEIGHBOR_WORK", 1)
    few = quality_report(codes, quantizer.sizes, x_ND=x_ND, reconstructed_ND=other_ND)
    assert few.neighbor_queries == 200
    assert few.neighbor_agreement == pytest.approx(report.neighbor_agreement, abs=0.1)
    assert few == quality_report(codes, quantizer.sizes, x_ND=x_ND, reconstructed_ND=other_ND)


def test_text_json_and_scalars_say_the_same() -> None:
    x_ND, quantizer = fitted()
    codes = quantizer.encode(x_ND)
    result = resolve("first_free", quantizer, x_ND, codes)
    report = quality_report(result.codes_NL, result.sizes, x_ND=x_ND, codes_before=codes, quantizer=quantizer)
    read = json.loads(report.to_json())
    assert read["items"] == 400 and read["usage"] == report.usage and read["sizes"] == [8, 8, 8]
    scalars = report.scalars()
    assert scalars["usage/level_2"] == report.usage[2] and scalars["collision_rate"] == 0.0
    assert all(isinstance(value, float) and math.isfinite(value) for value in scalars.values())
    table = report.table()
    assert f"(before the policy: {report.collision_rate_before:.2%})" in table
    assert f"{report.perplexity[1]:.1f}" in table.splitlines()[-2]
    assert "tuples by items" in table and "1: 400" in table
    assert max(map(len, table.splitlines())) <= 120
    bare = quality_report(codes, quantizer.sizes)
    assert "before" not in bare.table() and "MSE" not in bare.table() and "changed_items" not in bare.scalars()


def test_a_collapsed_level_stops_with_advice_in_one_line() -> None:
    codes = torch.stack([torch.arange(500) % 100, torch.arange(500) % 19], dim=1)
    collapse_alarm(codes, (100, 95))
    with pytest.raises(UserError, match="got 19 of 100 codes in use on level 1, expected at least 20%") as caught:
        collapse_alarm(codes, (100, 100))
    assert "\n" not in str(caught.value)
    for advice in ("sum over features", "k-means", "dead codes", "Adagrad"):
        assert advice in str(caught.value)
    collapse_alarm(codes, (100, 100), threshold=0.19)
    # Ten items cannot use a fifth of 100 codes.
    collapse_alarm(codes[:10], (100, 100))


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (CODES[:0], {}, "at least one item"),
        (CODES.float(), {}, "expected integers"),
        (CODES[:, :2], {}, "at 3 levels"),
        (CODES + 2, {}, "codes of level 0: got 5, expected 0 to 3"),
        (CODES - 1, {}, "codes of level 0: got -1"),
        (CODES, {"x_ND": torch.ones(7, 2)}, "7 embeddings for 8 rows"),
        (CODES, {"codes_before": CODES[:5]}, "5 codes before for 8 rows"),
    ],
)
def test_what_does_not_fit_is_refused(codes: Tensor, options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        quality_report(codes, SIZES, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("levels", "count", "width"), [(3, 400, 4), (1, 1, 1), (9, 50, 2)])
def test_the_picture_is_a_png(tmp_path: Path, levels: int, count: int, width: int) -> None:
    pytest.importorskip("matplotlib")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (count, levels), generator=generator)
    x_ND = torch.randn(count, width, generator=generator).half()
    draw_quality(quality_report(codes, (8,) * levels), codes, (8,) * levels, x_ND, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib is not installed; try pip install matplotlib"):
        draw_quality(quality_report(CODES, SIZES), CODES, SIZES, torch.ones(8, 2), tmp_path / "quality.png")
    assert list(tmp_path.iterdir()) == []
