"""Product quantization, plain, on principal components and under a rotation, and the controls that learn nothing."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.controls import Lsh, Random
from generative_recommenders.tokenizers.product import Opq, Pq, dealt_out, part_widths, principal_axes
from generative_recommenders.tokenizers.quantizer import ProductQuantizer, fingerprint


def items(n: int = 800, width: int = 10, seed: int = 0) -> Tensor:
    """Correlated columns of falling variance, off the origin."""
    draw = torch.Generator().manual_seed(seed)
    mixing_DD = torch.linalg.qr(torch.randn(width, width, generator=draw))[0]
    return 2 + torch.randn(n, width, generator=draw) * 0.7 ** torch.arange(width) @ mixing_DD


def mse(quantizer: ProductQuantizer, x_ND: Tensor) -> float:
    return float((quantizer.reconstruct(quantizer.encode(x_ND)) - x_ND).square().sum(dim=1).mean())


def test_each_level_codes_its_own_columns() -> None:
    x_ND = items()
    quantizer = Pq((8, 1, 5), center=False).fit(x_ND, seed=0)
    assert quantizer.parts == [4, 3, 3]
    codes_NL = quantizer.encode(x_ND)
    for level, part_Nd in enumerate(x_ND.double().split([4, 3, 3], dim=1)):
        nearest_N = torch.cdist(part_Nd, quantizer.codebooks()[level].double()).argmin(dim=1)
        assert torch.equal(codes_NL[:, level], nearest_N)
    expected = torch.cat([book[codes_NL[:, level]] for level, book in enumerate(quantizer.codebooks())], dim=1)
    torch.testing.assert_close(quantizer.reconstruct(codes_NL), expected)


@pytest.mark.parametrize("rotate", [False, True])
def test_error_is_that_of_faiss(rotate: bool) -> None:
    faiss = pytest.importorskip("faiss")
    x_ND = items(3000, 16)
    numbers = x_ND.numpy()
    if rotate:
        turn = faiss.OPQMatrix(16, 4)
        turn.niter = 10
        # OPQMatrix takes a bare pointer.
        codes_of_turn = faiss.ProductQuantizer(16, 4, 4)
        turn.pq = codes_of_turn
        turn.train(numbers)
        numbers = turn.apply(numbers)
    theirs = faiss.ProductQuantizer(16, 4, 4)
    theirs.train(numbers)
    expected = float(np.square(theirs.decode(theirs.compute_codes(numbers)) - numbers).sum(axis=1).mean())
    method = (Opq if rotate else Pq)((16, 16, 16, 16))
    assert mse(method.fit(x_ND, seed=0), x_ND) < 1.03 * expected


def test_the_rotation_is_one_and_finds_hidden_parts() -> None:
    """Two halves with codes of their own, mixed: principal axes, of variances nearly alike, mix them once more."""
    draw = torch.Generator().manual_seed(0)
    halves = [
        torch.randn(16, 5, generator=draw)[torch.randint(16, (2000,), generator=draw)],
        torch.randn(16, 5, generator=draw)[torch.randint(16, (2000,), generator=draw)],
    ]
    x_ND = torch.cat(halves, dim=1) @ torch.linalg.qr(torch.randn(10, 10, generator=draw))[0]
    dealt, turned = (Opq((16, 16), rounds=rounds).fit(x_ND, seed=0) for rounds in (0, 20))
    assert turned.rotation is not None
    torch.testing.assert_close(turned.rotation.T @ turned.rotation, torch.eye(10), rtol=0, atol=1e-5)
    assert mse(turned, x_ND) < 0.93 * mse(dealt, x_ND)


def test_principal_axes_help_where_variances_differ() -> None:
    x_ND = items()
    assert mse(Opq((16, 16), rounds=0).fit(x_ND, seed=0), x_ND) < 0.98 * mse(Pq((16, 16)).fit(x_ND, seed=0), x_ND)


def test_rounds_lower_the_error() -> None:
    errors: list[float] = []

    def keep(stage: str, step: int, metrics: dict[str, float]) -> None:
        if stage == "rotation":
            errors.append(metrics["mse"])

    Opq((16, 16), rounds=12).fit(items(), seed=0, progress=keep)
    assert len(errors) == 12
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("method", [Pq((8, 8), components=5), Opq((8, 8), components=5)])
def test_components_are_the_principal_ones(method: Pq) -> None:
    x_ND = items()
    quantizer = method.fit(x_ND, seed=0)
    assert quantizer.rotation is not None
    assert quantizer.rotation.shape == (10, 5)
    right = np.linalg.svd((x_ND - x_ND.mean(dim=0)).numpy(), full_matrices=False)[2][:5]
    projector = torch.from_numpy(right.T @ right)
    torch.testing.assert_close(quantizer.rotation @ quantizer.rotation.T, projector, rtol=0, atol=1e-4)
    assert [book.shape[1] for book in quantizer.codebooks()] == [3, 2]
    assert quantizer.reconstruct(quantizer.encode(x_ND)).shape == x_ND.shape


def test_axes_are_ordered_and_signed() -> None:
    z_ND = items() - items().mean(dim=0)
    axes_DD, variances_D = principal_axes(z_ND)
    assert bool((variances_D.diff() <= 0).all())
    torch.testing.assert_close((z_ND @ axes_DD).square().mean(dim=0), variances_D, rtol=1e-3, atol=1e-5)
    largest_D = axes_DD.gather(0, axes_DD.abs().argmax(dim=0, keepdim=True))
    assert bool((largest_D > 0).all())


def test_variances_are_dealt_out_evenly() -> None:
    order = dealt_out(torch.tensor([8.0, 4.0, 2.0, 1.0]), [2, 2])
    assert sorted(order) == [0, 1, 2, 3]
    assert sorted(map(sorted, (order[:2], order[2:]))) == [[0, 3], [1, 2]]
    assert sorted(dealt_out(torch.zeros(5), [2, 2, 1])) == [0, 1, 2, 3, 4]
    assert part_widths(11, 4) == [3, 3, 3, 2]


@pytest.mark.parametrize(
    "method", [Pq((8, 8)), Opq((8, 8)), Pq((8, 8), algorithm="minibatch"), Lsh((8, 8)), Random((8, 8))]
)
def test_same_seed_same_bytes_and_another_seed_others(method: Pq | Lsh | Random) -> None:
    x_ND = items()
    first, second, third = (method.fit(x_ND, seed=seed) for seed in (1, 1, 2))
    assert fingerprint(first) == fingerprint(second) != fingerprint(third)
    assert first.encode(x_ND).numpy().tobytes() == second.encode(x_ND).numpy().tobytes()


def test_rotation_is_fitted_on_a_sample() -> None:
    x_ND = items()
    method = Opq((4, 4), rows_per_code=50)
    assert mse(method.fit(x_ND, seed=0), x_ND) < 1.1 * mse(Opq((4, 4)).fit(x_ND, seed=0), x_ND)


def test_input_that_cannot_be_fitted() -> None:
    with pytest.raises(DataError, match="10 columns for 11 levels"):
        Pq((2,) * 11).fit(items(), seed=0)
    with pytest.raises(DataError, match="components: got 12, expected at most the 10 columns"):
        Pq((2, 2), components=12).fit(items(), seed=0)
    with pytest.raises(DataError, match="6 distinct embeddings of 12 items"):
        Opq((8, 2)).fit(items(6).repeat(2, 1), seed=0)
    broken = items()
    broken[3, 3] = torch.nan
    for method in (Pq(), Lsh(), Random()):
        with pytest.raises(DataError, match="NaN or infinity in row 3"):
            method.fit(broken, seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pq((4, 4), components=1), "Pq.components: got 1"),
        (lambda: Opq((4, 4), algorithm="balanced"), "Opq.algorithm: got 'balanced'"),
        (lambda: Opq(rounds=-1), "Opq.rounds: got -1"),
        (lambda: Lsh((8, 6)), "Lsh.sizes: got 6 at level 1, expected powers of two; try 4"),
        (lambda: Lsh(()), "Lsh.sizes: got no level"),
        (lambda: Random((0,)), r"Random.sizes: got \(0,\)"),
    ],
)
def test_settings_outside_their_range_are_named(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_planes_keep_neighborhoods_and_random_codes_do_not() -> None:
    x_ND = items(2000)
    near_ND = x_ND + 0.01 * items(2000, seed=1).sub(2)
    for method, low, high in ((Lsh((16,)), 0.9, 1.0), (Random((16,)), 0.03, 0.1)):
        quantizer = method.fit(x_ND, seed=0)
        same = float((quantizer.encode(x_ND) == quantizer.encode(near_ND)).float().mean())
        assert low < same <= high


def test_random_codes_are_uniform_and_independent_between_levels() -> None:
    codes_NL = Random((7, 9)).fit(items(), seed=0).encode(items(20000))
    cells = torch.bincount(codes_NL[:, 0] * 9 + codes_NL[:, 1], minlength=63).double()
    # Chi-square of 62 degrees of freedom: 103 is its 99.9th percentile.
    assert float(((cells - cells.mean()) ** 2 / cells.mean()).sum()) < 103
