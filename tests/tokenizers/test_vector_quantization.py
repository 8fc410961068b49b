"""Gradients through the choice of a code, codebooks that train, and balanced codes, each against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from generative_recommenders.tokenizers.quantizer_base import squared_distances
from generative_recommenders.tokenizers.vector_quantization import (
    CODEBOOKS,
    EmaCodebook,
    ResidualVq,
    SimVqCodebook,
    gumbel_weights,
    rotate,
    sinkhorn_plan,
    straight_through,
)
from ops.residual_quantize import residual_quantize


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _quantizer(**settings: object) -> ResidualVq:
    torch.manual_seed(1)
    return ResidualVq((8, 6, 5), 4, **settings)  # type: ignore[arg-type]


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    z_TD, q_TD = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    passed_TD = straight_through(z_TD, q_TD)
    assert torch.allclose(passed_TD, q_TD)
    weights_TD = torch.randn(5, 3)
    (passed_TD * weights_TD).sum().backward()
    assert torch.equal(z_TD.grad, weights_TD) and q_TD.grad is None  # type: ignore[arg-type]


def _rotation(z_D: Tensor, q_D: Tensor) -> Tensor:
    """The scaled rotation of the plane of z and q that takes z to q, as a matrix from an orthonormal basis."""
    a_D = z_D / z_D.norm()
    b_D = q_D - a_D * (a_D @ q_D)
    b_D = b_D / b_D.norm()
    cosine, sine = a_D @ q_D / q_D.norm(), b_D @ q_D / q_D.norm()
    basis_D2 = torch.stack((a_D, b_D), dim=1)
    turn = torch.stack((torch.stack((cosine, -sine)), torch.stack((sine, cosine))))
    identity = torch.eye(len(z_D), dtype=z_D.dtype)
    return q_D.norm() / z_D.norm() * (identity + basis_D2 @ (turn - torch.eye(2, dtype=z_D.dtype)) @ basis_D2.T)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 9), st.integers(0, 2**20))
def test_rotation_is_its_matrix_forwards_and_backwards(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z_D, q_D, weights_D = torch.randn(3, width, generator=generator, dtype=torch.float64)
    z_1D = z_D[None].clone().requires_grad_()
    rotated_1D = rotate(z_1D, q_D[None])
    assert torch.allclose(rotated_1D[0], q_D)
    (rotated_1D[0] @ weights_D).backward()
    assert z_1D.grad is not None
    assert torch.allclose(z_1D.grad[0], _rotation(z_D, q_D).T @ weights_D, rtol=1e-6, atol=1e-9)


def test_rotation_of_nothing_is_finite() -> None:
    z_TD = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    q_TD = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-2.0, 0.0]])
    rotated_TD = rotate(z_TD, q_TD)
    assert torch.equal(rotated_TD, q_TD)
    rotated_TD.sum().backward()
    assert z_TD.grad is not None and bool(z_TD.grad.isfinite().all())


def _encoder_gradients(quantizer: ResidualVq, loss: str) -> list[float]:
    """Norm of the gradient that each level's loss sends to z."""
    z_TD = torch.randn(64, 4, generator=_generator())
    norms = []
    for level in range(3):
        leaf_TD = z_TD.clone().requires_grad_()
        getattr(quantizer(leaf_TD, _generator()), loss)[level].backward()
        norms.append(0.0 if leaf_TD.grad is None else float(leaf_TD.grad.norm()))
    return norms


def test_total_sends_the_commitment_of_every_level_to_the_encoder() -> None:
    assert min(_encoder_gradients(_quantizer(straight_through="total"), "commitment_L")) > 1e-3


def test_per_level_loses_the_commitment_of_all_levels_but_the_first() -> None:
    first, *others = _encoder_gradients(_quantizer(straight_through="per_level"), "commitment_L")
    assert first > 1e-3 and others == [0.0, 0.0]


@pytest.mark.parametrize("straight", ["total", "per_level"])
def test_modes_differ_in_gradients_alone(straight: str) -> None:
    quantizer, z_TD = _quantizer(straight_through=straight), torch.randn(50, 4, requires_grad=True)
    quantized = quantizer(z_TD, _generator())
    codes_TL, rest_TD = residual_quantize(z_TD, quantizer.vectors())
    assert torch.equal(quantized.codes_TL, codes_TL)
    assert torch.allclose(quantized.q_TD, z_TD - rest_TD, atol=1e-6)
    assert torch.allclose(quantized.commitment_L[-1], rest_TD.square().sum(dim=1).mean(), atol=1e-6)
    (gradient_TD,) = torch.autograd.grad(quantized.q_TD.sum(), z_TD)
    assert torch.equal(gradient_TD, torch.ones(50, 4))


@pytest.mark.parametrize("straight", ["total", "per_level"])
@pytest.mark.parametrize("estimator", ["ste", "rotation", "gumbel"])
def test_codebook_loss_moves_each_level_by_its_own_error(estimator: str, straight: str) -> None:
    quantizer = _quantizer(estimator=estimator, straight_through=straight)
    quantized = quantizer(torch.randn(64, 4, requires_grad=True), _generator())
    quantized.codebook_L.sum().backward(retain_graph=True)
    for level, codebook in enumerate(quantizer.codebooks()):
        assert codebook.codes.grad is not None
        if estimator == "gumbel":
            assert float(codebook.codes.grad.norm()) > 0
            continue
        code_T, residual_TD = quantized.codes_TL[:, level], quantized.residuals[level]
        expected_CD = torch.zeros(codebook.size, 4)
        expected_CD.index_add_(0, code_T, 2 * (codebook.codes.detach()[code_T] - residual_TD) / 64)
        assert torch.allclose(codebook.codes.grad, expected_CD, atol=1e-6)


def test_the_decoder_reaches_codes_of_gumbel_alone() -> None:
    for estimator in ("ste", "rotation", "gumbel"):
        quantizer = _quantizer(estimator=estimator)
        quantizer(torch.randn(64, 4, requires_grad=True), _generator()).q_TD.square().sum().backward()
        reached = [codebook.codes.grad is not None for codebook in quantizer.codebooks()]
        assert reached == [estimator == "gumbel"] * 3


def test_gumbel_draws_codes_with_the_probabilities_of_their_distances() -> None:
    distances_TC = torch.tensor([0.0, 0.5, 2.0]).expand(40_000, 3)
    weights_TC = gumbel_weights(distances_TC, 0.1, _generator())
    assert torch.allclose(weights_TC.sum(dim=1), torch.ones(40_000), atol=1e-5)
    shares_C = torch.bincount(weights_TC.argmax(dim=1), minlength=3) / 40_000
    assert torch.allclose(shares_C, (-distances_TC[0]).softmax(dim=0), atol=0.01)


def test_moving_averages_follow_the_formula() -> None:
    codebook = EmaCodebook(5, 3, decay=0.9, epsilon=1e-3)
    counts, sums = [1.0] * 5, codebook.codes.clone()
    for _ in range(4):
        residual_TD, code_T = torch.randn(20, 3), torch.randint(0, 4, (20,))
        codebook.update(residual_TD, code_T)
        for code in range(5):
            chosen = code_T == code
            counts[code] = 0.9 * counts[code] + 0.1 * int(chosen.sum())
            sums[code] = 0.9 * sums[code] + 0.1 * residual_TD[chosen].sum(dim=0)
        total = sum(counts)
        smoothed = [(count + 1e-3) / (total + 5 * 1e-3) * total for count in counts]
        expected_CD = sums / torch.tensor(smoothed)[:, None]
        assert torch.allclose(codebook.codes, expected_CD, atol=1e-5)


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_replaced_codes_are_where_they_were_put(kind: str) -> None:
    codebook = CODEBOOKS[kind](6, 3)
    if isinstance(codebook, SimVqCodebook):
        with torch.no_grad():
            codebook.matrix.normal_()
    before_CD, vectors_nD = codebook.vectors().detach().clone(), torch.randn(2, 3)
    codebook.replace(torch.tensor([4, 1]), vectors_nD)
    after_CD = codebook.vectors().detach()
    assert torch.allclose(after_CD[[4, 1]], vectors_nD, atol=1e-4)
    assert torch.equal(after_CD[[0, 2, 3, 5]], before_CD[[0, 2, 3, 5]])


def test_revived_average_outlives_the_next_batches() -> None:
    codebook = EmaCodebook(4, 2)
    codebook.replace(torch.tensor([2]), torch.tensor([[5.0, -5.0]]))
    for _ in range(20):
        codebook.update(torch.randn(8, 2), torch.randint(0, 2, (8,)))
    assert torch.allclose(codebook.codes[2], torch.tensor([5.0, -5.0]), atol=0.01)


def test_a_gradient_to_one_simvq_code_moves_all() -> None:
    codebook = SimVqCodebook(6, 3)
    before_CD = codebook.vectors().detach().clone()
    codebook.vectors()[0].sum().backward()
    with torch.no_grad():
        assert codebook.matrix.grad is not None and codebook.codes.grad is None
        codebook.matrix -= 0.1 * codebook.matrix.grad
    assert bool((codebook.vectors() != before_CD).any(dim=1).all())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 2**20))
def test_sinkhorn_gives_rows_and_codes_their_shares(rows: int, size: int, seed: int) -> None:
    distances_TC = torch.rand(rows, size, generator=torch.Generator().manual_seed(seed)) * 7
    plan_TC = sinkhorn_plan(distances_TC, 0.2, iterations=200)
    assert torch.allclose(plan_TC.sum(dim=1), torch.full((rows,), 1 / rows, dtype=torch.float64))
    assert torch.allclose(plan_TC.sum(dim=0), torch.full((size,), 1 / size, dtype=torch.float64), rtol=1e-3)


def test_sinkhorn_spreads_rows_that_all_want_one_code() -> None:
    distances_TC = torch.rand(400, 8, generator=_generator())
    distances_TC[:, 0] -= 0.4
    nearest_C = torch.bincount(distances_TC.argmin(dim=1), minlength=8)
    balanced_C = torch.bincount(sinkhorn_plan(distances_TC, 0.01, iterations=500).argmax(dim=1), minlength=8)
    assert int(nearest_C.max()) > 200 and int(balanced_C.max()) < 65 and int(balanced_C.min()) > 35


@pytest.mark.parametrize("epsilon", [1e-6, 0.003, 10.0])
def test_sinkhorn_stays_finite(epsilon: float) -> None:
    far_TC = torch.tensor([[0.0, 1e12], [0.0, 1e12], [0.0, 1e12]])
    for distances_TC in (far_TC, torch.zeros(3, 2), torch.rand(1, 7)):
        assert bool(sinkhorn_plan(distances_TC, epsilon).isfinite().all())


def test_sinkhorn_sets_the_codes_of_its_level_alone() -> None:
    z_TD = torch.randn(60, 4)
    quantizer = _quantizer(sinkhorn_epsilons=(0.0, 0.0, 0.003))
    codes_TL = quantizer(z_TD, _generator()).codes_TL
    nearest_TL, _ = residual_quantize(z_TD, quantizer.vectors())
    assert torch.equal(codes_TL[:, :2], nearest_TL[:, :2])
    assert int(torch.bincount(codes_TL[:, 2], minlength=5).max()) < int(torch.bincount(nearest_TL[:, 2]).max())


def test_rotation_and_averages_agree_with_vector_quantize_pytorch() -> None:
    oracle = pytest.importorskip("vector_quantize_pytorch")
    z_TD, q_TD = torch.randn(2, 30, 4)
    rotate_to = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch").rotate_to
    leaf_TD, other_TD, weights_TD = z_TD.clone().requires_grad_(), z_TD.clone().requires_grad_(), torch.randn(30, 4)
    (rotate(leaf_TD, q_TD) * weights_TD).sum().backward()
    (rotate_to(other_TD, q_TD) * weights_TD).sum().backward()
    assert torch.allclose(leaf_TD.grad, other_TD.grad, atol=1e-4)  # type: ignore[arg-type]

    theirs = oracle.VectorQuantize(4, 6, decay=0.9, eps=1e-5, rotation_trick=False, threshold_ema_dead_code=0)
    ours = EmaCodebook(6, 4, decay=0.9, epsilon=1e-5)
    state = theirs._codebook
    ours.codes.data.copy_(state.embed[0])
    ours.get_buffer("sums").copy_(state.embed_avg[0])
    ours.get_buffer("counts").copy_(state.cluster_size[0])
    for _ in range(3):
        batch_TD = torch.randn(40, 4)
        code_T = squared_distances(batch_TD, ours.codes).argmin(dim=1)
        _, their_code_T, _ = theirs.train()(batch_TD[None])
        assert torch.equal(their_code_T[0], code_T)
        ours.update(batch_TD, code_T)
        assert torch.allclose(state.embed[0], ours.codes, atol=1e-4)
