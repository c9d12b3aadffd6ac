"""Prints a port on which rank 0 can listen: `python -m slurm.rendezvous_port`, on the job's first node.

Jobs that share a node begin their search at different ports.
"""

import os
import socket
import sys

from slurm.identity import FIRST_PORT, NUM_PORTS


def first_bindable(job: int) -> int | None:
    """The first port that can be bound on all addresses of this machine, from the job's own one on."""
    for offset in range(NUM_PORTS):
        port = FIRST_PORT + (job + offset) % NUM_PORTS
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    return None


if __name__ == "__main__":
    found = first_bindable(int(os.environ.get("SLURM_JOB_ID", 0)))
    if found is None:
        sys.exit(f"error: no port of {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} is free on {socket.gethostname()}")
    print(found)
