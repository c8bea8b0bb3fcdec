"""Rows are chosen before the strategy sees them, once per run, and a note says what was chosen and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import benchmarks  # noqa: F401  its scores
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig, SelectionConfig
from deal_core.selection.choose import ChosenRows, choose_rows, pick_rows, quotas, rows_read
from deal_core.training.train import TrainingSetup

TRAIN = TrainConfig(max_prompt_tokens=64)
LOSS = SelectionConfig(keep=0.25, score="loss")


@pytest.fixture
def choose(base, task, rows, half_learned, tmp_path):
    """Choose among 48 rows by settings; the other arguments change the rest."""

    def run(
        selection: SelectionConfig,
        *,
        parent: Path | None = half_learned,
        data: Dataset | None = None,
        task: TaskSchema = task,
        train: TrainConfig = TRAIN,
        journal: str = "selection.json",
        lend=lambda: base,
        on_progress=lambda done, total: None,
    ) -> ChosenRows:
        setup = TrainingSetup(
            task=task,
            strategy="deal",
            adapter=AdapterConfig(rank=4),
            method=MethodConfig(selection=selection),
            train=train,
        )
        return choose_rows(
            rows(48) if data is None else data,
            setup,
            lend,
            parent_folder=parent,
            journal=tmp_path / journal,
            on_progress=on_progress,
        )

    return run


def refuse():
    raise AssertionError("the base model was asked for")


def test_the_budget_is_kept_with_every_label_in_its_share(choose, rows):
    found = choose(LOSS)
    labels = [rows(48)[row]["output"] for row in found.rows]
    assert len(found.rows) == 12 and sorted(found.rows) == list(found.rows)
    assert {label: labels.count(label) for label in set(labels)} == {"red": 4, "green": 4, "blue": 4}
    assert "12 of 48 training rows were chosen by loss, 4 of each of 3 labels" in found.notes[0]
    assert "the parent version read 48 rows" in found.notes[1]


def test_a_second_call_takes_the_rows_of_the_journal(choose, tmp_path):
    first = choose(LOSS)
    assert choose(LOSS, lend=refuse) == first
    written = json.loads((tmp_path / "selection.json").read_text())
    assert written["rows"] == list(first.rows) and not list(tmp_path.glob("*.part"))
    (tmp_path / "selection.json").write_text(json.dumps({**written, "rows": [1, 2, 3]}))
    assert choose(LOSS, lend=refuse).rows == (1, 2, 3)  # what is written counts, not what would be chosen now


@pytest.mark.parametrize(
    "change",
    [
        {"selection": replace(LOSS, keep=0.5)},
        {"train": replace(TRAIN, seed=1)},
        {"parent": None},
    ],
)
def test_a_journal_of_another_run_is_not_taken(choose, change):
    first = choose(LOSS)
    assert choose(**{"selection": LOSS, **change}).key != first.key


def test_the_same_seed_gives_the_same_rows_and_leaves_the_global_generator_alone(choose):
    config = SelectionConfig(keep=10)
    state = torch.get_rng_state()
    first = choose(config, journal="one", lend=refuse)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert choose(config, journal="two", lend=refuse).rows == first.rows
    assert choose(config, journal="three", lend=refuse, train=replace(TRAIN, seed=1)).rows != first.rows


def test_the_first_arrival_is_chosen_at_random_and_says_so(choose):
    found = choose(LOSS, parent=None, lend=refuse)
    assert found.rows == choose(SelectionConfig(keep=0.25), parent=None, lend=refuse, journal="random").rows
    assert "chosen at random" in found.notes[0] and "not chosen by loss" in found.notes[1]


def test_a_model_reads_no_more_rows_than_its_limit(choose, rows, monkeypatch):
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(SelectionConfig, "max_scored", 18)
    config = replace(LOSS, keep=6)
    found = choose(config, on_progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (18, 18) and len(found.rows) == 6
    labels = [rows(48)[row]["output"] for row in found.rows]
    assert all(labels.count(label) == 2 for label in ("red", "green", "blue"))
    assert "read 18 rows drawn at random" in found.notes[1]
    assert len(choose(replace(config, keep=20), journal="more").rows) == 20  # the budget comes before the limit


def test_rows_without_labels_have_no_strata(choose, task):
    texts = replace(task, format="completion", labels=(), metric="rouge_l")
    data = Dataset.from_list([{"input": f"question {i}", "output": "word " * (i % 7 + 1)} for i in range(40)])
    found = choose(SelectionConfig(keep=5, score="length"), task=texts, data=data, lend=refuse)
    assert all(row % 7 == 6 for row in found.rows)
    errors = choose(SelectionConfig(keep=5, score="errors", noise="leave_out"), task=texts, data=data, journal="errors")
    assert len(errors.rows) == 5 and "no label was checked" in errors.notes[-1]


def swapped(rows: Dataset, wrong: dict[int, str]) -> Dataset:
    return Dataset.from_list(
        [{**row, "output": wrong.get(i, row["output"]), "sha256": f"{i:064x}"} for i, row in enumerate(rows)]
    )


def test_wrong_labels_are_named_and_left_out_only_if_asked(choose, rows, monkeypatch):
    """The tiny base's features say little, so features that say all take their place."""
    kinds = ("red", "green", "blue")
    right = [row["output"] for row in rows(48)]
    wrong = {row: kinds[(kinds.index(right[row]) + 1) % 3] for row in (5, 20)}
    centres = {label: 8.0 * torch.eye(3)[place] for place, label in enumerate(kinds)}
    texts = {row["input"]: row["output"] for row in rows(48)}

    def features(model, tokenizer, task, inputs, **settings):
        return torch.stack([centres[texts[text]] for text in inputs])

    monkeypatch.setattr("deal_core.selection.label_noise.features", features)
    data = swapped(rows(48), wrong)
    named = choose(SelectionConfig(noise="name"), data=data, journal="name")
    assert named.rows == tuple(range(48))
    assert named.notes[0].startswith("2 of 48 labels that were checked are probably wrong")
    assert ": sha256 " in named.notes[0]
    assert all(f"({wrong[row]}, likelier {right[row]})" in named.notes[0] for row in wrong)
    left = choose(SelectionConfig(noise="leave_out"), data=data, journal="out")
    assert left.rows == tuple(row for row in range(48) if row not in wrong) and ", and left out: " in left.notes[0]
    kept = choose(replace(LOSS, keep=46, noise="leave_out"), data=data, journal="both")
    assert len(kept.rows) == 46 and not set(kept.rows) & set(wrong)


def test_the_rows_that_are_read_are_known_before(task, monkeypatch):
    def setup(selection: SelectionConfig, **changes: object) -> TrainingSetup:
        return TrainingSetup(
            task=replace(task, **changes),
            strategy="deal",
            adapter=AdapterConfig(),
            train=TRAIN,
            method=MethodConfig(selection=selection),
        )

    assert rows_read(setup(SelectionConfig()), 100, has_parent=True) == 0
    assert rows_read(setup(SelectionConfig(keep=0.1)), 100, has_parent=True) == 0
    monkeypatch.setattr(SelectionConfig, "max_scored", 60)
    assert rows_read(setup(LOSS), 100, has_parent=True) == 60
    monkeypatch.undo()
    assert rows_read(setup(LOSS), 100, has_parent=False) == 0
    assert rows_read(setup(replace(LOSS, noise="name")), 100, has_parent=True) == 200
    assert rows_read(setup(replace(LOSS, noise="name"), labels=()), 100, has_parent=True) == 100


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": "loss"}, "selection.score would do nothing"),
        ({"keep": True}, "selection.keep is True"),
        ({"score_options": {"target": 0.1}}, "selection.score_options would do nothing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**values)


def test_a_share_and_a_number_are_told_apart():
    assert [SelectionConfig(keep=keep).num_kept(100_000) for keep in (0.01, 1000, 1.0)] == [1000, 1000, 100_000]
    assert SelectionConfig(keep=1000).num_kept(30) == 30 and SelectionConfig(keep=0.01).num_kept(3) == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_quotas_add_up_and_every_label_is_within_one_of_its_share(sizes, data):
    named = {f"label {place}": size for place, size in enumerate(sizes)}
    budget = data.draw(st.integers(1, sum(sizes)))
    found = quotas(named, budget)
    assert sum(found.values()) == budget
    assert all(0 <= found[name] <= size for name, size in named.items())
    if budget >= len(named):
        assert min(found.values()) >= 1
    if min(budget * size / sum(sizes) for size in sizes) >= 1:
        assert all(abs(found[name] - budget * size / sum(sizes)) <= 1 for name, size in named.items())


def test_the_largest_scores_are_taken_ties_go_to_the_first_row_and_a_rare_label_is_not_crowded_out():
    assert pick_rows(torch.tensor([2.0, 1.0, 2.0, 3.0, 1.0]), None, 2) == [0, 3]
    labels = ["often"] * 90 + ["rare"] * 10
    scores = torch.arange(100, 0, -1).double()  # the rare label has the lowest scores
    assert sum(row >= 90 for row in pick_rows(scores, labels, 10)) == 1
    assert pick_rows(scores, None, 10) == list(range(10))
