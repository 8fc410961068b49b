"""Fits of RQ-VAE and RQ-KMeans+: codes stay in use, repeat, survive a stop, and mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.data.errors import DataError
from generative_recommenders.errors import UserError
from generative_recommenders.tokenizers.autoencoder_training import (
    Autoencoder,
    CodebookCollapse,
    Training,
    distinct,
    usage_of,
)
from generative_recommenders.tokenizers.mlp import Mlp
from generative_recommenders.tokenizers.quantizer import fingerprint
from generative_recommenders.tokenizers.rqvae import RqKMeansPlus, RqVae
from generative_recommenders.tokenizers.vector_quantization import ResidualVq

SIZES = (16, 12, 8)
SMALL = RqVae(
    SIZES,
    hidden_dims=(32,),
    code_dim=8,
    learning_rate=1e-2,
    batch_size=128,
    steps=80,
    warmup_steps=10,
    revive_every=20,
    check_every=20,
)
PLUS = RqKMeansPlus(SIZES, hidden_dims=(32,), batch_size=128, steps=40, check_every=20, revive_every=20)


class Stopped(Exception):
    """As of a machine that goes away."""


@pytest.fixture(scope="module")
def items_ND() -> Tensor:
    """600 items in 30 groups, of columns with means and scales of their own."""
    generator = torch.Generator().manual_seed(7)
    groups_GD = torch.randn(30, 20, generator=generator)
    x_ND = groups_GD[torch.arange(600) % 30] + 0.3 * torch.randn(600, 20, generator=generator)
    return x_ND * torch.linspace(0.1, 3, 20) + torch.linspace(-5, 5, 20)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codebook": "ema"},
        {"codebook": "simvq"},
        {"estimator": "rotation"},
        {"estimator": "rotation", "codebook": "ema"},
        {"estimator": "gumbel"},
        {"straight_through": "per_level"},
        {"estimator": "rotation", "straight_through": "per_level"},
        {"sinkhorn_epsilons": (0.0, 0.0, 0.003)},
        {"reconstruction": "mean"},
        {"optimizer": "adagrad", "learning_rate": 0.05},
        {"input_normalization": "center"},
        {"input_normalization": "none"},
        {"activation": "silu"},
        {"kmeans_init": False},
        {"plain_share": 0.0},
        {"keep": "last"},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()) or "defaults",
)
def test_every_setting_keeps_its_codes_in_use(items_ND: Tensor, changes: dict[str, object]) -> None:
    quantizer = replace(SMALL, **changes).fit(items_ND, seed=0)  # type: ignore[arg-type]
    codes_NL = quantizer.encode(items_ND)
    assert quantizer.sizes == SIZES
    assert min(usage_of(codes_NL, SIZES)) >= 0.7
    errors_ND = quantizer.reconstruct(codes_NL) - items_ND
    variance = (items_ND - items_ND.mean(dim=0)).square().mean()
    assert float(errors_ND.square().mean() / variance) < (0.9 if changes.get("kmeans_init", True) else 1.0)


def test_more_steps_reconstruct_better(items_ND: Tensor) -> None:
    errors = []
    for steps in (20, 400):
        quantizer = replace(SMALL, steps=steps).fit(items_ND, seed=0)
        errors.append(float((quantizer.reconstruct(quantizer.encode(items_ND)) - items_ND).square().mean()))
    assert errors[1] < 0.6 * errors[0]


def test_plus_starts_from_balanced_clusters_and_improves_on_them(items_ND: Tensor) -> None:
    start = replace(PLUS, steps=1, learning_rate=1e-9, keep="last").fit(items_ND, seed=0)
    standard_ND = (items_ND - items_ND.mean(dim=0)) / items_ND.std(dim=0, correction=0)
    assert torch.allclose(start.latent(items_ND), standard_ND, atol=1e-4)
    counts_C = torch.bincount(start.encode(items_ND)[:, 0], minlength=16)
    assert int(counts_C.min()) > 0 and int(counts_C.max()) <= 3 * 600 // 16
    trained = replace(PLUS, steps=300, learning_rate=1e-3).fit(items_ND, seed=0)
    errors = [
        float((quantizer.reconstruct(quantizer.encode(items_ND)) - items_ND).square().mean())
        for quantizer in (start, trained)
    ]
    assert errors[1] < 0.95 * errors[0]
    assert min(usage_of(trained.encode(items_ND), SIZES)) >= 0.9


@pytest.mark.parametrize("settings", [SMALL, PLUS, replace(SMALL, estimator="gumbel"), replace(SMALL, codebook="ema")])
def test_same_seed_gives_the_same_bytes(items_ND: Tensor, settings: RqVae) -> None:
    first = settings.fit(items_ND, seed=5)
    torch.manual_seed(99)
    again = settings.fit(items_ND, seed=5)
    assert fingerprint(first) == fingerprint(again)
    assert torch.equal(first.encode(items_ND), again.encode(items_ND))
    assert fingerprint(settings.fit(items_ND, seed=6)) != fingerprint(first)


def test_a_fit_leaves_the_state_of_random_numbers_alone(items_ND: Tensor) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    replace(SMALL, steps=4).fit(items_ND, seed=1)
    assert torch.equal(torch.rand(3), expected)


def _stop_at(step: int) -> Callable[[str, int, dict[str, float]], None]:
    def progress(stage: str, number: int, metrics: dict[str, float]) -> None:
        if stage == "check" and number >= step:
            raise Stopped

    return progress


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        replace(SMALL, codebook="ema", estimator="rotation"),
        replace(SMALL, estimator="gumbel", optimizer="adagrad"),
        replace(SMALL, plain_share=0.6),
        PLUS,
    ],
)
def test_a_stopped_fit_goes_on_to_the_same_bytes(items_ND: Tensor, settings: RqVae, tmp_path: Path) -> None:
    expected = settings.fit(items_ND, seed=2)
    checkpoint = tmp_path / "fit.pt"
    with pytest.raises(Stopped):
        settings.fit(items_ND, seed=2, progress=_stop_at(40), checkpoint=checkpoint)
    assert checkpoint.exists()
    epochs: list[int] = []
    resumed = settings.fit(
        items_ND,
        seed=2,
        progress=lambda stage, number, metrics: epochs.append(number) if stage == "epoch" else None,
        checkpoint=checkpoint,
    )
    assert fingerprint(resumed) == fingerprint(expected)
    assert min(epochs) >= 3, "starts where it stopped"
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_fit_is_refused(items_ND: Tensor, tmp_path: Path) -> None:
    checkpoint = tmp_path / "fit.pt"
    with pytest.raises(Stopped):
        SMALL.fit(items_ND, seed=2, progress=_stop_at(60), checkpoint=checkpoint)
    for settings, x_ND, seed in (
        (SMALL, items_ND, 3),
        (SMALL, items_ND + 1, 2),
        (replace(SMALL, commitment=0.5), items_ND, 2),
    ):
        with pytest.raises(DataError, match=r"fit\.pt: got another fit's checkpoint, .*; delete or move it") as error:
            settings.fit(x_ND, seed=seed, checkpoint=checkpoint)
        assert "\n" not in str(error.value)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged checkpoint; delete it"):
        SMALL.fit(items_ND, seed=2, checkpoint=checkpoint)


def test_progress_tells_of_every_unit(items_ND: Tensor) -> None:
    told: list[tuple[str, int, dict[str, float]]] = []
    replace(SMALL, epochs=8).fit(items_ND, seed=0, progress=lambda *event: told.append(event))
    assert [number for stage, number, _ in told if stage == "epoch"] == list(range(8))
    assert [number for stage, number, _ in told if stage == "kmeans"] == [0, 1, 2]
    checks = [(number, metrics) for stage, number, metrics in told if stage == "check"]
    assert [number for number, _ in checks] == [20, 40]
    assert set(checks[0][1]) == {"usage_0", "usage_1", "usage_2", "collisions"}
    losses = [metrics for stage, _, metrics in told if stage == "epoch"][-1]
    assert losses["loss"] == pytest.approx(losses["reconstruction"] + losses["codebook"] + 0.25 * losses["commitment"])


def test_the_check_with_the_fewest_collisions_is_kept(items_ND: Tensor) -> None:
    collisions: list[float] = []

    def progress(stage: str, number: int, metrics: dict[str, float]) -> None:
        if stage == "check" and number >= 80:
            collisions.append(metrics["collisions"])

    settings = replace(SMALL, sizes=(8, 4), steps=160, check_every=5, learning_rate=1e-2)
    codes_NL = settings.fit(items_ND, seed=0, progress=progress).encode(items_ND)
    assert 1 - distinct(codes_NL) / 600 == pytest.approx(min(collisions))
    assert min(collisions) < collisions[-1], "the last check would do as well here, which tests nothing"
    last_NL = replace(settings, keep="last").fit(items_ND, seed=0).encode(items_ND)
    assert 1 - distinct(last_NL) / 600 == pytest.approx(collisions[-1])


def test_unused_codes_are_revived(items_ND: Tensor) -> None:
    settings = replace(SMALL, sizes=(64, 64), kmeans_init=False, plain_share=0.5, steps=160, keep="last")
    usage = []
    for revive_every in (0, 20):
        codes_NL = replace(settings, revive_every=revive_every).fit(items_ND, seed=0).encode(items_ND)
        usage.append(min(usage_of(codes_NL, (64, 64))))
    assert usage[0] < 0.6 < 0.75 < usage[1]


def test_revived_codes_are_residuals_and_used_ones_stay(items_ND: Tensor) -> None:
    width = items_ND.shape[1]
    model = Autoencoder(Mlp((width, 8)), ResidualVq(SIZES, 8), Mlp((8, width)), mean=None, scale=None)
    training = Training(
        model, items_ND, replace(SMALL, steps=2), seed=0, initialize=lambda: None, progress=None, checkpoint=None
    )
    residuals = [torch.randn(40, 8) for _ in SIZES]
    before = model.quantizer.vectors()
    before = [vectors_CD.clone() for vectors_CD in before]
    for counts_C in training.counts:
        counts_C[: len(counts_C) // 2] = 1
    training.revive(residuals, torch.Generator().manual_seed(0))
    for level, vectors_CD in enumerate(model.quantizer.vectors()):
        half = SIZES[level] // 2
        assert torch.equal(vectors_CD[:half], before[level][:half])
        matches = (vectors_CD[half:, None] == residuals[level]).all(dim=2)
        assert bool(matches.any(dim=1).all())
        assert len(matches.nonzero()[:, 1].unique()) == half, "no residual twice"
        assert int(training.counts[level].sum()) == 0


@pytest.mark.parametrize("skip", [False, True])
def test_centering_moves_the_latent_and_nothing_else(items_ND: Tensor, skip: bool) -> None:
    width = items_ND.shape[1]
    ends = (width, 12, width if skip else 8)
    encoder, decoder = Mlp(ends, skip=skip), Mlp(ends[::-1], skip=skip)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = Autoencoder(encoder, ResidualVq(SIZES, ends[-1]), decoder, mean=None, scale=None)
    before_Nd, decoded_ND = model.latent(items_ND), decoder(model.latent(items_ND)).detach()
    model.center(items_ND)
    after_Nd = model.latent(items_ND)
    assert float(before_Nd.mean(dim=0).norm()) > 0.5 and float(after_Nd.mean(dim=0).norm()) < 1e-4
    assert torch.allclose(after_Nd, before_Nd - before_Nd.mean(dim=0), atol=1e-4)
    assert torch.allclose(decoder(after_Nd), decoded_ND, atol=1e-3)


def test_a_collapse_stops_with_advice(items_ND: Tensor) -> None:
    settings = replace(
        SMALL,
        sizes=(256, 16),
        kmeans_init=False,
        revive_every=0,
        plain_share=0.5,
        steps=200,
        learning_rate=0.03,
        codebook="ema",
    )
    with pytest.raises(CodebookCollapse) as error:
        settings.fit(items_ND, seed=0)
    message = str(error.value)
    assert message.startswith("RqVae: got ") and "of the codes of level" in message and "\n" not in message
    assert "expected at least 20%; try kmeans_init=True, revive_every=100" in message
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize("plain_share", [0.0, 0.5])
def test_a_loss_that_is_not_finite_stops(items_ND: Tensor, plain_share: float) -> None:
    with pytest.raises(UserError, match=r"RqVae: got a loss that is not finite by step \d+, .*; lower learning_rate"):
        replace(SMALL, learning_rate=1e30, plain_share=plain_share).fit(items_ND, seed=0)


def test_bad_items_are_refused(items_ND: Tensor) -> None:
    broken_ND = items_ND.clone()
    broken_ND[7, 3] = float("nan")
    for x_ND, message in (
        (broken_ND, "NaN or infinity in row 7"),
        (items_ND[:15], "15 distinct embeddings of 15 items, expected at least 16; ask for fewer codes"),
        (items_ND[:9].repeat(4, 1), "9 distinct embeddings of 36 items"),
        (items_ND[0], "expected floats"),
        (items_ND.long(), "expected floats"),
    ):
        with pytest.raises(DataError, match=message) as error:
            SMALL.fit(x_ND, seed=0)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ()}, r"RqVae\.sizes: got \(\)"),
        ({"sizes": (256, 1)}, "2 codes or more a level"),
        ({"hidden_dims": (0,)}, "hidden_dims"),
        ({"code_dim": 0}, "code_dim: got 0, expected 1 or more; try 32"),
        ({"activation": "selu"}, "activation: got 'selu', expected one of relu, silu, gelu"),
        ({"estimator": "st"}, "estimator: got 'st', expected one of ste, rotation, gumbel"),
        ({"straight_through": "both"}, "straight_through"),
        ({"codebook": "sgd"}, "one of gradient, ema, simvq"),
        ({"optimizer": "sgd"}, "one of adagrad, adamw"),
        ({"reconstruction": "max"}, "one of sum, mean"),
        ({"input_normalization": "l1"}, "input_normalization"),
        ({"sinkhorn_epsilons": (0.1,)}, r"expected 3 values or none; try \(0\.0, 0\.0, 0\.003\)"),
        ({"sinkhorn_epsilons": (0, 0, -1)}, "sinkhorn_epsilons"),
        ({"sinkhorn_epsilons": (0, 0, 0.1), "estimator": "gumbel"}, "none with estimator"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, expected more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": 0}, "steps"),
        ({"epochs": -1}, "epochs"),
        ({"commitment": -0.1}, "commitment"),
        ({"plain_share": 1.0}, "plain_share: got 1.0, expected 0 to less than 1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"keep": "first"}, "one of best, last"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        RqVae(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_name_is_that_of_the_method() -> None:
    with pytest.raises(ConfigError, match=r"RqKMeansPlus\.steps"):
        RqKMeansPlus(steps=0)


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_rotation_starts_around_the_origin(items_ND: Tensor, codebook: str) -> None:
    settings = replace(SMALL, estimator="rotation", codebook=codebook, steps=21, plain_share=20 / 21, keep="last")
    z_Nd = replace(settings, learning_rate=1e-3).fit(items_ND, seed=0).latent(items_ND)
    assert float(z_Nd.mean(dim=0).norm() / z_Nd.norm(dim=1).mean()) < 0.05
    other_Nd = replace(settings, learning_rate=1e-3, estimator="ste").fit(items_ND, seed=0).latent(items_ND)
    assert float(other_Nd.mean(dim=0).norm() / other_Nd.norm(dim=1).mean()) > 0.1


@pytest.mark.slow
def test_beauty_uses_its_codes(shared_dir: Path) -> None:
    path = shared_dir / "data/amazon-2014/beauty/text_emb_minilm_l6_v2.f16.npy"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    x_ND = torch.from_numpy(np.load(path).astype(np.float32))
    codes_NL = RqVae(steps=600).fit(x_ND, seed=0).encode(x_ND)
    assert min(usage_of(codes_NL, (256, 256, 256))) >= 0.95
    assert distinct(codes_NL) > 0.9 * len(x_ND)
