"""Semantic IDs of a large catalogue: table, look-ups, files, additions, trie and collisions, in seconds.

    python benchmarks/e2e/semantic_ids.py                     # 1,000,000 items, all parts
    python benchmarks/e2e/semantic_ids.py --parts=add_with_trie,trie

Items are random vectors and codes those of a residual quantizer with random codebooks (3 x 256): speeds depend on the
number of items, levels and collisions, not on what the vectors mean. `--dim` is their width. A part is measured after
one turn to warm up; collision policies, which take longest, are not warmed up and run once.

`table` builds a table of unsorted rows, `look_up` indexes it and asks for the items of 100,000 tuples (indexed before),
`save` and `load` include checksums and what the disk takes. `add` gives 1,000 items codes beside those of all others,
in files, from the lock to the swap; `add_with_trie` then reads the new version and builds its trie.
Rows go to semantic_ids.csv.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS
from benchmarks.measuring import Row, append, elapsed, percentiles, provenance
from generative_recommenders.errors import UserError, run_cli
from generative_recommenders.tokenizers.catalogue import add_items, load_current, publish
from generative_recommenders.tokenizers.collisions import POLICIES, resolve
from generative_recommenders.tokenizers.quantizer import ResidualQuantizer, fingerprint
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

SIZES = (256, 256, 256)
ADDED, ASKED = 1_000, 100_000
CPU = torch.device("cpu")
# Levels and codes a level of the two tries that published figures exist for.
TRIES = {"trie_8x2048": (2_048,) * 8, "trie_4x256": (256,) * 4}


class Catalogue:
    """Random embeddings (N, D), a quantizer, its codes and the table of policy "dedup"."""

    def __init__(self, items: int, dim: int, seed: int) -> None:
        torch.manual_seed(seed)
        # Each level quantizes what the one before left, which is shorter.
        self.quantizer = ResidualQuantizer([torch.randn(size, dim) * 0.6**i for i, size in enumerate(SIZES)])
        self.x_ND = torch.randn(items, dim)
        self.codes_NL = self.quantizer.encode(self.x_ND)
        result = resolve("dedup", self.quantizer, self.x_ND, self.codes_NL, width=256)
        self.item_ids_N = torch.arange(1, items + 1)
        self.table = SemanticIds(
            result.codes_NL,
            self.item_ids_N,
            tuple(result.sizes),
            policy="dedup",
            tokenizer_fingerprint=fingerprint(self.quantizer),
        )


def seconds(step: Callable[[], object], repeats: int, warm: bool = True) -> list[float]:
    return [ms / 1e3 for ms in elapsed([step] * (repeats + warm), CPU)[int(warm) :]]


def row(part: str, catalogue: Catalogue, taken: list[float], **more: object) -> Row:
    found = {name.replace("_ms", "_s"): value for name, value in percentiles("time", taken).items()}
    return {"part": part, "items": len(catalogue.table), "repeats": len(taken)} | found | more


def table(catalogue: Catalogue, repeats: int) -> list[Row]:
    old = catalogue.table
    order = torch.randperm(len(old))
    ids_N, codes_NL = old.item_ids_N[order], old.codes_NL[order]
    return [row("table", catalogue, seconds(lambda: SemanticIds.of(ids_N, codes_NL, old.sizes), repeats))]


def look_up(catalogue: Catalogue, repeats: int) -> list[Row]:
    old = catalogue.table
    asked = torch.randint(0, len(old), (ASKED,))
    codes_nL = old.codes_NL[asked].long()

    def index() -> None:
        SemanticIds(old.codes_NL, old.item_ids_N, old.sizes).items_of(codes_nL[:1])

    return [
        row("index", catalogue, seconds(index, repeats)),
        row("look_up", catalogue, seconds(lambda: old.items_of(codes_nL), repeats), asked=ASKED),
        row("codes_of", catalogue, seconds(lambda: old.codes_of(old.item_ids_N[asked]), repeats), asked=ASKED),
    ]


def files(catalogue: Catalogue, repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "table"
        saved = seconds(lambda: catalogue.table.save(place), repeats)
        size = sum(path.stat().st_size for path in place.iterdir()) / 1e6
        loaded = seconds(lambda: SemanticIds.load(place), repeats)
    return [row("save", catalogue, saved, megabytes=size), row("load", catalogue, loaded, megabytes=size)]


def add(catalogue: Catalogue, repeats: int) -> list[Row]:
    return [_additions("add", catalogue, repeats, lambda folder: None)]


def add_with_trie(catalogue: Catalogue, repeats: int) -> list[Row]:
    def build(folder: str) -> None:
        ids = load_current(folder)
        build_trie(ids.codes_NL, ids.sizes, ids.item_ids_N)

    return [_additions("add_with_trie", catalogue, repeats, build)]


def _additions(part: str, catalogue: Catalogue, repeats: int, then: Callable[[str], None]) -> Row:
    """Every turn adds to the catalogue that the one before left."""
    width, first = catalogue.x_ND.shape[1], len(catalogue.table) + 1
    with tempfile.TemporaryDirectory() as folder:
        publish(folder, catalogue.table, catalogue.quantizer)
        turns = iter(range(repeats + 1))

        def step() -> None:
            turn = next(turns)
            add_items(folder, torch.arange(first, first + ADDED) + turn * ADDED, torch.randn(ADDED, width))
            then(folder)

        taken = seconds(step, repeats)
        new = load_current(folder)
    assert torch.equal(new.codes_of(catalogue.item_ids_N), catalogue.table.codes_NL.long())
    return row(part, catalogue, taken, added=ADDED)


def trie(catalogue: Catalogue, repeats: int) -> list[Row]:
    rows = []
    for name, sizes in TRIES.items():
        codes_NL = torch.stack([torch.randint(0, size, (len(catalogue.table),)) for size in sizes], dim=1)
        taken = seconds(lambda c=codes_NL, s=sizes: build_trie(c, s, catalogue.item_ids_N), repeats)
        rows.append(row(name, catalogue, taken))
    return rows


def build_trie(codes_NL: Tensor, sizes: tuple[int, ...], item_ids_N: Tensor) -> object:
    from generative_recommenders.generative.trie import Trie

    return Trie.build(codes_NL, sizes, item_ids_N)


def collisions(catalogue: Catalogue, _: int) -> list[Row]:
    rows = []
    for policy in POLICIES:
        results = []

        def run(policy: str = policy, results: list = results) -> None:
            results.append(resolve(policy, catalogue.quantizer, catalogue.x_ND, catalogue.codes_NL))

        taken = seconds(run, 1, warm=False)
        shared = shared_tuples(results[0].codes_NL)
        rows.append(row(f"collisions_{policy}", catalogue, taken, shared=shared))
    return rows


def shared_tuples(codes_NL: Tensor) -> int:
    """Items that share their tuple with another."""
    groups = SemanticIds(codes_NL, torch.arange(1, len(codes_NL) + 1), tuple((codes_NL.amax(0) + 1).tolist()))
    sizes = groups.group_sizes()
    return int(sizes[sizes > 1].sum())


PARTS: dict[str, Callable[[Catalogue, int], list[Row]]] = {
    "table": table,
    "look_up": look_up,
    "files": files,
    "add": add,
    "add_with_trie": add_with_trie,
    "trie": trie,
    "collisions": collisions,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    argument = parser.add_argument
    argument("--items", type=int, default=1_000_000)
    argument("--dim", type=int, default=32)
    argument("--repeats", type=int, default=5)
    argument("--seed", type=int, default=0)
    argument("--parts", default=",".join(PARTS), help="separated by commas; default: %(default)s")
    argument("--results", type=Path, default=RESULTS, help="folder of the csv file")
    arguments = parser.parse_args()
    parts = [name for name in arguments.parts.split(",") if name]
    unknown = next((name for name in parts if name not in PARTS), None)
    if unknown is not None:
        raise UserError(f"--parts: got {unknown!r}, expected some of {', '.join(PARTS)}")
    for name, least in {"items": 1, "dim": 1, "repeats": 1}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name}: got {getattr(arguments, name)}, expected at least {least}; try {least}")
    catalogue = Catalogue(arguments.items, arguments.dim, arguments.seed)
    shared = shared_tuples(catalogue.codes_NL)
    sys.stdout.write(f"{arguments.items:,} items, {shared:,} of them share their tuple\n")
    about = provenance(CPU) | {"seed": arguments.seed, "dim": arguments.dim, "shared_before": shared}
    for part in parts:
        rows = PARTS[part](catalogue, arguments.repeats)
        for found in rows:
            more = f"  {found['shared']:,} share their tuple" if "shared" in found else ""
            sys.stdout.write(f"{found['part']:24} {found['time_s']:9.3f} s{more}\n")
            sys.stdout.flush()
        append(arguments.results / "semantic_ids.csv", [found | about for found in rows])
    return 0


if __name__ == "__main__":
    run_cli(main)
