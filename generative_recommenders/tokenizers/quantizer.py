"""Quantizers of embeddings, how they are kept, and what identifies one.

A quantizer is a pure function of the embedding: it holds no table of items, so that what it was fitted on and what it
is asked about need not be the same items. Fitting is elsewhere (`rqkmeans`, `rvq`, `rqvae`, `product`, `controls`).

On disk a quantizer is a folder with `tokenizer.json` (kind, sizes, settings) and `model.safetensors` (its tensors).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_folder
from generative_recommenders.tokenizers.hash_quantizers import LshQuantizer, RandomQuantizer
from generative_recommenders.tokenizers.mlp import Mlp
from generative_recommenders.tokenizers.quantizer_base import Quantizer, kept, squared_distances, with_prices
from ops.residual_quantize import residual_quantize

__all__ = [
    "QUANTIZERS",
    "LshQuantizer",
    "ProductQuantizer",
    "Quantizer",
    "RandomQuantizer",
    "ResidualQuantizer",
    "fingerprint",
    "load_quantizer",
    "save_quantizer",
]

SETTINGS_FILE = "tokenizer.json"
TENSORS_FILE = "model.safetensors"
VERSION = 1


class ResidualQuantizer(Quantizer):
    """Nearest code of what the levels before left of z = encoder((x - mean) / scale).

    Args:
        codebooks: (C_l, d) a level.
        mean, scale: (width,), of the input; none is 0 and 1.
        encoder, decoder: none is the identity: RQ-KMeans, R-VQ. The decoder's output is rescaled by scale and mean.
        normalize_residuals: each level quantizes its residual over the residual's length (GRID). A code then says
            nothing of that length, and `reconstruct` puts `lengths`, (L,), the mean ones of the fit, in its place.
        prices: (C_l,) a level, 0 or more, added to squared distances (balanced RQ-KMeans); none is 0.
    """

    kind = "residual"
    mean: Tensor | None
    scale: Tensor | None
    lengths: Tensor | None

    def __init__(
        self,
        codebooks: Sequence[Tensor],
        *,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        encoder: Mlp | None = None,
        decoder: Mlp | None = None,
        normalize_residuals: bool = False,
        lengths: Tensor | None = None,
        prices: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.sizes = tuple(len(codebook_CD) for codebook_CD in codebooks)
        self.width = encoder.widths[0] if encoder is not None else codebooks[0].shape[1]
        self.normalize_residuals = normalize_residuals
        self.encoder, self.decoder = encoder, decoder
        for level, codebook_CD in enumerate(codebooks):
            self.register_buffer(f"codebook_{level}", kept(codebook_CD))
        self.priced = prices is not None
        for level, prices_C in enumerate(prices or ()):
            self.register_buffer(f"prices_{level}", kept(prices_C))
        self.register_buffer("mean", kept(mean))
        self.register_buffer("scale", kept(scale))
        self.register_buffer("lengths", kept(lengths))
        self.requires_grad_(False)
        self.eval()

    def codebooks(self) -> list[Tensor]:
        return [self.get_buffer(f"codebook_{level}") for level in range(len(self.sizes))]

    def latent(self, x_nD: Tensor) -> Tensor:
        """What the first level quantizes, float32 (n, d), before any normalization; all rows at once."""
        z_nD = self._input(x_nD)
        if self.mean is not None:
            z_nD = z_nD - self.mean
        if self.scale is not None:
            z_nD = z_nD / self.scale
        return z_nD if self.encoder is None else self.encoder(z_nD)

    def _encode(self, x_nD: Tensor) -> Tensor:
        residual_nD, codebooks, levels = self.latent(x_nD), self.codebooks(), len(self.sizes)
        if self.priced:
            residual_nD = F.pad(residual_nD, (0, levels))
            codebooks = [
                with_prices(codebook_CD, self.get_buffer(f"prices_{level}"), level, levels)
                for level, codebook_CD in enumerate(codebooks)
            ]
        if not self.normalize_residuals:
            return residual_quantize(residual_nD, codebooks)[0]
        codes = []
        for codebook_CD in codebooks:
            # The columns of the prices are no part of the residual's length.
            unit_nD = F.normalize(residual_nD[:, : self.codebooks()[0].shape[1]], dim=1)
            code_n1, residual_nD = residual_quantize(F.pad(unit_nD, (0, levels * self.priced)), [codebook_CD])
            codes.append(code_n1)
        return torch.cat(codes, dim=1)

    def _distances(self, x_nD: Tensor, codes_nL: Tensor, level: int) -> Tensor:
        codebooks = self.codebooks()
        residual_nD = self.latent(x_nD)
        for before in range(level + 1):
            residual_nD = F.normalize(residual_nD, dim=1) if self.normalize_residuals else residual_nD
            if before < level:
                residual_nD = residual_nD - codebooks[before][codes_nL[:, before]]
        distances_nC = squared_distances(residual_nD, codebooks[level])
        return distances_nC.add_(self.get_buffer(f"prices_{level}")) if self.priced else distances_nC

    def _reconstruct(self, codes_nL: Tensor) -> Tensor:
        sum_nD = torch.zeros((), device=codes_nL.device)
        for level in reversed(range(len(self.sizes))):
            sum_nD = sum_nD + self.codebooks()[level][codes_nL[:, level]]
            if self.lengths is not None:
                sum_nD = sum_nD * self.lengths[level]
        x_nD = sum_nD if self.decoder is None else self.decoder(sum_nD)
        if self.scale is not None:
            x_nD = x_nD * self.scale
        return x_nD if self.mean is None else x_nD + self.mean

    def settings(self) -> dict[str, Any]:
        return {
            "normalize_residuals": self.normalize_residuals,
            "encoder": None if self.encoder is None else self.encoder.settings(),
            "decoder": None if self.decoder is None else self.decoder.settings(),
        }

    @classmethod
    def build(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> ResidualQuantizer:
        levels = sum(name.startswith("codebook_") for name in tensors)
        encoder, decoder = (Mlp(**settings[name]) if settings[name] else None for name in ("encoder", "decoder"))
        result = cls(
            [tensors[f"codebook_{level}"] for level in range(levels)],
            mean=tensors.get("mean"),
            scale=tensors.get("scale"),
            encoder=encoder,
            decoder=decoder,
            normalize_residuals=settings["normalize_residuals"],
            lengths=tensors.get("lengths"),
            prices=[tensors[f"prices_{level}"] for level in range(levels)] if "prices_0" in tensors else None,
        )
        result.load_state_dict(tensors)
        return result


class ProductQuantizer(Quantizer):
    """Nearest code of each part of z = (x - mean) @ rotation, a level a part (Jegou et al. 2011; OPQ: Ge et al. 2013).

    Args:
        codebooks: (C_l, d_l) a level; the parts follow each other in z.
        mean: (width,).
        rotation: (width, sum of d_l) with orthonormal columns; fewer columns than rows drop directions (PCA).
    """

    kind = "product"
    mean: Tensor | None
    rotation: Tensor | None

    def __init__(
        self, codebooks: Sequence[Tensor], *, mean: Tensor | None = None, rotation: Tensor | None = None
    ) -> None:
        super().__init__()
        self.sizes = tuple(len(codebook_Cd) for codebook_Cd in codebooks)
        self.parts = [codebook_Cd.shape[1] for codebook_Cd in codebooks]
        self.width = sum(self.parts) if rotation is None else rotation.shape[0]
        for level, codebook_Cd in enumerate(codebooks):
            self.register_buffer(f"codebook_{level}", kept(codebook_Cd))
        self.register_buffer("mean", kept(mean))
        self.register_buffer("rotation", kept(rotation))

    def codebooks(self) -> list[Tensor]:
        return [self.get_buffer(f"codebook_{level}") for level in range(len(self.sizes))]

    def latent(self, x_nD: Tensor) -> Tensor:
        """The rotated embedding, float32 (n, sum of d_l); all rows at once."""
        z_nD = self._input(x_nD)
        z_nD = z_nD if self.mean is None else z_nD - self.mean
        return z_nD if self.rotation is None else z_nD @ self.rotation

    def _encode(self, x_nD: Tensor) -> Tensor:
        parts = self.latent(x_nD).split(self.parts, dim=1)
        pairs = zip(parts, self.codebooks(), strict=True)
        return torch.cat([residual_quantize(part_nd, [codebook_Cd])[0] for part_nd, codebook_Cd in pairs], dim=1)

    def _distances(self, x_nD: Tensor, codes_nL: Tensor, level: int) -> Tensor:
        return squared_distances(self.latent(x_nD).split(self.parts, dim=1)[level], self.codebooks()[level])

    def _reconstruct(self, codes_nL: Tensor) -> Tensor:
        z_nD = torch.cat([codebook[codes_nL[:, level]] for level, codebook in enumerate(self.codebooks())], dim=1)
        x_nD = z_nD if self.rotation is None else z_nD @ self.rotation.T
        return x_nD if self.mean is None else x_nD + self.mean

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> ProductQuantizer:
        levels = sum(name.startswith("codebook_") for name in tensors)
        codebooks = [tensors[f"codebook_{level}"] for level in range(levels)]
        return cls(codebooks, mean=tensors.get("mean"), rotation=tensors.get("rotation"))


QUANTIZERS: dict[str, type[Quantizer]] = {
    ResidualQuantizer.kind: ResidualQuantizer,
    ProductQuantizer.kind: ProductQuantizer,
    LshQuantizer.kind: LshQuantizer,
    RandomQuantizer.kind: RandomQuantizer,
}


def save_quantizer(quantizer: Quantizer, folder: Path) -> None:
    """Write the folder, whole or not at all, in the place of an older quantizer.

    Raises:
        DataError: the folder cannot be written, or holds something else than a quantizer.
    """
    if folder.exists() and not (folder / SETTINGS_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: got something that is no tokenizer, expected none or an old one; choose another")
    with whole_folder(folder) as partial:
        (partial / SETTINGS_FILE).write_text(_described(quantizer), encoding="utf-8")
        save_file(_tensors(quantizer), partial / TENSORS_FILE)


def load_quantizer(folder: Path) -> Quantizer:
    """The quantizer of a folder, on the CPU.

    Raises:
        DataError: the folder is none that `save_quantizer` wrote, or is damaged.
    """
    try:
        described = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_FILE)
    except OSError as error:
        raise DataError(f"{folder}: cannot read a tokenizer ({error.strerror or error}); fit one first") from error
    except (ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: got a damaged tokenizer ({error}); fit it again") from error
    found = (described.get("version"), described.get("kind")) if isinstance(described, dict) else (None, None)
    if found[0] != VERSION or found[1] not in QUANTIZERS:
        expected = f"version {VERSION} of {', '.join(QUANTIZERS)}"
        raise DataError(f"{folder}: got version {found[0]} of kind {found[1]!r}, expected {expected}; fit it again")
    try:
        quantizer = QUANTIZERS[found[1]].build(described["settings"], tensors)
    except (KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder}: got tensors that do not fit {SETTINGS_FILE} ({error!r}); fit it again") from error
    if list(quantizer.sizes) != described["sizes"]:
        raise DataError(f"{folder}: got sizes {described['sizes']} of {list(quantizer.sizes)} codes; fit it again")
    return quantizer


def fingerprint(quantizer: Quantizer) -> str:
    """SHA-256, 64 hex digits, over settings and tensors: equal where all codes are."""
    digest = hashlib.sha256(_described(quantizer).encode())
    for name, tensor in sorted(_tensors(quantizer).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _described(quantizer: Quantizer) -> str:
    described = {
        "version": VERSION,
        "kind": quantizer.kind,
        "sizes": list(quantizer.sizes),
        "width": quantizer.width,
        "settings": quantizer.settings(),
    }
    return json.dumps(described, indent=2, sort_keys=True) + "\n"


def _tensors(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in quantizer.state_dict().items()}
