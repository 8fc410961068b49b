"""A drafter inside a generative model: pooled states of its own encoder, for histories and for items alike.

    h = L2norm(W mean over tokens of Encoder(tokens))            score of an item = h(history) . h(item alone) / t

SpecGR++ of "Inductive Generative Recommendation via Retrieval-based Speculation" (arXiv 2410.02939): an item is encoded
as a history of nothing but itself, so items that no training event has are scored like any other. Training adds to the
generative loss, stage one, the contrast of each history's target with the other targets of the batch, and stage two the
cross-entropy over all trained items, whose vectors are frozen when it begins.

`items = "embedded"`, ours, gives an item a linear map of its input embeddings instead, which is cheap enough for stage
one to be the cross-entropy over all trained items as well (`negatives = "catalogue"`): a retrieval model in one encoder
with a generative one.

Differences from the public code: the batch's targets are compared with once each (there an item that is the target of
several rows is, for each of them, so many further columns with the logit 0), both stages keep the generative loss, and
a decoder-only model learns from every item of a sequence that carries loss.

Letters: W width of a vector, N items with an ID, n samples, U distinct targets.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import configurable
from generative_recommenders.distributed.runtime import (
    all_gather_concat,
    all_reduce_sum,
    gathered_rows,
    world_size,
)
from generative_recommenders.errors import UserError
from generative_recommenders.generative.tokens import IdTable, TokenEmbedding
from ops import jagged
from ops.linear_cross_entropy import linear_cross_entropy
from ops.random import fold
from ops.row_sums import row_sums

# Items encoded at a time where all are.
_ITEMS_AT_A_TIME = 2048
# Apart from the seeds of the histories' dropout.
_ITEM_SEED = 20_241_002


@configurable("draft_head")
@dataclass(frozen=True)
class DraftConfig:
    """Bindings `draft_head.*`: whether a generative model drafts too, and how that is trained.

    width: of the vectors; 0 is no head. temperature: t. l2_norm: vectors have length 1; without it scores are plain
    inner products, for which t = 1 is usual. items: an item's vector is that of a history of nothing but itself
    ("encoded"), or a linear map of the sum of its codes' embeddings, and of its own where histories have one
    ("embedded"). negatives: the other targets of the "batch", or all trained items ("catalogue", which takes
    "embedded").

    loss_weight: of the drafter's loss beside the generative loss, which `generative_loss_weight` is of. The last
    `finetune_epochs` of `train_generative.num_epochs` are stage two, with rates and a weight of its own
    (`finetune_learning_rate`, `finetune_warmup_steps`, `finetune_loss_weight`); "embedded" has none.

    Raises:
        UserError: a value outside its range.
    """

    width: int = 0
    temperature: float = 0.07
    l2_norm: bool = True
    items: Literal["encoded", "embedded"] = "encoded"
    negatives: Literal["batch", "catalogue"] = "batch"
    loss_weight: float = 6.0
    generative_loss_weight: float = 1.0
    finetune_epochs: int = 0
    finetune_learning_rate: float = 3e-5
    finetune_warmup_steps: int = 0
    finetune_loss_weight: float = 20.0

    def __post_init__(self) -> None:
        for name in ("width", "loss_weight", "generative_loss_weight", "finetune_epochs", "finetune_warmup_steps"):
            self._expect(name, getattr(self, name) >= 0, "at least 0")
        for name in ("temperature", "finetune_learning_rate", "finetune_loss_weight"):
            self._expect(name, getattr(self, name) > 0, "more than 0")
        self._expect("items", self.items in ("encoded", "embedded"), "'encoded' or 'embedded'")
        self._expect("negatives", self.negatives in ("batch", "catalogue"), "'batch' or 'catalogue'")
        self._expect(
            "items",
            self.width > 0 or (self.items, self.negatives) == ("encoded", "batch"),
            "'encoded', and draft_head.negatives = 'batch', without a head; try draft_head.width",
        )
        self._expect(
            "negatives",
            self.negatives == "batch" or self.items == "embedded",
            "'batch' with draft_head.items = 'encoded': all items would go through the encoder at every step",
        )
        self._expect(
            "finetune_epochs", self.width > 0 or self.finetune_epochs == 0, "0 without a head; try draft_head.width"
        )
        self._expect(
            "finetune_epochs",
            self.items == "encoded" or self.finetune_epochs == 0,
            "0 with draft_head.items = 'embedded', which needs no frozen vectors to be compared with all items; try "
            "draft_head.negatives = 'catalogue'",
        )

    def _expect(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"draft_head.{name}: got {getattr(self, name)!r}, expected {expected}")

    def describe(self) -> str:
        """For a run's name; empty without a head."""
        if not self.width:
            return ""
        stage_two = f"-ft{self.finetune_epochs}" if self.finetune_epochs else ""
        chosen = "".join(
            f"-{name}"
            for name, used in (
                ("embedded", self.items == "embedded"),
                ("catalogue", self.negatives == "catalogue"),
                ("products", not self.l2_norm),
            )
            if used
        )
        return f"draft{self.width}-t{self.temperature:g}-w{self.loss_weight:g}{chosen}{stage_two}"


class HistoryStates(NamedTuple):
    """States of the tokens of histories, (S, D), and their offsets (B + 1,); no token knows of a target.

    An encoder gives those of all tokens, a decoder-only model the one that predicts the next item.
    """

    states_SD: Tensor
    offsets: Tensor

    @classmethod
    def one_a_row(cls, states_BD: Tensor) -> HistoryStates:
        return cls(states_BD, torch.arange(states_BD.shape[0] + 1, device=states_BD.device))


@dataclass(frozen=True)
class DraftSamples:
    """What a training batch teaches a drafter: n histories and the items that followed them, int64 (n,)."""

    states: HistoryStates
    target_ids_n: Tensor


class DraftHead(nn.Module):
    """Vectors of histories and items, and the losses they are trained with.

    `begin_stage_two` freezes the items' vectors; from then on `joint_loss` is that of stage two. A checkpoint of that
    stage holds them.
    """

    frozen_nW: Tensor
    trained_n: Tensor
    negatives_n: Tensor | None
    threshold: Tensor

    def __init__(self, config: DraftConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.projection = nn.Linear(dim, config.width)
        self.item_projection = nn.Linear(dim, config.width, bias=False) if config.items == "embedded" else None
        if self.item_projection is not None:
            # Scores start as inner products of states and embeddings, or of their first W numbers, and are learned at
            # the pace of a retrieval model's. Rows beyond D would never move if both maps had zeros there.
            nn.init.eye_(self.item_projection.weight)
            rows = min(dim, config.width)
            with torch.no_grad():
                nn.init.eye_(self.projection.weight[:rows])
            # What is brought to length 1 has to have a direction, without tokens too.
            if not config.l2_norm:
                nn.init.zeros_(self.projection.bias)
        self.register_buffer("frozen_nW", torch.empty(0, config.width))
        self.register_buffer("trained_n", torch.empty(0, dtype=torch.int64))
        # What "catalogue" compares with, ascending; whoever trains sets it.
        self.register_buffer("negatives_n", None, persistent=False)
        # Of SpecGR, as it was tuned for these weights last; NaN where it never was.
        self.register_buffer("threshold", torch.tensor(math.nan, dtype=torch.float64))

    @property
    def in_stage_two(self) -> bool:
        return self.trained_n.numel() > 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Empty in stage one, and as many rows as there were trained items in stage two.
        for name in ("frozen_nW", "trained_n"):
            if (found := state_dict.get(prefix + name)) is not None:
                setattr(self, name, getattr(self, name).new_empty(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, states: HistoryStates) -> Tensor:
        """(B, W), of length 1 with `l2_norm`; a history without tokens has the vector of a state of zeros."""
        size, count = states.offsets.numel() - 1, states.states_SD.shape[0]
        sums_BD = row_sums(jagged.rows(states.offsets, count), states.states_SD.float(), num_rows=size)
        means_BD = sums_BD / states.offsets.diff().clamp(min=1)[:, None]
        return self._normed(self.projection(means_BD))

    def _normed(self, vectors_nW: Tensor) -> Tensor:
        return F.normalize(vectors_nW, dim=-1) if self.config.l2_norm else vectors_nW

    def items(
        self, model: DraftingModel, item_ids_n: Tensor, seed: int | None = None, row_numbers_n: Tensor | None = None
    ) -> Tensor:
        """Vectors of items, (n, W): of histories that hold the item alone, or of their input embeddings.

        Dropout, of the former, only where there is a seed, keyed by the row numbers.
        """
        if self.item_projection is not None:
            return self._normed(self.item_projection(model.item_inputs(item_ids_n)))
        return self(model.history_states(lone_items(item_ids_n, row_numbers_n), seed))

    @torch.no_grad()
    def all_items(self, model: DraftingModel, item_ids_n: Tensor) -> Tensor:
        """Vectors of many items, (n, W), some at a time and without dropout."""
        was_training = model.training
        model.eval()
        parts = [self.items(model, ids) for ids in item_ids_n.split(_ITEMS_AT_A_TIME)]
        model.train(was_training)
        return torch.cat(parts)

    def begin_stage_two(self, model: DraftingModel, trained_n: Tensor) -> None:
        """Freeze the vectors of the trained items, int64 ids in ascending order."""
        self.frozen_nW = self.all_items(model, trained_n)
        self.trained_n = trained_n

    def joint_loss(
        self,
        model: DraftingModel,
        seed: int,
        loss: Tensor,
        scalars: dict[str, Tensor],
        samples: DraftSamples,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generative loss of this rank's rows and the drafter's, weighted; `draft_loss` joins the scalars.

        The drafter's is the mean over the global batch's samples whose target has an ID.
        """
        learned_n = model.table.rows_of(samples.target_ids_n) >= 0
        # A target without an ID stands for any item with one, and carries no loss.
        targets_n = torch.where(learned_n, samples.target_ids_n, model.table.item_ids_N[0])
        queries_nW = self(samples.states)
        if self.in_stage_two:
            weight, losses_n = self.config.finetune_loss_weight, self._over_frozen(queries_nW, targets_n)
        else:
            weight = self.config.loss_weight
            if self.config.negatives == "catalogue":
                losses_n = self._over_catalogue(model, queries_nW, targets_n)
            else:
                losses_n = self._contrast(model, queries_nW, targets_n, learned_n, seed)
        total = all_reduce_sum(learned_n.sum().float()).clamp(min=1.0)
        draft = torch.where(learned_n, losses_n, 0.0).sum() / total * world_size()
        joint = self.config.generative_loss_weight * loss + weight * draft
        reported = all_reduce_sum(draft.detach()) / world_size()
        main = self.config.generative_loss_weight * scalars["ar_loss"] + weight * reported
        return joint, scalars | {"draft_loss": reported, "ar_loss": main}

    def _contrast(
        self, model: DraftingModel, queries_nW: Tensor, targets_n: Tensor, learned_n: Tensor, seed: int
    ) -> Tensor:
        """Cross-entropy of each target among the distinct targets of all ranks' samples, (n,)."""
        own_ids = torch.unique(targets_n[learned_n])
        # Keyed by the item, so that an item has one vector a step, whichever ranks it is a target on.
        vectors = self.items(model, own_ids, fold(seed, _ITEM_SEED), own_ids)
        ids_X, items_XW = all_gather_concat(own_ids), gathered_rows(vectors)
        distinct_U, place_X = torch.unique(ids_X, return_inverse=True)
        columns_X = torch.arange(len(ids_X), device=ids_X.device)
        first_U = columns_X.new_full(distinct_U.shape, len(ids_X)).scatter_reduce(0, place_X, columns_X, "amin")
        if not len(distinct_U):
            return 0.0 * (queries_nW.sum(1) + vectors.sum())
        logits_nU = queries_nW @ items_XW[first_U].T / self.config.temperature
        label_n = torch.searchsorted(distinct_U, targets_n).clamp_max(len(distinct_U) - 1)
        return F.cross_entropy(logits_nU, label_n, reduction="none")

    def _over_catalogue(self, model: DraftingModel, queries_nW: Tensor, targets_n: Tensor) -> Tensor:
        """Cross-entropy of each target among all items of `negatives_n`, (n,); 0 of a target that is none of them."""
        ids_X = self.negatives_n
        assert ids_X is not None and ids_X.numel(), "draft head: nothing to compare with, set negatives_n"
        place_n = torch.searchsorted(ids_X, targets_n).clamp_max(len(ids_X) - 1)
        rows_X = torch.arange(len(ids_X), device=ids_X.device)
        losses_n = linear_cross_entropy(
            queries_nW, self.items(model, ids_X), rows_X, place_n, temperature=self.config.temperature
        )
        return torch.where(ids_X[place_n] == targets_n, losses_n, 0.0)

    def _over_frozen(self, queries_nW: Tensor, targets_n: Tensor) -> Tensor:
        """Cross-entropy of each target among all trained items, (n,); 0 of a target that is none of them."""
        place_n = torch.searchsorted(self.trained_n, targets_n).clamp_max(len(self.trained_n) - 1)
        label_n = torch.where(self.trained_n[place_n] == targets_n, place_n, -100)
        logits_nn = queries_nW @ self.frozen_nW.T / self.config.temperature
        losses_n: Tensor = F.cross_entropy(logits_nn, label_n, reduction="none")
        return losses_n


class DraftingModel(nn.Module):
    """A generative model; `forward(batch, seed)` is the training loss, the drafter's too where there is one."""

    table: IdTable
    tokens: TokenEmbedding

    def __init__(self) -> None:
        super().__init__()
        self.draft: DraftHead | None = None

    def item_inputs(self, item_ids_n: Tensor) -> Tensor:
        """The sum of the embeddings that an item with an ID has in a history, (n, D), as they are stored."""
        return self.tokens.items(self.table.codes_of_items(item_ids_n)).sum(1)

    @abstractmethod
    def generative_loss(self, batch: SequenceBatch, seed: int) -> tuple[Tensor, dict[str, Tensor], DraftSamples]:
        """This rank's part of the global mean loss, global scalars by name, and what a drafter learns from."""

    @abstractmethod
    def history_states(self, batch: SequenceBatch, seed: int | None = None) -> HistoryStates:
        """States of the tokens of the histories; dropout only where there is a seed."""

    def forward(self, batch: SequenceBatch, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the global mean loss, and global scalars by name, without gradient.

        Scaled so that averaging gradients over ranks gives the gradient of the loss of the global batch.
        """
        loss, scalars, samples = self.generative_loss(batch, seed)
        if self.draft is None:
            return loss, scalars
        return self.draft.joint_loss(self, seed, loss, scalars, samples)

    @property
    def flexible_buffers(self) -> frozenset[str]:
        """Buffers whose shape is the checkpoint's."""
        return frozenset() if self.draft is None else frozenset(("draft.frozen_nW", "draft.trained_n"))


class EncoderDrafter:
    """Scores of all items by a model's own draft head; see `drafters.Drafter`.

    The items' vectors are those of the weights at construction.

    Raises:
        UserError: the model has no head.
    """

    def __init__(self, model: DraftingModel) -> None:
        if model.draft is None:
            raise UserError(
                "specgr.drafter: got 'encoder' and a model without a head to draft with, expected one trained with "
                "draft_head.width > 0; or try specgr.drafter = 'semantic_knn'"
            )
        self.model, self.head = model, model.draft
        self.item_ids_N = model.table.item_ids_N
        self.items_NW = self.head.all_items(model, self.item_ids_N)

    @torch.no_grad()
    def scores(self, batch: SequenceBatch) -> Tensor:
        """(B, V) float32, column = item id, -inf for ids without a semantic ID."""
        return self.scores_of(self.model.history_states(batch))

    @torch.no_grad()
    def scores_of(self, states: HistoryStates) -> Tensor:
        """The scores from states that are at hand."""
        queries_BW = self.head(states)
        size = int(self.item_ids_N[-1]) + 1
        scores_BV = queries_BW.new_full((queries_BW.shape[0], size), -math.inf)
        return scores_BV.index_copy_(1, self.item_ids_N, queries_BW @ self.items_NW.T)


def lone_items(item_ids_n: Tensor, row_numbers_n: Tensor | None = None) -> SequenceBatch:
    """Histories of one item each, at time 0 and of no user."""
    zeros_n = torch.zeros_like(item_ids_n)
    return SequenceBatch(
        item_ids_T=item_ids_n,
        ratings_T=zeros_n.float(),
        timestamps_T=zeros_n,
        next_item_ids_T=zeros_n,
        next_timestamps_T=zeros_n,
        offsets=torch.arange(len(item_ids_n) + 1, device=item_ids_n.device),
        user_ids_B=zeros_n,
        target_ids_B=zeros_n,
        target_ratings_B=zeros_n.float(),
        target_timestamps_B=zeros_n,
        row_numbers_B=zeros_n if row_numbers_n is None else row_numbers_n,
    )
