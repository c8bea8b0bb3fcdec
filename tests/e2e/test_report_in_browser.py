"""A run's page in a real browser: readable on a desk and on a phone, in light and dark, with nothing loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from infra.report.page import render_page
from tests.report_sample import sample_evaluation, sample_report, sample_versions

CHROMIUM = shutil.which("chromium")
HEIGHT = 844

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(sample_versions(), sample_report(), sample_evaluation()), encoding="utf-8")
    return path


def open_page(browser: Browser, file: Path, width: int, scheme: str) -> tuple[Page, list[str], list[str]]:
    """The page, with every detail opened; what its console said, and what it asked for."""
    page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)  # type: ignore[arg-type]
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.locator("summary").evaluate_all("all => all.forEach(one => one.click())")
    return page, said, asked


@pytest.mark.parametrize("width", [360, 390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_screen_and_says_the_verdict_first(
    browser: Browser, file: Path, width: int, scheme: str
) -> None:
    page, said, asked = open_page(browser, file, width, scheme)
    assert said == [], "the console is silent"
    assert asked == [file.as_uri()], "nothing else is loaded"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "no scrolling sideways"
    assert page.locator("details[open]").count() == page.locator("details").count() == 4
    for element in ("#verdict", ".verdict li >> nth=-1", ".scores dd >> nth=0"):
        box = page.locator(element).bounding_box()
        assert box is not None and box["y"] + box["height"] <= HEIGHT, f"{element} is in the first screen"
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.close()


def test_charts_have_a_size_and_text_can_be_read_on_a_phone(browser: Browser, file: Path) -> None:
    page, _, _ = open_page(browser, file, 360, "light")
    sizes = page.locator("svg").evaluate_all("all => all.map(one => [one.clientWidth, one.clientHeight])")
    assert len(sizes) == 2, "the tasks, the loss"
    assert all(width >= 200 and height >= 60 for width, height in sizes)
    assert page.locator("svg path").evaluate_all("all => all.filter(one => !one.getAttribute('d')).length") == 0
    fonts = page.evaluate(
        "[...document.querySelectorAll('body *:not(svg *)')]"
        ".filter(one => one.childNodes.length && one.textContent.trim())"
        ".map(one => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert min(fonts) >= 12
    drawn = page.locator("svg text").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
    assert min(drawn) >= 12, "as it is on the screen: a chart scrolls, it does not shrink"
    shaded = page.locator(".matrix td.s9").first.evaluate("one => getComputedStyle(one).backgroundColor")
    assert shaded == "rgb(22, 79, 132)"
    narrow = page.locator(".matrix").evaluate("one => one.parentElement.clientWidth < one.scrollWidth")
    assert narrow, "a table that is too wide scrolls within its box"
    page.close()
