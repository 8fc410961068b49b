"""Top-k under Mixture of Logits: recall against the exact list, latency, memory, and the frontier of both.

    python benchmarks/e2e/topk.py                            # a synthetic corpus of 100,000 items
    python benchmarks/e2e/topk.py --checkpoint=RUN_FOLDER    # the catalogue and the test users of a trained run

Random weights say nothing about recall, so the synthetic corpus is learned: items are 50-d vectors around 2,000 random
centers, a query is the vector of an item plus noise and its positive is that item. A module of the published
MovieLens-1M size (8 x 4 x 64) learns to rank the positive above 127 random items, 300 steps of 256 queries. Queries
that are timed are drawn anew. `naive` is the evaluation of the public code: all items projected and all (B, X, P)
logits in memory, for every batch. Times are medians; the methods take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS
from benchmarks.measuring import Row, append, provenance
from generative_recommenders.indexing.approximate import top_k_by_name
from generative_recommenders.nn.dropout import Draws
from generative_recommenders.similarity.mol import MoL, MoLConfig
from ops.mol_score import MoLItems, MoLQueries, mol_topk

DIM, CENTERS, DEEPEST = 50, 2_000, 100
PUBLISHED = MoLConfig(8 * 8, 8, 4, 0.05, 0.0, 512, 0.0, -1, 128, 128, 128, 0.0, query_nonlinearity="swiglu")
METHODS = (
    "MoLNaiveTopK5 MoLNaiveTopK10 MoLNaiveTopK50 MoLNaiveTopK100 MoLNaiveFaissTopK5 MoLAvgTopK200 MoLAvgTopK500 "
    "MoLAvgTopK1000 MoLAvgTopK2000 MoLAvgTopK4000 MoLCombTopK5_200 MoLCombTopK10_500 MoLCombTopK50_500 "
    "MoLHIndexerTopK500 MoLHIndexerTopK1000 MoLHIndexerTopK2000"
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

    similarity = MoL(PUBLISHED, DIM, DIM)
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
        raise SystemExit(f"{path}: got a model with {type(model.similarity).__name__}, expected Mixture of Logits")
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


@torch.inference_mode()
def measure(corpus: Corpus, methods: list[str], repeats: int) -> list[Row]:
    gate, temperature = corpus.similarity.pair_gate(), corpus.similarity.config.temperature
    items = corpus.items()
    names = ["MoLBruteForceTopK", *methods]
    modules = {name: top_k_by_name(name)(items, gate, temperature, corpus.ids_X) for name in names}
    runs = {name: lambda b, m=module: m(corpus.queries(b), DEEPEST)[1] for name, module in modules.items()}
    runs["naive"] = lambda b: naive(corpus, b)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    found: dict[str, list[Tensor]] = {name: [] for name in runs}
    for b in range(min(repeats, len(corpus.batches)) + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            ids = run(b % len(corpus.batches))
            if b:  # The first turn warms up.
                seconds[name].append(time.perf_counter() - started)
                found[name].append(ids)
    exact = torch.cat(found["MoLBruteForceTopK"])
    base = statistics.median(seconds["MoLBruteForceTopK"])
    rows: list[Row] = []
    for name in runs:
        took, ids = statistics.median(seconds[name]), torch.cat(found[name])
        row: Row = {"corpus": corpus.name, "items": len(corpus.ids_X), "batch": len(corpus.batches[0][0])}
        row |= {"method": name, "ms": took * 1e3, "times_faster_than_exact": base / took}
        row |= {f"recall@{k}": recall(ids, exact, k) for k in (1, 10, 100)}
        held = {t.data_ptr(): t for t in vars(modules.get(name, object.__new__(Corpus))).values() if torch.is_tensor(t)}
        row["index_mb"] = sum(t.numel() * t.element_size() for t in held.values()) / 1e6
        rows.append(row)
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Recall@100 against the time, a point a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for row in rows:
        if row["method"] == "naive":
            continue
        label = str(row["method"]).removeprefix("MoL").replace("TopK", " ").replace("BruteForce ", "exact")
        axes.scatter(row["ms"], row["recall@100"], color="black" if label == "exact" else "tab:blue")
        axes.annotate(label, (row["ms"], row["recall@100"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds for {rows[0]['batch']} queries")
    axes.set_ylabel("recall@100 against exact")
    axes.set_title(f"Top-k under Mixture of Logits, {rows[0]['corpus']} ({rows[0]['items']:,} items)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a trained run with Mixture of Logits")
    add("--data_dir", type=Path, default=Path("tmp"))
    add("--items", type=int, default=100_000)
    add("--batch", type=int, default=32)
    add("--repeats", type=int, default=5)
    add("--steps", type=int, default=300, help="of learning the synthetic corpus")
    add("--seed", type=int, default=0)
    add("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    batches = arguments.repeats + 1
    if arguments.checkpoint is not None:
        corpus = of_checkpoint(arguments.checkpoint, arguments.data_dir, arguments.batch, batches)
    else:
        corpus = synthetic(arguments.items, arguments.batch, batches, arguments.steps, arguments.seed)
    rows = measure(corpus, [name for name in arguments.methods.split(",") if name], arguments.repeats)
    for row in rows:
        figures = " ".join(f"{k} {row[k]:.3f}" for k in ("recall@1", "recall@10", "recall@100"))
        faster = f"{row['times_faster_than_exact']:7.1f}x"
        sys.stdout.write(f"{row['method']:22} {row['ms']:9.1f} ms {faster} {figures} {row['index_mb']:.0f} MB\n")
    about = provenance(torch.device("cpu")) | {"seed": arguments.seed}
    append(RESULTS / "topk.csv", [row | about for row in rows])
    draw(rows, RESULTS / f"topk-{corpus.name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
