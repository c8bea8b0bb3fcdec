"""The contents of the figures, read from the figures."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from infra.report.figures import (
    COLOURS,
    accuracy_over_versions,
    loss_curve,
    result_figure,
    save_png,
)


def make_matrix(*tasks: str) -> AccuracyMatrix:
    """Every version scores 80 on its own task and 5 less on each older one; base 10, parent 20."""
    matrix, accuracies = AccuracyMatrix(), dict[str, float]()
    for task in tasks:
        accuracies = {name: value - 0.05 for name, value in accuracies.items()} | {task: 0.8}
        parent = 0.2 if matrix.rows else None
        matrix = matrix.with_row(task, accuracies, base_accuracy=0.1, parent_accuracy=parent)
    return matrix


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def pixels(figure: Figure, folder: Path) -> numpy.ndarray:
    save_png(figure, folder / "figure.png")
    return imread(folder / "figure.png")


def test_the_heat_map_shows_every_known_cell_and_hatches_the_others() -> None:
    axes = result_figure(make_matrix("bank", "clinic", "parcels")).axes[0]
    *cells, said = texts(axes)
    assert cells == ["10.0"] * 3 + ["80.0", "20.0", "75.0", "80.0", "20.0", "70.0", "75.0", "80.0"]
    hatched = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    assert [patch.get_xy() for patch in hatched] == [(2, 1)]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["bank", "clinic", "parcels"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "base model",
        "1  after bank",
        "2  after clinic",
        "3  after parcels",
    ]
    assert "average 75.0" in said and "forgetting 7.5" in said


def test_below_each_score_of_few_rows_stands_its_interval() -> None:
    matrix = AccuracyMatrix().with_row("t", {"t": 0.85}, base_accuracy=0.25, parent_accuracy=None, num_rows={"t": 20})
    assert texts(result_figure(matrix).axes[0])[:4] == ["25.0", "11–47, n 20", "85.0", "64–95, n 20"]
    assert texts(accuracy_over_versions(matrix).axes[0]) == ["85.0, 64–95, n 20  t"]


def test_lines_start_where_a_task_was_first_learned() -> None:
    axes = accuracy_over_versions(make_matrix("bank", "clinic", "bank", "parcels")).axes[0]
    lines = [line for line in axes.lines if line.get_transform() == axes.transData]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3, 4], [2, 3, 4], [4]]
    assert list(lines[0].get_ydata()) == pytest.approx([80, 75, 80, 75])
    assert texts(axes) == ["75.0  bank", "70.0  clinic", "80.0  parcels"]


@pytest.mark.parametrize("num_versions", [1, 2, 9, 40])
def test_steps_have_the_names_of_their_versions(num_versions: int) -> None:
    names = [str(10 + number) for number in range(num_versions)]
    axes = accuracy_over_versions(make_matrix(*["bank"] * num_versions), names).axes[0]
    named = dict(zip(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()], strict=True))
    assert 1 <= len(named) <= 13 and {step: names[int(step) - 1] for step in named} == named


def test_the_loss_curve_shows_every_finite_point_and_smooths_long_ones() -> None:
    short = loss_curve([(10, 2.0), (20, float("nan")), (30, 1.0)]).axes[0]
    assert [list(line.get_xdata()) for line in short.lines] == [[10, 30]]
    steps = range(300)
    raw, smooth = loss_curve([(step, float(step % 2)) for step in steps]).axes[0].lines
    assert len(raw.get_xdata()) == 300
    assert list(smooth.get_xdata()) == list(range(10, 290))
    assert numpy.ptp(smooth.get_ydata()) < 0.06


def test_the_loss_of_held_back_rows_is_a_line_of_its_own_with_the_step_that_is_kept() -> None:
    axes = loss_curve([(1, 2.0), (2, 1.0), (3, 0.5)], [(1, 2.5), (3, 3.0)], kept_step=1).axes[0]
    training, held_back, kept = axes.lines
    assert list(held_back.get_ydata()) == [2.5, 3.0] and list(training.get_ydata()) == [2.0, 1.0, 0.5]
    assert list(kept.get_xdata()) == [1, 1] and axes.get_ylim()[1] > 3.0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["held-back rows", "kept: step 1"]


def test_the_result_is_a_matrix_and_what_is_left_of_each_task() -> None:
    figure = result_figure(make_matrix("bank", "clinic"), name="mine")
    assert [axes.get_title(loc="left").strip() for axes in figure.axes] == ["mine", "at the end, all tasks"]
    bars = figure.axes[-1]
    assert [container.get_label() for container in bars.containers] == ["base model", "mine"]
    assert [bar.get_height() for bar in bars.containers[1]] == pytest.approx([75, 80])
    assert figure.get_suptitle() == "Mean accuracy after 2 arrivals: mine 77.5 %"


def test_a_rival_has_the_right_half_and_the_title_says_the_finding() -> None:
    rival = AccuracyMatrix()
    for task, accuracies in (("bank", {"bank": 0.8}), ("clinic", {"bank": 0.0, "clinic": 0.0})):
        rival = rival.with_row(task, accuracies, base_accuracy=0.1, parent_accuracy=0.2 if rival.rows else None)
    figure = result_figure(make_matrix("bank", "clinic"), rival, rival_name="plain LoRA")
    left, right = figure.axes
    assert [axes.get_title(loc="left").strip() for axes in (left, right)] == ["deal", "plain LoRA"]
    assert texts(left)[-3:-1] == ["75.0", "80.0"] and texts(right)[-3:-1] == ["0.0", "0.0"]
    assert figure.get_suptitle() == "Mean accuracy after 2 arrivals: deal 77.5 %, plain LoRA 0.0 %"


@pytest.mark.parametrize(
    "figure",
    [
        accuracy_over_versions(AccuracyMatrix()),
        loss_curve([]),
        loss_curve([(1, float("inf"))]),
        loss_curve([(5, 0.0)]),
        result_figure(make_matrix(*(f"a-rather-long-task-name-{number}" for number in range(12)))),
        accuracy_over_versions(make_matrix("one")),
    ],
    ids=lambda _: "",
)
def test_unusual_input_gives_a_picture_with_something_on_it(figure: Figure, tmp_path: Path) -> None:
    picture = pixels(figure, tmp_path)
    assert picture[..., :3].min() < 0.5
    border = numpy.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert border[:, :3].min() > 0.9, "a part is cut off at the border"


def test_the_colours_are_told_apart_without_red_or_green() -> None:
    """All line colours differ with simulated deuteranopia (Machado et al., 2009)."""
    simulate = numpy.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    seen = [simulate @ [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)] for colour in COLOURS]
    distances = [numpy.linalg.norm(one - other) for index, one in enumerate(seen) for other in seen[:index]]
    assert min(distances) > 0.15
