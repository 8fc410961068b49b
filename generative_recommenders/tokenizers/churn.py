"""What changed between two tables of semantic IDs of one catalogue."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from generative_recommenders.tokenizers.code_keys import CodeKeys
from generative_recommenders.tokenizers.semantic_ids import SemanticIds


@dataclass(frozen=True)
class ChurnReport:
    """What became of the items from one version to the next; all but versions and sizes count items.

    Args:
        version_before: 0 where there was none.
        items: active ones of the new version.
        added: not in the table before, codes new.
        restored: were removed, and are back with the codes they had.
        removed: are masked now, or gone without having been masked.
        dropped: were masked, and are gone.
        changed: in both versions with different codes.
        collisions_resolved: added items whose tuple was another's, and whose codes are their own now.
        unresolved: added items that share their tuple still.
    """

    version_before: int
    version: int
    items: int
    added: int
    restored: int
    removed: int
    dropped: int
    changed: int
    sizes_before: tuple[int, ...]
    sizes: tuple[int, ...]
    collisions_resolved: int = 0
    unresolved: int = 0

    def summary(self) -> str:
        counts = {name: value for name, value in asdict(self).items() if isinstance(value, int)}
        parts = [f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items() if "version" not in name]
        return f"v{self.version_before} to v{self.version}: {', '.join(parts)}"


def compare(old: SemanticIds | None, new: SemanticIds) -> ChurnReport:
    """What happened between two tables of one catalogue; collisions are left at 0."""
    items = int(new.active_N.sum())
    if old is None:
        return ChurnReport(0, new.version, items, len(new), 0, 0, 0, 0, (), new.sizes)
    rows = new.rows_of(old.item_ids_N)
    there = rows >= 0
    before, after = old.active_N[there], new.active_N[rows[there]]
    changed = int(there.sum())
    if old.levels == new.levels:
        changed = int((old.codes_NL[there] != new.codes_NL[rows[there]]).any(dim=1).sum())
    return ChurnReport(
        version_before=old.version,
        version=new.version,
        items=items,
        added=len(new) - int(there.sum()),
        restored=int((~before & after).sum()),
        removed=int((before & ~after).sum() + old.active_N[~there].sum()),
        dropped=int((~old.active_N[~there]).sum()),
        changed=changed,
        sizes_before=old.sizes,
        sizes=new.sizes,
    )


def shared_rows(old_ML: Tensor, new_nL: Tensor, sizes: tuple[int, ...]) -> int:
    """How many of the new rows are equal to another row, old or new."""
    keys = CodeKeys(torch.cat([old_ML, new_nL.cpu().to(old_ML.dtype)]), sizes)
    distinct, group_n, counts = torch.unique(keys.of(new_nL), return_inverse=True, return_counts=True)
    if len(distinct) == 0:
        return 0
    old_keys = keys.of(old_ML)
    places = torch.searchsorted(distinct, old_keys).clamp_(max=len(distinct) - 1)
    counts += torch.bincount(places[distinct[places] == old_keys], minlength=len(distinct))
    return int((counts[group_n] > 1).sum())
