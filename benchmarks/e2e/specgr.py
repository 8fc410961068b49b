"""SpecGR against the constrained beam of the same weights, and a subset of items ranked against each item alone.

    python benchmarks/e2e/specgr.py --checkpoint=exps/amzn14-beauty-temporal-l20/RUN --data_dir=tmp     # CPU

A checkpoint of a model that drafts (`draft_head.width` > 0) and the test histories of its dataset. For every number of
results K, providers take turns on each batch:

- `beam`: the constrained beam search, `--beams` wide.
- `specgr_δ`: drafts of δ a round, as many beams, and the threshold that accepts `--acceptance` of first-round drafts of
  the validation split.

hr@K of each stands beside the milliseconds a user, since a list is only worth its time if it is as good. `subset`: K
random items of the catalogue ranked by `rank_items`, and by SpecGR drafting among them; `alone` scores one item after
the other, of which `--alone` are timed and the time of all K is counted from them. Rows go to specgr.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS
from benchmarks.measuring import Row, append, elapsed, percentiles, provenance
from generative_recommenders.batch import SequenceBatch
from generative_recommenders.data.collate import Split
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.loader import Loader
from generative_recommenders.errors import UserError, run_cli
from generative_recommenders.generative.assemble import Splits
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.beam_result import BeamResult
from generative_recommenders.generative.draft_head import EncoderDrafter
from generative_recommenders.generative.item_paths import Score
from generative_recommenders.generative.prefix_scoring import rank_items
from generative_recommenders.generative.specgr import SpecGR
from generative_recommenders.generative.specgr_config import SpecGRConfig
from generative_recommenders.serving.generated import GeneratedRecommender, recommender_of
from generative_recommenders.training.runs import find_checkpoint

CPU = torch.device("cpu")
Search = Callable[[SequenceBatch], BeamResult]


def batches_of(split: Split, size: int, count: int, seed: int) -> list[SequenceBatch]:
    return [batch for batch, _ in zip(Loader(split, size, seed, True, 0, 1).epoch(0), range(count), strict=False)]


def searches(own: GeneratedRecommender, valid: Split, k: int, arguments: argparse.Namespace) -> dict[str, Search]:
    model, trie = own.model, own.searcher.trie
    config = BeamSearchConfig(widths=arguments.beams)
    found: dict[str, Search] = {"beam": lambda batch: beam_search(model, batch, trie, k, config)}  # type: ignore[type-var]
    in_sample = trie.allow(torch.isin(model.table.item_ids_N, own.trained_ids))
    drafter = EncoderDrafter(model)
    tuning = batches_of(valid, arguments.batch, arguments.batches, arguments.seed)
    for drafts in arguments.drafts:
        settings = SpecGRConfig(
            draft_size=drafts,
            num_beams=arguments.beams,
            target_acceptance=arguments.acceptance,
            threshold=-100.0,
            score=arguments.score,
        )
        specgr = SpecGR(model, trie, drafter, settings, in_sample).calibrated(tuning)  # type: ignore[type-var]
        found[f"specgr_{drafts}"] = lambda batch, s=specgr: s(batch, k)
    return found


def turns(found: dict[str, Search], batches: list[SequenceBatch], k: int) -> list[Row]:
    taken: dict[str, list[float]] = {name: [] for name in found}
    hits: dict[str, list[Tensor]] = {name: [] for name in found}
    for number, batch in enumerate(batches):
        for name, search in found.items():
            results: list[BeamResult] = []
            milliseconds = elapsed([lambda s=search, b=batch, r=results: r.append(s(b))], CPU)[0]  # type: ignore[misc]
            # The first batch warms up.
            if number:
                taken[name].append(milliseconds / batch.size)
                hits[name].append((results[0].items_BK == batch.target_ids_B[:, None]).any(1))
    beam = percentiles("user", taken["beam"])["user_ms"]
    rows: list[Row] = []
    for name, values in taken.items():
        median = percentiles("user", values)
        rate = torch.cat(hits[name]).double().mean().item()
        rows.append({"provider": name, "k": k, "hr": rate, "times_faster": beam / median["user_ms"]} | median)
    return rows


def subset(own: GeneratedRecommender, batch: SequenceBatch, k: int, arguments: argparse.Namespace) -> list[Row]:
    model, trie = own.model, own.searcher.trie
    known = model.table.item_ids_N
    count = min(arguments.subset, len(known))
    chosen = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(arguments.seed))[:count]]
    in_sample = trie.allow(torch.isin(known, own.trained_ids))
    allowed = trie.allow(torch.isin(known, chosen))
    settings = SpecGRConfig(draft_size=max(arguments.drafts), num_beams=arguments.beams, threshold=-100.0)
    specgr = SpecGR(model, trie, EncoderDrafter(model), settings, in_sample)  # type: ignore[type-var]

    def alone() -> None:
        for item in chosen[: arguments.alone].tolist():
            rank_items(model, batch, trie, torch.tensor([item]))  # type: ignore[type-var]

    steps: dict[str, Callable[[], object]] = {
        "subset_alone": alone,
        "subset_rank_items": lambda: rank_items(model, batch, trie, chosen),  # type: ignore[type-var]
        "subset_specgr": lambda: specgr(batch, k, allowed=allowed, subset=True),
    }
    rows: list[Row] = []
    for name, step in steps.items():
        milliseconds = min(elapsed([step], CPU)[0] for _ in range(3)) / batch.size
        share = count / min(arguments.alone, count) if name == "subset_alone" else 1.0
        rows.append({"provider": name, "k": k, "subset": count, "user_ms": milliseconds * share})
    return [row | {"times_faster": rows[0]["user_ms"] / row["user_ms"]} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    argument = parser.add_argument
    argument("--checkpoint", type=Path, required=True)
    argument("--data_dir", type=Path, default=Path("tmp"))
    argument("--batch", type=int, default=32)
    argument("--batches", type=int, default=20)
    argument("--beams", type=int, default=50)
    argument("--drafts", type=int, nargs="+", default=[20, 50, 100])
    argument("--results_at", type=int, nargs="+", default=[10, 50], help="numbers of results K")
    argument("--acceptance", type=float, default=0.8)
    argument("--score", choices=get_args(Score), default="drop_last", help="which codes are scored, see specgr.score")
    argument("--subset", type=int, default=10_000)
    argument("--alone", type=int, default=100)
    argument("--seed", type=int, default=42)
    argument("--results", type=Path, default=RESULTS, help="folder of the csv file")
    arguments = parser.parse_args()
    for name in ("batch", "batches", "beams", "subset", "alone"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: got {getattr(arguments, name)}, expected at least 1; try 1")
    own = recommender_of(find_checkpoint(arguments.checkpoint))
    if not isinstance(own, GeneratedRecommender):
        raise UserError("--checkpoint: got a retrieval model, expected one of train_generative that drafts")
    dataset = PreparedDataset.load(arguments.data_dir, own.plan.experiment.dataset_name)
    splits = Splits.of(own.plan.experiment, dataset)
    batches = batches_of(splits.test, arguments.batch, arguments.batches + 1, arguments.seed)
    rows: list[Row] = []
    with torch.no_grad():
        for k in arguments.results_at:
            rows += turns(searches(own, splits.valid, k, arguments), batches, k)
        rows += subset(own, batches_of(splits.test, 1, 1, arguments.seed)[0], 50, arguments)
    about = {"dataset": dataset.name, "model": own.plan.experiment.model, "batch": arguments.batch}
    about |= {"beams": arguments.beams, "acceptance": arguments.acceptance, "seed": arguments.seed}
    about["score"] = arguments.score
    for row in rows:
        rate = f"  hr@{row['k']} {row['hr']:.4f}" if "hr" in row else f"  of {row['subset']:,} items"
        sys.stdout.write(
            f"{row['provider']:18} K {row['k']:3} {row['user_ms']:10.3f} ms a user {row['times_faster']:8.2f} x{rate}\n"
        )
    append(arguments.results / "specgr.csv", [row | about | provenance(CPU) for row in rows])
    return 0


if __name__ == "__main__":
    run_cli(main)
