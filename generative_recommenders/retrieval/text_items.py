"""Item vectors made of texts (`train_fn.item_encoder = "text"`): from vectors of the texts to the part of a model.

The texts' vectors come from where the semantic IDs have theirs (`data.text_embeddings`). Before they are frozen they
may be whitened: y = (x - m) C^(-1/2) with mean m and covariance C of the items that occur in training, so that nothing
of the others decides how they are seen; an eigenvalue below a thousandth of their mean counts as that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from generative_recommenders.nn.text_items import TextItems
from generative_recommenders.retrieval.config import TextItemsConfig

_SMALLEST_EIGENVALUE = 1e-3


def build_text_items(
    config: TextItemsConfig, text_XE: Tensor | None, catalog_X: Tensor, counts_X: Tensor | None, dim: int
) -> TextItems:
    """Items with the given text vectors; without them, those that a checkpoint brings.

    text_XE: float32, row by row of `catalog_X`, ids in ascending order. counts_X: their training events.
    """
    if text_XE is None:
        text_XE = torch.empty(len(catalog_X), 0)
    elif config.whiten:
        text_XE = whitened(text_XE, None if counts_X is None else counts_X > 0)
    text_VE = text_XE.new_zeros(int(catalog_X[-1]) + 1, text_XE.shape[1])
    text_VE[catalog_X] = text_XE
    return TextItems(
        text_VE,
        dim,
        num_experts=config.num_experts,
        dropout_rate=config.dropout_rate,
        noisy_gate=config.noisy_gate,
    )


class Whitening(NamedTuple):
    """y = (x - mean) map, float64 (E,) and (E, E). Rows of zeros stand for nothing and stay as they are."""

    mean_E: Tensor
    map_EE: Tensor

    @classmethod
    def fit(cls, vectors_XE: Tensor, fitted_X: Tensor | None = None) -> Whitening:
        """Vectors (X, E) of which the fitted rows, bool (X,), get mean 0 and, as far as they vary, covariance 1.

        All rows but those of zeros are fitted where none of the chosen ones is left.
        """
        values_XE, filled_X = vectors_XE.double(), vectors_XE.any(dim=1)
        chosen_X = filled_X if fitted_X is None else filled_X & fitted_X
        own = values_XE[chosen_X if bool(chosen_X.any()) else filled_X]
        mean_E = own.sum(0) / max(1, len(own))
        centred = own - mean_E
        eigenvalues_E, directions_EE = torch.linalg.eigh(centred.T @ centred / max(1, len(own)))
        floor = (_SMALLEST_EIGENVALUE * eigenvalues_E.mean()).clamp(min=torch.finfo(torch.float32).tiny)
        scaled_EE = directions_EE * eigenvalues_E.clamp(min=floor).rsqrt()
        return cls(mean_E, scaled_EE @ directions_EE.T)

    def __call__(self, vectors_XE: Tensor) -> Tensor:
        found_XE = ((vectors_XE.double() - self.mean_E) @ self.map_EE).to(vectors_XE.dtype)
        return found_XE.masked_fill_(~vectors_XE.any(dim=1)[:, None], 0.0)


def whitened(vectors_XE: Tensor, fitted_X: Tensor | None = None) -> Tensor:
    """The vectors under the whitening that is fitted on them."""
    return Whitening.fit(vectors_XE, fitted_X)(vectors_XE)
