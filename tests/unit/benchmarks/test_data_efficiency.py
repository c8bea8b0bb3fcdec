"""Options of data-efficient training, each against random rows and all rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.continual.cell import revision_of, settings_read
from benchmarks.data_efficiency import ALL, RANDOM, main, tables
from deal_core.method_config import MethodConfig, SelectionConfig

ROOT = Path(__file__).parents[3]
MEASURED: dict[str, Any] = {
    "rows": 100,
    "max_prompt_tokens": 160,
    "options": {"no option": {"before": 0.0, "step": 2.0}, "selection.score: loss": {"before": 5.0, "step": 9.0}},
}


def cell(bits: str, *, method: MethodConfig | None = None, seed: int = 0, **train: Any) -> dict[str, Any]:
    settings = {
        "strategy": "deal",
        "tasks": ["yahoo", "agnews"],
        "seed": seed,
        "rows": 300,
        "scored": "last",
        "method": json.loads(json.dumps(settings_read("deal", method or MethodConfig()))),
        "train": {"max_prompt_tokens": 160, "max_steps": None, **train},
        "revision": revision_of("deal"),
    }
    scores = {"yahoo": {"correct": bits[:4]}, "agnews": {"correct": bits[4:]}}
    versions = [{"scores": {}, "num_steps": 10}, {"scores": scores, "num_steps": 10}]
    return {"settings": settings, "versions": versions, "perplexity": {"base": 30.0, "adapted": 33.0}}


def keeping(**settings: Any) -> MethodConfig:
    return MethodConfig(selection=SelectionConfig(keep=75, **settings))


def test_an_option_is_compared_with_random_rows_and_with_all_rows():
    (table,) = tables(
        [
            cell("11110000", method=keeping(score="loss")),
            cell("11000000", method=keeping()),
            cell("11110011", max_steps=30),
        ],
        MEASURED,
    )
    lines = {line["option"]: line for line in table["lines"]}
    assert list(lines) == [ALL, "selection.score: loss", RANDOM], "best first"
    chosen = lines["selection.score: loss"]
    assert (chosen["accuracy"], chosen["rows"], chosen["steps"], chosen["perplexity"]) == (50, 75, 20, 1.1)
    assert {name: found[0] for name, found in chosen["against"].items()} == {RANDOM: 25, ALL: -25}
    assert set(lines[RANDOM]["against"]) == {ALL} and lines[ALL]["rows"] == 300
    assert (lines[ALL]["seconds"], chosen["seconds"]) == (20, 35), "ten steps; 300 rows are read before"


def test_the_page_is_the_one_that_the_stored_results_give(tmp_path: Path):
    results = ROOT / "benchmarks" / "results"
    main(cells=results / "development", noisy=results / "noisy", page=tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (ROOT / "benchmarks" / "data_efficiency.md").read_text()
