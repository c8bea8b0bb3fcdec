"""A figure as SVG inside the page: it loads nothing, runs nothing, and takes the page's light or dark colours."""

from __future__ import annotations

import html
import io
import re

from matplotlib import rc_context
from matplotlib.figure import Figure

from infra.report.figures import COLOURS, MUTED

PAGE_COLOURS = {
    COLOURS[0]: "var(--accent)", COLOURS[1]: "var(--second)", COLOURS[-1]: "var(--text)", "#333333": "var(--text)",
    MUTED: "var(--muted)", "#DDDDDD": "var(--line)", "#EFEFEF": "var(--line)",
}  # fmt: skip
"""What stands for a figure's colour on the page: `page.css` has one value for light and one for dark screens."""
_COLOUR = re.compile("|".join(PAGE_COLOURS), re.IGNORECASE)
_BY_LOWER_CASE = {colour.lower(): variable for colour, variable in PAGE_COLOURS.items()}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """Draw a figure as an SVG element. The same figure gives the same text.

    Args:
        figure: its text stays text, so that people can search and copy it.
        name: other than that of every other figure on the page; the ids within the element depend on it.
        title: what a screen reader says instead of the drawing.
    """
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=_NO_METADATA)
    text = drawn.getvalue()
    (box,) = re.findall(r'viewBox="([^"]*)"', text)
    content = text[text.index(">", text.index("<svg")) + 1 :]  # the page is HTML: it needs no namespaces
    content = re.sub(r"<!--.*?-->|<style.*?</style>", "", content, flags=re.DOTALL)  # a style would hold for the page
    content = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), content)
    content = re.sub(r'<g id="[^"]*">', "<g>", content).replace("xlink:href", "href")
    content = _COLOUR.sub(lambda found: _BY_LOWER_CASE[found[0].lower()], content)
    content = re.sub(r"\s*\n\s*", "\n", content).strip()
    said = html.escape(title)
    return f'<svg viewBox="{box}" role="img" aria-label="{said}">\n<title>{said}</title>\n{content}'
