"""How often drift is reported where there is none, how often it is found where it is, and how good ATC's estimate is.

    python -m benchmarks.monitoring --version FOLDER --data FOLDER --answers answers.parquet
    python -m benchmarks.monitoring --answers answers.parquet

The first step asks the model: a version's folder (PEFT files and deal.json) answers a task's test rows, the same rows
with typos, and texts of other tasks. Its answers are kept in a Parquet file. The second step only computes; it draws
references and windows from the kept answers. A call without `--version` does the second step alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from benchmarks.output import RESULTS, Out, write_result
from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import Precision
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import load_base_of
from deal_core.evaluation.answering import ServedTask, read_served
from deal_core.evaluation.generation import answer_inputs
from deal_core.judging_config import MonitorConfig
from deal_core.monitoring.drift import compare
from deal_core.monitoring.predictions import COLUMNS, answer_facts
from deal_core.monitoring.report import TaskDrift
from infra.settings import HomeSettings

USUAL, TYPOS = "usual", "20 % typos"
FOREIGN: Mapping[str, Sequence[str]] = {"agnews": ("amazon",), "amazon": ("agnews", "yelp")}
"""A task → the tasks whose texts are sent to it. Yelp and Amazon are near twins, with the same labels."""
WINDOWS = (100, 200, 500)
TYPO_SHARE = 0.2
KEPT = (*COLUMNS, "score", "condition", "expected")

Base = Annotated[str | None, typer.Option(help="Base model; the version's own without it.")]


def with_typos(text: str, share: float, seed: int) -> str:
    """Put one typo into a share of the words: two letters change places, one is left out, or one is doubled.

    Example:
        >>> with_typos("lost", 1.0, 0) != "lost"
        True
    """
    draw = random.Random(seed)
    words = text.split(" ")
    for place, word in enumerate(words):
        if len(word) < 2 or draw.random() >= share:
            continue
        at = draw.randrange(len(word) - 1)
        first, second = word[at], word[at + 1]
        changed = draw.choice((second + first, second, first + first + second))
        words[place] = word[:at] + changed + word[at + 2 :]
    return " ".join(words)


def conditions(data: Path, task: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The rows that a task is asked: its own test rows, these with typos, and other tasks' test rows."""
    usual = _rows(data / f"{task}.test.jsonl")
    yield USUAL, usual
    yield TYPOS, [{**row, "text": with_typos(row["text"], TYPO_SHARE, seed)} for seed, row in enumerate(usual)]
    for other in FOREIGN.get(task, ()):
        yield f"texts of {other}", _rows(data / f"{other}.test.jsonl")


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def ask(folder: Path, data: Path, tasks: Sequence[str], base: str | None, precision: Precision) -> pd.DataFrame:
    """Let a version answer every condition of the tasks; one row for each answer."""
    served = read_served(folder)
    model = load_base_of(served, HomeSettings().cache_dir, base, precision=precision)
    found: list[dict[str, Any]] = []
    with adapter_on(model.model, folder) as adapted:
        for name in tasks:
            task = served.task(name)
            if task is None:
                raise ConfigError(f"{folder} does not know the task {name!r}; give --tasks that it knows.")
            for condition, rows in conditions(data, name):
                texts = [task.readable(row["text"], "A row") for row in rows]
                given = answer_inputs(adapted, model.tokenizer, task, texts)
                for number, (row, text, answer) in enumerate(zip(rows, texts, given, strict=True)):
                    found.append(
                        {
                            **_facts(task, text, answer.text, row["label"]),
                            "id": f"{name}/{condition}/{number}",
                            "confidence": answer.confidence.confidence,
                            "label_mass": answer.confidence.label_mass,
                            "condition": condition,
                        }
                    )
                typer.echo(f"{name}, {condition}: {len(rows)} answers", err=True)
    return pd.DataFrame(found, columns=list(KEPT))


def _facts(task: ServedTask, text: str, answer: str, expected: str) -> dict[str, Any]:
    facts = answer_facts(task.schema, text, answer)
    right = answer_facts(task.schema, text, expected)["label"]
    score = None if right is None else float(facts["label"] == right)
    return {**facts, "input": text, "expected": right, "score": score}


def halves(rows: pd.DataFrame, draw: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two disjoint random halves."""
    order = draw.permutation(len(rows))
    return rows.iloc[order[: len(rows) // 2]], rows.iloc[order[len(rows) // 2 :]]


def false_alarms(rows: pd.DataFrame, num_looks: int, config: MonitorConfig) -> dict[str, Any]:
    """Share of random halves of one task's rows that raise an alarm, and of those that would without limits on size."""
    draw = np.random.default_rng(0)
    looks = [_look(*halves(rows, draw), config) for _ in range(num_looks)]
    level = [config.alpha / max(1, each.num_tests) for each in looks]
    significant = [_is_significant(each, limit) for each, limit in zip(looks, level, strict=True)]
    return {
        "num_looks": num_looks,
        "rows_of_a_half": len(rows) // 2,
        "alarms": _share([bool(x.alarms) for x in looks]),
        "significant": _share(significant),
        "promised": config.alpha,
    }


def _is_significant(found: TaskDrift, level: float) -> bool:
    accuracies = [each for each in (found.estimated, found.measured) if each is not None and each.p_value is not None]
    return any(each.p_value < level for each in found.tests) or any((each.p_value or 0) < level for each in accuracies)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _look(reference: pd.DataFrame, live: pd.DataFrame, config: MonitorConfig) -> TaskDrift:
    (found,) = compare(reference, live.assign(time=None), config).tasks
    return found


def live_conditions(answers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each condition of one task. A condition without the commonest label is made of the usual rows."""
    found = {str(name): rows for name, rows in answers.groupby("condition", sort=False)}
    usual = found[USUAL]
    gone = usual["expected"].mode().iloc[0]
    return {**found, "one label is gone": usual[usual["expected"] != gone]}


def power(answers: pd.DataFrame, num_draws: int, config: MonitorConfig, windows: Sequence[int]) -> list[dict[str, Any]]:
    """How often each condition raises an alarm. The reference is half of the usual rows, the window comes from others.

    A window that is larger than what is left is drawn with replacement.
    """
    lines, found = [], live_conditions(answers)
    for condition, rows in found.items():
        for size in windows:
            draw = np.random.default_rng(0)
            looks, repeated = [], False
            for _ in range(num_draws):
                reference, _rest = halves(found[USUAL], draw)
                left = rows[~rows["number"].isin(reference["number"])] if _shares_rows(condition) else rows
                repeated = len(left) < size
                live = left.iloc[draw.choice(len(left), size, replace=repeated)]
                looks.append(_look(reference, live, config))
            kinds = {
                kind: _share([any(a.kind == kind for a in x.alarms) for x in looks]) for kind in ("drift", "quality")
            }
            tests = {
                test.name: _share([any(t.name == test.name and t.is_alarm for t in x.tests) for x in looks])
                for test in looks[0].tests
            }
            lines.append(
                {
                    "condition": condition,
                    "window": size,
                    "alarms": _share([bool(x.alarms) for x in looks]),
                    **kinds,
                    "tests": tests,
                    "with_replacement": repeated,
                    "num_draws": num_draws,
                }
            )
    return lines


def _shares_rows(condition: str) -> bool:
    """Whether a condition's rows are the task's own test rows, changed or not."""
    return not condition.startswith("texts of ")


def atc(answers: pd.DataFrame, num_draws: int, config: MonitorConfig) -> list[dict[str, Any]]:
    """The estimated accuracy against the true one, where a right answer is known."""
    lines, found = [], live_conditions(answers)
    for condition, rows in found.items():
        if not rows["score"].notna().all():
            continue
        draw, pairs = np.random.default_rng(0), []
        for _ in range(num_draws):
            reference, _rest = halves(found[USUAL], draw)
            live = rows[~rows["number"].isin(reference["number"])] if _shares_rows(condition) else rows
            estimated = _look(reference, live, config).estimated
            if estimated is not None:
                pairs.append((estimated.accuracy, float(live.tail(config.window_rows)["score"].mean())))
        if pairs:
            estimates, truths = np.array(pairs).T
            lines.append(
                {
                    "condition": condition,
                    "true": float(truths.mean()),
                    "estimated": float(estimates.mean()),
                    "mean_error_points": float(100 * np.abs(estimates - truths).mean()),
                    "largest_error_points": float(100 * np.abs(estimates - truths).max()),
                    "num_draws": len(pairs),
                }
            )
    return lines


def measure(
    answers: pd.DataFrame, *, num_looks: int, num_draws: int, num_text_draws: int, windows: Sequence[int] = WINDOWS
) -> dict[str, Any]:
    """All figures of kept answers, task by task. The classifier of texts is slow, so it gets draws of its own."""
    config, tasks = MonitorConfig(), {}
    for name, found in answers.groupby("task"):
        rows = found.assign(number=found["id"].str.rpartition("/")[2].astype(int))
        numbers = rows.assign(input=None)
        usual = numbers[numbers["condition"] == USUAL]
        tasks[str(name)] = {
            "false_alarms": false_alarms(usual, num_looks, config),
            "power": power(numbers, num_draws, config, windows),
            "power_with_texts": power(rows, num_text_draws, config, windows) if num_text_draws else [],
            "atc": atc(numbers, num_draws, config),
        }
    return {"config": {name: getattr(config, name) for name in config.__dataclass_fields__}, "tasks": tasks}


def main(
    answers: Annotated[Path, typer.Option(help="Parquet file of the answers.")],
    version: Annotated[Path | None, typer.Option(help="Folder of the version that answers: the first step.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with TASK.test.jsonl; the first step.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; the first step.")] = ",".join(FOREIGN),
    base: Base = None,
    precision: Annotated[str, typer.Option(help="Of the base model: auto, bf16 or fp32.")] = "auto",
    looks: Annotated[int, typer.Option(help="Random halves for the false alarms.")] = 1000,
    draws: Annotated[int, typer.Option(help="Draws for each window and for ATC.")] = 200,
    text_draws: Annotated[int, typer.Option(help="Draws with the classifier of texts; 0: none.")] = 20,
    out: Out = RESULTS / "monitoring.json",
) -> None:
    """Ask the version if it is given, then print and write the figures."""
    if version is not None:
        if data is None:
            raise typer.BadParameter("the first step needs --data, the folder of the tasks' rows")
        found = ask(version, data, tasks.split(","), base, precision)  # type: ignore[arg-type]
        answers.parent.mkdir(parents=True, exist_ok=True)
        found.to_parquet(answers, index=False)
    kept = pd.read_parquet(answers)
    write_result(out, measure(kept, num_looks=looks, num_draws=draws, num_text_draws=text_draws))


if __name__ == "__main__":
    typer.run(main)
