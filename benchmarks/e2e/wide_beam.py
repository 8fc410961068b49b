"""Milliseconds of a search with hundreds of beams: a large decoder-only model over semantic IDs, real shapes.

    python benchmarks/e2e/wide_beam.py                  # 8 layers x 1,024, 4 x 256 codes, bf16 on a GPU
    python benchmarks/e2e/wide_beam.py --quick          # whether it runs, where there is no GPU

The cases are those that NVIDIA publishes for SID-GR with its own kernels on an H100 (200 beams): batch 1 and 16 with
contexts of 256 and 2,048 tokens. Weights, codes and histories are random; the catalogue has 100,000 items. A search is
the prefill of the context, four levels of constrained beams and the items of the result. `constraint_ms` is one step of
the trie alone, at the widths of the last level. Rows go to wide_beam.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import RESULTS
from benchmarks.measuring import Row, append, elapsed, percentiles, provenance
from generative_recommenders.batch import SequenceBatch
from generative_recommenders.errors import UserError, run_cli
from generative_recommenders.generative.beam import beam_search
from generative_recommenders.generative.beam_config import BeamSearchConfig
from generative_recommenders.generative.sid_gr import SIDGR
from generative_recommenders.generative.sid_gr_config import SIDGRConfig
from generative_recommenders.generative.tokens import IdTable
from generative_recommenders.generative.trie import Trie
from generative_recommenders.tokenizers.semantic_ids import SemanticIds

SIZES = (256,) * 4
# Batch, tokens of the context, beams, and the public figure in milliseconds where there is one.
CASES: tuple[tuple[int, int, int, float | None], ...] = (
    (1, 256, 200, 21.5),
    (1, 2048, 200, 30.1),
    (16, 256, 200, 23.0),
    (16, 2048, 200, 80.0),
    (1, 256, 1000, None),
)
WARM_UP = 3


def random_ids(items: int, generator: torch.Generator) -> SemanticIds:
    codes_NL = torch.stack([torch.randint(size, (items,), generator=generator) for size in SIZES], 1)
    return SemanticIds.of(torch.arange(1, items + 1), codes_NL, SIZES)


def random_batch(rows: int, items_a_row: int, items: int, generator: torch.Generator) -> SequenceBatch:
    ids_T = torch.randint(1, items + 1, (rows * items_a_row,), generator=generator)
    zeros_T, zeros_B = torch.zeros_like(ids_T), torch.zeros(rows, dtype=torch.int64)
    return SequenceBatch(
        item_ids_T=ids_T,
        ratings_T=zeros_T.float(),
        timestamps_T=zeros_T,
        next_item_ids_T=zeros_T,
        next_timestamps_T=zeros_T,
        offsets=torch.arange(rows + 1) * items_a_row,
        user_ids_B=torch.arange(rows),
        target_ids_B=zeros_B,
        target_ratings_B=zeros_B.float(),
        target_timestamps_B=zeros_B,
        row_numbers_B=torch.arange(rows),
    )


def constraint(trie: Trie, logits_BMC: Tensor, states_BM: Tensor, beams: int, device: torch.device) -> float:
    """Median milliseconds of the last level's step."""
    scores_BM = torch.zeros(states_BM.shape, device=device)
    last = len(SIZES) - 1

    def step() -> None:
        trie.step(logits_BMC, states_BM, scores_BM, last, beams)

    return statistics.median([elapsed([step], device)[0] for _ in range(13)][WARM_UP:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    argument = parser.add_argument
    argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    argument("--items", type=int, default=100_000)
    argument("--repeats", type=int, default=20)
    argument("--seed", type=int, default=0)
    argument("--quick", action="store_true", help="a small model and few beams, once")
    argument("--results", type=Path, default=RESULTS, help="folder of the csv file")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.items < 1000:
        raise UserError(
            f"--repeats, --items: got {arguments.repeats}, {arguments.items}, expected at least 1 and 1,000; try those"
        )
    device = torch.device(arguments.device)
    quick: bool = arguments.quick
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = random_ids(1000 if quick else arguments.items, generator)
    trie = Trie.build(ids.codes_NL, ids.sizes, ids.item_ids_N, ids.active_N).to(device)
    torch.manual_seed(arguments.seed)
    # The bf16 autocast of the backbone is what the public figures are of.
    sizes = {"dim": 64, "num_blocks": 2} if quick else {"dim": 1024, "num_blocks": 8, "ffn_hidden_dim": 4096}
    config = SIDGRConfig(
        backbone="transformer", num_heads=4 if quick else 16, loss_on="last", dropout_rate=0.0, bf16=True, **sizes
    )
    model = SIDGR(config, IdTable(ids), 2048 // len(SIZES)).to(device).eval()
    about = provenance(device) | {"seed": arguments.seed, "items": len(ids), **sizes, "dtype": "bfloat16"}
    rows: list[Row] = []
    for size, tokens, beams, public in CASES:
        beams, tokens = (beams // 20, tokens // 16) if quick else (beams, tokens)
        batch = random_batch(size, tokens // len(SIZES), len(ids), generator).to(device)
        search = BeamSearchConfig(widths=beams)

        def run(batch: SequenceBatch = batch, search: BeamSearchConfig = search, k: int = beams) -> None:
            beam_search(model, batch, trie, k, search)

        repeats = 1 if quick else arguments.repeats
        taken = [elapsed([run], device)[0] for _ in range(repeats + WARM_UP)][WARM_UP:]
        states_BM = torch.randint(len(trie.tokens[-2]), (size, beams), generator=generator).to(device)
        logits_BMC = torch.randn(size, beams, SIZES[-1], generator=generator).to(device)
        step = constraint(trie, logits_BMC, states_BM, beams, device)
        row = {"batch": size, "tokens": tokens, "beams": beams} | percentiles("search", taken)
        rows.append(row | {"constraint_ms": step, "public_ms": public} | about)
        told = f", public {public:g}" if public and not quick else ""
        sys.stdout.write(
            f"batch {size:2} tokens {tokens:5} beams {beams:4}: {row['search_ms']:8.2f} ms{told}; step {step:.3f} ms\n"
        )
        sys.stdout.flush()
    append(arguments.results / "wide_beam.csv", rows)
    return 0


if __name__ == "__main__":
    run_cli(main)
