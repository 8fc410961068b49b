"""A trained model without what only training needs, and the catalogue as a retrieval index would hold it.

The folder serves `--mode=recommend --checkpoint=FOLDER` and `Recommender.from_checkpoint` like a checkpoint. Beside
weights, configuration and maps it holds `index.safetensors`, for a search engine of one's own: `item_ids` (X,) int64
and the item side of the similarity in their order. With the dot product that is `embeddings` (X, D), normalized where
the model does; with Mixture of Logits `components` (X, P_X, D_P), `gate` (X, P) where items have one, and the weights
of the pairs' gate, `pair_w1`, `pair_b1`, `pair_w2`, `pair_b2` (see `ops.mol_score.MoLGate`). Of a generative
model it is `codes` (X, L), the semantic IDs of the items, and with a drafting head `embeddings` too.

Such embeddings can be what semantic IDs are made of: `train_tokenizer.encoder = "file"` takes the index.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.folders import whole_folder
from generative_recommenders.generative.draft_head import DraftingModel
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.serving.generated import GeneratedRecommender, recommender_of
from generative_recommenders.serving.recommender import Recommender
from generative_recommenders.similarity.mol import MoL
from generative_recommenders.training.checkpoint import Checkpoint

INDEX_FILE = "index.safetensors"
_NOT_SERVED = ("optimizer.safetensors",)


def item_index(model: RetrievalModel) -> dict[str, Tensor]:
    """The tensors of `index.safetensors`."""
    with torch.no_grad():
        features = model.item_features()
        tensors: dict[str, Tensor | None] = {"item_ids": model.catalog_X}
        if isinstance(model.similarity, MoL):
            gate = model.similarity.pair_gate()
            tensors |= dict(zip(("components", "gate"), features, strict=False))
            tensors |= {"pair_w1": gate.w1, "pair_b1": gate.b1, "pair_w2": gate.w2, "pair_b2": gate.b2}
        else:
            tensors["embeddings"] = features[0]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}


def export(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the folder, whole or not at all.

    Raises:
        DataError: the folder is there and is no export.
        CheckpointError, ConfigError: the checkpoint was not written by this project.
    """
    if folder.exists() and not (folder.is_dir() and (folder / INDEX_FILE).is_file()):
        raise DataError(f"--output: got {folder}, which is there and is no export; try another folder")
    recommender = recommender_of(checkpoint)
    with whole_folder(folder) as partial:
        for source in sorted(checkpoint.path.iterdir()):
            if source.is_dir():
                shutil.copytree(source, partial / source.name)
            elif source.name not in _NOT_SERVED:
                shutil.copyfile(source, partial / source.name)
        if isinstance(recommender, Recommender):
            save_file(item_index(recommender.model), partial / INDEX_FILE, metadata=_description(recommender))
        else:
            assert isinstance(recommender, GeneratedRecommender)
            save_file(id_index(recommender.model), partial / INDEX_FILE)
    return folder


def id_index(model: DraftingModel) -> dict[str, Tensor]:
    """The tensors of `index.safetensors` of a generative model."""
    ids = model.table
    tensors = {"item_ids": ids.item_ids_N, "codes": ids.codes_NL}
    if model.draft is not None:
        tensors["embeddings"] = model.draft.all_items(model, ids.item_ids_N)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _description(recommender: Recommender) -> dict[str, str]:
    model = recommender.model
    similarity = {"similarity": type(model.similarity).__name__}
    if isinstance(model.similarity, MoL):
        config = model.similarity.config
        similarity |= {"temperature": str(config.temperature), "combination": config.gating_combination_type}
    return similarity | {"items": json.dumps(len(recommender.catalog))}
