"""Generated users with drifting interests (`generative_recommenders.data.synthetic`): no download, a known optimum.

dataset.json gets `best_hr_at_10` and `best_ndcg_at_10`, what the true model reaches on every user's last event, and
`expected_hr_at_10`, the same without the noise of the draw.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import RawEvents, Source, item_text
from generative_recommenders.data.synthetic import SyntheticConfig, SyntheticData, generate

_CATEGORIES = (
    *("Astronomy", "Baking", "Camping", "Chess", "Cycling", "Drawing", "Fishing", "Gardening", "Hiking", "Knitting"),
    *("Maps", "Music", "Painting", "Photography", "Pottery", "Running", "Sailing", "Swimming", "Tea", "Woodwork"),
)


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(Source):
    """Generates its events; the three options are the sizes and the seed of `SyntheticConfig`."""

    synthetic_users: int = SyntheticConfig.num_users
    synthetic_items: int = SyntheticConfig.num_items
    synthetic_seed: int = SyntheticConfig.seed
    option_names: ClassVar[tuple[str, ...]] = ("synthetic_users", "synthetic_items", "synthetic_seed")

    @property
    def needs_files(self) -> bool:
        return False

    def read(self, raw: RawFiles | None) -> RawEvents:
        config = SyntheticConfig(
            num_users=self.synthetic_users, num_items=self.synthetic_items, seed=self.synthetic_seed
        )
        data = generate(config)
        return RawEvents(
            user_ids=data.user_ids,
            item_ids=data.item_ids,
            ratings=data.ratings,
            timestamps=data.timestamps,
            items=_items(data),
            facts={
                "best_hr_at_10": data.best_hr,
                "best_ndcg_at_10": data.best_ndcg,
                "expected_hr_at_10": data.expected_hr,
            },
        )


def _items(data: SyntheticData) -> pa.Table:
    names = [_category_name(category) for category in data.categories.tolist()]
    titles = [f"{name} No. {rank}" for name, rank in zip(names, data.ranks.tolist(), strict=True)]
    item_ids = np.arange(1, len(titles) + 1)
    return pa.table(
        {
            "item_id": item_ids,
            "raw_id": [f"item-{item}" for item in item_ids],
            "title": titles,
            "text": [item_text(title, [name]) for title, name in zip(titles, names, strict=True)],
            "categories": pa.array([[name] for name in names], pa.list_(pa.string())),
        }
    )


def _category_name(category: int) -> str:
    series, name = divmod(category, len(_CATEGORIES))
    return f"{_CATEGORIES[name]} {series + 1}" if series else _CATEGORIES[name]


SOURCE = SyntheticSource(name="synthetic")
