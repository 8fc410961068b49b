"""Run many configs and compare them in one table.

    python run_grid.py --configs 'configs/ml-1m/*.gin' --seeds 1,2,3
    python run_grid.py --configs configs/synthetic/hstu-demo.gin --sweep 'train_fn.learning_rate=1e-3,3e-4' --jobs 2

A run is a process of main.py. Stop the grid at any moment: the same command goes on where it was, and what is finished
is not run again. The folder --out gets results.csv, results.md and report.html.

Exit status: 0 all finished, 1 some did not, 2 with one line for a mistake in flags or bindings, 130 after a signal.
"""

from generative_recommenders.errors import run_cli
from generative_recommenders.grid.command import run_command


def main() -> int:
    """Run what the command line asks for; see the module's docstring."""
    return run_command(__doc__ or "")


if __name__ == "__main__":
    run_cli(main)
