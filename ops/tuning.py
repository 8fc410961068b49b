"""Configurations of Triton kernels: data in `ops/<op>/tuning.json`, apart from the kernels, and choices by measurement.

    {"kernel": {"interpreted": {config}, "rows": [{"up_to": {"head_dim": 64, "bytes": 2}, "default": {config},
                                                    "others": [{config}, ...]}, ...]}}

A config holds the kernel's block sizes and num_warps, num_stages. The first row whose `up_to` bounds the call's key in
every name it mentions is used; the last row mentions none. Every key has "sm", the architecture (80, 90). With
`GR_AUTOTUNE=1` the first call with a new key times every configuration of the row on the device and keeps the fastest
in `<cache>/tuning/<device>.json`, which later processes read whether or not the variable is set; a row that changed
since is measured anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ops.native import cache_folder
from ops.triton_runtime import architecture, compiling, interpreted

logger = logging.getLogger(__name__)

Config = dict[str, int]


class Table:
    """The configurations of one op's kernels."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._choices: dict[tuple[Any, ...], Config] = {}

    @functools.cached_property
    def kernels(self) -> dict[str, Any]:
        path = Path(__file__).parent / self.op / "tuning.json"
        kernels: dict[str, Any] = json.loads(path.read_text())
        return kernels

    def row(self, kernel: str, key: dict[str, int]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self.kernels[kernel]["rows"]
        key = {**key, "sm": architecture()}
        return next(row for row in rows if all(key[name] <= bound for name, bound in row.get("up_to", {}).items()))

    def constant(self, kernel: str, key: dict[str, int], name: str) -> int:
        """A block size that every configuration of the row shares, where the host must know it before the launch."""
        if interpreted():
            value: int = self.kernels[kernel]["interpreted"][name]
            return value
        row = self.row(kernel, key)
        (shared,) = {config[name] for config in (row["default"], *row.get("others", []))}
        return shared

    def options(self, kernel: str, key: dict[str, int], measure: Callable[[Config], bool]) -> list[Config]:
        """The configuration to launch with, followed by the others of its row.

        measure(config) launches once and returns whether there was anything to do.
        """
        if interpreted():
            return [self.kernels[kernel]["interpreted"]]
        row = self.row(kernel, key)
        listed: list[Config] = [row["default"], *row.get("others", [])]
        if compiling() or not _has_gpu():
            return listed
        best = self._choice(kernel, key, listed, measure)
        return [best, *(config for config in listed if config != best)]

    def _choice(
        self, kernel: str, key: dict[str, int], listed: list[Config], measure: Callable[[Config], bool]
    ) -> Config:
        place = (torch.cuda.current_device(), kernel, *sorted(key.items()))
        if place in self._choices:
            return self._choices[place]
        digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:12]
        name = f"{self.op}/{kernel}/{','.join(f'{k}={v}' for k, v in sorted(key.items()))}/{digest}"
        saved = _saved(_device_file()).get(name)
        if saved in listed:
            self._choices[place] = saved
        elif os.environ.get("GR_AUTOTUNE") == "1" and len(listed) > 1:
            if not _launches(listed[0], measure):
                # Nothing was launched, for want of rows, so nothing can be learned.
                return listed[0]
            self._choices[place] = _fastest(name, listed, measure)
            _save(_device_file(), name, self._choices[place])
        else:
            self._choices[place] = listed[0]
        return self._choices[place]


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _launches(config: Config, measure: Callable[[Config], bool]) -> bool:
    """Whether there is anything to launch, also where this configuration does not fit the device."""
    try:
        return measure(config)
    except Exception:
        return True


def _fastest(name: str, listed: list[Config], measure: Callable[[Config], bool]) -> Config:
    from triton.testing import do_bench

    times: list[tuple[float, int]] = []
    for index, config in enumerate(listed):
        try:
            times.append((do_bench(functools.partial(measure, config), warmup=10, rep=50), index))
        except Exception as error:
            # A candidate that asks for more shared memory than this device has is no candidate here.
            logger.info("tuning %s: %s does not run: %s", name, config, error)
    if not times:
        # The launch that follows says why the default does not run.
        return listed[0]
    milliseconds, index = min(times)
    logger.info("tuning %s: %s, %.3f ms", name, listed[index], milliseconds)
    return listed[index]


def _device_file() -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    return cache_folder() / "tuning" / f"{device}.json"


@functools.lru_cache(maxsize=8)
def _saved(path: Path) -> dict[str, Config]:
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _save(path: Path, name: str, config: Config) -> None:
    _saved.cache_clear()
    saved = {**_saved(path), name: config}
    _saved.cache_clear()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(saved, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("tuning results were not saved: %s", error)
