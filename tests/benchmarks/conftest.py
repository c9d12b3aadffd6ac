"""All tests here run the model in one process."""

from tests.single_process import single_process

__all__ = ["single_process"]
