"""Quantizers of every kind: kept and read again, distances, blocks, fingerprints, and what they refuse."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from generative_recommenders.config_syntax import ConfigError
from generative_recommenders.data.errors import DataError
from generative_recommenders.tokenizers import quantizer_base
from generative_recommenders.tokenizers.mlp import Mlp
from generative_recommenders.tokenizers.quantizer import (
    QUANTIZERS,
    LshQuantizer,
    ProductQuantizer,
    Quantizer,
    RandomQuantizer,
    ResidualQuantizer,
    fingerprint,
    load_quantizer,
    save_quantizer,
)

WIDTH = 6


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizers() -> dict[str, Quantizer]:
    torch.manual_seed(0)
    books = [draws(4, WIDTH), draws(1, WIDTH, seed=1), draws(5, WIDTH, seed=2)]
    latent = [draws(4, 3), draws(7, 3, seed=1)]
    skip = Mlp((WIDTH, 8, WIDTH), skip=True, activation="silu")
    torch.nn.init.normal_(skip.layers[-1].weight)
    return {
        "plain": ResidualQuantizer(books),
        "conditioned": ResidualQuantizer(books, mean=draws(WIDTH, seed=3), scale=draws(WIDTH, seed=4).abs() + 0.5),
        "lengths": ResidualQuantizer(books, normalize_residuals=True, lengths=torch.tensor([2.0, 1.0, 0.5])),
        "priced": ResidualQuantizer(books, prices=[torch.rand(len(book)) for book in books]),
        "priced lengths": ResidualQuantizer(
            books, normalize_residuals=True, prices=[0.1 * torch.rand(len(book)) for book in books]
        ),
        "encoder": ResidualQuantizer(latent, encoder=Mlp((WIDTH, 5, 3)), decoder=Mlp((3, 5, WIDTH))),
        "skip": ResidualQuantizer(books, encoder=skip),
        "product": ProductQuantizer([draws(4, 4), draws(3, 2)]),
        "rotated": ProductQuantizer(
            [draws(4, 2), draws(1, 2)], mean=draws(WIDTH), rotation=torch.linalg.qr(draws(WIDTH, 4))[0]
        ),
        "lsh": LshQuantizer((8, 1, 4), draws(5, WIDTH), mean=draws(WIDTH, seed=1)),
        "random": RandomQuantizer((3, 1, 1000), torch.randint(-(1 << 62), 1 << 62, (3, WIDTH + 1))),
    }


KINDS = list(quantizers())


@pytest.mark.parametrize("name", KINDS)
def test_what_is_kept_is_what_is_read(name: str, tmp_path: Path) -> None:
    quantizer, x_ND = quantizers()[name], draws(500, WIDTH, seed=9)
    save_quantizer(quantizer, tmp_path / "tokenizer")
    loaded = load_quantizer(tmp_path / "tokenizer")
    assert type(loaded) is type(quantizer)
    assert loaded.sizes == quantizer.sizes
    assert loaded.width == WIDTH
    assert fingerprint(loaded) == fingerprint(quantizer)
    codes_NL = quantizer.encode(x_ND)
    assert loaded.encode(x_ND).numpy().tobytes() == codes_NL.numpy().tobytes()
    if quantizer.reconstructs:
        assert torch.equal(loaded.reconstruct(codes_NL), quantizer.reconstruct(codes_NL))


@pytest.mark.parametrize("name", KINDS)
def test_the_nearest_code_is_the_encoded_one(name: str) -> None:
    quantizer, x_ND = quantizers()[name], draws(300, WIDTH, seed=9)
    codes_NL = quantizer.encode(x_ND)
    quantizer.check_codes(codes_NL)
    for level, size in enumerate(quantizer.sizes):
        distances_NC = quantizer.distances(x_ND, codes_NL, level)
        assert distances_NC.shape == (300, size)
        assert bool((distances_NC >= 0).all())
        assert torch.equal(distances_NC.argmin(dim=1), codes_NL[:, level])
        # Levels to come have no part in it.
        assert torch.equal(quantizer.distances(x_ND, codes_NL[:, :level], level), distances_NC)


@pytest.mark.parametrize("name", KINDS)
def test_blocks_and_dtypes_change_no_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, x_ND = quantizers()[name], draws(100, WIDTH, seed=9).half()
    codes_NL = quantizer.encode(x_ND)
    monkeypatch.setattr(quantizer_base, "BLOCK_VALUES", 7 * WIDTH)
    assert torch.equal(quantizer.encode(x_ND), codes_NL)
    assert torch.equal(quantizer.encode(x_ND.double()), codes_NL)
    if quantizer.reconstructs:
        in_blocks = quantizer.reconstruct(codes_NL)
        monkeypatch.undo()
        torch.testing.assert_close(in_blocks, quantizer.reconstruct(codes_NL))
    assert quantizer.encode(x_ND[:0]).shape == (0, len(quantizer.sizes))


def test_fingerprints_tell_quantizers_apart() -> None:
    found = [fingerprint(quantizer) for quantizer in quantizers().values()]
    assert len(set(found)) == len(found)
    assert found == [fingerprint(quantizer) for quantizer in quantizers().values()]
    changed = quantizers()["encoder"]
    with torch.no_grad():
        changed.encoder.layers[0].bias[0] += 1e-6
    assert fingerprint(changed) != found[KINDS.index("encoder")]


def test_residual_distances_are_those_of_the_chosen_prefix() -> None:
    quantizer, x_ND = quantizers()["conditioned"], draws(20, WIDTH, seed=9)
    codes_NL = torch.stack([torch.arange(20) % size for size in quantizer.sizes], dim=1)
    first_CD, second_CD, third_CD = quantizer.codebooks()
    left_ND = (x_ND - quantizer.mean) / quantizer.scale - first_CD[codes_NL[:, 0]] - second_CD[codes_NL[:, 1]]
    expected_NC = torch.cdist(left_ND.double(), third_CD.double()).square().float()
    torch.testing.assert_close(quantizer.distances(x_ND, codes_NL, 2), expected_NC, rtol=1e-4, atol=1e-4)


def test_reconstruction_undoes_the_conditioning() -> None:
    quantizer = quantizers()["conditioned"]
    codes_NL = torch.tensor([[3, 0, 4], [0, 0, 1]])
    summed_ND = sum(book[codes_NL[:, level]] for level, book in enumerate(quantizer.codebooks()))
    torch.testing.assert_close(quantizer.reconstruct(codes_NL), summed_ND * quantizer.scale + quantizer.mean)


def test_lengths_stand_in_for_those_that_normalization_took() -> None:
    first_CD, second_CD = torch.eye(2), 0.5 * torch.eye(2)
    quantizer = ResidualQuantizer([first_CD, second_CD], normalize_residuals=True, lengths=torch.tensor([3.0, 0.2]))
    expected = 3.0 * (first_CD[1] + 0.2 * second_CD[0])
    torch.testing.assert_close(quantizer.reconstruct(torch.tensor([[1, 0]])), expected[None])


def test_normalized_codes_do_not_depend_on_length() -> None:
    quantizer, x_ND = quantizers()["priced lengths"], draws(50, WIDTH, seed=9)
    assert torch.equal(quantizer.encode(x_ND), quantizer.encode(64 * x_ND))


def test_bits_are_sides_of_planes() -> None:
    quantizer, x_ND = quantizers()["lsh"], draws(50, WIDTH, seed=9)
    for x_D, codes in zip(x_ND, quantizer.encode(x_ND).tolist(), strict=True):
        bits = [int(torch.dot(plane_D, x_D - quantizer.mean) > 0) for plane_D in quantizer.planes]
        assert codes == [bits[0] + 2 * bits[1] + 4 * bits[2], 0, bits[3] + 2 * bits[4]]
    # A code that differs in one bit is as far as the item is from that plane.
    codes_NL = quantizer.encode(x_ND)
    unit_D = quantizer.planes[4] / quantizer.planes[4].norm()
    expected_N = ((x_ND - quantizer.mean) @ unit_D).square()
    found_NC = quantizer.distances(x_ND, codes_NL, 2)
    torch.testing.assert_close(found_NC.gather(1, codes_NL[:, 2:] ^ 2)[:, 0], expected_N, rtol=1e-4, atol=1e-6)


def test_random_codes_are_the_hash_they_say() -> None:
    quantizer, x_ND = quantizers()["random"], draws(20, WIDTH, seed=9)
    words = x_ND.numpy().view("uint32").tolist()
    for row, codes in zip(words, quantizer.encode(x_ND).tolist(), strict=True):
        for size, keys, code in zip(quantizer.sizes, quantizer.keys.tolist(), codes, strict=True):
            value = (keys[-1] + sum(key * word for key, word in zip(keys, row, strict=False))) % (1 << 64)
            assert code == (value >> 32) * size >> 32


def test_equal_zeros_have_equal_random_codes() -> None:
    codes_NL = quantizers()["random"].encode(torch.tensor([[0.0] * WIDTH, [-0.0] * WIDTH]))
    assert torch.equal(codes_NL[0], codes_NL[1])


def test_controls_stand_for_no_embedding() -> None:
    for name in ("lsh", "random"):
        with pytest.raises(DataError, match="stand for no embedding"):
            quantizers()[name].reconstruct(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(DataError, match="codes have no vectors"):
        quantizers()["random"].codebooks()


@pytest.mark.parametrize("name", [name for name in KINDS if name != "random"])
def test_codebooks_have_a_vector_a_code(name: str) -> None:
    quantizer = quantizers()[name]
    assert [len(book) for book in quantizer.codebooks()] == list(quantizer.sizes)


@pytest.mark.parametrize("name", KINDS)
def test_embeddings_that_do_not_fit_are_refused(name: str) -> None:
    quantizer, x_ND = quantizers()[name], draws(10, WIDTH)
    for wrong in (x_ND[:, :-1], x_ND[0], x_ND.long()):
        with pytest.raises(DataError, match=f"expected floats \\(items, {WIDTH}\\)"):
            quantizer.encode(wrong)
    x_ND[4, 1], x_ND[8, 1] = -math.inf, math.nan
    with pytest.raises(DataError, match="NaN or infinity in row 4"):
        quantizer.encode(x_ND)


def test_codes_that_do_not_fit_are_refused() -> None:
    quantizer = quantizers()["plain"]
    for wrong in (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 3)):
        with pytest.raises(DataError, match=r"expected integers \(items, 3\)"):
            quantizer.reconstruct(wrong)
    with pytest.raises(DataError, match="codes of level 2: got 5, expected 0 to 4"):
        quantizer.reconstruct(torch.tensor([[0, 0, 5]]))
    with pytest.raises(DataError, match="codes of level 0: got -1, expected 0 to 3"):
        quantizer.reconstruct(torch.tensor([[-1, 0, 4]]))


def test_folders_that_hold_no_quantizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read a tokenizer"):
        load_quantizer(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="something that is no tokenizer"):
        save_quantizer(quantizers()["plain"], tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match):
            load_quantizer(folder)
        save_quantizer(quantizers()["encoder"], folder)

    save_quantizer(quantizers()["encoder"], folder)
    (folder / "model.safetensors").write_bytes(b"short")
    refused("damaged tokenizer")
    (folder / "tokenizer.json").write_text("{")
    refused("damaged tokenizer")
    settings = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(settings | {"kind": "cube"}))
    refused(f"kind 'cube', expected version 1 of {', '.join(QUANTIZERS)}")
    (folder / "tokenizer.json").write_text(json.dumps(settings | {"version": 99}))
    refused("version 99")
    (folder / "tokenizer.json").write_text(json.dumps(settings | {"sizes": [4, 8]}))
    refused(r"sizes \[4, 8\]")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layers.0.weight"]
    save_file(tensors, folder / "model.safetensors")
    refused("tensors that do not fit")
    load_quantizer(folder)


def test_a_quantizer_has_nothing_to_train_and_no_part_of_what_made_it() -> None:
    book_CD = draws(4, WIDTH)
    quantizer = ResidualQuantizer([book_CD], encoder=Mlp((WIDTH, WIDTH)))
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())
    before = fingerprint(quantizer)
    book_CD.zero_()
    assert fingerprint(quantizer) == before


def test_a_perceptron_with_a_skip_starts_as_the_identity() -> None:
    x_ND = draws(5, WIDTH)
    assert torch.equal(Mlp((WIDTH, 9, WIDTH), skip=True)(x_ND), x_ND)
    assert Mlp((WIDTH, 9, 2))(x_ND).shape == (5, 2)


@pytest.mark.parametrize(
    ("widths", "settings", "message"),
    [
        ((4,), {}, r"got \(4,\)"),
        ((4, 0), {}, r"got \(4, 0\)"),
        ((4, 3), {"skip": True}, "expected equal ends"),
        ((4, 3), {"activation": "sign"}, "got 'sign', expected one of relu"),
    ],
)
def test_perceptrons_outside_their_range_are_named(widths: tuple[int, ...], settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mlp(widths, **settings)
