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
from deal_core.evaluation.answering import read_served
from deal_core.evaluation.generation import answer_inputs
from deal_core.judging_config import DriftLimits
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
    base_model = load_base_of(served, HomeSettings().cache_dir, base, precision=precision)
    answers: list[dict[str, Any]] = []
    with adapter_on(base_model.model, folder) as model:
        for name in tasks:
            task = served.task(name)
            if task is None:
                raise ConfigError(f"{folder} does not know the task {name!r}; give --tasks that it knows.")
            for condition, rows in conditions(data, name):
                texts = [task.readable(row["text"], "A row") for row in rows]
                answered = answer_inputs(model, base_model.tokenizer, task, texts)
                for number, (row, text, answer) in enumerate(zip(rows, texts, answered, strict=True)):
                    facts = answer_facts(task.schema, text, answer.text)
                    right = answer_facts(task.schema, text, row["label"])["label"]
                    answers.append(
                        {
                            **facts,
                            **answer.confidence._asdict(),
                            "id": f"{name}/{condition}/{number}",
                            "input": text,
                            "expected": right,
                            "score": None if right is None else float(facts["label"] == right),
                            "condition": condition,
                        }
                    )
                typer.echo(f"{name}, {condition}: {len(rows)} answers", err=True)
    return pd.DataFrame(answers, columns=list(KEPT))


def halves(rows: pd.DataFrame, draw: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two disjoint random halves."""
    order = draw.permutation(len(rows))
    return rows.iloc[order[: len(rows) // 2]], rows.iloc[order[len(rows) // 2 :]]


def false_alarms(rows: pd.DataFrame, num_looks: int, config: DriftLimits) -> dict[str, Any]:
    """Share of random halves of one task's rows that raise an alarm, and of those that would without limits on size."""
    draw = np.random.default_rng(0)
    looks = [_look(*halves(rows, draw), config) for _ in range(num_looks)]
    return {
        "num_looks": num_looks,
        "rows_of_a_half": len(rows) // 2,
        "alarms": _share([bool(look.alarms) for look in looks]),
        "significant": _share([_is_significant(look, config.alpha / max(1, look.num_tests)) for look in looks]),
        "promised": config.alpha,
    }


def _is_significant(look: TaskDrift, level: float) -> bool:
    accuracies = [each for each in (look.estimated, look.measured) if each is not None]
    p_values = [test.p_value for test in look.tests] + [each.p_value for each in accuracies if each.p_value is not None]
    return any(p_value < level for p_value in p_values)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _look(reference: pd.DataFrame, live: pd.DataFrame, config: DriftLimits) -> TaskDrift:
    (look,) = compare(reference, live.assign(time=None), config).tasks
    return look


def live_conditions(answers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each condition of one task. A condition without the commonest label is made of the usual rows."""
    by_condition = {str(name): rows for name, rows in answers.groupby("condition", sort=False)}
    usual = by_condition[USUAL]
    gone = usual["expected"].mode().iloc[0]
    return {**by_condition, "one label is gone": usual[usual["expected"] != gone]}


def power(answers: pd.DataFrame, num_draws: int, config: DriftLimits, windows: Sequence[int]) -> list[dict[str, Any]]:
    """How often each condition raises an alarm. The reference is half of the usual rows, the window comes from others.

    A window that is larger than what is left is drawn with replacement.
    """
    lines, by_condition = [], live_conditions(answers)
    for condition, rows in by_condition.items():
        for size in windows:
            draw = np.random.default_rng(0)
            looks, repeated = [], False
            for _ in range(num_draws):
                reference, left = _drawn(by_condition[USUAL], rows, condition, draw)
                repeated = len(left) < size
                live = left.iloc[draw.choice(len(left), size, replace=repeated)]
                looks.append(_look(reference, live, config))
            kinds = [{alarm.kind for alarm in look.alarms} for look in looks]
            tests = [{test.name for test in look.tests if test.is_alarm} for look in looks]
            lines.append(
                {
                    "condition": condition,
                    "window": size,
                    "alarms": _share([bool(look.alarms) for look in looks]),
                    **{kind: _share([kind in of_look for of_look in kinds]) for kind in ("drift", "quality")},
                    "tests": {test.name: _share([test.name in alarms for alarms in tests]) for test in looks[0].tests},
                    "with_replacement": repeated,
                    "num_draws": num_draws,
                }
            )
    return lines


def _drawn(
    usual: pd.DataFrame, rows: pd.DataFrame, condition: str, draw: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Half of the usual rows as the reference, and the condition's rows that are not those of the reference."""
    reference, _rest = halves(usual, draw)
    if condition.startswith("texts of "):  # of another task
        return reference, rows
    return reference, rows[~rows["number"].isin(reference["number"])]


def atc(answers: pd.DataFrame, num_draws: int, config: DriftLimits) -> list[dict[str, Any]]:
    """The estimated accuracy against the true one, where a right answer is known."""
    lines, by_condition = [], live_conditions(answers)
    for condition, rows in by_condition.items():
        if not rows["score"].notna().all():
            continue
        draw, pairs = np.random.default_rng(0), []
        for _ in range(num_draws):
            reference, live = _drawn(by_condition[USUAL], rows, condition, draw)
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
    config, tasks = DriftLimits(), {}
    for name, of_task in answers.groupby("task"):
        rows = of_task.assign(number=of_task["id"].str.rpartition("/")[2].astype(int))
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
        asked = ask(version, data, tasks.split(","), base, precision)  # type: ignore[arg-type]
        answers.parent.mkdir(parents=True, exist_ok=True)
        asked.to_parquet(answers, index=False)
    kept = pd.read_parquet(answers)
    write_result(out, measure(kept, num_looks=looks, num_draws=draws, num_text_draws=text_draws))


if __name__ == "__main__":
    typer.run(main)
