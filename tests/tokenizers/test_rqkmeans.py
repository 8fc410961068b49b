"""RQ-KMeans and R-VQ: levels on residuals, even codes, seeds, and what they refuse."""

import math

import pytest
import torch
from torch import Tensor

from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers.kmeans import ALGORITHMS
from generative_recommenders.tokenizers.quantizer import ResidualQuantizer, fingerprint
from generative_recommenders.tokenizers.rqkmeans import RqKMeans, distinct_rows
from generative_recommenders.tokenizers.rvq import OPTIMIZERS, Rvq


def items(n: int = 600, width: int = 12, seed: int = 0) -> Tensor:
    """Rows around a few centers of a few groups, off the origin, as embeddings of text are."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randn(6, width, generator=draw)[torch.randint(6, (n,), generator=draw)]
    fine = 0.5 * torch.randn(20, width, generator=draw)[torch.randint(20, (n,), generator=draw)]
    return 3 + coarse + fine + 0.3 * torch.randn(n, width, generator=draw)


def mse(quantizer: ResidualQuantizer, x_ND: Tensor) -> float:
    return float((quantizer.reconstruct(quantizer.encode(x_ND)) - x_ND).square().sum(dim=1).mean())


def perplexity(codes_N: Tensor, size: int) -> float:
    share_C = codes_N.bincount(minlength=size) / len(codes_N)
    return math.exp(-float(torch.xlogy(share_C, share_C).sum()))


@pytest.mark.parametrize("algorithm", ["lloyd", "minibatch"])
@pytest.mark.parametrize("normalize", [False, True])
def test_codes_are_nearest_to_the_residuals(algorithm: str, normalize: bool) -> None:
    x_ND = items()
    quantizer = RqKMeans((8, 5, 3), algorithm=algorithm, normalize_residuals=normalize).fit(x_ND, seed=0)
    assert quantizer.sizes == (8, 5, 3)
    residual_ND = x_ND.double() - x_ND.double().mean(dim=0)
    for level, codebook_CD in enumerate(quantizer.codebooks()):
        if normalize:
            residual_ND = residual_ND / residual_ND.norm(dim=1, keepdim=True)
        nearest_N = torch.cdist(residual_ND, codebook_CD.double()).argmin(dim=1)
        assert torch.equal(quantizer.encode(x_ND)[:, level], nearest_N)
        residual_ND = residual_ND - codebook_CD[nearest_N].double()


def test_every_level_is_made_of_means_of_residuals() -> None:
    x_ND = items()
    quantizer = RqKMeans((6, 4), tolerance=0.0, iterations=500).fit(x_ND, seed=0)
    codes_NL = quantizer.encode(x_ND)
    residual_ND = x_ND - x_ND.mean(dim=0)
    for level, codebook_CD in enumerate(quantizer.codebooks()):
        means = [residual_ND[codes_NL[:, level] == code].mean(dim=0) for code in range(len(codebook_CD))]
        torch.testing.assert_close(codebook_CD, torch.stack(means), rtol=1e-3, atol=1e-4)
        residual_ND = residual_ND - codebook_CD[codes_NL[:, level]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_codes_are_used_and_levels_add(algorithm: str) -> None:
    x_ND = items(800)
    errors = []
    for sizes in ((16,), (16, 16), (16, 16, 16)):
        quantizer = RqKMeans(sizes, algorithm=algorithm).fit(x_ND, seed=0)
        assert all(len(code_N.unique()) == 16 for code_N in quantizer.encode(x_ND).T)
        errors.append(mse(quantizer, x_ND))
    assert errors[0] > 1.2 * errors[1] > 1.3 * errors[2]


def test_error_is_that_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    x_ND = items(3000, 16)
    theirs = faiss.ResidualQuantizer(16, 3, 4)
    theirs.max_beam_size = 1
    theirs.train(x_ND.numpy())
    decoded = torch.from_numpy(theirs.decode(theirs.compute_codes(x_ND.numpy())))
    expected = float((decoded - x_ND).square().sum(dim=1).mean())
    assert mse(RqKMeans((16, 16, 16)).fit(x_ND, seed=0), x_ND) < 1.03 * expected


@pytest.mark.parametrize("normalize", [False, True])
def test_balanced_codes_stay_even_for_items_of_later(normalize: bool) -> None:
    x_ND = items(4000)
    even = RqKMeans((16, 16), algorithm="balanced", normalize_residuals=normalize).fit(x_ND[:2000], seed=0)
    plain = RqKMeans((16, 16), normalize_residuals=normalize).fit(x_ND[:2000], seed=0)
    for level in range(2):
        assert perplexity(even.encode(x_ND[:2000])[:, level], 16) > 15.9
        assert perplexity(even.encode(x_ND[2000:])[:, level], 16) > 15.7
        assert perplexity(plain.encode(x_ND[2000:])[:, level], 16) < 15.7


def test_prices_are_part_of_the_distances() -> None:
    x_ND = items()
    quantizer = RqKMeans((8, 1, 8), algorithm="balanced").fit(x_ND, seed=0)
    codes_NL = quantizer.encode(x_ND)
    for level in range(3):
        assert torch.equal(quantizer.distances(x_ND, codes_NL, level).argmin(dim=1), codes_NL[:, level])
    without = ResidualQuantizer(quantizer.codebooks(), mean=quantizer.mean)
    assert not torch.equal(without.encode(x_ND), codes_NL)


@pytest.mark.parametrize("method", [RqKMeans((4, 1, 300)), Rvq((4, 1, 300), steps=5), RqKMeans((1,))])
def test_levels_of_one_code_and_of_their_own_sizes(method: RqKMeans | Rvq) -> None:
    quantizer = method.fit(items(), seed=0)
    codes_NL = quantizer.encode(items())
    assert quantizer.sizes == method.sizes
    assert [int(code_N.max()) + 1 for code_N in codes_NL.T] == list(method.sizes)


@pytest.mark.parametrize("method", [*(RqKMeans((8, 8), algorithm=name) for name in ALGORITHMS), Rvq((8, 8), steps=20)])
def test_same_seed_same_bytes_and_another_seed_others(method: RqKMeans | Rvq) -> None:
    x_ND = items()
    first, second, third = (method.fit(x_ND, seed=seed) for seed in (1, 1, 2))
    assert fingerprint(first) == fingerprint(second) != fingerprint(third)
    assert first.encode(x_ND).numpy().tobytes() == second.encode(x_ND).numpy().tobytes()


def test_half_precision_gives_the_codes_of_the_same_numbers() -> None:
    x_ND = items().half()
    assert fingerprint(RqKMeans((8, 8)).fit(x_ND, seed=0)) == fingerprint(RqKMeans((8, 8)).fit(x_ND.float(), seed=0))


def test_progress_is_told_by_level() -> None:
    told: list[tuple[str, int]] = []
    x_ND = items()
    RqKMeans((4, 4), iterations=3, tolerance=0.0).fit(
        x_ND, seed=0, progress=lambda stage, step, metrics: told.append((stage, step))
    )
    assert told == [("level 0", 1), ("level 0", 2), ("level 0", 3), ("level 1", 1), ("level 1", 2), ("level 1", 3)]


@pytest.mark.parametrize("method", [RqKMeans((8,)), Rvq((8,), steps=2)])
def test_input_that_cannot_be_fitted(method: RqKMeans | Rvq) -> None:
    x_ND = items(100)
    x_ND[11, 0] = math.inf
    with pytest.raises(DataError, match="NaN or infinity in row 11"):
        method.fit(x_ND, seed=0)
    with pytest.raises(DataError, match="7 distinct embeddings of 70 items, expected at least 8"):
        method.fit(items(7).repeat(10, 1), seed=0)
    with pytest.raises(DataError, match=r"got float32 \(100,\)"):
        method.fit(x_ND[:, 1], seed=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RqKMeans(()), r"RqKMeans.sizes: got \(\)"),
        (lambda: RqKMeans((4, 0)), r"RqKMeans.sizes: got \(4, 0\)"),
        (lambda: RqKMeans(algorithm="k"), "RqKMeans.algorithm: got 'k'"),
        (lambda: Rvq(optimizer="lion"), "Rvq.optimizer: got 'lion'"),
        (lambda: Rvq(learning_rate=0.0), "Rvq.learning_rate: got 0.0"),
        (lambda: Rvq(steps=-1), "Rvq.steps: got -1"),
    ],
)
def test_settings_outside_their_range_are_named(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("copies", [1, 5])
def test_distinct_rows_are_counted_as_far_as_needed(copies: int) -> None:
    x_ND = items(40).repeat(copies, 1)
    assert distinct_rows(x_ND, 1000) == 40
    assert 30 <= distinct_rows(x_ND, 30) <= 40
    assert distinct_rows(torch.tensor([[0.0], [-0.0]]), 2) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("normalize", [False, True])
def test_training_lowers_the_error_of_the_seeds(optimizer: str, normalize: bool) -> None:
    x_ND = 50 * items()
    settings = {"optimizer": optimizer, "normalize_residuals": normalize, "batch_size": 100}
    seeded, trained = (Rvq((16, 16), steps=steps, **settings).fit(x_ND, seed=0) for steps in (0, 100))
    assert mse(trained, x_ND) < 0.9 * mse(seeded, x_ND)
    assert all(len(code_N.unique()) == 16 for code_N in trained.encode(x_ND).T)


def test_a_step_is_that_of_autograd() -> None:
    x_ND = items(50)
    seeded, stepped = (
        Rvq((5,), steps=steps, batch_size=50, optimizer="sgd", learning_rate=0.1, normalize_residuals=False).fit(
            x_ND, seed=0
        )
        for steps in (0, 1)
    )
    codebook_CD = seeded.codebooks()[0].clone().requires_grad_()
    (x_ND - x_ND.mean(dim=0) - codebook_CD[seeded.encode(x_ND)[:, 0]]).square().sum(dim=1).mean().backward()
    assert codebook_CD.grad is not None
    torch.testing.assert_close(stepped.codebooks()[0], codebook_CD.detach() - 0.1 * codebook_CD.grad)
