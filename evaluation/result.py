"""What every evaluation gives back."""

from abc import ABC, abstractmethod
from pathlib import Path


class EvaluationResult(ABC):
    """Numbers of one evaluation, for a person, for TensorBoard, for a file and as plots.

    Attributes:
        name: What was evaluated, as on the command line; results of one model are told apart by it.
    """

    name: str

    @abstractmethod
    def lines(self) -> list[str]:
        """The results for a person, as a table."""

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """TensorBoard tag -> value; `evaluation/NAME/` is put before each tag when it is written."""

    @abstractmethod
    def to_json(self) -> dict[str, object]:
        """The results as values that JSON can hold; an infinity or a NaN is None."""

    def draw(self, folder: Path) -> list[Path]:
        """Draws plots.

        Args:
            folder: An existing folder for them.

        Returns:
            The files that were written; by default none.
        """
        return []
