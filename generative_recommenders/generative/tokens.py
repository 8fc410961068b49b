"""Semantic IDs as a model reads them: items to codes on the device, and one embedding table for all levels' codes.

A code of level l is the token offset_l + code, as in TIGER ("Recommender Systems with Generative Retrieval", arXiv
2305.05065, section 3.2) and its reimplementations. Differences: items without an ID are told apart instead of being
read as some other item, a user's row is a keyed hash of the id instead of a remainder, and the table can start from the
tokenizer's codebooks.

Letters: S tokens of a batch, the histories' codes and further tokens laid end to end (jagged).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generative_recommenders.batch import SequenceBatch
from generative_recommenders.errors import UserError
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.tokenizers.semantic_ids import SemanticIds
from ops import jagged
from ops.random import fold, lane_bits, token_hash

# A model must find the same row for a user in every run, so these are constants.
_USER_SEED = 20_230_508
_ROTATION_SEED = 2_305_065
# Tokens of one row lie below this, so (row, token) is one 64-bit key.
_MAX_TOKENS = 1 << 24


class IdTable(nn.Module):
    """The codes of all items, of one table of semantic IDs or of several side by side (modalities).

    `sizes` are the codes of every level, those of the first table before those of the second; `modalities` is the
    number of levels of each table. With several tables an item is known if all of them have it. Nothing here is trained
    or saved: `fingerprints` says which tables a checkpoint belongs to.
    """

    row_of_item_V: Tensor
    codes_NL: Tensor
    item_ids_N: Tensor

    def __init__(self, *tables: SemanticIds) -> None:
        super().__init__()
        if not tables:
            raise UserError("semantic IDs: got no table, expected one at least; pass one a modality")
        items = tables[0].item_ids_N
        for table in tables[1:]:
            items = items[table.rows_of(items) >= 0]
        if items.numel() == 0:
            raise UserError("semantic IDs: got tables without an item in common, expected those of one dataset")
        rows = torch.full((int(items[-1]) + 1,), -1, dtype=torch.int64)
        rows[items] = torch.arange(items.numel())
        self.sizes = tuple(size for table in tables for size in table.sizes)
        self.modalities = tuple(table.levels for table in tables)
        self.fingerprints = tuple(table.fingerprint for table in tables)
        self.register_buffer("row_of_item_V", rows, persistent=False)
        self.register_buffer("codes_NL", torch.cat([table.codes_of(items) for table in tables], 1), persistent=False)
        self.register_buffer("item_ids_N", items, persistent=False)

    @property
    def levels(self) -> int:
        return len(self.sizes)

    def rows_of(self, item_ids: Tensor) -> Tensor:
        """Row of each item in `codes_NL`, int64 of the same shape, or -1 for one without an ID (0, padding, too)."""
        last = self.row_of_item_V.numel() - 1
        rows = self.row_of_item_V[item_ids.clamp(0, last)]
        return torch.where((item_ids < 0) | (item_ids > last), -1, rows)

    def codes_of_items(self, item_ids: Tensor) -> Tensor:
        """Codes of items of any shape, int64 (…, L); -1 at all levels of an item without an ID."""
        rows = self.rows_of(item_ids)
        return torch.where(rows[..., None] < 0, -1, self.codes_NL[rows.clamp(min=0)])

    def known_only(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch without those events of the histories whose items have no ID; targets stay as they are.

        What follows an event is then the next event that is left. The batch itself where nothing is missing. Waits for
        the device once.
        """
        known_T = self.rows_of(batch.item_ids_T) >= 0
        if bool(known_T.all()):
            return batch
        kept = known_T.nonzero()[:, 0]
        counts = F.pad(known_T.cumsum(0), (1, 0))
        offsets = counts[batch.offsets]
        columns = ("item_ids_T", "ratings_T", "timestamps_T")
        changes = {name: getattr(batch, name)[kept] for name in columns}
        filled = offsets.diff() > 0
        last = offsets[1:][filled] - 1
        for name, target in (("item_ids", batch.target_ids_B), ("timestamps", batch.target_timestamps_B)):
            following = changes[f"{name}_T"].roll(-1)
            following[last] = target[filled]
            changes[f"next_{name}_T"] = following
        events = {name: column[kept] for name, column in batch.events.items()}
        return replace(batch, **changes, offsets=offsets, events=events)

    def extra_repr(self) -> str:
        return f"items={len(self.item_ids_N)}, sizes={self.sizes}"


class TokenEmbedding(nn.Module):
    """One table (sum of sizes, D) for the codes of all levels and modalities; users, separator and BOS beside.

    Args:
        sizes: codes a level, over all modalities.
        dim: D.
        users: rows that users share by a hash of their ids; 0 is none.
        separator: a learned token after each item.
        bos: a learned token that decoding begins with.
        std: standard deviation all rows start with (normal).
    """

    level_offsets_L: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        *,
        users: int = 0,
        separator: bool = False,
        bos: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.std = std
        self.table = nn.Parameter(torch.empty(sum(self.sizes), dim))
        self.users = nn.Parameter(torch.empty(users, dim)) if users else None
        self.separator = nn.Parameter(torch.empty(dim)) if separator else None
        self.bos = nn.Parameter(torch.empty(dim)) if bos else None
        offsets = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
        self.register_buffer("level_offsets_L", offsets, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for rows in self.parameters():
            nn.init.normal_(rows, std=self.std)

    @property
    def dim(self) -> int:
        return self.table.shape[1]

    def items(self, codes_L: Tensor) -> Tensor:
        """Embeddings of whole tuples, (…, L) -> (…, L, D)."""
        return F.embedding(codes_L + self.level_offsets_L, self.table)

    def level(self, level: int, codes: Tensor) -> Tensor:
        """Embeddings of codes of one level, any shape: (…, D)."""
        return F.embedding(codes + self.level_offsets_L[level], self.table)

    def of_users(self, user_ids: Tensor) -> Tensor:
        """Embeddings of users by the hash of their ids, (…, D); of an unknown one (a negative id) the mean of all rows.

        Raises:
            ValueError: the table has no rows for users.
        """
        if self.users is None:
            raise ValueError("token embedding: got no rows for users; build it with users > 0")
        known = F.embedding(hashed_users(user_ids, self.users.shape[0]), self.users)
        return torch.where(user_ids[..., None] < 0, self.users.mean(0), known)

    def histories(self, table: IdTable, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Tokens of the histories, (S, D), and their offsets (B + 1,).

        A row is its user, where there are user rows, then the codes of each event, oldest first, a separator after each
        where there is one. Items must be known to `table`; see `IdTable.known_only`.
        """
        x_TLD = self.items(table.codes_of_items(batch.item_ids_T))
        if self.separator is not None:
            x_TLD = torch.cat([x_TLD, self.separator.expand(x_TLD.shape[0], 1, -1)], 1)
        x_SD, offsets = x_TLD.flatten(0, 1), batch.offsets * x_TLD.shape[1]
        if self.users is None:
            return x_SD, offsets
        users_B1D = self.of_users(batch.user_ids_B)[:, None]
        return jagged.concat_jagged(users_B1D, x_SD, right_offsets=offsets)

    @torch.no_grad()
    def from_codebooks(self, codebooks: Sequence[Tensor | None]) -> None:
        """Start the table from a tokenizer's codebooks, (sizes[l], d) a level; d may differ from D and by level.

        Codebooks of one width share one map to D: a rotation where d <= D, which keeps all distances, else the D
        directions that carry most. Each level is then scaled to the table's own spread, since residual codebooks shrink
        from level to level. A level of None, or behind the last codebook, such as one that only tells items apart, is
        left alone.

        Raises:
            UserError: a codebook does not fit its level.
        """
        if len(codebooks) > len(self.sizes):
            raise UserError(f"codebooks: got {len(codebooks)} levels, expected at most {len(self.sizes)}")
        rows: dict[int, Tensor] = {}
        for level, (size, codebook) in enumerate(zip(self.sizes, codebooks, strict=False)):
            if codebook is None:
                continue
            if codebook.dim() != 2 or codebook.shape[0] != size:
                raise UserError(
                    f"codebooks: got shape {tuple(codebook.shape)} at level {level}, expected ({size}, width); "
                    "try the tokenizer that these IDs were made with"
                )
            kept = codebook.detach().to("cpu", torch.float32)
            rows[level] = kept - kept.mean(0)
        widths = sorted({codebook.shape[1] for codebook in rows.values()})
        maps = {d: _projection(torch.cat([c for c in rows.values() if c.shape[1] == d]), self.dim) for d in widths}
        for level, codebook in rows.items():
            projected = codebook @ maps[codebook.shape[1]]
            spread = projected.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
            start = int(self.level_offsets_L[level])
            self.table[start : start + len(projected)].copy_(projected * (self.std / spread))

    def extra_repr(self) -> str:
        users = 0 if self.users is None else self.users.shape[0]
        return f"sizes={self.sizes}, dim={self.dim}, users={users}, separator={self.separator is not None}"


def _projection(rows_nd: Tensor, dim: int) -> Tensor:
    """(d, D): principal directions where d > D, then a fixed rotation that spreads what is left over all of D."""
    generator = torch.Generator().manual_seed(_ROTATION_SEED)
    rotation_DD = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    if rows_nd.shape[1] <= dim:
        return rotation_DD[: rows_nd.shape[1]]
    directions_dd = torch.linalg.eigh(rows_nd.T @ rows_nd)[1]
    return directions_dd[:, -dim:] @ rotation_DD


def hashed_users(user_ids: Tensor, rows: int) -> Tensor:
    """Row of each user among `rows`, int64 of the same shape; the same in every run."""
    keys = user_ids.reshape(-1)
    bits = lane_bits(token_hash(fold(_USER_SEED, 0), keys), torch.zeros_like(keys))
    # 32 random bits scaled to 0 .. rows - 1.
    return (bits * rows >> 32).view_as(user_ids)


def token_draws(batch: SequenceBatch, offsets: Tensor, count: int, seed: int) -> Draws:
    """`Draws` for S = `count` tokens in rows of the given offsets, keyed by row and place in the row."""
    rows = batch.row_numbers_B[jagged.rows(offsets, count)]
    return Draws(seed, rows * _MAX_TOKENS + jagged.positions(offsets, count))
