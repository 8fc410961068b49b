"""Outputs, gradients, losses and metrics of the public implementations, computed by them and kept beside the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.encoders.hstu import HSTUConfig
from generative_recommenders.encoders.sasrec import SASRecConfig
from generative_recommenders.evaluation.metrics import per_user_metrics, published_ranks
from generative_recommenders.indexing.exact import MIPSBruteForceTopK
from generative_recommenders.losses.objective import Objective
from generative_recommenders.nn.embeddings import ItemEmbedding
from generative_recommenders.nn.outputs import OUTPUTS
from generative_recommenders.retrieval.model import RetrievalModel
from generative_recommenders.similarity.dot import DotProduct
from ops.sampled_softmax import sampled_softmax_loss

HSTU_CASES = ("hstu_base", "hstu_large", "hstu_concat_ua", "hstu_no_activation")
SASREC_CASES = ("sasrec_relu", "sasrec_gelu")
OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


class Case:
    """One golden file with our model holding its weights."""

    def __init__(self, folder: Path, name: str) -> None:
        self.arguments = json.loads((folder / "index.json").read_text())[name]
        self.data = {key: torch.from_numpy(value) for key, value in np.load(folder / f"{name}.npz").items()}
        self.model = self._model()
        self.parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for public, ours in self.names().items():
                self.parameters[ours].copy_(self.data[f"param/{public}"].view_as(self.parameters[ours]))

    def _model(self) -> RetrievalModel:
        a = self.arguments
        n = a["max_sequence_length"] + a["gr_output_length"] + 1
        shared = ("num_blocks", "num_heads", "dqk", "dv", "linear_dropout_rate", "concat_ua", "linear_activation")
        own = (*shared[:2], "ffn_hidden_dim", "ffn_activation_fn", "ffn_dropout_rate")
        if a["encoder"] == "hstu":
            config = HSTUConfig(**{k: a[k] for k in shared if k in a})
        else:
            config = SASRecConfig(**{k: a[k] for k in own if k in a})
        dim = a["item_embedding_dim"]
        return RetrievalModel(
            ItemEmbedding(a["num_items"], dim),
            config.build(dim, n, 0.0, False),
            OUTPUTS[a["user_embedding_norm"]](1e-6),
            DotProduct(),
            Objective(),
            torch.arange(1, a["num_items"] + 1),
            item_l2_norm=True,
            l2_norm_eps=1e-6,
            top_k_method="MIPSBruteForceTopK",
        )

    def names(self) -> dict[str, str]:
        """Public parameter names -> ours."""
        names = {
            "_embedding_module._item_emb.weight": "items.table",
            "_input_features_preproc._pos_emb.weight": "encoder.input.position_embedding",
        }
        for i in range(self.arguments["num_blocks"]):
            layer = f"encoder.layers.{i}"
            if self.arguments["encoder"] == "hstu":
                public = f"_hstu._attention_layers.{i}"
                names |= {
                    f"{public}._uvqk": f"{layer}.uvqk",
                    f"{public}._rel_attn_bias._ts_w": f"{layer}.bias.time_weights",
                    f"{public}._rel_attn_bias._pos_w": f"{layer}.bias.position_weights",
                    f"{public}._o.weight": f"{layer}.output.weight",
                    f"{public}._o.bias": f"{layer}.output.bias",
                }
            else:
                for kind in ("weight", "bias"):
                    names |= {
                        f"attention_layers.{i}.in_proj_{kind}": f"{layer}.in_proj.{kind}",
                        f"attention_layers.{i}.out_proj.{kind}": f"{layer}.out_proj.{kind}",
                        f"forward_layers.{i}._conv1d.0.{kind}": f"{layer}.ffn_in.{kind}",
                        f"forward_layers.{i}._conv1d.3.{kind}": f"{layer}.ffn_out.{kind}",
                    }
        return names

    def batch(self) -> SequenceBatch:
        lengths, ids, times = self.data["lengths"], self.data["past_ids"], self.data["timestamps"]
        rows = torch.arange(lengths.numel())
        with_target = ids.clone()
        with_target[rows, lengths] = self.data["target_ids"]
        inside = torch.arange(ids.shape[1]) < lengths[:, None]
        shifted = torch.cat([torch.zeros_like(inside[:, :1]), inside[:, :-1]], dim=1)
        return SequenceBatch(
            item_ids_T=ids[inside],
            ratings_T=torch.zeros(int(lengths.sum())),
            timestamps_T=times[inside],
            next_item_ids_T=with_target[shifted],
            next_timestamps_T=times[shifted],
            offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            user_ids_B=rows,
            target_ids_B=self.data["target_ids"],
            target_ratings_B=torch.zeros(lengths.numel()),
            target_timestamps_B=times[rows, lengths],
            row_numbers_B=rows,
        )

    def jagged(self, padded: Tensor) -> Tensor:
        return padded[torch.arange(padded.shape[1]) < self.data["lengths"][:, None]]


@pytest.fixture(params=HSTU_CASES + SASREC_CASES)
def case(request: pytest.FixtureRequest, golden_dir: Path) -> Case:
    return Case(golden_dir, request.param)


def test_states_and_queries(case: Case) -> None:
    case.model.eval()
    batch = case.batch()
    states = case.model.queries(batch)
    torch.testing.assert_close(states, case.jagged(case.data["states"]), atol=OUTPUT_TOLERANCE, rtol=0)
    torch.testing.assert_close(case.model.last_queries(batch), case.data["query"], atol=OUTPUT_TOLERANCE, rtol=0)


def test_gradients(case: Case) -> None:
    states = case.model.queries(case.batch())
    value = (states * case.jagged(case.data["probe"])).sum()
    torch.testing.assert_close(value, case.data["probe_sum"], atol=1e-3, rtol=1e-5)
    value.backward()
    for public, ours in case.names().items():
        expected = case.data[f"grad/{public}"]
        actual = case.parameters[ours].grad
        assert actual is not None, ours
        message = f"{ours} against {public}"
        torch.testing.assert_close(
            actual, expected.view_as(actual), atol=GRADIENT_TOLERANCE, rtol=1e-4, msg=lambda m, at=message: f"{at}: {m}"
        )


def test_sampled_softmax_loss(case: Case) -> None:
    normed = case.arguments["user_embedding_norm"] == "l2_norm"
    batch = case.batch()
    loss = sampled_softmax_loss(
        case.model.queries(batch),
        case.model.items.table,
        batch.next_item_ids_T,
        case.data["negatives"],
        temperature=0.05 if normed else 1.0,
        l2_norm=normed,
    ).mean()
    torch.testing.assert_close(loss, case.data["sampled_softmax_loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    for name, ours in (("item_emb", "items.table"), ("pos_emb", "encoder.input.position_embedding")):
        torch.testing.assert_close(
            case.parameters[ours].grad, case.data[f"loss_grad/{name}"], atol=GRADIENT_TOLERANCE, rtol=1e-4
        )


def test_metrics_are_exact(golden_dir: Path) -> None:
    data = {key: torch.from_numpy(value) for key, value in np.load(golden_dir / "retrieval_metrics.npz").items()}
    candidates = torch.arange(1, data["items"].shape[0])
    lengths, past = data["lengths"], data["past_ids"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    seen = past[torch.arange(past.shape[1]) < lengths[:, None]]
    ranks = MIPSBruteForceTopK(data["items"], candidates).rank_of_target(
        data["queries"], data["target_ids"].flatten(), offsets, seen, filter_history=True
    )
    ours = per_user_metrics(published_ranks(ranks, candidates.numel()))
    liked = data["target_ratings"].flatten() >= 4
    checked = 0
    for key, expected in data.items():
        name = key.removeprefix("metric/")
        if name == key:
            continue
        value = ours[name.removesuffix("_>=4")][liked] if name.endswith("_>=4") else ours[name]
        torch.testing.assert_close(value.float(), expected, atol=1e-7, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        checked += 1
    assert checked == 17
