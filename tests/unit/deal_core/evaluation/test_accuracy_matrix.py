"""Metrics against values worked out by hand from the definitions."""

from __future__ import annotations

import dataclasses

import pytest

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.interval import CellScore

THREE = AccuracyMatrix(
    tasks=("a", "b", "c"),
    trained=("a", "b", "c"),
    rows=((0.8, 0.3, None), (0.9, 0.7, 0.4), (0.6, 0.8, 0.5)),
    base=(0.1, 0.2, 0.25),
)


def test_metrics_of_three_tasks_follow_the_definitions() -> None:
    assert THREE.average_accuracy == pytest.approx((0.6 + 0.8 + 0.5) / 3)
    # a's best before the end is its second version, not the one that learned it; b gained, which counts as less than 0
    assert THREE.forgetting_by_task == pytest.approx({"a": 0.9 - 0.6, "b": 0.7 - 0.8})
    assert THREE.forgetting == pytest.approx((0.3 - 0.1) / 2)
    assert THREE.backward_transfer == pytest.approx(((0.6 - 0.8) + (0.8 - 0.7)) / 2)
    assert THREE.forward_transfer == pytest.approx(((0.3 - 0.2) + (0.4 - 0.25)) / 2)


def test_accuracy_before_a_task_was_learned_does_not_count_as_forgotten() -> None:
    lucky = AccuracyMatrix(
        tasks=("a", "b", "c"),
        trained=("a", "b", "c"),
        base=(0.0, 0.0, 0.0),
        rows=((0.5, 0.9, None), (0.5, 0.6, 0.0), (0.5, 0.6, 0.5)),
    )
    assert lucky.forgetting_by_task == {"a": 0.0, "b": 0.0}


def test_with_one_task_transfer_and_forgetting_are_undefined() -> None:
    one = AccuracyMatrix().with_row("a", {"a": 0.5}, base_accuracy=0.1, parent_accuracy=None)
    again = one.with_row("a", {"a": 0.4}, base_accuracy=None, parent_accuracy=None)
    for matrix in (one, again):
        assert (matrix.forgetting, matrix.backward_transfer, matrix.forward_transfer) == (None, None, None)
        assert matrix.forgetting_by_task == {}
    assert again.average_accuracy == 0.4
    assert AccuracyMatrix().average_accuracy is None


def test_with_row_places_base_and_parent_of_a_new_task() -> None:
    matrix = AccuracyMatrix().with_row("a", {"a": 0.8}, base_accuracy=0.1, parent_accuracy=None)
    matrix = matrix.with_row("b", {"b": 0.7, "a": 0.9}, base_accuracy=0.2, parent_accuracy=0.3)
    matrix = matrix.with_row("c", {"a": 0.6, "b": 0.8, "c": 0.5}, base_accuracy=0.25, parent_accuracy=0.4)
    assert matrix == THREE


def test_each_cell_has_its_number_of_test_rows() -> None:
    matrix = AccuracyMatrix().with_row("a", {"a": 0.8}, base_accuracy=0.1, parent_accuracy=None, num_rows={"a": 20})
    matrix = matrix.with_row(
        "b", {"a": 0.9, "b": 0.7}, base_accuracy=0.2, parent_accuracy=0.3, num_rows={"a": 12, "b": 30}
    )
    assert matrix.cells == (((0.1, 20), (0.2, 30)), ((0.8, 20), (0.3, 30)), ((0.9, 12), (0.7, 30)))
    renewed = matrix.with_slice("b", "b.old-1").remeasured("b", base_accuracy=0.1, last_accuracy=0.4, num_rows=50)
    assert [row[1:] for row in renewed.cells] == [
        ((0.1, 50), (0.2, 30)),
        ((0.3, 30), (0.3, 30)),
        ((0.4, 50), (0.7, 30)),
    ]
    third = renewed.with_consolidation({"a": 0.9, "b": 0.5}, {"a": 20, "b": 50})
    assert third.cells[-1] == ((0.9, 20), (0.5, 50), (None, None))
    assert AccuracyMatrix.from_json(third.to_json()) == third
    assert THREE.cells[1] == ((0.8, None), (0.3, None), (None, None)), "of a benchmark they are not known"


def test_what_was_forgotten_is_told_by_the_rows_that_both_versions_answered() -> None:
    """Of the ten rows of the first version six are right in the end, as before; the twenty later rows are harder."""
    matrix = AccuracyMatrix().with_row("a", {"a": 0.6}, base_accuracy=0.1, parent_accuracy=None, num_rows={"a": 10})
    matrix = matrix.with_row("a", {"a": 0.7}, base_accuracy=None, parent_accuracy=None, num_rows={"a": 10})
    grown = matrix.with_row(
        "b",
        {"a": 0.3, "b": 1.0},
        base_accuracy=0.0,
        parent_accuracy=0.0,
        num_rows={"a": 30, "b": 9},
        on_fewer={"a": (CellScore(0.6, 10),)},
    )
    assert [row[0] for row in grown.cells] == [(0.1, 10), (0.6, 10), (0.7, 10), (0.3, 30)]
    assert grown.forgetting == pytest.approx(0.1) and grown.backward_transfer == 0.0
    assert grown.relative_forgetting == pytest.approx(0.1 / 0.6)
    assert grown.average_accuracy == pytest.approx(0.65), "of all rows of today"
    assert AccuracyMatrix.from_json(grown.to_json()) == grown
    later = grown.with_row(
        "b", {"a": 0.2, "b": 1.0}, base_accuracy=None, parent_accuracy=None, num_rows={"a": 30, "b": 9}
    )
    assert later.on_fewer == {}, "they are of the last version alone"
    assert later.learned_best()["a"] == 1
    on_ten = grown.with_row(
        "b",
        {"a": 0.2, "b": 1.0},
        base_accuracy=None,
        parent_accuracy=None,
        num_rows={"a": 30, "b": 9},
        on_fewer={"a": (CellScore(0.6, 10),)},
    )
    assert on_ten.forgetting_by_task["a"] == pytest.approx(0.1), "as much was lost on the thirty rows as on the ten"


def test_a_task_that_arrives_again_keeps_its_column_and_its_first_accuracy() -> None:
    matrix = THREE.with_row("a", {"a": 0.95, "b": 0.4, "c": 0.5}, base_accuracy=None, parent_accuracy=None)
    assert matrix.tasks == ("a", "b", "c") and matrix.trained[-1] == "a" and matrix.base == THREE.base
    # R[a][a] stays the 0.8 of the first version trained on it, and c is an old task now
    assert matrix.backward_transfer == pytest.approx(((0.95 - 0.8) + (0.4 - 0.7) + (0.5 - 0.5)) / 3)
    assert matrix.forgetting_by_task == pytest.approx({"a": 0.9 - 0.95, "b": 0.8 - 0.4, "c": 0.0})
    assert matrix.forward_transfer == THREE.forward_transfer


def test_forward_transfer_is_undefined_when_a_parent_or_base_is_unknown() -> None:
    start = AccuracyMatrix().with_row("a", {"a": 0.8}, base_accuracy=0.1, parent_accuracy=None)
    for base, parent in ((None, 0.3), (0.2, None)):
        matrix = start.with_row("b", {"a": 0.8, "b": 0.7}, base_accuracy=base, parent_accuracy=parent)
        assert matrix.forward_transfer is None and matrix.forgetting == 0.0
        more = matrix.with_row("c", {"a": 0.8, "b": 0.7, "c": 0.6}, base_accuracy=0.1, parent_accuracy=0.2)
        assert more.forward_transfer is None  # the mean of the one known gain would be another figure


def test_a_version_between_that_was_not_scored_is_passed_over() -> None:
    matrix = AccuracyMatrix(
        tasks=THREE.tasks,
        trained=THREE.trained,
        base=THREE.base,
        rows=((0.8, 0.3, None), (None, 0.7, 0.4), (0.6, 0.8, 0.5)),
    )
    assert matrix.forgetting_by_task == pytest.approx({"a": 0.2, "b": -0.1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("b", "a", "c")}, "order of first arrival"),
        ({"base": (0.1,)}, "one base accuracy per task"),
        ({"rows": ((0.8, 0.3, None), (0.9, 0.7, 0.4))}, "one row per version"),
        ({"rows": ((0.8, 0.3, None), (0.9, 0.7, 0.4), (0.6, 0.8, 50.0))}, "shares from 0 to 1"),
        ({"rows": ((None, 0.3, None), (0.9, 0.7, 0.4), (0.6, 0.8, 0.5))}, "lacks an accuracy of 'a'"),
        ({"rows": ((0.8, 0.3, None), (0.9, 0.7, 0.4), (0.6, None, 0.5))}, "lacks an accuracy of 'b'"),
    ],
)
def test_a_matrix_that_contradicts_itself_is_refused(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {"tasks": THREE.tasks, "trained": THREE.trained, "rows": THREE.rows, "base": THREE.base}
    with pytest.raises(ValueError, match=message):
        AccuracyMatrix(**{**fields, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("accuracies", [{"a": 0.5}, {"a": 0.5, "b": 0.5, "c": 0.5, "x": 0.5}])
def test_with_row_wants_every_task_and_no_other(accuracies: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="The new version has accuracies of"):
        THREE.with_row("a", accuracies, base_accuracy=None, parent_accuracy=None)


def test_figures_of_replaced_test_rows_are_not_compared_with_the_present_ones() -> None:
    """The task stays as good as it was, on harder rows; nothing is forgotten."""
    matrix = AccuracyMatrix().with_row("bank", {"bank": 0.95}, base_accuracy=0.1, parent_accuracy=None)
    matrix = matrix.with_row("clinic", {"bank": 0.95, "clinic": 0.8}, base_accuracy=0.1, parent_accuracy=0.2)
    renewed = matrix.with_slice("bank", "bank.old-1").remeasured("bank", base_accuracy=0.1, last_accuracy=0.7)
    found = renewed.with_row(
        "clinic", {"bank": 0.65, "bank.old-1": 0.95, "clinic": 0.8}, base_accuracy=None, parent_accuracy=None
    )
    assert found.forgetting_by_task["bank"] == pytest.approx(0.05), "since the rows were replaced"
    assert found.backward_transfer == pytest.approx((-0.05 + 0) / 2)
    assert found.forward_transfer == pytest.approx(0.1), "of clinic"
    assert AccuracyMatrix.from_json(found.to_json()) == found


def test_a_debt_counts_from_the_best_version_that_learned_the_task_alone() -> None:
    again = AccuracyMatrix(
        tasks=("a", "b"),
        trained=("a", "b", "a", "b", "b"),
        rows=((0.6, None), (0.9, 0.5), (0.8, 0.5), (0.7, 0.4), (0.7, 0.5)),
        base=(0.1, 0.1),
    )
    assert again.learned_best() == {"a": 2, "b": 1}, "0.9 was not reached by learning a, and the last does not count"
    renewed = dataclasses.replace(again, measured_from={"a": 3})
    assert renewed.learned_best() == {"b": 1}, "no version has learned a on its present test rows"


def test_a_consolidation_is_marked_and_forgives_no_debt() -> None:
    matrix = THREE.with_consolidation({"a": 0.9, "b": 0.9, "c": 0.9})
    assert (matrix.trained[-1], matrix.learned[-1], matrix.consolidated) == ("c", "(consolidation)", (3,))
    assert AccuracyMatrix.from_json(matrix.to_json()) == matrix
    after = matrix.with_row("d", dict.fromkeys("abcd", 0.5), base_accuracy=0.1, parent_accuracy=0.2)
    assert after.consolidated == (3,) and after.learned_best() == {"a": 0, "b": 1, "c": 2}
