"""Hides GPUs from the tests, which compare with CPU numbers and start more processes than a machine has GPUs.

tests/gpu gives them back to the processes it starts. This must come before anything asks torch for a GPU.
"""

import os

VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
