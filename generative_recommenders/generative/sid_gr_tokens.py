"""From a batch of items to one jagged batch of tokens, by index arithmetic: [BOS] s1 ... sL for each item.

The items of a row are its known history, of which the newest `max_items` are kept, and then the item to predict. A BOS
stands before the last `loss_items` of them, all if that is None. While training the last item has its codes but for
the last, which nothing follows; while decoding it is open: only its BOS is there. A BOS predicts s1, s_l predicts
s_{l+1}; what follows s_L is never predicted, since that is a BOS or an item without loss.

Every token carries its item's time as a key; as a query it asks at the time of the item that it is about to predict,
which for s_L is the next item and otherwise its own.

NVIDIA's SID-GR marks items the same way. Differences: long histories keep their newest items instead of their oldest,
the BOS tokens of earlier items stay visible to later ones while training and are there while decoding too, and the
first item can carry loss.

Letters: X items of all rows, history and target, laid end to end; S tokens; n items that carry loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.generative.tokens import IdTable
from ops import jagged


@dataclass(frozen=True)
class FlatTokens:
    """Tokens of B rows.

    Args:
        items_X: item ids. codes_XL: their codes; 0 where an item is open or has no ID.
        places_X: place of an item in its row, oldest 0.
        cells_S: of each token its cell in the (X, L + 1) rectangle of BOS and codes of every item.
        rows: the tokens as rows of a batch, for layers: offsets, times as keys and as queries, and as item ids the item
            that a token belongs to and the one it predicts.
        open_places_B: place of the last item of each row.
        loss_nL: tokens that predict the L codes of an item that carries loss.
        labels_nL: these codes, -1 for a target without an ID.
        unknown: events of the histories that were left out, having no ID.
    """

    items_X: Tensor
    codes_XL: Tensor
    places_X: Tensor
    cells_S: Tensor
    rows: SequenceBatch
    open_places_B: Tensor
    loss_nL: Tensor
    labels_nL: Tensor
    unknown: int


def longest_row(levels: int, max_items: int, loss_items: int | None) -> int:
    """The most tokens of a row: while training, and of context and one beam while decoding."""
    marked = max_items + 1 if loss_items is None else min(loss_items, max_items + 1)
    return max_items * levels + marked + levels - 1


def flatten(
    batch: SequenceBatch, table: IdTable, *, max_items: int, loss_items: int | None, with_target: bool
) -> FlatTokens:
    """Tokens of a batch; `with_target` while training, otherwise the last item of each row is open."""
    known = table.known_only(batch)
    kept_B = known.lengths_B.clamp(max=max_items)
    item_offsets = jagged.lengths_to_offsets(kept_B + 1)
    count = int(item_offsets[-1])
    rows_X, places_X = jagged.rows(item_offsets, count), jagged.positions(item_offsets, count)
    after_X = kept_B[rows_X] - places_X
    is_target_X = after_X == 0

    # Targets behind the events, so that one index finds either.
    events_X = torch.where(is_target_X, known.item_ids_T.numel() + rows_X, known.offsets[1:][rows_X] - after_X)
    items_X = torch.cat([known.item_ids_T, known.target_ids_B])[events_X]
    times_X = torch.cat([known.timestamps_T, known.target_timestamps_B])[events_X]
    codes_XL = table.codes_of_items(items_X)
    if not with_target:
        codes_XL = torch.where(is_target_X[:, None], -1, codes_XL)

    levels = torch.arange(table.levels + 1, device=rows_X.device)
    marked_X = torch.ones_like(is_target_X) if loss_items is None else after_X < loss_items
    last_level_X = torch.where(is_target_X, table.levels - 1 if with_target else 0, table.levels)
    present_XC = torch.where(levels == 0, marked_X[:, None], levels <= last_level_X[:, None])
    cells_S = present_XC.flatten().nonzero()[:, 0]
    before = F.pad(present_XC.flatten().cumsum(0), (1, 0))
    offsets = before[item_offsets * (table.levels + 1)]
    starts_n = before[:-1].view(present_XC.shape)[marked_X, 0]

    item_S = cells_S // (table.levels + 1)
    # s_L of a row's last item is never there, so the item after it is of the same row.
    asks_S = torch.where(cells_S % (table.levels + 1) == table.levels, item_S + 1, item_S)
    rows = replace(
        batch,
        item_ids_T=items_X[item_S],
        ratings_T=torch.zeros_like(item_S),
        timestamps_T=times_X[item_S],
        next_item_ids_T=items_X[asks_S],
        next_timestamps_T=times_X[asks_S],
        offsets=offsets,
        events={},
    )
    return FlatTokens(
        items_X=items_X,
        codes_XL=codes_XL.clamp(min=0),
        places_X=places_X,
        cells_S=cells_S,
        rows=rows,
        open_places_B=kept_B,
        loss_nL=starts_n[:, None] + levels[:-1],
        labels_nL=codes_XL[marked_X],
        unknown=batch.item_ids_T.numel() - known.item_ids_T.numel(),
    )
