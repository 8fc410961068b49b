"""The launcher: python main.py --gin_config_file=configs/ml-1m/hstu-sampled-softmax-n128-final.gin

Modes: train (default), evaluate, recommend and export; `--help` lists the flags. On a machine with several GPUs it
starts one rank a GPU; under torchrun it is one of the ranks.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from generative_recommenders.config import ConfigError, load
from generative_recommenders.distributed.runtime import Runtime, runtime
from generative_recommenders.errors import run_cli

logger = logging.getLogger("main")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--gin_config_file", action="append", default=[], metavar="F", help="gin file; may be repeated")
    add("--gin_bindings", action="append", default=[], metavar="B", help="one binding, e.g. 'train_fn.num_epochs = 3'")
    add("--mode", choices=("train", "evaluate", "recommend", "export"), default="train")
    add("--dry_run", action="store_true", help="parse, validate, build and print what a run would be")
    add("--data_dir", type=Path, default=Path("tmp"), help="prepared datasets (default tmp)")
    add("--exps_dir", type=Path, default=Path("exps"), help="run folders (default exps)")
    add("--checkpoint", type=Path, help="evaluate, recommend, export: a run folder or one of its checkpoints/step-*")
    add("--record", type=Path, metavar="FOLDER", help="evaluate: also write its metrics.json into the folder")
    add("--split", choices=("valid", "test"), default="test", help="evaluate: the held-out event (default test)")
    add("--histories", type=Path, help="recommend: parquet, csv or json with item_ids in raw ids")
    add("--output", type=Path, help="recommend: parquet, csv or json to write, default console; export: a folder")
    add("--top_k", type=int, default=10, help="recommend: items a user (default 10)")
    add("--top_k_method", help="evaluate, recommend: retrieval instead of the config's train_fn.top_k_method")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add("--master_port", type=int, default=12355, help="port of the ranks' rendezvous on this machine")
    return parser


def _start_ranks(arguments: argparse.Namespace) -> None:
    """Become torchrun with one rank a GPU, where there are several and nobody has started ranks yet."""
    import torch

    several = torch.cuda.device_count() > 1 and arguments.device is None and "RANK" not in os.environ
    if not several or arguments.mode in ("recommend", "export") or arguments.dry_run:
        return
    count = torch.cuda.device_count()
    logger.info("starting %d ranks, one a GPU; CUDA_VISIBLE_DEVICES=0 or --device=cuda:0 keeps to one", count)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
    os.execv(sys.executable, [*launcher, f"--master_port={arguments.master_port}", *sys.argv])


def _train_or_evaluate(arguments: argparse.Namespace, here: Runtime) -> int:
    from generative_recommenders.training.experiment import Places, experiment_of
    from generative_recommenders.training.loop import Interrupted
    from generative_recommenders.training.runs import find_checkpoint

    files = list(arguments.gin_config_file)
    if arguments.mode == "evaluate" and arguments.checkpoint is not None and not files:
        files = [str(find_checkpoint(arguments.checkpoint).path / "config.gin")]
    if not files and not arguments.gin_bindings and arguments.mode == "evaluate":
        raise ConfigError("--mode=evaluate: needs --checkpoint=RUN_FOLDER, or --gin_config_file of a run that is here")
    if not files and not arguments.gin_bindings:
        raise ConfigError(
            "--gin_config_file: not given; try --gin_config_file=configs/ml-1m/hstu-sampled-softmax-n128-final.gin"
        )
    config = load(files, arguments.gin_bindings)
    experiment = experiment_of(config, Places(arguments.data_dir, arguments.exps_dir), here)
    try:
        if arguments.dry_run:
            lines = [experiment.dry_run()]
        elif arguments.mode == "evaluate":
            lines = experiment.report(arguments.checkpoint, arguments.split, arguments.top_k_method, arguments.record)
        else:
            lines = experiment.run()
    except Interrupted as stopped:
        logger.info("%s; the same command continues", stopped)
        return 130 if stopped.by_hand else 0
    if here.is_main:
        for line in lines:
            logger.info("%s", line)
    return 0


def _recommend(arguments: argparse.Namespace, here: Runtime) -> int:
    from generative_recommenders.serving.generated import recommender_of
    from generative_recommenders.serving.histories import read_histories
    from generative_recommenders.serving.recommender import check_output, write_recommendations
    from generative_recommenders.training.runs import find_checkpoint

    if arguments.checkpoint is None or arguments.histories is None:
        raise ConfigError("--mode=recommend: needs --checkpoint=RUN_FOLDER and --histories=FILE (parquet, csv or json)")
    if arguments.output is not None:
        check_output(arguments.output)
    recommender = recommender_of(find_checkpoint(arguments.checkpoint), here.device, arguments.top_k_method)
    table = recommender.recommend(read_histories(arguments.histories, recommender.event_columns), arguments.top_k)
    if arguments.output is not None:
        write_recommendations(table, arguments.output)
        logger.info("%d recommendations for %d users in %s", len(table), table["user_id"].nunique(), arguments.output)
    else:
        sys.stdout.write(table.to_string(index=False) + "\n")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from generative_recommenders.serving.export import export
    from generative_recommenders.training.runs import find_checkpoint

    if arguments.checkpoint is None or arguments.output is None:
        raise ConfigError("--mode=export: needs --checkpoint=RUN_FOLDER and --output=FOLDER")
    if arguments.top_k_method is not None:
        raise ConfigError("--top_k_method: --mode=export searches nothing; give it to --mode=recommend")
    folder = export(find_checkpoint(arguments.checkpoint), arguments.output)
    logger.info("exported to %s; try --mode=recommend --checkpoint=%s --histories=FILE", folder, folder)
    return 0


def _check_environment() -> None:
    from ops.dispatch import check_environment

    try:
        check_environment()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def main() -> int:
    arguments = _parser().parse_args()
    _check_environment()
    main_rank = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.INFO if main_rank else logging.ERROR, format="%(message)s", stream=sys.stdout)
    _start_ranks(arguments)
    with runtime(arguments.device) as here:
        if arguments.mode == "recommend":
            return _recommend(arguments, here)
        return _export(arguments) if arguments.mode == "export" else _train_or_evaluate(arguments, here)


if __name__ == "__main__":
    run_cli(main)
