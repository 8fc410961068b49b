"""What a run leaves for people: TensorBoard curves, `metrics.jsonl`, `metrics.json` and console lines.

Tags are the public ones: `losses/ar_loss` and `losses/main_loss` every step, `loss/train`, `lr` and `eval/*` every
`eval_interval` steps, `eval_epoch/*` and `eval_epoch_full/*` by epoch; added are `eval_valid/*`, `eval_test/*`,
`perf/*`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from generative_recommenders.training.checkpoint import write_atomically

logger = logging.getLogger(__name__)
T = TypeVar("T")

METRICS_LINES = "metrics.jsonl"
METRICS_FINAL = "metrics.json"


class Reporter:
    """Writes for rank 0; on every other rank, and with `folder=None`, all methods do nothing."""

    def __init__(self, folder: Path | None, first_step: int = 0, first_epoch: int = 0) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _forget_from(folder / METRICS_LINES, first_epoch)
            self.writer = SummaryWriter(str(folder), purge_step=first_step if first_step else None, flush_secs=30)

    @property
    def active(self) -> bool:
        return self.folder is not None

    def config(self, text: str) -> None:
        """The operative config as `config.gin` and as text in TensorBoard."""
        if self.folder is not None and self.writer is not None:
            write_atomically(self.folder / "config.gin", text)
            self.writer.add_text("config", f"```\n{text}\n```")

    def scalars(self, values: Mapping[str, float], x: int, prefix: str = "") -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{prefix}{name}", value, x)

    def line(self, record: Mapping[str, Any]) -> None:
        """One evaluation, appended to `metrics.jsonl`."""
        if self.folder is not None:
            with (self.folder / METRICS_LINES).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def final(self, record: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> None:
        """`metrics.json`, whose presence marks a finished run, and hparams with the final metrics."""
        if self.folder is None or self.writer is None:
            return
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in hyperparameters.items()}
        metrics = {f"final/{name}": value for name, value in record["metrics"].items()}
        for summary in hparams(plain, metrics):
            self.writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, 0)
        self.writer.flush()
        write_atomically(self.folder / METRICS_FINAL, json.dumps(record, indent=1) + "\n")

    def say(self, text: str) -> None:
        if self.active:
            logger.info("%s", text)

    def progress(self, batches: Iterable[T], total: int, initial: int, label: str) -> Iterator[T]:
        """The batches, behind a progress bar where the console can draw one."""
        hidden = not (self.active and sys.stderr.isatty())
        yield from tqdm(batches, total=total, initial=initial, desc=label, disable=hidden, leave=False)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _forget_from(path: Path, epoch: int) -> None:
    """Drop the evaluations of epochs that a resumed run is about to repeat, and a last line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["epoch"] < epoch:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_atomically(path, "".join(line + "\n" for line in kept))
