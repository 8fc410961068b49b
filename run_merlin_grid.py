"""Run all configs for Merlin session data, configs/merlin/*.gin, and compare their test metrics in one table.

    python preprocess_merlin_data.py
    python run_merlin_grid.py

It is run_grid.py with these configs and the folder exps/merlin-grid as defaults, and takes the same flags.
"""

from pathlib import Path

from generative_recommenders.errors import run_cli
from generative_recommenders.grid.command import run_command


def main() -> int:
    """Run what the command line asks for; see the module's docstring."""
    return run_command(__doc__ or "", configs=("configs/merlin/*.gin",), out=Path("exps/merlin-grid"))


if __name__ == "__main__":
    run_cli(main)
