"""Top-k under Mixture of Logits: recall against the exact list, latency, memory, and the frontier of both.

    python benchmarks/e2e/topk.py                            # a synthetic corpus of 100,000 items
    python benchmarks/e2e/topk.py --checkpoint=RUN_FOLDER    # the catalogue and the test users of a trained run

Random weights say nothing about recall, so the synthetic corpus is learned: items are 50-d vectors around 2,000 random
centers, a query is the vector of an item plus noise and its positive is that item. A module of the published
MovieLens-1M size (8 x 4 x 64) learns to rank the positive above 127 random items, 300 steps of 256 queries. Queries
that are timed are drawn anew. No interaction data enters: figures of a trained run come from --checkpoint.

Recall is the mean share of the exact k best items that a method lists among its k best; 100 are asked for. `scored` is
the full scores a query takes, each of another pair; index_mb what a method holds beside the projected items, once for
all queries. Times are of one batch of queries, projected within, after a turn to warm up; the methods take turns.
`naive` is the evaluation of the public code: all items projected and all (B, X, P) logits in memory, for every batch.
It takes several GB at 100,000 items. Rows go to topk.csv, and recall@100 against time is drawn beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS
from benchmarks.measuring import Row, append, percentiles, provenance
from generative_recommenders.errors import UserError, run_cli
from generative_recommenders.indexing.approximate import TwoStageTopK, lacks_faiss, top_k_by_name
from generative_recommenders.indexing.mol import MoLBruteForceTopK
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.similarity.mol import MoL, MoLConfig
from ops.mol_score import MoLItems, MoLQueries, mol_topk

DIM, CENTERS, DEEPEST = 50, 2_000, 100
PUBLISHED = MoLConfig(DIM, DIM, 8 * 8, 8, 4, 0.05, 0.0, 512, 0.0, -1, 128, 128, 128, 0.0, query_nonlinearity="swiglu")
EXACT, NAIVE = "MoLBruteForceTopK", "naive"
METHODS = (
    "MoLNaiveTopK5 MoLNaiveTopK10 MoLNaiveTopK50 MoLNaiveTopK100 MoLNaiveFaissTopK5 MoLAvgTopK200 MoLAvgTopK500 "
    "MoLAvgTopK1000 MoLAvgTopK2000 MoLAvgTopK4000 MoLAvgTopK6000 MoLCombTopK5_200 MoLCombTopK10_500 MoLCombTopK50_500 "
    "MoLHIndexerTopK500 MoLHIndexerTopK1000 MoLHIndexerTopK2000 MoLHIndexerTopK4000 MoLFittedTopK200 MoLFittedTopK300 "
    f"MoLFittedTopK500 MoLFittedTopK1000 {NAIVE}"
).split()


@dataclass(frozen=True)
class Corpus:
    """A trained similarity with its item embeddings (X, D) and ids, and batches of queries (B, D) with their users."""

    name: str
    similarity: MoL
    items_XD: Tensor
    ids_X: Tensor
    batches: list[tuple[Tensor, Tensor]]

    def queries(self, batch: int) -> MoLQueries:
        return MoLQueries(*self.similarity.project_queries(*self.batches[batch], None)[0])

    def items(self) -> MoLItems:
        return MoLItems(*self.similarity.project_items(self.items_XD, self.ids_X, None))


def synthetic(items: int, batch: int, batches: int, steps: int, seed: int) -> Corpus:
    torch.manual_seed(seed)
    centers = torch.randn(CENTERS, DIM)
    items_XD = F.normalize(centers[torch.randint(0, CENTERS, (items,))] + 0.5 * torch.randn(items, DIM), dim=-1)

    def queries(count: int) -> tuple[Tensor, Tensor]:
        positives = torch.randint(0, items, (count,))
        return F.layer_norm(items_XD[positives] + 0.08 * torch.randn(count, DIM), (DIM,)), positives

    similarity = MoL(PUBLISHED)
    optimizer = torch.optim.AdamW(similarity.parameters(), lr=1e-3)
    nobody = torch.zeros(256, dtype=torch.int64)
    for step in range(steps):
        query, positives = queries(256)
        candidates = torch.cat([positives[:, None], torch.randint(0, items, (256, 127))], dim=1)
        rows, places = candidates.unique(return_inverse=True)
        draws = Draws(step, torch.arange(256))
        features, _ = similarity.project_queries(query, nobody, draws)
        projected = similarity.project_items(items_XD[rows], rows, draws)
        own = tuple(F.embedding(places, f.flatten(1)).unflatten(-1, f.shape[1:]) for f in projected)
        loss = F.cross_entropy(similarity.score(features, own, draws), nobody)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sys.stdout.write(f"learned in {steps} steps: loss {loss.item():.3f} of {torch.tensor(128.0).log().item():.3f}\n")
    asked = [(queries(batch)[0], nobody[:batch]) for _ in range(batches)]
    return Corpus(f"synthetic-{items}", similarity.eval(), items_XD, torch.arange(1, items + 1), asked)


def of_checkpoint(path: Path, data_dir: Path, batch: int, batches: int) -> Corpus:
    """The catalogue of a trained run, and its test users in a fixed order."""
    from generative_recommenders.config import load
    from generative_recommenders.data.dataset import PreparedDataset
    from generative_recommenders.nn.outputs import l2_normalize
    from generative_recommenders.retrieval.assemble import Plan, Splits, build_model
    from generative_recommenders.training.runs import find_checkpoint

    checkpoint = find_checkpoint(path)
    plan = Plan.of(load([str(checkpoint.path / "config.gin")]))
    dataset = PreparedDataset.load(data_dir, plan.experiment.dataset_name)
    model = build_model(plan, dataset.catalog.item_ids)
    checkpoint.load_model(model, "cpu")
    model.eval()
    if not isinstance(model.similarity, MoL):
        got = type(model.similarity).__name__
        raise UserError(f"{path}: got a model with {got}, expected Mixture of Logits; try another run")
    split = Splits.of(plan.experiment, dataset).test
    table = model.items.table.detach()[model.catalog_X]
    table = l2_normalize(table, model.l2_norm_eps) if model.item_l2_norm else table
    members = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: batch * batches].split(batch)
    asked = []
    for chosen in members:
        sequences = split.batch(chosen, torch.arange(len(chosen)))
        asked.append((model.last_queries(sequences), sequences.user_ids_B))
    return Corpus(dataset.name, model.similarity, table, model.catalog_X, asked)


def naive(corpus: Corpus, batch: int) -> Tensor:
    """The k best ids by the public code's way of scoring."""
    nobody = torch.zeros(len(corpus.batches[batch][0]) + 1, dtype=torch.int64)
    similarity = corpus.similarity
    _, ids, _ = mol_topk(
        corpus.queries(batch),
        corpus.items(),
        similarity.pair_gate(),
        corpus.ids_X,
        DEEPEST,
        nobody,
        nobody[:0],
        temperature=similarity.config.temperature,
        backend="reference",
    )
    return ids


def recall(found_BK: Tensor, exact_BK: Tensor, k: int) -> float:
    """Mean share of the exact k best that are among the k best found."""
    hits = (found_BK[:, :k, None] == exact_BK[:, None, :k]).any(1)
    return float(hits.double().mean())


def scored(module: MoLBruteForceTopK, corpus: Corpus) -> float:
    """Full scores a query of the first batch takes, on average."""
    if not isinstance(module, TwoStageTopK):
        return float(len(module))
    queries = corpus.queries(0)
    listed = module(queries, len(module))[1]
    return float((listed > 0).sum(1).double().mean()) + module.sampled(queries)


@torch.inference_mode()
def measure(corpus: Corpus, methods: list[str], repeats: int) -> list[Row]:
    gate, temperature = corpus.similarity.pair_gate(), corpus.similarity.config.temperature
    items = corpus.items()
    names = dict.fromkeys([EXACT, *methods])
    modules = {n: top_k_by_name(n)(items, gate, temperature, corpus.ids_X) for n in names if n != NAIVE}
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    # The first turn warms up.
    for turn in range(repeats + 1):
        batch = turn % len(corpus.batches)
        for name in names:
            started = time.perf_counter()
            ids = naive(corpus, batch) if name == NAIVE else modules[name](corpus.queries(batch), DEEPEST)[1]
            milliseconds[name].append(1e3 * (time.perf_counter() - started))
            found[name].append(ids)
    exact = torch.cat(found[EXACT][1:])
    rows: list[Row] = []
    for name in names:
        row: Row = {"corpus": corpus.name, "items": len(corpus.ids_X), "batch": len(corpus.batches[0][0])}
        row |= {"method": name, "repeats": repeats} | percentiles("batch", milliseconds[name][1:])
        row["times_faster_than_exact"] = (rows[0]["batch_ms"] if rows else row["batch_ms"]) / row["batch_ms"]
        row |= {f"recall@{k}": recall(torch.cat(found[name][1:]), exact, k) for k in (1, 10, 100)}
        if name != NAIVE:
            row |= {"scored": scored(modules[name], corpus), "index_mb": modules[name].index_bytes() / 1e6}
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    lines = [f"{'method':22} {'ms':>9} {'faster':>8} {'@1':>6} {'@10':>6} {'@100':>6} {'scored':>8} {'index MB':>8}"]
    for row in rows:
        recalls = " ".join(f"{row[f'recall@{k}']:6.3f}" for k in (1, 10, 100))
        held = f"{row['scored']:8.0f} {row['index_mb']:8.0f}" if "scored" in row else ""
        lines.append(
            f"{row['method']:22} {row['batch_ms']:9.1f} {row['times_faster_than_exact']:7.1f}x {recalls} {held}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _family(row: Row) -> str:
    return str(row["method"]).rstrip("0123456789_")


def draw(rows: list[Row], path: Path) -> None:
    """Recall@100 against the time, a point a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    points = [row for row in rows if row["method"] != NAIVE]
    for family in dict.fromkeys(_family(row) for row in points):
        own = [row for row in points if _family(row) == family]
        (line,) = axes.plot([r["batch_ms"] for r in own], [r["recall@100"] for r in own], "o-", lw=0.8, label=family)
        for row in own:
            size = str(row["method"]).removeprefix(family)
            at, color = (row["batch_ms"], row["recall@100"]), line.get_color()
            axes.annotate(size, at, xytext=(4, -11), textcoords="offset points", fontsize=8, color=color)
    axes.legend(fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds for {rows[0]['batch']} queries")
    axes.set_ylabel("recall@100 against exact")
    axes.set_title(f"Top-k under Mixture of Logits, {rows[0]['corpus']} ({rows[0]['items']:,} items)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def runnable(names: str) -> list[str]:
    """The methods named, less those this machine lacks a library for; raises UserError for an unknown one."""
    methods = []
    for name in filter(None, names.split(",")):
        if name != NAIVE:
            try:
                top_k_by_name(name)
            except ValueError as error:
                raise UserError(f"--methods: {error}, or {NAIVE}") from None
        if lacks_faiss(name):
            sys.stderr.write(f"{name}: left out, FAISS is not installed; try pip install faiss-cpu\n")
        else:
            methods.append(name)
    return methods


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a trained run with Mixture of Logits")
    add("--data_dir", type=Path, default=Path("tmp"))
    add("--items", type=int, default=100_000)
    add("--batch", type=int, default=32)
    add("--repeats", type=int, default=5)
    add("--steps", type=int, default=300, help="of learning the synthetic corpus")
    add("--seed", type=int, default=3, help="not 0, on which the fitted method was tuned")
    add("--methods", default=",".join(METHODS), help="separated by commas; default: %(default)s")
    add("--results", type=Path, default=RESULTS, help="folder of the csv file and the figure")
    arguments = parser.parse_args()
    methods = runnable(arguments.methods)
    for name, least in {"items": DEEPEST, "batch": 1, "repeats": 1, "steps": 1}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name}: got {getattr(arguments, name)}, expected at least {least}; try {least}")
    batches = arguments.repeats + 1
    if arguments.checkpoint is not None:
        corpus = of_checkpoint(arguments.checkpoint, arguments.data_dir, arguments.batch, batches)
        figure = f"topk-{corpus.name}.png"
    else:
        corpus = synthetic(arguments.items, arguments.batch, batches, arguments.steps, arguments.seed)
        figure = "topk.png"
    rows = measure(corpus, methods, arguments.repeats)
    sys.stdout.write(table(rows) + "\n")
    about = provenance(torch.device("cpu")) | {"seed": arguments.seed}
    if arguments.checkpoint is None:
        about["steps"] = arguments.steps
    append(arguments.results / "topk.csv", [row | about for row in rows])
    draw(rows, arguments.results / figure)
    return 0


if __name__ == "__main__":
    run_cli(main)
