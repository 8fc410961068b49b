"""A run that is killed, stopped or extended ends with the parameters of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

DRIVER = Path(__file__).with_name("resume_driver.py")


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    latest = max(folder.glob("*/*/checkpoints/step-*"))
    return load_file(latest / "model.safetensors") | {
        f"optimizer.{k}": v for k, v in load_file(latest / "optimizer.safetensors").items()
    }


def run_folder(exps: Path) -> Path:
    (folder,) = {path.parent for path in exps.glob("*/*/metrics.json")}
    return folder


def test_killed_at_ten_random_moments(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), "10", "7"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kills = int(done.stdout.split()[1])
    assert kills == 10, done.stdout
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    # Evaluations are neither lost nor told twice, and the reported metrics agree to the last digit.
    one, other = run_folder(tmp_path / "whole"), run_folder(tmp_path / "killed")
    told = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    assert [(x["epoch"], x["metrics"]) for x in told[0]] == [(x["epoch"], x["metrics"]) for x in told[1]]
    final = [json.loads((f / "metrics.json").read_text()) for f in (one, other)]
    assert final[0]["metrics"] == final[1]["metrics"]
    leftovers = [p.name for p in (other / "checkpoints").iterdir() if p.name.startswith(".")]
    assert not leftovers


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", ["first step", "during evaluation"])
def test_a_stop_saves_and_says_who_asked(tmp_path: Path, moment: str, number: str) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(DRIVER.parents[2])!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.toy import write_toy_dataset
from tests.training import resume_driver
from generative_recommenders.training import loop, retrieval
folder = Path({str(tmp_path)!r})
write_toy_dataset(folder / "data")
moment = {moment!r}
if moment == "first step":
    step = loop.Trainer._step
    def stopping(self, batch):
        os.kill(os.getpid(), signal.{number})
        return step(self, batch)
    loop.Trainer._step = stopping
else:
    evaluate = retrieval.evaluate
    def stopping(*a, **k):
        os.kill(os.getpid(), signal.{number})
        return evaluate(*a, **k)
    retrieval.evaluate = stopping
try:
    resume_driver.train(folder, "exps")
except loop.Interrupted as stopped:
    print("STOPPED", stopped.by_hand, stopped)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"STOPPED {number == 'SIGINT'}" in done.stdout
    (state,) = (json.loads(p.read_text()) for p in tmp_path.glob("exps/*/*/checkpoints/step-*/state.json"))
    progress = state["progress"]
    assert (progress["epoch"], progress["batch"]) == ((0, 1) if moment == "first step" else (1, 0))
