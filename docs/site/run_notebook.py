"""Run the notebook quickstart.ipynb in an empty home, and store what its cells show.

make notebook
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "quickstart.ipynb"
SECONDS = 1800
"""Longest time of one cell."""


def run(notebook: nbformat.NotebookNode) -> None:
    """Run the cells of a notebook in this folder, with a home that is removed afterwards. Their outputs are replaced.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell has failed.
    """
    with tempfile.TemporaryDirectory() as home:
        place = {"metadata": {"path": str(NOTEBOOK.parent)}}
        client = NotebookClient(notebook, timeout=SECONDS, resources=place, record_timing=False)
        client.execute(env={**os.environ, "DEAL_HOME": home})
    for cell in notebook.cells:
        cell.metadata.clear()


if __name__ == "__main__":
    stored = nbformat.read(NOTEBOOK, as_version=4)
    run(stored)
    nbformat.write(stored, NOTEBOOK)
