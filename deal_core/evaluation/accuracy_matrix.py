"""The accuracy matrix with its figures of learning and forgetting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from pydantic import BeforeValidator, ConfigDict, PlainSerializer

from deal_core.evaluation.interval import CellScore
from deal_core.schema_version import JsonOf, VersionedJson

CONSOLIDATED = "(consolidation)"
"""What stands for the task of a row whose version learned all tasks together. No task has such a name."""


Value = TypeVar("Value")


@dataclass(frozen=True)
class AccuracyMatrix(VersionedJson, what="The accuracy matrix", error=ValueError, version=1):
    """R[t][i]: accuracy of version t on task i. Rows are versions, columns tasks in order of first arrival.

    Accuracies are shares, 0 to 1. A cell is None for versions before the task was learned, except the version directly
    before it (needed for forward transfer). A benchmark may fill only the first and last cells after that.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    tasks: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    """The task that each row's version was trained on; of a consolidation the task of the row before it."""
    rows: tuple[tuple[float | None, ...], ...] = ()
    base: tuple[float | None, ...] = ()
    """Accuracy of the untouched base model on each task."""
    num_rows: tuple[tuple[int | None, ...], ...] = ()
    """Test rows behind each cell: first those of `base`, then those of `rows`. Empty: they are not known, as for a
    benchmark."""
    on_fewer: Mapping[str, tuple[CellScore, ...]] = field(default_factory=dict, hash=False)
    """For each task whose test rows have grown: the last version's scores on the rows of before each growth. A version
    of that time is compared with these: what was forgotten is told by the rows that both answered."""
    slices: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Column with earlier test rows of a task → the task. Averages, forgetting and transfer leave these columns out."""
    measured_from: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Task whose test rows were replaced → the first row of the matrix whose figure is of the present test rows."""
    consolidated: tuple[int, ...] = ()
    """The rows of consolidations, counted from 0: their versions learned all tasks together."""

    def __post_init__(self) -> None:
        if tuple(name for name in self.tasks if name not in self.slices) != tuple(dict.fromkeys(self.trained)):
            raise ValueError(
                f"The matrix has tasks {self.tasks} for versions trained on {self.trained}; "
                "give every task once, in order of first arrival."
            )
        if len(self.trained) != len(self.rows) or len(self.base) != len(self.tasks):
            raise ValueError(
                f"The matrix has {len(self.rows)} rows for {len(self.trained)} versions and {len(self.base)} base "
                f"accuracies for {len(self.tasks)} tasks; give one row per version and one base accuracy per task."
            )
        for values in (*self.rows, self.base):
            if len(values) != len(self.tasks) or any(value is not None and not 0 <= value <= 1 for value in values):
                raise ValueError(f"The matrix has {values} for {len(self.tasks)} tasks; give shares from 0 to 1.")
        if self.num_rows and [*map(len, self.num_rows)] != [len(self.tasks)] * (len(self.rows) + 1):
            raise ValueError("The matrix has other cells than numbers of test rows; give one number a cell.")
        for column, first in enumerate(self.first_versions()):
            is_slice = self.tasks[column] in self.slices  # its rows may be forgotten
            if not is_slice and (self.rows[first][column] is None or self.rows[-1][column] is None):
                raise ValueError(
                    f"The matrix lacks an accuracy of {self.tasks[column]!r}; evaluate the version that "
                    "learned a task, and the last one, on it."
                )

    def with_row(
        self,
        task: str,
        accuracies: Mapping[str, float],
        *,
        base_accuracy: float | None,
        parent_accuracy: float | None,
        num_rows: Mapping[str, int] | None = None,
        on_fewer: Mapping[str, tuple[CellScore, ...]] | None = None,
    ) -> AccuracyMatrix:
        """A new matrix with one more version, trained on `task`, which is new to the lineage or not.

        `accuracies` are the new version's on every task so far, including `task`. On a new task, `base_accuracy` is the
        untouched base model's, and `parent_accuracy` the parent's before training. `num_rows` are the test rows of each
        accuracy; None: they are not known. Base model and parent answered those of a new task too. `on_fewer` is of the
        new version, see the field.

        Raises:
            ValueError: an accuracy is missing, or is given for a task that the lineage does not know.
        """
        tasks, rows, base = self.tasks, self.rows, self.base
        sizes = self.num_rows or ((None,) * len(tasks),) * (len(rows) + 1)
        if task not in tasks:
            before = [None] * max(len(rows) - 1, 0) + [parent_accuracy] * min(len(rows), 1)
            rows = tuple((*row, cell) for row, cell in zip(rows, before, strict=True))
            tasks, base = (*tasks, task), (*base, base_accuracy)
            answered = [None if cell is None else (num_rows or {}).get(task) for cell in (base_accuracy, *before)]
            sizes = tuple((*row, size) for row, size in zip(sizes, answered, strict=True))
        if set(accuracies) - set(self.slices) != set(tasks) - set(self.slices):
            raise ValueError(f"The new version has accuracies of {sorted(accuracies)}; give those of {sorted(tasks)}.")
        new_row = tuple(None if (value := accuracies.get(name)) is None else float(value) for name in tasks)
        is_known = bool(self.num_rows) or (num_rows is not None and not self.rows)
        sizes = (*sizes, tuple((num_rows or {}).get(name) if name in accuracies else None for name in tasks))
        return replace(
            self,
            tasks=tasks,
            trained=(*self.trained, task),
            rows=(*rows, new_row),
            base=base,
            num_rows=sizes if is_known else (),
            on_fewer=dict(on_fewer or {}),
        )

    def remeasured(
        self, task: str, *, base_accuracy: float, last_accuracy: float, num_rows: int | None = None
    ) -> AccuracyMatrix:
        """The matrix after a task got `num_rows` other test rows, with new accuracies of the base and the last version.

        Cells of earlier versions stay: they are accuracies on the previous test rows.
        """
        column = self.tasks.index(task)

        def put(row: tuple[Value | None, ...], value: Value | None) -> tuple[Value | None, ...]:
            return (*row[:column], value, *row[column + 1 :])

        rows, sizes = (*self.rows[:-1], put(self.rows[-1], last_accuracy)), self.num_rows
        if sizes:
            sizes = (put(sizes[0], num_rows), *sizes[1:-1], put(sizes[-1], num_rows))
        since = {**self.measured_from, task: len(rows) - 1}
        return replace(self, rows=rows, base=put(self.base, base_accuracy), measured_from=since, num_rows=sizes)

    def with_slice(self, task: str, name: str) -> AccuracyMatrix:
        """The matrix with the present test rows of a task as the slice `name`: a copy of the task's column."""
        column = self.tasks.index(task)
        return replace(
            self,
            tasks=(*self.tasks, name),
            rows=tuple((*row, row[column]) for row in self.rows),
            base=(*self.base, self.base[column]),
            num_rows=tuple((*row, row[column]) for row in self.num_rows),
            slices={**self.slices, name: task},
        )

    def with_consolidation(
        self,
        accuracies: Mapping[str, float],
        num_rows: Mapping[str, int] | None = None,
        on_fewer: Mapping[str, tuple[CellScore, ...]] | None = None,
    ) -> AccuracyMatrix:
        """A new matrix with a version more that learned all tasks together; the arguments are those of `with_row`."""
        task = self.trained[-1]
        grown = self.with_row(
            task, accuracies, base_accuracy=None, parent_accuracy=None, num_rows=num_rows, on_fewer=on_fewer
        )
        return replace(grown, consolidated=(*self.consolidated, len(self.rows)))

    @property
    def cells(self) -> tuple[tuple[CellScore, ...], ...]:
        """The scores and their numbers of test rows: a row for the base model, then one for each version."""
        shares = (self.base, *self.rows)
        sizes = self.num_rows or ((None,) * len(self.tasks),) * len(shares)
        return tuple(tuple(map(CellScore, *pair)) for pair in zip(shares, sizes, strict=True))

    @property
    def learned(self) -> tuple[str, ...]:
        """What each row's version learned: its task, or CONSOLIDATED."""
        return tuple(CONSOLIDATED if row in self.consolidated else task for row, task in enumerate(self.trained))

    def learned_best(self) -> dict[str, int]:
        """For each task learned before the last version, the row from which its debt counts.

        It is the best of the versions that learned the task alone, on its present test rows; of several the newest. A
        consolidation does not count, so it forgives nothing.
        """
        best = {}
        for column, name in enumerate(self.tasks):
            first = self.measured_from.get(name, 0)
            rows = [row for row, task in enumerate(self.learned[:-1]) if task == name and row >= first]
            if rows:  # none: only the last version learned it, or it is a slice
                best[name] = max(rows, key=lambda row: (self._lost_since(row, column), row))
        return best

    @property
    def average_accuracy(self) -> float | None:
        """AA = mean_i R[T][i]; None before the first version."""
        last = self.rows[-1] if self.rows else ()
        return mean_of_all(value for name, value in zip(self.tasks, last, strict=False) if name not in self.slices)

    @property
    def forgetting_by_task(self) -> dict[str, float]:
        """Forgetting_i = max over i ≤ t < T of R[t][i] − R[T][i], for every task learned before the last version.

        Both are of the test rows that version t answered. The maximum starts at the first version trained on the task,
        or at the first one that was measured on the task's present test rows. Versions that were not evaluated on the
        task do not count. A negative value is a gain. The dict is empty with one task.
        """
        return {task.name: task.lost for task in self._old_tasks()}

    @property
    def forgetting(self) -> float | None:
        """Mean of `forgetting_by_task`; None with one task."""
        return mean_of_all(self.forgetting_by_task.values())

    @property
    def relative_forgetting(self) -> float | None:
        """Mean over the old tasks of Forgetting_i as a share of the task's own range, best_i − base_i.

        It compares tasks with different metrics. None with one task, or if a task's best version is not above the base.
        """
        return mean_of_all(
            task.lost / (task.best - task.base) if task.best > task.base else None for task in self._old_tasks()
        )

    @property
    def backward_transfer(self) -> float | None:
        """BWT = mean_{i<T}(R[T][i] − R[i][i]); None with one task.

        R[i][i] is of the first version trained on task i, or the first one measured on the task's present test rows.
        """
        return mean_of_all(task.gained for task in self._old_tasks())

    @property
    def forward_transfer(self) -> float | None:
        """FWT = mean_{i>1}(R[i−1][i] − base_i): how much earlier tasks improve a task before its own training.

        None with one task, or if the parent or the base was not evaluated on a task before its training. Tasks whose
        test rows were replaced do not count.
        """
        gains: list[float | None] = []
        for column, first in enumerate(self.first_versions()):
            if first > 0 and self.tasks[column] not in (*self.slices, *self.measured_from):
                before, untouched = self.rows[first - 1][column], self.base[column]
                gains.append(None if before is None or untouched is None else before - untouched)
        return mean_of_all(gains)

    def first_versions(self) -> list[int]:
        """Return the number of the first version that was trained on each column's task."""
        return [self.trained.index(self.slices.get(task, task)) for task in self.tasks]

    def _old_tasks(self) -> list[_OldTask]:
        """The tasks learned before the last version; empty with a single task."""
        if len(self.tasks) - len(self.slices) < 2:
            return []
        old_tasks = []
        for column, (name, learned) in enumerate(zip(self.tasks, self.first_versions(), strict=True)):
            first = max(learned, self.measured_from.get(name, 0))
            if first < len(self.rows) - 1 and name not in self.slices:
                lost = {row: self._lost_since(row, column) for row in range(first, len(self.rows) - 1)}
                worst = max(lost, key=lost.__getitem__)
                best = self.rows[worst][column] or 0.0
                old_tasks.append(_OldTask(name, self.base[column] or 0.0, best, lost[worst], -lost[first]))
        return old_tasks

    def _lost_since(self, row: int, column: int) -> float:
        """What the last version has lost against the version of a row, on the test rows that both answered."""
        last = self.rows[-1][column]
        if fewer := self.on_fewer.get(self.tasks[column]):
            last = {cell.num_rows: cell.share for cell in fewer}.get(self.num_rows[row + 1][column], last)
        return (self.rows[row][column] or 0.0) - (last or 0.0)


class _OldTask(NamedTuple):
    """A task that was learned before the last version."""

    name: str
    base: float
    best: float
    """Accuracy of the version against which the last one has lost most."""
    lost: float
    """What it has lost."""
    gained: float
    """What the last version has gained since the first one that was trained or measured on the task."""


StoredMatrix = Annotated[
    AccuracyMatrix,
    BeforeValidator(lambda values: values if isinstance(values, AccuracyMatrix) else AccuracyMatrix.from_json(values)),
    PlainSerializer(AccuracyMatrix.to_json),
]
"""A matrix as a field of something else that is kept as JSON: its own schema version stands inside."""
MatrixJson = Annotated[dict[str, Any], JsonOf(AccuracyMatrix)]
"""A matrix as plain values, as `to_json` gives it."""


def mean_of_all(values: Iterable[float | None]) -> float | None:
    """Mean, or None if there is no value or a value is unknown: a mean of the rest would be another figure."""
    values = list(values)
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
