"""Arms of the memory: they differ in what they say they differ in, and the rule decides as it was written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.method import memory
from benchmarks.method.memory import ARMS, Pair, ends_of, pairs_of, verdict
from benchmarks.method.one_memory import MemoryOptions, StagedRehearsal, rows_of_steps
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.base_model.load import load_base
from deal_core.benchmark import run as benchmark_run
from deal_core.benchmark.cell import make_cell
from deal_core.benchmark.run import CellRun, run_cell
from deal_core.benchmark.suites import load_suite
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig
from deal_core.strategies.rehearsal import RehearsedRow

pytestmark = pytest.mark.nightly

TASKS = ("dbpedia", "agnews")
NUM_DEV, NUM_UNUSED = 4, 6
"""Of 12 test rows 40 % are for development; of 40 training rows 24 are learned and 10 may be rehearsed."""
Learn = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def learn(tiny_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Learn:
    """Run a cell of two tasks; return the digest of its last adapter, and the cell."""
    base = load_base(str(tiny_base), tmp_path / "cache")
    monkeypatch.setattr(benchmark_run, "NUM_FURTHER_ROWS", 10)

    def learn(strategy: str, method: MethodConfig) -> tuple[str, dict[str, Any]]:
        cell = make_cell(
            strategy,
            TASKS,
            method=method,
            seed=3,
            train=TrainConfig(num_epochs=1, learning_rate=0.01, max_prompt_tokens=64, checkpoint_steps=0, seed=3),
            rows=24,
            part="dev",
            max_test_rows=None,
            scored="ends",
            scoring="likeliest",
            scores_unused=True,
            adapter=AdapterConfig(rank=4),
            base="tiny",
            data="d",
        )
        folder = tmp_path / cell.file_name
        run = CellRun(
            base=base,
            cell=cell,
            tasks=load_suite(data, TASKS),
            method=method,
            work=folder / "work",
            shared=tmp_path / "shared",
            keep=folder / "kept",
            on_progress=lambda *_: None,
        )
        result = {"settings": cell.to_json(), **run_cell(run)}
        return hashlib.sha256((folder / "kept" / "1" / WEIGHTS_FILE).read_bytes()).hexdigest(), result

    return learn


def options(**given: Any) -> MethodConfig:
    return MethodConfig(strategy_options=given)


def test_answers_alone_are_the_earlier_default(learn: Learn) -> None:
    default, _ = learn("deal_asked", options(texts="own"))
    answers, cell = learn(*ARMS["answers"])
    assert answers == default, "the same rows, targets, order and steps"
    assert learn(*ARMS["learned-answers"])[0] != answers, "other rows"
    assert cell["settings"]["method"]["strategy_options.beta"] == 0.0, "the cell says the options that were not given"


def test_labels_and_answers_in_halves_are_todays_default_and_every_option_changes_what_is_learned(learn: Learn) -> None:
    default, _ = learn("deal", MethodConfig())
    assert learn(*ARMS["learned-both"])[0] == default, "the same rows, targets, order and steps"
    changed = [{"beta": 1.0}, {"per_step": 2}, {"ramp": True}, {"closing_steps": 2}]
    digests = [learn("one_memory", options(**{"beta": 0.5, **option}))[0] for option in changed]
    assert len({default, *digests}) == 1 + len(changed)


def test_kept_rows_of_replay_have_a_weight(learn: Learn) -> None:
    plain, light, same = (
        learn(*method)[0]
        for method in (ARMS["replay-4"], ARMS["replay-4-half"], ("weighted_replay", options(weight=1.0)))
    )
    assert plain == same != light


def test_options_are_checked(learn: Learn) -> None:
    with pytest.raises(ConfigError, match=r"strategy_options\.beta is 2"):
        learn("one_memory", options(beta=2.0))
    with pytest.raises(ConfigError, match="Strategy 'seq_lora' has no option 'beta'; it takes none"):
        learn("seq_lora", options(beta=0.5))


def test_a_ramp_has_as_many_rows_as_equal_steps() -> None:
    for num_steps in (1, 7, 57):
        ramp = rows_of_steps(MemoryOptions(ramp=True), num_steps, 3)
        assert sum(ramp) == 4 * num_steps
    assert (ramp[0], ramp[len(ramp) // 2], ramp[-1]) == (2, 4, 6), "a few rows at first, more at the end"
    assert rows_of_steps(MemoryOptions(), 2, 3) == [4, 4]
    assert rows_of_steps(MemoryOptions(late_per_step=8), 2, 6) == [4, 4]
    assert rows_of_steps(MemoryOptions(late_per_step=8), 2, 7) == [8, 8]


def test_a_staged_rehearsal_draws_every_row_in_turn() -> None:
    sets = [[RehearsedRow([task, number], [0]) for number in range(3)] for task in range(2)]
    staged = StagedRehearsal(sets, None, [1, 2, 3], weight=1.0, seed=0)
    drawn = [staged.draw(step) for step in range(3)]
    assert [len(rows) for rows in drawn] == [1, 2, 3]
    assert len({tuple(row.prompt_ids) for rows in drawn for row in rows}) == 6


def pair(end: float, nll: float = 0.0, learned: float = 0.0, worst: float = 0.0) -> Pair:
    return Pair(
        order="1", seed=1, learned=learned, end=end, recentred=end, nll=nll, by_task={"yelp": end, "IMDB": worst}
    )


def test_the_rule_decides_as_it_was_written() -> None:
    assert verdict([pair(-1.0, nll=0.1)]).startswith("give up")
    assert verdict([pair(-1.0, nll=-0.1)]) == "go on: 1 of 3 pairs"
    assert verdict([pair(1.4), pair(1.5), pair(1.6)]).startswith("adopt: gain +1.5")
    assert verdict([pair(0.8), pair(0.9), pair(0.8)]).startswith("not adopted: gain +0.8")
    assert verdict([pair(8.0), pair(-3.0), pair(0.0)]).startswith("not adopted: gain +1.7, 80 % interval from -")
    assert verdict([pair(1.5, learned=-0.6)] * 2 + [pair(1.6, learned=-0.6)]) == "not adopted: it learns -0.6 points"
    assert verdict([pair(1.5, worst=-4.1)] * 2 + [pair(1.6, worst=-4.1)]) == "not adopted: IMDB ends -4.1 points"


def test_only_cells_of_one_kind_of_processor_make_a_pair(learn: Learn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "JUDGED", TASKS)
    _, cell = learn(*ARMS["plain"])
    other = {**cell, "perplexity": {**cell["perplexity"], "base": cell["perplexity"]["base"] + 0.1}}
    (same,) = pairs_of([cell], [cell])
    assert same.end == same.nll == same.learned == 0 and set(same.by_task) == set(TASKS)
    assert not list(pairs_of([cell], [other]))
    hits = ends_of(cell).hits
    assert {name: len(each) for name, each in hits.items()} == dict.fromkeys(TASKS, NUM_DEV + NUM_UNUSED)
