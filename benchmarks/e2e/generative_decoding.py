"""Time a user of lists of items on real histories: constrained generation, what others search with, and retrieval.

    python benchmarks/e2e/generative_decoding.py --dataset amzn14-beauty     # 20 beams, batches of 32, CPU

Test histories of a prepared dataset whose semantic IDs are made. Sizes are those of the dataset's configs
(configs/<dataset>/*.gin), weights are random: no time depends on them. Providers take turns on each batch:

- `transformers`: the TIGER below in the transformers package, `generate` with beams and a `prefix_allowed_tokens_fn`
  over a trie of dictionaries, as the public reimplementations search. Its lists must be ours, or nothing is written.
- `tiger`, `tiger_bf16`, `sid_gr_hstu`, `sid_gr_transformer`: beam search over the trie, the same number of beams.
- `parallel_exact`, `parallel_beam`: Parallel TIGER, every item scored or beams.
- `sasrec`: SASRec and the exact top-k of dot products, as long a list.

Rows with medians in milliseconds a user, and their ratios to `transformers` and `sasrec`, go to
generative_decoding.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS
from benchmarks.measuring import Row, append, elapsed, percentiles, provenance
from benchmarks.transformers_t5 import TransformersTiger
from generative_recommenders.batch import SequenceBatch
from generative_recommenders.config import load
from generative_recommenders.data.collate import Split
from generative_recommenders.data.dataset import PreparedDataset
from generative_recommenders.data.loader import Loader
from generative_recommenders.errors import UserError, run_cli
from generative_recommenders.generative.assemble import Plan, Searcher, Splits, build_model, build_trie, load_ids
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.tiger import Tiger
from generative_recommenders.retrieval import assemble as retrieval

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BASELINE, RETRIEVAL = "transformers", "sasrec"
# Provider -> config of the dataset, and what differs from it.
GENERATIVE: dict[str, tuple[str, list[str]]] = {
    "tiger": ("tiger", []),
    "tiger_bf16": ("tiger", ["tiger.bf16 = True"]),
    "sid_gr_hstu": ("sid-gr-hstu", []),
    "sid_gr_transformer": ("sid-gr-transformer", []),
    "parallel_exact": ("parallel-tiger", ["parallel_tiger.decoding = 'exact'"]),
    "parallel_beam": ("parallel-tiger", ["parallel_tiger.decoding = 'beam'"]),
}
Recommend = Callable[[SequenceBatch], object]


def providers(dataset: PreparedDataset, beams: int, seed: int) -> tuple[dict[str, Recommend], Split]:
    """The searches by name, and the test split."""
    found: dict[str, Recommend] = {}
    search = BeamSearchConfig(widths=beams)
    for name, (config, different) in GENERATIVE.items():
        path = ROOT / "configs" / dataset.name / f"{config}.gin"
        plan = Plan.of(load([str(path)], [f"train_generative.random_seed = {seed}", *different]))
        tables = load_ids([dataset.folder / "semantic_ids" / x for x in plan.experiment.semantic_ids], dataset)
        model = build_model(plan, tables).eval()
        trie = build_trie(tables, CPU)
        found[name] = Searcher(model, trie, search, beams, filter_history=False)
        test = Splits.of(plan.experiment, dataset).test
        if isinstance(model, Tiger) and not model.config.bf16:
            theirs = TransformersTiger(model, tables[0].codes_NL.long())
            found[BASELINE] = lambda batch, theirs=theirs: theirs.recommend(batch, beams)
    plan = retrieval.Plan.of(load([str(ROOT / "configs" / dataset.name / "sasrec-ce.gin")], []))
    model = retrieval.build_model(plan, dataset.catalog.item_ids).eval()
    index = model.top_k()

    def retrieve(batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        scores, items = index(model.search_queries(batch), beams)
        return scores, items

    found[RETRIEVAL] = retrieve
    return found, test


def disagreement(found: dict[str, Recommend], batch: SequenceBatch) -> str | None:
    """Whether the baseline's lists differ from ours in more than the order of equal scores."""
    ours = found["tiger"](batch)
    codes_BKL, scores_BK = found[BASELINE](batch)  # type: ignore[misc]
    apart = (ours.scores_BK - scores_BK).abs().max().item()  # type: ignore[attr-defined]
    same = (ours.codes_BKL == codes_BKL).all(-1).float().mean().item()  # type: ignore[attr-defined]
    return None if apart < 1e-3 and same > 0.98 else f"scores differ by {apart:.2g}, {same:.1%} of the places are equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    argument = parser.add_argument
    argument("--dataset", default="amzn14-beauty", help="prepared, with semantic IDs; default: %(default)s")
    argument("--data_dir", type=Path, default=Path("tmp"))
    argument("--beams", type=int, default=20, help="beams, and places of a list")
    argument("--batch", type=int, default=32)
    argument("--batches", type=int, default=8)
    argument("--baseline_batches", type=int, default=2, help="batches that the baseline takes part in")
    argument("--seed", type=int, default=42)
    argument("--results", type=Path, default=RESULTS, help="folder of the csv file")
    arguments = parser.parse_args()
    for name in ("beams", "batch", "batches"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: got {getattr(arguments, name)}, expected at least 1; try 1")
    dataset = PreparedDataset.load(arguments.data_dir, arguments.dataset)
    found, test = providers(dataset, arguments.beams, arguments.seed)
    loader = Loader(test, arguments.batch, arguments.seed, True, 0, 1)
    batches = [batch for batch, _ in zip(loader.epoch(0), range(arguments.batches + 1), strict=False)]
    if not 1 <= arguments.baseline_batches < len(batches):
        raise UserError(
            f"--baseline_batches: got {arguments.baseline_batches}, expected 1 to {len(batches) - 1}; try 1"
        )
    wrong = disagreement(found, batches[0])
    if wrong is not None:
        raise UserError(f"{BASELINE}: its lists are not ours ({wrong}); nothing is timed")
    taken: dict[str, list[float]] = {name: [] for name in found}
    with torch.no_grad():
        for number, batch in enumerate(batches):
            # The first batch warms up.
            names = [name for name in found if name != BASELINE or number <= arguments.baseline_batches]
            milliseconds = elapsed([lambda n=name, b=batch: found[n](b) for name in names], CPU)  # type: ignore[misc]
            for name, ms in zip(names, milliseconds, strict=True):
                taken[name] += [ms / batch.size] if number else []
    rows = rows_of(taken, arguments, len(dataset.catalog))
    append(arguments.results / "generative_decoding.csv", rows)
    return 0


def rows_of(taken: dict[str, list[float]], arguments: argparse.Namespace, items: int) -> list[Row]:
    about = provenance(CPU) | {"seed": arguments.seed}
    shape = {name: getattr(arguments, name) for name in ("dataset", "batch", "beams")} | {"items": items}
    medians = {name: percentiles("user", values)["user_ms"] for name, values in taken.items()}
    rows: list[Row] = []
    sys.stdout.write(f"{'provider':20} {'ms a user':>10} {f'x {BASELINE}':>16} {f'of {RETRIEVAL}':>12}\n")
    for name, values in taken.items():
        faster, slower = medians[BASELINE] / medians[name], medians[name] / medians[RETRIEVAL]
        sys.stdout.write(f"{name:20} {medians[name]:10.3f} {faster:16.1f} {slower:12.2f}\n")
        ratios = {"times_faster_than_transformers": faster, "times_sasrec": slower, "batches": len(values)}
        rows.append({"provider": name} | shape | percentiles("user", values) | ratios | about)
    return rows


if __name__ == "__main__":
    run_cli(main)
