"""Sequential and generative recommenders in PyTorch, wired with gin and launched by `main.py`."""

import os

# Between two parallel regions an idle OpenMP thread spins for milliseconds by default. As soon as anything else wants
# the core, the thread that is waited for does not get it: one small HSTU epoch took 110 s beside two busy processes on
# two cores, and 8 s with a short spin. Read when the runtime is loaded: this stands before the first import of torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
