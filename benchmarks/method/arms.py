r"""Ideas of neighbouring papers, tried before they get a setting.

    OMP_NUM_THREADS=1 python -m benchmarks.method.arms --data FOLDER --arm plain --arm consistency --seed 0
    OMP_NUM_THREADS=1 python -m benchmarks.method.arms --data FOLDER --arm plain --arm own --arm recentred \
        --strategy deal_asked --task yelp --task amazon --task MNLI --task IMDB --task SST-2 --task dbpedia \
        --task agnews --task yahoo --task BoolQA --out benchmarks/results/arms_recentred.json
    (the same with --seed 1 and the arms plain and own gives arms_own.json, with --seed 0 --seed 1 and saved
    arms_saved.json; benchmarks.report compares saved with own)

One adapter learns the tasks one after the other, and all tasks are scored on development rows in the end. The arms:

plain         the strategy as it is
rate          the strategy at twice the learning rate: the control of `consistency`
consistency   after Learning from the Undesirable (arXiv 2511.13052), in a cheaper form: the adapter takes one step of
              length `STEP` up the loss, and the hidden states of the answers' tokens there are held to those before it
own           `deal_asked` with `texts: own`: it asks about up to `NUM_FURTHER_ROWS` texts of the old tasks
              themselves, which it has not learned, held to the parent's answers, re-centred. No step more than `plain`
saved         as `own`, with `answers: first`: the answers are those of the version that had just learned the
              task. They are asked for once; in `own` every parent is asked again
recentred     the last version of `plain` after `--recentre-steps` of `benchmarks.method.recentre`, on training rows
              that it has not learned

The rules, written before the first run. consistency: its mean accuracy is above that of both `plain` and `rate`, lower
end of the interval over rows above 0, with both seeds. own: above `plain` in the same sense, and not behind `recentred`
on the second half of the rows. recentred: above `plain`; its 50 steps were chosen among 25 and 50 on the first half of
the development rows. Else an idea is left out.

saved is taken up if the interval over rows of both seeds together, against `own`, lies above -1 point: it asks less.

The arm own was the default until `rehearsal.rows` took its place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal
from unittest.mock import patch

import torch
import typer
from datasets import disable_progress_bars
from torch import Tensor, nn

from benchmarks.continual.run import NUM_FURTHER_ROWS
from benchmarks.continual.suites import load_suite
from benchmarks.method.asked import TaskTexts
from benchmarks.method.recentre import recentre_adapter
from benchmarks.method.versions import Versions
from benchmarks.output import RESULTS, Base, Out, write_result
from deal_core.adapter.files import METHOD_FILE
from deal_core.base_model.load import load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import RATES, TrainConfig
from deal_core.data.collate import IGNORED, NOT_READ
from deal_core.evaluation.report import outcome_text
from deal_core.method_config import MethodConfig
from deal_core.strategies import strategy_class
from deal_core.training import train as training
from deal_core.training.trainer import AdapterTrainer
from infra.settings import HomeSettings

Arm = Literal["plain", "rate", "consistency", "own", "saved", "recentred"]
STEP, WEIGHT = 0.1, 5.0
"""The paper's length of a step and weight of the term. Here the term is relative to the squared hidden states."""
ASKED: dict[str, dict[str, str]] = {"own": {"texts": "own"}, "saved": {"texts": "own", "answers": "first"}}
"""The options of the arms that ask about texts of the old tasks themselves."""
TASKS = ("dbpedia", "amazon", "yahoo", "agnews")
"""Order 1 of the suite of four."""
TINY = 1e-12


class _ConsistentTrainer(AdapterTrainer):
    """Adds the gradient of the consistency term after a step's last micro-batch, before the strategy sees it."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._last = inputs
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        before_step = self.strategy.before_step
        with patch.object(self.strategy, "before_step", lambda: (self._add_consistency(), before_step())):
            return super().training_step(*args, **kwargs)

    def _add_consistency(self) -> None:
        params = [param for param in self.model.parameters() if param.grad is not None]
        norm = torch.stack([param.grad.norm() for param in params]).norm()
        with torch.no_grad():
            calm = _hidden(self.model, self._last)
            kept = [param.detach().clone() for param in params]
            for param in params:
                param += STEP * param.grad / (norm + TINY)
        moved = _hidden(self.model, self._last)
        is_token_BK = self._last["labels"].ne(IGNORED)
        terms = [
            ((after - before).square().sum(-1) / before.square().sum(-1).clamp_min(TINY))[is_token_BK].mean()
            for before, after in zip(calm, moved, strict=True)
        ]
        (WEIGHT * torch.stack(terms).mean()).backward()
        with torch.no_grad():
            for param, before in zip(params, kept, strict=True):
                param.copy_(before)


def _hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The hidden states, after every layer, from which the answers' tokens are predicted, each B×K×H, in fp32."""
    num_tokens = inputs["labels"].shape[1]
    features = {name: value for name, value in inputs.items() if name not in NOT_READ}
    if "prefix_ids" in inputs:  # whole rows: the prefix is put back
        num_rows = inputs["input_ids"].shape[0]
        features["input_ids"] = torch.cat([inputs["prefix_ids"].expand(num_rows, -1), inputs["input_ids"]], 1)
        mask = inputs["attention_mask"]
        features["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    states = model(**features, output_hidden_states=True, logits_to_keep=1, use_cache=False).hidden_states[1:]
    return [state[:, -num_tokens - 1 : -1].float() for state in states]


def learn_all(versions: Versions, arm: Arm, num_rows: int) -> str:
    """Learn all tasks in their order, as far as they are not learned; return the name of the last version."""
    parent = None
    for number in range(len(versions.tasks)):
        if (versions.folder / str(number) / METHOD_FILE).is_file():
            parent = str(number)
            continue
        setup = versions.setup(number, range(number))
        old_texts: list[TaskTexts] = []
        if arm in ASKED:
            setup = replace(setup, method=MethodConfig(strategy_options=ASKED[arm]))
            old_texts = texts_of(versions, range(number), num_rows)
        trainer = _ConsistentTrainer if arm == "consistency" else AdapterTrainer
        with patch.object(training, "AdapterTrainer", trainer):
            parent = versions.learn(str(number), versions.rows(number, 0, num_rows), setup, parent, old_texts)
    assert parent is not None
    return parent


def texts_of(versions: Versions, numbers: Iterable[int], num_rows: int) -> list[TaskTexts]:
    """Training rows of tasks after those that are learned."""
    return [
        TaskTexts(
            task=versions.tasks[number].schema,
            rows=versions.rows(number, num_rows, num_rows + NUM_FURTHER_ROWS),
            max_prompt_tokens=versions.train.max_prompt_tokens,
            max_new_tokens=versions.train.max_answer_tokens,
        )
        for number in numbers
    ]


def recentre(versions: Versions, last: str, num_rows: int, num_steps: int) -> str:
    """Re-centre a copy of the last version on the rows after those that were learned; return the copy's name."""
    texts = texts_of(versions, range(len(versions.tasks)), num_rows)
    name = f"{last}-recentred-{num_steps}"
    shutil.copytree(versions.folder / last, versions.folder / name, dirs_exist_ok=True)
    for note in recentre_adapter(versions.base, versions.folder / name, texts, versions.train, num_steps):
        typer.echo(note)
    return name


def main(
    data: Annotated[Path, typer.Option(help="Folder of tasks.")],
    arm: Annotated[list[str], typer.Option(help="Arms.")],
    task: Annotated[list[str] | None, typer.Option(help="Tasks, in order.", show_default=", ".join(TASKS))] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.", show_default="0")] = None,
    strategy: Annotated[str, typer.Option(help="Strategy.")] = "seq_lora",
    rows: Annotated[int, typer.Option(help="Training rows per task; the first rows are used.")] = 150,
    max_test_rows: Annotated[int, typer.Option(help="Development rows per task.")] = 200,
    recentre_steps: Annotated[int, typer.Option(help="Steps of the arm recentred.")] = 50,
    keep: Annotated[
        Path | None, typer.Option(help="Keeps the versions; a second call continues.", show_default="a temporary one")
    ] = None,
    base: Base = DEFAULT_BASE,
    out: Out = RESULTS / "arms.json",
) -> None:
    """Learn the tasks with every arm and seed, and write the outcomes."""
    disable_progress_bars()
    if strategy != "deal_asked" and (idle := sorted(ASKED.keys() & set(arm))):
        raise typer.BadParameter(f"{', '.join(idle)} changes what deal_asked asks; give --strategy deal_asked")
    names = tuple(task or TASKS)
    suite, model = load_suite(data, names), load_base(base, HomeSettings().cache_dir)
    settings = {"base": model.name, "strategy": strategy, "rows": rows, "tasks": names}
    made_by = [model.sha256, settings, strategy_class(strategy).revision, asdict(TrainConfig())]
    digest = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:8]
    settings |= {"recentre_steps": recentre_steps} if "recentred" in arm else {}
    trials: list[dict[str, Any]] = []
    for each in arm:
        for number in seed or [0]:
            train = TrainConfig(max_prompt_tokens=160, checkpoint_steps=0, seed=number)
            if each == "rate":
                train = replace(train, learning_rate=2 * RATES[0][1])
            with TemporaryDirectory() as temporary:
                folder = (keep or Path(temporary)) / f"{'plain' if each == 'recentred' else each}-{number}-{digest}"
                versions = Versions(model, [suite[name] for name in names], folder, strategy, train)
                last = learn_all(versions, each, rows)  # type: ignore[arg-type]
                if each == "recentred":
                    last = recentre(versions, last, rows, recentre_steps)
                scores = versions.score(last, max_test_rows)
            outcomes = {name: outcome_text(found.outcomes) for name, found in scores.items()}
            accuracy = {name: 100 * text.count("1") / len(text) for name, text in outcomes.items()}
            mean = sum(accuracy.values()) / len(accuracy)
            trials.append({"arm": each, "seed": number, "mean": mean, "accuracy": accuracy, "outcomes": outcomes})
            write_result(out, {**settings, "trials": trials})


if __name__ == "__main__":
    typer.run(main)
