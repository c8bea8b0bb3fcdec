"""Bounds that train nothing: a classifier per task answers from features of the untouched base model.

    python -m benchmarks.method.heads --data FOLDER --head frozen_head --task agnews --task yahoo --rows 150

So nothing can be forgotten. A head knows a row's task, as the prompt of every strategy does.

frozen_head   linear discriminant analysis with Ledoit-Wolf shrinkage, as RanPAC's head without its random projection
              (arXiv 2307.02251)
knn           the stored rows nearest to a text vote, after Reference Trustable Decoding (arXiv 2409.20181) with one
              head
knn_means     the nearest mean of a label's rows

Shapes: N rows, K neighbours, D width of the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.continual.suites import Part, SuiteTask, load_suite
from benchmarks.output import RESULTS, Base, Out, write_result
from deal_core.base_model.load import BaseModel, load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.evaluation.report import outcome_text
from deal_core.evaluation.score import evaluate_answers
from deal_core.selection.label_noise import features
from infra.settings import HomeSettings

NUM_NEIGHBOURS = 32
MAX_PROMPT_TOKENS = 160


def _nearest_rows(train_ND: NDArray[np.float64]) -> ClassifierMixin:
    """Neighbours that vote with weight exp(-d^2 / T); T is the stored rows' mean d^2 to their own K-th neighbour."""
    num_neighbours = min(NUM_NEIGHBOURS, len(train_ND))
    scaled_ND = StandardScaler().fit_transform(train_ND)
    index = KNeighborsClassifier(num_neighbours).fit(scaled_ND, np.zeros(len(train_ND)))
    distances_NK, _ = index.kneighbors(scaled_ND)
    temperature = max(float(np.mean(distances_NK[:, -1] ** 2)), np.finfo(float).tiny)
    return KNeighborsClassifier(num_neighbours, weights=lambda distances: np.exp(-(distances**2) / temperature))


HEADS: dict[str, Callable[[NDArray[np.float64]], ClassifierMixin]] = {
    "frozen_head": lambda _: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "knn": _nearest_rows,
    "knn_means": lambda _: NearestCentroid(),
}
"""Name of a bound -> its classifier for these training rows. Features are standardised before it."""


def answer_by_head(
    bound: str, train_ND: Tensor, labels: Sequence[str], test_ND: Tensor, known: Sequence[str]
) -> list[str]:
    """Fit a bound's classifier on the features and labels of training rows, and return its label for every test row.

    A label of the task (`known`) without a training row is never answered.
    """
    if len(set(labels)) < 2:  # a classifier needs two classes
        return [labels[0] if labels else known[0]] * len(test_ND)
    rows_ND, others_ND = (part_ND.double().numpy() for part_ND in (train_ND, test_ND))
    head = make_pipeline(StandardScaler(), HEADS[bound](rows_ND))
    head.fit(rows_ND, list(labels))
    return [str(label) for label in head.predict(others_ND)]


def score_heads(
    head: str, base: BaseModel, tasks: Mapping[str, SuiteTask], num_rows: int, part: Part
) -> dict[str, dict[str, Any]]:
    """Fit a head for every task on its first rows; return the scores of its answers to the rows of a part, by task."""
    scores = {}
    for name, task in tasks.items():
        if not task.schema.labels:
            raise typer.BadParameter(f"{head} answers with labels, and task {name} has none")
        learned, tested = (Dataset.from_list(list(rows)) for rows in (task.train[:num_rows], task.part(part)))
        train_ND, test_ND = (
            features(base.model, base.tokenizer, task.schema, [*rows["input"]], max_prompt_tokens=MAX_PROMPT_TOKENS)
            for rows in (learned, tested)
        )
        answers = answer_by_head(head, train_ND, list(learned["output"]), test_ND, task.schema.labels)
        evaluation = evaluate_answers(task.schema, tested, answers)
        scores[name] = {
            "correct": outcome_text(evaluation.outcomes),
            "rouge1": evaluation.rouge1,
            "majority_rate": evaluation.majority_rate,
        }
    return scores


def main(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    task: Annotated[list[str], typer.Option(help="Tasks.")],
    head: Annotated[list[str], typer.Option(help="frozen_head, knn, knn_means.")],
    rows: Annotated[int, typer.Option(help="Training rows per task; the first rows are used.")] = 150,
    part: Annotated[str, typer.Option(help="Test rows: dev or reported.")] = "reported",
    base: Base = DEFAULT_BASE,
    out: Out = RESULTS / "heads.json",
) -> None:
    """Score heads on tasks, and write the scores."""
    model, tasks = load_base(base, HomeSettings().cache_dir), load_suite(data, tuple(task))
    scores = {name: score_heads(name, model, tasks, rows, part) for name in head}  # type: ignore[arg-type]
    write_result(out, {"base": model.name, "rows": rows, "part": part, "heads": scores})


if __name__ == "__main__":
    typer.run(main)
