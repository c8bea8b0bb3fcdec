"""Figures inside a page: alike each time, apart from each other, with text, in the page's own colours."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

import infra.report
from infra.report.figures import accuracy_over_versions, fill_bars, loss_curve
from infra.report.inline_svg import PAGE_COLOURS, inline_svg
from tests.report_sample import TASKS, sample_evaluation, sample_report

PLAIN = {"svg", "title", "defs", "g", "path", "use", "text", "clipPath", "rect"}
CSS = Path(infra.report.__file__).parent / "templates" / "page.css"


def figures() -> dict[str, Figure]:
    training = sample_report().training
    return {
        "tasks": accuracy_over_versions(sample_evaluation().matrix), "loss": loss_curve(training.losses),
        "fill": fill_bars(training.fill),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tasks", "loss", "fill"])
def test_a_figure_gives_the_same_text_each_time(name: str) -> None:
    assert inline_svg(figures()[name], name, "A title") == inline_svg(figures()[name], name, "A title")


def test_ids_are_unique_on_a_page_and_every_reference_finds_its_own() -> None:
    same = [inline_svg(loss_curve([(1, 2.0), (2, 1.0)]), name, "Loss") for name in ("first", "second")]
    ids = [re.findall(r' id="([^"]*)"', drawn) for drawn in same]
    assert ids[0] and len(set(ids[0] + ids[1])) == len(ids[0] + ids[1])
    for drawn, own in zip(same, ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', drawn)) <= set(own)


def test_an_element_loads_nothing_styles_nothing_else_and_says_what_it_shows() -> None:
    for name, figure in figures().items():
        root = ElementTree.fromstring(inline_svg(figure, name, 'Before & after "it" <b>'))
        assert root.attrib["role"] == "img" and root.attrib["aria-label"] == root.findtext("title")
        assert root.findtext("title") == 'Before & after "it" <b>'
        assert {each.tag for each in root.iter()} <= PLAIN
        assert all(each.attrib.get("href", "#").startswith("#") for each in root.iter())


def test_text_stays_text() -> None:
    root = ElementTree.fromstring(inline_svg(accuracy_over_versions(sample_evaluation().matrix), "tasks", "t"))
    texts = ["".join(each.itertext()).replace("\xa0", " ") for each in root.iter("text")]
    assert [text.split() for text in texts if "." in text and text[0].isdigit()] == [
        ["75.0", "bank"], ["85.0", "clinic"], ["25.0", TASKS[2]],
    ]  # fmt: skip


def test_colours_that_would_vanish_on_a_dark_screen_are_the_pages_own() -> None:
    css = CSS.read_text(encoding="utf-8")
    for name, figure in figures().items():
        drawn = inline_svg(figure, name, "t").lower()
        assert not [colour for colour in PAGE_COLOURS if colour.lower() in drawn]
        assert "#ffffff" not in drawn and "fill: #000" not in drawn, "the page shows through"
        for variable in re.findall(r"var\((--\w+)\)", drawn):
            assert css.count(f"{variable}:") == 2, "one value for light, one for dark"
