"""Synthetic session tables hold the structure that they claim, and feed the preprocessing."""

from pathlib import Path

import numpy as np

from generative_recommenders.data import merlin_synthetic
from generative_recommenders.data.merlin import prepare_merlin
from generative_recommenders.data.merlin_raw import EVENT_TYPES, ITEMS, SPLITS, TIME
from tests.merlin_tables import run_python


def test_synthetic_sessions_follow_their_rule(tmp_path: Path) -> None:
    tables = merlin_synthetic.generate(3_000, 50, seed=1)
    assert {split: table.num_rows for split, table in tables.items()} == {"train": 2400, "valid": 300, "test": 300}
    assert tables["train"].equals(merlin_synthetic.generate(3_000, 50, seed=1)["train"])
    assert not tables["train"].equals(merlin_synthetic.generate(3_000, 50, seed=2)["train"])
    times = np.concatenate([tables[split][TIME].to_numpy() for split in SPLITS])
    assert (np.diff(times) > 0).all()

    def counted(split: str) -> dict[tuple[int, int], dict[int, int]]:
        counts: dict[tuple[int, int], dict[int, int]] = {}
        for row in tables[split].to_pylist():
            events = zip(row[ITEMS], row[EVENT_TYPES], row[ITEMS][1:], strict=False)
            for item, kind, following in events:
                counts.setdefault((item, kind), {}).setdefault(following, 0)
                counts[item, kind][following] += 1
        return counts

    best = {key: max(found, key=lambda item: found[item]) for key, found in counted("train").items()}
    right = total = 0
    for key, found in counted("test").items():
        right += found.get(best.get(key, -1), 0)
        total += sum(found.values())
    assert right / total > merlin_synthetic.FOLLOW - 0.1
    lengths = np.concatenate([np.diff(t[ITEMS].combine_chunks().offsets.to_numpy()) for t in tables.values()])
    assert (lengths.min(), lengths.max()) == (merlin_synthetic.MIN_LENGTH, merlin_synthetic.MAX_LENGTH)
    assert set(tables["test"][EVENT_TYPES].combine_chunks().flatten().to_pylist()) == set(range(1, 7))


def test_synthetic_command_feeds_the_preprocessing(tmp_path: Path) -> None:
    module = "generative_recommenders.data.merlin_synthetic"
    out = tmp_path / "merlin"
    done = run_python("-m", module, f"--out={out}", "--sessions=200", "--items=40", "--seed=3")
    assert (done.returncode, done.stdout) == (0, f"{out}: sessions train 160, valid 20, test 20\n")
    metadata = prepare_merlin(out, out).metadata
    assert metadata["counts"]["sequences"] == 200
    assert metadata["num_event_types"] == 6
    for arguments, message in ((("--sessions=9",), "--sessions: got 9"), (("--items=6",), "--items: got 6")):
        refused = run_python("-m", module, f"--out={out}", *arguments)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: {message}")
