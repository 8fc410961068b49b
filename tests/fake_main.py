"""A stand-in for main.py that takes the same flags, needs no torch, and behaves as its first argument says.

That is JSON from seed to behavior: "finish" (also of seeds not named), "fail", "crash", "killed", "leave" (status 0, no
metrics), "fail once", "slow" (until SIGTERM, then finishes at the next start), "brief" (slow, but finishes by itself),
"stubborn" (ignores SIGTERM). `starts.txt` in the run's folder gets a line a start, `times.txt` begin and end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn


def main() -> None:
    behaviors, flags = json.loads(sys.argv[1]), sys.argv[2:]
    exps_dir = Path(next(flag for flag in flags if flag.startswith("--exps_dir=")).removeprefix("--exps_dir="))
    seed = re.findall(r"random_seed = (\d+)", " ".join(flags))[-1]
    behavior = behaviors.get(seed, "finish")
    began = time.time()
    starts = exps_dir / "starts.txt"
    with starts.open("a") as file:
        file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {os.getcwd()}\n")
    first = len(starts.read_text().splitlines()) == 1
    folder = exps_dir / "toy-l8" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"epoch": n, "split": "test", "metrics": {"ndcg@10": n / 10}}) + "\n" for n in (0, 1))
    )
    sys.stdout.write("epoch 1: loss 0.5\n")
    sys.stdout.flush()
    if behavior in ("slow", "brief") and first:
        wait(forever=behavior == "slow")
    elif behavior == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (exps_dir / "ready").touch()
        time.sleep(600)
    elif behavior == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif behavior == "fail" or (behavior == "fail once" and first):
        sys.stderr.write("error: out of luck; try <another> seed\nsome warning\n")
        sys.exit(2)
    elif behavior == "crash":
        raise RuntimeError("a defect")
    elif behavior == "leave":
        return
    metrics = {"ndcg@10": int(seed) / 100, "hr@10": 1 - int(seed) / 100, "ndcg@10_>=4": float("nan")}
    final = {"metrics": metrics, "epochs": 2, "seconds": 1.5, "split": "test", "protocol": "test curve"}
    (folder / "metrics.json").write_text(json.dumps(final))
    (exps_dir / "times.txt").write_text(f"{began} {time.time()}")


def wait(forever: bool) -> None:
    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    time.sleep(600 if forever else 0.7)


if __name__ == "__main__":
    main()
