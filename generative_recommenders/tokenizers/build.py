"""From embeddings to a folder of semantic IDs: fit, encode, look for collapse, resolve collisions, measure, write.

    <data_dir>/<dataset>/semantic_ids/<name>/
        tokenizer/          the trained quantizer
        v1/  current.json   the table and which version of it counts (see `tokenizers.catalogue`)
        quality.json  quality.png
        config.gin  identity.json

The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from generative_recommenders.data.folders import whole_folder
from generative_recommenders.data.text_embeddings import Embeddings
from generative_recommenders.errors import UserError
from generative_recommenders.tokenizers.catalogue import publish
from generative_recommenders.tokenizers.collisions import resolve
from generative_recommenders.tokenizers.config import TokenizerConfig
from generative_recommenders.tokenizers.quality import QualityReport, collapse_alarm, draw_quality, quality_report
from generative_recommenders.tokenizers.quantizer import Quantizer, fingerprint
from generative_recommenders.tokenizers.rqkmeans import Progress
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

logger = logging.getLogger(__name__)


class Method(Protocol):
    """Settings of a tokenizer; see `tokenizers.rqkmeans.RqKMeans`."""

    def fit(self, x_ND: Tensor, *, seed: int, progress: Progress | None = None) -> Quantizer: ...


IDENTITY_FILE, QUALITY_FILE, PICTURE_FILE = "identity.json", "quality.json", "quality.png"


@dataclass(frozen=True)
class Built:
    """What a build makes."""

    table: SemanticIds
    quantizer: Quantizer
    report: QualityReport


def build_semantic_ids(
    config: TokenizerConfig,
    method: Method,
    embeddings: Embeddings,
    fitted_N: Tensor,
    *,
    raw_ids: list[str],
    dataset_fingerprint: str,
    progress: Progress | None = None,
) -> Built:
    """Fit `method` on the rows `fitted_N` (bool) and give every item an ID.

    Raises:
        UserError: embeddings or settings that the method refuses, or a level of which less than
            `config.collapse_threshold` of the codes are used.
    """
    x_ND = embeddings.values_ND
    quantizer = method.fit(x_ND[fitted_N], seed=config.random_seed, progress=progress)
    plain_NL = quantizer.encode(x_ND)
    collapse_alarm(plain_NL, quantizer.sizes, config.collapse_threshold)
    resolution = resolve(
        config.collision_policy,
        quantizer,
        x_ND,
        plain_NL,
        width=config.dedup_width,
        seed=config.random_seed,
        nearest=config.nearest,
    )
    report = quality_report(
        resolution.codes_NL,
        resolution.sizes,
        x_ND=x_ND,
        reconstructed_ND=quantizer.reconstruct(plain_NL) if quantizer.reconstructs else None,
        codes_before=plain_NL,
        quantizer=quantizer,
    )
    table = SemanticIds(
        resolution.codes_NL,
        embeddings.item_ids_N,
        resolution.sizes,
        np.asarray(raw_ids, dtype=object),
        policy=config.collision_policy,
        tokenizer_fingerprint=fingerprint(quantizer),
        embeddings_fingerprint=embeddings.fingerprint,
        dataset_fingerprint=dataset_fingerprint,
    )
    return Built(table, quantizer, report)


def write_built(built: Built, x_ND: Tensor, folder: Path, identity: str, config_text: str) -> None:
    """Put a build in the place of `folder`."""
    with whole_folder(folder) as partial:
        publish(partial, built.table, built.quantizer)
        (partial / QUALITY_FILE).write_text(built.report.to_json(), encoding="utf-8")
        try:
            draw_quality(built.report, built.table.codes_NL, built.table.sizes, x_ND, partial / PICTURE_FILE)
        except UserError as error:
            # The IDs are made; a picture of them is not worth making them again.
            logger.warning("%s", error)
        (partial / "config.gin").write_text(config_text, encoding="utf-8")
        (partial / IDENTITY_FILE).write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")


def identity_of(folder: Path) -> str | None:
    """The identity that `write_built` noted, None where there is no build."""
    try:
        content = json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(content["identity"]) if isinstance(content, dict) and "identity" in content else None
