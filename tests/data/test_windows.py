"""Windows against a plain loop over users and prefixes."""

from __future__ import annotations

import pytest
import torch

from generative_recommenders.data.collate import Split, Thinning
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.loader import Loader
from generative_recommenders.data.windows import Windows
from tests.toy import write_toy_dataset

Sample = tuple[int, tuple[int, ...], int]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("windows")
    write_toy_dataset(folder, num_users=17)
    return PreparedDataset.load(folder, "toy")


def expected(dataset: PreparedDataset, longest: int, held_out: int) -> list[Sample]:
    samples = []
    for user in range(dataset.num_users):
        events = dataset.item_ids_E[dataset.offsets[user] : dataset.offsets[user + 1]].tolist()
        events = events[: len(events) - held_out]
        samples += [
            (int(dataset.user_ids_U[user]), tuple(events[max(0, i - longest) : i]), events[i])
            for i in range(1, len(events))
        ]
    return samples


def samples_of(split: Split, epoch: int = 0, batch_size: int = 7) -> list[Sample]:
    found = []
    for batch in Loader(split, batch_size, shuffle=False).epoch(epoch):
        rows = [tuple(row.tolist()) for row in batch.item_ids_T.tensor_split(batch.offsets[1:-1])]
        found += list(zip(batch.user_ids_B.tolist(), rows, batch.target_ids_B.tolist(), strict=True))
    return found


@pytest.mark.parametrize(("longest", "held_out"), [(3, 2), (50, 1), (1, 0)])
def test_all_prefixes_are_each_users_prefixes(dataset: PreparedDataset, longest: int, held_out: int) -> None:
    windows = Windows(dataset, longest, held_out)
    wanted = expected(dataset, longest, held_out)
    assert len(windows) == len(wanted)
    assert samples_of(windows) == wanted
    assert all(len(history) >= 1 for _, history, _ in wanted)


def test_a_random_end_is_a_prefix_and_another_every_epoch(dataset: PreparedDataset) -> None:
    windows = Windows(dataset, 5, 2, mode="random_end", seed=9)
    allowed = set(expected(dataset, 5, 2))
    epochs = [samples_of(windows, epoch) for epoch in range(60)]
    assert all(set(samples) <= allowed and len(samples) == len(windows) for samples in epochs)
    assert epochs[0] == samples_of(windows, 0, batch_size=4) and epochs[0] != epochs[1]
    # Sixty epochs reach every one of at most 12 prefixes with probability above .99 each.
    assert len(set().union(*map(set, epochs))) > 0.95 * len(allowed)


def test_last_is_the_split_itself(dataset: PreparedDataset) -> None:
    assert samples_of(Windows(dataset, 5, 1, mode="last")) == samples_of(Split(dataset, 5, 1))


def test_next_events_belong_to_the_window(dataset: PreparedDataset) -> None:
    for batch in Loader(Windows(dataset, 4, 2), 11, shuffle=True, seed=3).epoch(2):
        last = batch.offsets[1:] - 1
        assert torch.equal(batch.next_item_ids_T[last], batch.target_ids_B)
        assert torch.equal(batch.next_timestamps_T[last], batch.target_timestamps_B)


def test_thinned_windows_are_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(ValueError, match="thinned"):
        Windows(dataset, 4, 2, thinning=Thinning(positional_sampling_ratio=0.5))
