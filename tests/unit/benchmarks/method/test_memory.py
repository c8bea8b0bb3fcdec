"""Chains and forks: nothing is trained twice, a fork has its chain's rows, and the figures are what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.method import memory
from benchmarks.method.memory import ORDERS, PARTS, app, figures_of, give_kept_rows, read_tasks
from benchmarks.tiny_tasks import write_tasks
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.adapter.state import load_method_state
from deal_core.base_model.load import BaseModel, load_base
from deal_core.strategies.kept_rows import rows_name, unpack

NAMES = ("colours", "sizes", "shapes")
LABELS = {"colours": ("red", "green"), "sizes": ("large", "small"), "shapes": ("round", "flat")}
Run = Callable[..., str]


@pytest.fixture
def small(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    """Three tasks of 24 training rows, two of them judged, for a tiny base model."""
    base = load_base(str(tiny_base), tmp_path / "cache")
    monkeypatch.setattr(memory, "ORDERS", {"1": NAMES})
    monkeypatch.setattr(memory, "JUDGED", NAMES[:2])
    monkeypatch.setattr(memory, "NUM_ROWS", 24)
    monkeypatch.setattr(memory, "PARTS", {"dev": ("test", 0, 6), "unused": ("train", 24, 32)})
    monkeypatch.setattr(memory, "identify_base", lambda source: None)
    monkeypatch.setattr(memory, "cached_base", lambda reference: base)
    write_tasks(tmp_path, LABELS, num_train=40, num_test=12)
    return base


@pytest.fixture
def run(small: BaseModel, tmp_path: Path) -> Run:
    """Run one of the commands; return what it printed."""

    def run(command: str, **options: Any) -> str:
        given = {"work": tmp_path / "work", "out": tmp_path / "cells", "data": tmp_path / "data", **options}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        result = CliRunner().invoke(app, [command, *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def weights(tmp_path: Path, *place: str) -> bytes:
    return tmp_path.joinpath("work", *place, WEIGHTS_FILE).read_bytes()


def test_a_second_call_trains_and_scores_only_what_is_missing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("chain", arm="replay", kept=2)
    name, home = "chain-1-102-replay-2", tmp_path / "work" / "chain-1-102-replay-2"
    cell, last = (tmp_path / "cells" / f"{name}.json").read_bytes(), weights(tmp_path, name, "2")
    (home / "2" / memory.VERSION_FILE).unlink()  # as after a stop in the last training
    (home / "2" / "scores" / "sizes-unused.json").unlink()
    learned, answered = [], []
    train, label_scores = memory.train_adapter, memory.label_scores
    monkeypatch.setattr(
        memory, "train_adapter", lambda *given, **rest: (learned.append(given[2].task.name), train(*given, **rest))[1]
    )
    monkeypatch.setattr(
        memory,
        "label_scores",
        lambda *given, **rest: (answered.append(given[2].name), label_scores(*given, **rest))[1],
    )
    run("chain", arm="replay", kept=2)
    assert (learned, answered) == (["shapes"], ["sizes"])
    assert weights(tmp_path, name, "2") == last, "the same bytes"
    again = json.loads((tmp_path / "cells" / f"{name}.json").read_text())
    first = json.loads(cell)
    for version in (*first["versions"], *again["versions"]):
        del version["seconds"], version["rows_per_second"]
        version["scores"] = {key: score["log_probs"] for key, score in version["scores"].items()}
    assert again == first


def test_a_fork_with_its_chains_settings_is_the_chains_last_version(run: Run, tmp_path: Path) -> None:
    run("chain", arm="deal", kept=2)
    chain = "chain-1-102-deal-2"
    run("fork", chain=chain, arm="deal", kept=2)
    last = weights(tmp_path, chain, "2")
    assert weights(tmp_path, "fork-1-102-deal-2-of-102-deal-2", "2") == last
    others = [("deal", 2, 103), ("deal", 4, 102), ("replay", 2, 102)]
    forks = {last: ["the chain"]}
    for arm, kept, seed in others:
        run("fork", chain=chain, arm=arm, kept=kept, seed=seed)
        name = f"fork-1-{seed}-{arm}-{kept}-of-102-deal-2"
        forks.setdefault(weights(tmp_path, name, "2"), []).append(name)
    assert [names for names in forks.values() if len(names) > 1] == []
    cell = json.loads((tmp_path / "cells" / "fork-1-103-deal-2-of-102-deal-2.json").read_text())
    assert cell["settings"]["parent"]["seed"] == 102 and cell["settings"]["seed"] == 103
    assert (figures := figures_of(cell)) is not None and figures.learned is None
    assert "fork-1-103-deal-2-of-102-deal-2" in run("score")


def test_kept_rows_that_are_given_are_those_of_the_chain_and_fewer_are_the_first_of_more(
    run: Run, small: BaseModel, tmp_path: Path
) -> None:
    run("chain", arm="replay", kept=4)
    tasks, parent = read_tasks(tmp_path / "data"), tmp_path / "work" / "chain-1-102-replay-4" / "1"
    kept = {}
    for number in (0, 2, 4, 6):
        folder = tmp_path / "given"
        give_kept_rows(small, tasks, parent, NAMES[:2], number, 102, folder)
        assert (folder / WEIGHTS_FILE).read_bytes() == (parent / WEIGHTS_FILE).read_bytes()
        kept[number] = {name: tensor.tolist() for name, tensor in load_method_state(folder).tensors.items()}
    own = {name: tensor.tolist() for name, tensor in load_method_state(parent).tensors.items()}
    assert kept[4] == own
    assert kept[0] == {}
    name = rows_name("colours")
    assert kept[6][name][: len(kept[2][name])] == kept[2][name]
    assert len(unpack(load_method_state(folder).tensors[name])) == 6


def test_figures_are_over_the_judged_tasks_and_the_parts_that_are_asked_for(run: Run, tmp_path: Path) -> None:
    run("chain", arm="replay", kept=0)
    cell = json.loads((tmp_path / "cells" / "chain-1-102-replay-0.json").read_text())
    assert {version["stores"] for version in cell["versions"]} == {"nothing"}
    both, dev = figures_of(cell), figures_of(cell, ["dev"])
    assert both is not None and dev is not None
    assert (both.num_rows, dev.num_rows) == (2 * (6 + 8), 2 * 6)
    last = cell["versions"][-1]["scores"]
    assert {key for key in last if key.startswith("shapes")} == {"shapes-dev"}, "it is not judged"
    hits = [last[f"{name}-{part}"]["hits"] for name in NAMES[:2] for part in ("dev", "unused")]
    right = [[*map(int, "".join(hits[:2]))], [*map(int, "".join(hits[2:]))]]
    assert both.end == pytest.approx(100 * np.mean([np.mean(row) for row in right]))
    assert both.newest == pytest.approx(100 * np.mean(right[1]))
    assert both.perplexity == pytest.approx(cell["perplexity"]["adapted"] / cell["perplexity"]["base"])
    del last["colours-unused"]
    assert figures_of(cell) is None and figures_of(cell, ["dev"]) is not None


def test_scored_rows_are_never_learned() -> None:
    for _, first, last in (place for place in PARTS.values() if place[0] == "train"):
        assert memory.NUM_ROWS <= first < last
    assert all(sorted(order) == sorted(ORDERS["1"]) for order in ORDERS.values())
