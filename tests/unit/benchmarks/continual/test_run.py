"""A cell on the tiny base: what it learns and scores, and how it continues after it died."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks  # noqa: F401  its scores
from benchmarks.continual.cell import Cell, make_cell, unpack_answers
from benchmarks.continual.run import CellRun, run_cell
from benchmarks.continual.suites import SuiteTask
from benchmarks.continual.summary import departures, final_scores, matrix_of
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.label_scores import label_log_probs
from deal_core.evaluation.metrics import score_answers
from deal_core.evaluation.report import outcome_text
from deal_core.general.perplexity import LIMIT, TEXTS, perplexity
from deal_core.method_config import MethodConfig, RehearsalConfig, SelectionConfig
from deal_core.selection.label_noise import features

DEFAULTS, KEEPS_NONE = MethodConfig(), MethodConfig(rehearsal=RehearsalConfig(rows=0))
LABELS = {"colours": ("red", "green"), "sizes": ("large", "small"), "sounds": ("loud", "soft")}
TWO, THREE = tuple(LABELS)[:2], tuple(LABELS)
TRAIN = TrainConfig(
    num_epochs=1,
    batch_size=4,
    learning_rate=0.02,
    schedule="constant",
    balance_labels=False,
    max_prompt_tokens=64,
    checkpoint_steps=0,
)


def task(name: str) -> SuiteTask:
    labels = LABELS[name]
    rows = [{"input": f"number {i} of {labels[i % 2]}", "output": labels[i % 2]} for i in range(25)]
    schema = TaskSchema(name=name, labels=labels, instruction=f"Which of the {name}?")
    return SuiteTask(schema=schema, train=tuple(rows[:16]), test=tuple(rows[16:]))


TASKS = {name: task(name) for name in LABELS}
Run = Callable[..., dict[str, Any]]


def cell(strategy: str, method: MethodConfig, tasks: tuple[str, ...] = TWO, **changes: Any) -> Cell:
    given = {
        "seed": 0,
        "rows": 16,
        "part": "reported",
        "max_test_rows": None,
        "scored": "all",
        "train": TRAIN,
        "adapter": AdapterConfig(rank=4),
        "base": "tiny",
        "data": "d",
        **changes,
    }
    return make_cell(strategy, tasks, method=method, **given)


@pytest.fixture
def run(base: BaseModel, tmp_path: Path) -> Run:
    """Run a cell and return what its file would hold."""

    def run(
        strategy: str,
        method: MethodConfig = DEFAULTS,
        on_progress: Any = None,
        keep: Path | None = None,
        **changes: Any,
    ) -> Any:
        made = cell(strategy, method, **changes)
        result = run_cell(
            CellRun(
                base=base,
                cell=made,
                tasks=TASKS,
                method=method,
                work=tmp_path / "work" / made.digest(),
                shared=tmp_path / "shared",
                keep=keep,
                on_progress=on_progress or (lambda *_: None),
            )
        )
        return json.loads(json.dumps({"settings": made.to_json(), **result}))

    return run


def scored(result: dict[str, Any]) -> list[list[str]]:
    return [list(version["scores"]) for version in result["versions"]]


def test_every_entry_that_the_matrix_needs_is_scored(run):
    names = list(THREE)
    assert scored(run("deal", tasks=THREE)) == [names[:2], names, names]
    assert scored(run("base", tasks=THREE)) == [sorted(names)]
    last = run("deal", scored="last", max_test_rows=2)
    assert scored(last) == [[], names[:2]]
    assert all(len(score["correct"]) == 2 for score in last["versions"][-1]["scores"].values())


def test_a_cell_keeps_the_answers_and_the_log_probability_of_every_label(run, base):
    score = final_scores(run("base"))["colours"]
    kept, rows = unpack_answers(score), TASKS["colours"].part("reported")
    assert kept is not None and kept.labels == LABELS["colours"]
    references = [row["output"] for row in rows]
    assert [kept.labels[number] for number in kept.targets_N] == references
    assert outcome_text(score_answers("exact", kept.texts(), references)) == score["correct"]
    expected = label_log_probs(
        base.model,
        base.tokenizer,
        TASKS["colours"].schema,
        [row["input"] for row in rows],
        max_prompt_tokens=TRAIN.max_prompt_tokens,
    )
    torch.testing.assert_close(torch.tensor(kept.log_probs_NL).float(), expected, atol=0, rtol=1e-3)
    assert unpack_answers({"correct": "1"}) is None, "an earlier cell has no answers"


def test_the_likeliest_label_can_be_the_answer(run):
    generated, likeliest = (run("seq_lora", scoring=scoring) for scoring in ("generated", "likeliest"))
    for before, after in zip(generated["versions"], likeliest["versions"], strict=True):
        for name, score in after["scores"].items():
            kept = unpack_answers(score)
            assert score["log_probs"] == before["scores"][name]["log_probs"], "the versions are the same"
            assert [LABELS[name][i] for i in kept.log_probs_NL.argmax(1)] == kept.texts()
            assert (
                "".join("01"[bool(i == j)] for i, j in zip(kept.answers, kept.targets_N, strict=True))
                == (score["correct"])
            )


def test_the_last_version_answers_training_rows_that_no_cell_uses(run):
    assert "unused" not in run("seq_lora", rows=6)
    for strategy in ("seq_lora", "base"):
        unused = run(strategy, rows=6, scores_unused=True)["unused"]
        assert {name: len(score["correct"]) for name, score in unused.items()} == dict.fromkeys(TWO, 16 - 6)
        assert all(len(unpack_answers(score).texts()) == 10 for score in unused.values())
    assert run("seq_lora", rows=16, scores_unused=True)["unused"] == {}, "no row is left"


def test_the_versions_of_a_finished_cell_can_be_kept(run, base, tmp_path):
    result = run("seq_lora", keep=tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0", "1"]
    with adapter_on(base.model, tmp_path / "kept" / "1") as model:
        texts = [row["input"] for row in TASKS["sizes"].part("reported")]
        found = label_log_probs(model, base.tokenizer, TASKS["sizes"].schema, texts, max_prompt_tokens=64)
    kept = unpack_answers(final_scores(result)["sizes"]).log_probs_NL
    torch.testing.assert_close(torch.tensor(kept).float(), found, atol=0, rtol=2e-3)


def test_bounds_learn_every_task_alone_and_all_at_once_in_as_many_steps(run):
    """Six of nine test rows are reported."""
    each, joint = run("per_task"), run("joint")
    assert scored(each) == [[name] for name in sorted(TWO)] and scored(joint) == [sorted(TWO)]
    assert [version["num_steps"] for version in each["versions"]] == [4, 4]
    assert [version["num_steps"] for version in joint["versions"]] == [8]
    assert [version["num_steps"] for version in run("joint", tasks=THREE)["versions"]] == [12]
    for score in final_scores(each).values():
        assert len(score["correct"]) == 6 and score["majority_rate"] == 0.5
        assert score["rouge1"] >= score["correct"].count("1") / 6


def test_a_first_version_is_made_once_for_the_cells_that_share_it(run, tmp_path):
    first = run("seq_lora")["versions"][0]
    (file,) = (tmp_path / "shared").glob("*/version.json")
    file.write_text(json.dumps({**first, "mark": 1}))
    assert run("deal", KEEPS_NONE)["versions"][0] == {**first, "mark": 1}
    for strategy in ("deal", "replay"):
        assert "mark" not in run(strategy)["versions"][0]


def test_a_cell_that_died_goes_on_with_the_task_it_was_at(run):
    seen: list[str] = []

    def die(done: float, total: float, doing: str) -> None:
        seen.append(doing)
        if doing == "sizes: step 3 of 4":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run("replay", on_progress=die)
    num_before = len(seen)
    run("replay", on_progress=lambda _, __, doing: seen.append(doing))
    assert seen[num_before] == "sizes: step 1 of 4"


def test_a_prompt_that_cannot_fit_is_refused_before_anything_is_trained(run, tmp_path, monkeypatch):
    second = TASKS[TWO[1]]
    monkeypatch.setitem(TASKS, TWO[1], replace(second, schema=replace(second.schema, instruction="Say it. " * 60)))
    with pytest.raises(ConfigError, match=f"The prompt of task {TWO[1]} takes .* without any text"):
        run("seq_lora")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_perplexity_is_that_of_the_texts(base, parent):
    import torch

    with torch.no_grad():
        losses, num_tokens = 0.0, 0
        for text in TEXTS:
            ids = torch.tensor([base.tokenizer(text)["input_ids"]])
            losses += float(base.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            num_tokens += ids.shape[1] - 1
    before = perplexity(base.model, base.tokenizer)
    assert before == pytest.approx(float(torch.tensor(losses / num_tokens).exp()), rel=1e-4)
    with adapter_on(base.model, parent) as model:
        assert perplexity(model, base.tokenizer) != before
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(float("nan"))
        assert perplexity(model, base.tokenizer) == LIMIT, "the gate is told, and JSON can hold it"


def test_a_selecting_cell_trains_on_the_chosen_rows_in_as_many_steps(run):
    method = MethodConfig(selection=SelectionConfig(keep=0.5, score="loss"))  # it reads the parent
    result = run("seq_lora", method, scored="last")
    for version in result["versions"]:
        assert version["num_steps"] == 2 and len(set(version["chosen"])) == 8 and max(version["chosen"]) < 16
        assert "8 of 16 training rows were chosen" in version["notes"][0]
    first, second = (version["notes"][0] for version in result["versions"])
    assert "at random" in first and "by loss" in second  # the first arrival has no parent


def test_a_bound_trains_on_all_rows_whatever_is_selected(run):
    (version,) = run("joint", MethodConfig(selection=SelectionConfig(keep=0.5)), scored="last")["versions"]
    assert version["num_steps"] == 8 and "chosen" not in version


def test_features_do_not_depend_on_the_batch(base: BaseModel):
    task = TaskSchema(name="t", labels=("a", "b"), instruction="Which?")
    texts = ["short", "a text that is a good deal longer than the other ones", "x"]

    def found(inputs: list[str]) -> torch.Tensor:
        return features(base.model, base.tokenizer, task, inputs, max_prompt_tokens=64)

    together_ND = found(texts)
    torch.testing.assert_close(together_ND, torch.cat([found([text]) for text in texts]))
    assert not torch.allclose(together_ND[0], together_ND[2]), "the features tell texts apart"


def test_after_every_second_task_a_version_more_learns_all_tasks_so_far(run, tmp_path):
    result = run("deal", tasks=THREE, scored="ends", consolidate_every=2, keep=tmp_path / "kept")
    assert [version["task"] for version in result["versions"]] == [THREE[0], THREE[1], None, THREE[2]]
    assert scored(result) == [[THREE[0]], [THREE[1]], list(TWO), list(THREE)]
    matrix = matrix_of(result)
    assert matrix.learned == (*TWO, "(consolidation)", THREE[2]) and matrix.learned_best() == {TWO[0]: 0, TWO[1]: 1}
    steps = [version["num_steps"] for version in result["versions"]]
    assert steps == [4, 4, 8, 4], "rows of two tasks are twice the steps"

    before, together, after = (load_method_state(tmp_path / "kept" / str(number)) for number in (1, 2, 3))
    assert together.kept_rows.keys() == before.kept_rows.keys() and len(after.kept_rows) == 3
    assert all(torch.equal(together.kept_rows[name], rows) for name, rows in before.kept_rows.items())
    assert (before.num_arrivals, together.num_arrivals, after.num_arrivals) == (2, 3, 4)
    joint = run("joint", tasks=TWO, keep=tmp_path / "joint")
    weights = [(folder / WEIGHTS_FILE).read_bytes() for folder in (tmp_path / "kept" / "2", tmp_path / "joint" / "0")]
    assert weights[0] == weights[1], "it is joint training from the base model"
    assert departures(result) == "consolidated every 2 tasks" and joint["settings"].keys() < result["settings"].keys()
