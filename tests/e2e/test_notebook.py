"""The notebook of the docs runs in a kernel, whose event loop is running. Its stored output names no machine."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import nbformat
import pytest

from docs.site.run_notebook import NOTEBOOK, run
from tests.adapting import PASS

pytestmark = pytest.mark.e2e


def test_the_stored_output_is_whole_and_names_no_machine() -> None:
    text = NOTEBOOK.read_text()
    cells = [cell for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run in order, by make notebook"
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds == {"stream", "execute_result", "display_data"}, "no error, nothing on stderr, and one picture"
    for output in (output for cell in cells for output in cell.outputs):
        output.get("data", {}).pop("image/png", None)  # its bytes as text hold all kinds of words
    assert not [cell for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    told = [re.sub(r"https?://\S+|\.\./examples\S*", "", str(cell)) for cell in cells]
    assert not [each for each in told if re.search(r"(?<![\w.])/\w+/\w|127\.0\.0\.1|20\d\d-\d\d", each)]
    assert not [each for each in told if re.search(rf"\b{re.escape(socket.gethostname())}\b", each)]
    assert os.path.expanduser("~") not in text


@pytest.mark.nightly
def test_every_cell_runs(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny base, which learns nothing in two steps, so every version passes."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    quick = {"train": {"max_steps": 2, "max_prompt_tokens": 192}, "gate": PASS}
    for cell in notebook.cells:
        cell.source = cell.source.replace('"smollm2-135m-instruct"', repr(str(tiny_base)))
        cell.source = cell.source.replace("lineage.adapt(", f"lineage.adapt(settings={quick}, data=")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    run(notebook)
    (last,) = [cell for cell in notebook.cells if "lineage.rollback()" in cell.source]
    version, after = re.findall(r"^(\d+) .*\((.*)\)$", last.outputs[-1].data["text/plain"], re.MULTILINE)
    assert "champion" in version[1] and "champion" not in after[1], "the version before the second is back"
