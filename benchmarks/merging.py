"""Two versions of one parent are merged without data, and compared with learning one task after the other.

    OMP_NUM_THREADS=1 python -m benchmarks.merging --data FOLDER

A parent learns the first task. From it, one version learns the second task and another one the third. Two merges are
made of them and cut to the parent's rank: the mean of both ΔW, and ΔW_parent + Σ(ΔW − ΔW_parent) (task arithmetic,
arXiv 2212.04089). The rival learns the third task on top of the second. All are scored on development rows.

The rule, written before the first run: `deal merge` is worth a command if the better merge is at most 2 points below
the rival, on average over the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.output import write_result
from deal_core.adapter.spectrum import Factors, decompose
from deal_core.adapter.stack import collect_stacks
from deal_core.adapter.state import adapter_on, load_method_state, save_adapter
from deal_core.base_model.load import BaseModel, load_base
from deal_core.benchmark.suites import SuiteTask, load_suite
from deal_core.config import AdapterConfig, EvaluateConfig, TrainConfig
from deal_core.evaluation.score import evaluate_task
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingSetup, train_adapter
from infra.settings import HomeSettings

OUT = Path(__file__).parent / "results" / "merging.json"


def weighted(parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Factors, float]:
    """Factors of the best approximation of Σ w·B·A of the parts' rank, and the share of ‖ΔW‖² that is cut off."""
    rank = parts[0][0].shape[1]
    b_MOR = torch.cat([weight * b for (_, b), weight in zip(parts, weights, strict=True)], 2)
    found = decompose(torch.cat([a for a, _ in parts], 1), b_MOR)
    power_MR = found.sigma_MR.square()
    y_A, y_B = found.truncate(rank).factors()
    return (y_A.mT, y_B), float(power_MR[:, rank:].sum() / power_MR.sum())


@dataclass(frozen=True)
class Trial:
    """A base model, three tasks, and the folder of their versions."""

    base: BaseModel
    tasks: Sequence[SuiteTask]
    folder: Path
    num_rows: int
    max_test_rows: int
    train: TrainConfig

    def learn(self, number: int, parent: str | None, olds: Sequence[int]) -> str:
        """Learn a task on top of a version, with the default strategy; return the new version's name."""
        name = f"{parent or ''}{number}"
        setup = TrainingSetup(
            task=self.tasks[number].schema, old_tasks=tuple(self.tasks[old].schema for old in olds), strategy="deal",
            adapter=AdapterConfig(), method=MethodConfig(), train=self.train,
        )  # fmt: skip
        train_adapter(
            self.base, Dataset.from_list(list(self.tasks[number].train[: self.num_rows])), setup,
            parent_folder=self.folder / parent if parent else None, output_folder=self.folder / name,
            checkpoint_folder=self.folder / f"{name}-checkpoints",
        )  # fmt: skip
        return name

    def merge(self, name: str, versions: Sequence[str], weights: Sequence[float]) -> float:
        """Write a merge of versions; return the largest share of ‖ΔW‖² that the rank cuts off in a group of modules."""
        factors = []
        for version in versions:
            with adapter_on(self.base.model, self.folder / version) as model:
                factors.append([stack.read() for stack in collect_stacks(model)])
        with adapter_on(self.base.model, self.folder / versions[0]) as model:
            lost = []
            for stack, parts in zip(collect_stacks(model), zip(*factors, strict=True), strict=True):
                merged, share = weighted(parts, weights)
                stack.write(*merged)
                lost.append(share)
            state = load_method_state(self.folder / versions[0])
            save_adapter(model, self.folder / name, state, base_name=self.base.name)
        return max(lost)

    def score(self, version: str) -> list[float]:
        """Accuracy of a version on every task, in points."""
        found = []
        with adapter_on(self.base.model, self.folder / version) as model:
            for task in self.tasks:
                rows = Dataset.from_list(list(task.part("dev", self.max_test_rows)))
                result = evaluate_task(
                    model, self.base.tokenizer, task.schema, rows, EvaluateConfig(max_new_tokens=20),
                    max_prompt_tokens=self.train.max_prompt_tokens,
                )
                found.append(100 * result.accuracy)
        typer.echo(f"{version}: {found}")
        return found


def main(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    task: Annotated[list[str] | None, typer.Option(help="Three tasks.", show_default="dbpedia, agnews, yahoo")] = None,
    rows: Annotated[int, typer.Option(help="Training rows per task; the first rows are used.")] = 150,
    max_test_rows: Annotated[int, typer.Option(help="Development rows per task.")] = 200,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.", show_default="0, 1")] = None,
    base: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m-instruct",
    out: Annotated[Path, typer.Option(help="File of the figures.")] = OUT,
) -> None:
    """Train, merge and score with every seed, and write the figures."""
    disable_progress_bars()
    names = tuple(task or ("dbpedia", "agnews", "yahoo"))
    suite, model = load_suite(data, names), load_base(base, HomeSettings().cache_dir)
    trials: list[dict[str, Any]] = []
    for number in seed or [0, 1]:
        with TemporaryDirectory() as folder:
            train = TrainConfig(max_prompt_tokens=160, checkpoint_steps=0, seed=number)
            trial = Trial(model, [suite[name] for name in names], Path(folder), rows, max_test_rows, train)
            parent = trial.learn(0, None, [])
            left, right = trial.learn(1, parent, [0]), trial.learn(2, parent, [0])
            after = trial.learn(2, left, [0, 1])
            cut = {
                "mean": trial.merge("mean", [left, right], [0.5, 0.5]),
                "sum": trial.merge("sum", [left, right, parent], [1.0, 1.0, -1.0]),
            }
            scores = {
                "parent": trial.score(parent), "second": trial.score(left), "third": trial.score(right),
                "one after the other": trial.score(after), "mean": trial.score("mean"), "sum": trial.score("sum"),
            }  # fmt: skip
            trials.append({"seed": number, "scores": scores, "cut_off": cut})
            write_result(out, {"base": model.name, "rows": rows, "tasks": names, "trials": trials})


if __name__ == "__main__":
    typer.run(main)
