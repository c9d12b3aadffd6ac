"""What must hold for all tests, before anything else is imported.

GPUs are hidden: the tests compare with CPU numbers and start more processes than a machine has GPUs; tests/gpu gives
them back to the processes it starts. SIGINT is heard: a test run in the background of a shell would ignore it, and so
would every process it starts. Random examples have no time limit: a busy machine is no failure.
"""

import os
import signal

from hypothesis import settings

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("no time limit", deadline=None)
settings.load_profile("no time limit")
