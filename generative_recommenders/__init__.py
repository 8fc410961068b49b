"""Sequential and generative recommenders in PyTorch, wired with gin and launched by `main.py`."""

import os

# Between two parallel regions an idle OpenMP thread spins for milliseconds by default. As soon as anything else wants
# the core, the thread that is waited for does not get it: one small HSTU epoch took 110 s beside two busy processes on
# two cores, and 8 s with a short spin, which costs about 3 % where nothing else runs. The runtime reads it when it is
# loaded, so this stands before the first import of torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
