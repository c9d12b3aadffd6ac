"""How a process of a job leaves, so that the job sees its status."""

import signal

from train.stop_signals import SIGNALS


def keep_status() -> None:
    """From now on stop signals are ignored; for a process that leaves with a status other than 0.

    The first one makes srun terminate the others, and those are leaving too: killed at the last moment, a crash or a
    user's mistake would look like a stop after saving.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
