"""Two versions of one parent are merged without data, and compared with learning one task after the other.

    OMP_NUM_THREADS=1 python -m benchmarks.method.merging --data FOLDER

A parent learns the first task. From it, one version learns the second task and another one the third. Two merges are
made of them and cut to the parent's rank: the mean of both ΔW, and ΔW_parent + Σ(ΔW − ΔW_parent) (task arithmetic,
arXiv 2212.04089). The rival learns the third task on top of the second. All are scored on development rows.

The rule, written before the first run: `deal merge` is worth a command if the better merge is at most 2 points below
the rival, on average over the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from datasets import disable_progress_bars

from benchmarks.continual.suites import load_suite
from benchmarks.method.rivals import write_factors
from benchmarks.method.versions import Versions
from benchmarks.output import RESULTS, Base, Out, write_result
from deal_core.adapter.stack import Spectrum, collect_stacks, decompose
from deal_core.adapter.state import adapter_on, load_method_state, save_adapter
from deal_core.base_model.load import load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import TrainConfig
from infra.settings import HomeSettings

Factors = tuple[torch.Tensor, torch.Tensor]


def weighted(parts: Sequence[Factors], weights: Sequence[float]) -> tuple[Factors, float]:
    """Factors of the best approximation of Σ w·B·A of the parts' rank, and the share of ‖ΔW‖² that is cut off."""
    rank = parts[0][0].shape[1]
    b_MOR = torch.cat([weight * b for (_, b), weight in zip(parts, weights, strict=True)], dim=2)
    whole = decompose(torch.cat([a for a, _ in parts], dim=1), b_MOR)
    power_MR = whole.sigma_MR.square()
    # the largest directions are the best approximation of this rank (Eckart-Young)
    cut = Spectrum(whole.left_MOR[..., :rank], whole.sigma_MR[:, :rank], whole.right_MIR[..., :rank])
    y_A, y_B = cut.factors()
    return (y_A.mT, y_B), float(power_MR[:, rank:].sum() / power_MR.sum())


def merge(versions: Versions, name: str, names: Sequence[str], weights: Sequence[float]) -> float:
    """Write a merge of versions; return the largest share of ‖ΔW‖² that the rank cuts off in a group of modules."""
    base, folder, factors, lost = versions.base, versions.folder, [], []
    for each in names:
        with adapter_on(base.model, folder / each) as model:
            factors.append([stack.read() for stack in collect_stacks(model)])
    with adapter_on(base.model, folder / names[0]) as model:
        for stack, parts in zip(collect_stacks(model), zip(*factors, strict=True), strict=True):
            merged, share = weighted(parts, weights)
            write_factors(stack, *merged)
            lost.append(share)
        save_adapter(model, folder / name, load_method_state(folder / names[0]), base_name=base.name)
    return max(lost)


def trial(versions: Versions, num_rows: int, max_test_rows: int) -> dict[str, Any]:
    """Train, merge and score the versions of three tasks; accuracies are points, in the order of the tasks."""

    def learn(number: int, parent: str | None, olds: Sequence[int]) -> str:
        rows = versions.rows(number, 0, num_rows)
        return versions.learn(f"{parent or ''}{number}", rows, versions.setup(number, olds), parent)

    parent = learn(0, None, [])
    left, right = learn(1, parent, [0]), learn(2, parent, [0])
    after = learn(2, left, [0, 1])
    cut_off = {
        "mean": merge(versions, "mean", [left, right], [0.5, 0.5]),
        "sum": merge(versions, "sum", [left, right, parent], [1.0, 1.0, -1.0]),
    }
    names = {"parent": parent, "second": left, "third": right, "one after the other": after}
    scores = {
        shown: [100 * each.accuracy for each in versions.score(name, max_test_rows).values()]
        for shown, name in {**names, "mean": "mean", "sum": "sum"}.items()
    }
    return {"scores": scores, "cut_off": cut_off}


def main(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    task: Annotated[list[str] | None, typer.Option(help="Three tasks.", show_default="dbpedia, agnews, yahoo")] = None,
    rows: Annotated[int, typer.Option(help="Training rows per task; the first rows are used.")] = 150,
    max_test_rows: Annotated[int, typer.Option(help="Development rows per task.")] = 200,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.", show_default="0, 1")] = None,
    base: Base = DEFAULT_BASE,
    out: Out = RESULTS / "merging.json",
) -> None:
    """Train, merge and score with every seed, and write the figures."""
    disable_progress_bars()
    names = tuple(task or ("dbpedia", "agnews", "yahoo"))
    suite, model = load_suite(data, names), load_base(base, HomeSettings().cache_dir)
    trials: list[dict[str, Any]] = []
    for number in seed or [0, 1]:
        with TemporaryDirectory() as folder:
            train = TrainConfig(max_prompt_tokens=160, checkpoint_steps=0, seed=number)
            versions = Versions(model, [suite[name] for name in names], Path(folder), "deal", train)
            trials.append({"seed": number, **trial(versions, rows, max_test_rows)})
            write_result(out, {"base": model.name, "rows": rows, "tasks": names, "trials": trials})


if __name__ == "__main__":
    typer.run(main)
