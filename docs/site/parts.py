"""Draw docs/img/parts.svg: the parts of the pipeline, with the words of the README's glossary on them.

python -m docs.site.parts    # writes docs/img/parts.svg

The picture has a white ground of its own, so it can be read on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "img" / "parts.svg"
WIDTH, HEIGHT = 960, 440
INK, GREY, LINE, PALE = "#1b2129", "#59636e", "#d9dde3", "#f6f7f9"
GREEN, PALE_GREEN, RED = "#17703a", "#e5f4ea", "#b3261e"
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" \
role="img" font-family="{FONT}" text-anchor="middle">
  <title>The parts: inbox, Prefect flow, store, MLflow and serving</title>
  <desc>A file that lands in the inbox is an arrival. A Prefect flow ingests it, trains on it, evaluates the new \
version on the test rows of all tasks, and lets the gate decide. The store keeps the lineage's versions. An accepted \
version becomes champion, from which the next training starts. MLflow is a mirror. deal serve or vLLM answers with the \
champion.</desc>
  <defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">\
<path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>
  <rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>"""
STAGES = (
    ("ingest", "bad rows are", "set aside"),
    ("train", "the new rows, and", "rehearsal of old tasks"),
    ("evaluate", "the test rows", "of every task"),
    ("gate", "new task learned?", "old tasks kept?"),
)
STAGE_WIDTH, STAGE_LEFT, STAGE_STEP = 166, 206, 184


def box(x: int, y: int, width: int, height: int, fill: str = PALE, line: str = LINE) -> str:
    """A rounded rectangle; x and y are its upper left corner."""
    look = f'rx="8" fill="{fill}" stroke="{line}" stroke-width="1.5"'
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {look}/>'


def text(x: int, y: int, words: str, *, bold: bool = False, color: str = GREY, anchor: str = "middle") -> str:
    """A line of text around, or from, x."""
    look = 'font-size="16" font-weight="600"' if bold else 'font-size="13.5"'
    return f'<text x="{x}" y="{y}" {look} fill="{INK if bold else color}" text-anchor="{anchor}">{words}</text>'


def arrow(path: str, *, is_dashed: bool = False) -> str:
    """A line with a head at its end."""
    dashes = ' stroke-dasharray="5 4"' if is_dashed else ""
    return f'<path d="{path}" stroke="{GREY}" stroke-width="1.8" fill="none" marker-end="url(#end)"{dashes}/>'


def version(x: int, y: int, number: int, fill: str, line: str) -> str:
    """A version of the lineage, as a circle with its number."""
    return (
        f'<circle cx="{x}" cy="{y}" r="20" fill="{fill}" stroke="{line}" stroke-width="2"/>'
        f'<text x="{x}" y="{y + 6}" font-size="16" font-weight="600" fill="{INK}">{number}</text>'
    )


def inbox() -> Sequence[str]:
    """Where files land."""
    return (
        box(20, 66, 130, 96),
        text(85, 96, "inbox", bold=True),
        text(85, 118, "rows of a task:"),
        text(85, 138, "an arrival"),
        arrow("M150 114 H186"),
    )


def flow() -> Sequence[str]:
    """The stages of one run."""
    drawn = [box(188, 20, 752, 160, "#ffffff"), text(564, 44, "Prefect flow: one run for each arrival", bold=True)]
    for number, (name, first, second) in enumerate(STAGES):
        left = STAGE_LEFT + number * STAGE_STEP
        middle = left + STAGE_WIDTH // 2
        drawn += [box(left, 66, STAGE_WIDTH, 96), text(middle, 96, name, bold=True)]
        drawn += [text(middle, 118, first), text(middle, 138, second)]
        if number:
            drawn.append(arrow(f"M{left - STAGE_STEP + STAGE_WIDTH} 114 H{left - 2}"))
    return drawn


def store() -> Sequence[str]:
    """The lineage's versions, of which one is champion."""
    return (
        box(188, 262, 480, 158, "#ffffff"),
        text(204, 286, "store: a folder, or S3", bold=True, anchor="start"),
        text(204, 411, "lineage: a chain of versions of one adapter", anchor="start"),
        version(250, 340, 1, PALE, GREY),
        arrow("M272 340 H318"),
        version(340, 340, 2, PALE, GREY),
        arrow("M361 333 L446 310"),
        version(468, 306, 4, PALE_GREEN, GREEN),
        text(498, 311, "champion", color=GREEN, anchor="start"),
        arrow("M361 347 L446 363", is_dashed=True),
        version(468, 368, 3, "#ffffff", RED),
        text(498, 373, "rejected: never serves", color=RED, anchor="start"),
        arrow("M473 284 V164"),
        text(463, 220, "the champion is the", anchor="end"),
        text(463, 238, "next version's parent", anchor="end"),
        arrow("M841 162 V222 H620 V260"),
        text(730, 214, "a new version, registered"),
    )


def around() -> Sequence[str]:
    """What shows and what serves versions."""
    return (
        box(20, 292, 130, 96),
        text(85, 322, "MLflow", bold=True),
        text(85, 344, "a mirror of runs"),
        text(85, 364, "and versions"),
        arrow("M188 340 H152", is_dashed=True),
        box(760, 292, 180, 96, PALE_GREEN, GREEN),
        text(850, 322, "deal serve, vLLM", bold=True),
        text(850, 344, "answer people and"),
        text(850, 364, "programs"),
        arrow("M574 306 H758"),
    )


def picture() -> str:
    """Return the whole picture as SVG."""
    parts = (*inbox(), *flow(), *store(), *around())
    return "\n".join([HEAD, *(f"  {part}" for part in parts), "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
