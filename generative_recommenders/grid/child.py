"""Becomes a run's command, tied to the grid that started it: `python child.py <pid of the grid> <command> ...`.

Where the kernel offers it (Linux), the end of the grid's process, a kill included, sends the run SIGTERM, upon which it
saves a checkpoint. Elsewhere a run outlives its grid, and the lock that it inherits keeps a second start away.
"""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1


def main() -> None:
    """Replace this process by the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        # The grid was gone before the request reached the kernel.
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
