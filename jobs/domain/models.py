"""Which model each line of a batch runs on, and a run order in which those of one stand together.

A shard has lines of one model, since an engine has one; so a batch of several runs them one after
the other. Models are numbered as the file first names them.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from jobs.domain.plan import RunOrder

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_MODELS = 255
"""A line's model is kept in a byte."""


class ModelColumn:
    """The number of each line's model, kept where it changes.

    Attributes:
        is_grouped: whether no model came back after another one.
    """

    def __init__(self) -> None:
        """Begin without a line."""
        self._starts = array("I")
        self._models = bytearray()
        self._most = -1
        self.is_grouped = True

    def note(self, line: int, model: int) -> bool:
        """Note that lines from this one on are of a model.

        Return whether a shard begins here: where the file has its lines by model already it may
        run as it is, and where it has not, it is cut once the lines are in order.
        """
        if self._models and self._models[-1] == model:
            return False
        self._starts.append(line)
        self._models.append(model)
        if model <= self._most:
            self.is_grouped = False
        self._most = max(self._most, model)
        return self.is_grouped

    @property
    def num_models(self) -> int:
        """How many models the lines have."""
        return self._most + 1

    @property
    def starts(self) -> list[int]:
        """From which line on each is of another model than the one before."""
        return self._starts.tolist()

    def of_lines(self, num_lines: int) -> "NDArray[np.uint8]":
        """Return for each line the number of its model."""
        models = np.frombuffer(bytes(self._models), dtype=np.uint8)
        starts = np.frombuffer(self._starts.tobytes(), dtype=self._starts.typecode)
        return np.repeat(models, np.diff(starts, append=np.uint32(num_lines)))


def group_by_model(
    order: RunOrder, models: ModelColumn, num_lines: int
) -> tuple[RunOrder, list[int]]:
    """Return a run order changed so that models run one after the other, each in the order it had.

    With it comes at which place each model begins.
    """
    if order.is_arrival and models.is_grouped:
        return order, models.starts
    of_lines = models.of_lines(num_lines)
    rank = np.arange(num_lines, dtype=np.uint32) if order.rank is None else order.rank
    of_places = np.empty(order.num_leaders, dtype=np.uint8)
    of_places[rank] = of_lines  # a follower is of its leader's model
    placed = np.argsort(of_places, kind="stable")
    turns = np.empty(order.num_leaders, dtype=np.uint32)
    turns[placed] = np.arange(order.num_leaders, dtype=np.uint32)
    starts = np.searchsorted(of_places[placed], np.arange(models.num_models))
    return replace(order, rank=turns[rank]), starts.tolist()


def model_at(place: int, starts: Sequence[int]) -> int:
    """Return the number of the model that a place of a run order is of."""
    return bisect_right(starts, place) - 1
