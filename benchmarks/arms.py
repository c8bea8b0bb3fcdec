r"""Ideas of neighbouring papers, tried before they get a setting.

    OMP_NUM_THREADS=1 python -m benchmarks.arms --data FOLDER --arm plain --arm consistency --seed 0
    OMP_NUM_THREADS=1 python -m benchmarks.arms --data FOLDER --arm plain --arm own --arm recentred --strategy deal \
        --task yelp --task amazon --task MNLI --task IMDB --task SST-2 --task dbpedia --task agnews --task yahoo \
        --task BoolQA --out benchmarks/results/arms_recentred.json
    (the same with --seed 1 and the arms plain and own gives benchmarks/results/arms_own.json)

One adapter learns the tasks one after the other, and all tasks are scored on development rows in the end. The arms:

plain         the strategy as it is
rate          the strategy at twice the learning rate: the control of `consistency`
consistency   after Learning from the Undesirable (arXiv 2511.13052), in a cheaper form: the adapter takes one step of
              length `STEP` up the loss, and the hidden states of the answers' tokens there are held to those before it
anchors       `deal`, and `NUM_ANCHORS` more questions a step: old tasks about `CONTENT_FREE` texts, held to the answers
              that the adapter gave when it had just learned the task (after arXiv 2102.09690, which calibrates answers
              by content-free texts)
own           `deal`, and its questions are about up to `MAX_OWN_TEXTS` texts of the old tasks themselves, which it
              has not learned, held to the parent's answers, re-centred. No step more than `plain`
both          half of the questions as in `own`, half as in `plain`
saved         as `own`, but the answers to a task's texts are those of the version that had just learned the task.
              They are asked for once; in `own` every parent is asked again
recentred     the last version of `plain` after `--recentre-steps` of `deal_core.training.recentre`, on training rows
              that it has not learned

The rules, written before the first run. consistency: its mean accuracy is above that of both `plain` and `rate`, lower
end of the interval over rows above 0, with both seeds. anchors, own and both: above `plain` in the same sense. Of own
and both, the one with the higher mean is taken up, if it is not behind `recentred` on the second half of the rows. Else
an idea is left out. The same as of anchors is asked of recentred, but after a first trial: its 50 steps were chosen
among 25 and 50 on the first half of the development rows.

saved is taken up if the interval over rows of both seeds together, against `own`, lies above -1 point: it asks less.

The arm own was taken up as `memory: tests`. The arm both was not run.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import typer
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.output import RESULTS, Base, Out, write_result
from benchmarks.versions import Versions
from deal_core.adapter.files import METHOD_FILE
from deal_core.base_model.load import load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.benchmark.suites import load_suite
from deal_core.config import MAX_OWN_TEXTS, TrainConfig
from deal_core.data.collate import IGNORED, NOT_READ
from deal_core.evaluation.report import outcome_text
from deal_core.method_config import RehearsalConfig
from deal_core.strategies import deal
from deal_core.strategies.deal import Deal
from deal_core.strategies.label_questions import questions_with, recentred_goals
from deal_core.strategies.questions import _on_new_texts
from deal_core.strategies.rehearsal import Question, Rehearsal
from deal_core.strategies.strategy import SEED_STRIDE, MethodState, TaskContext, TaskTexts
from deal_core.training import train as training
from deal_core.training.recentre import _questions, recentre_adapter
from deal_core.training.trainer import AdapterTrainer
from infra.settings import HomeSettings

Arm = Literal["plain", "rate", "consistency", "anchors", "own", "both", "saved", "recentred"]
STEP, WEIGHT = 0.1, 5.0
"""The paper's length of a step and weight of the term. Here the term is relative to the squared hidden states."""
CONTENT_FREE = ("", "N/A", "-", "...", "none", "text", "the", "?")
NUM_ANCHORS = 2
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


class _AnchoredRehearsal(Rehearsal):
    """Adds questions about content-free texts to every step; the old tasks take turns."""

    anchors: Sequence[Sequence[Question]] = ()

    def draw(self, step: int) -> list[Question]:
        places = range(step * NUM_ANCHORS, (step + 1) * NUM_ANCHORS)
        turns = [divmod(place, len(self.anchors)) for place in places] if self.anchors else []
        return super().draw(step) + [self.anchors[task][turn % len(CONTENT_FREE)] for turn, task in turns]


@contextmanager
def anchored() -> Iterator[None]:
    """Within the block, `deal` keeps its answers to content-free texts and is held to those of old tasks."""
    kept: dict[str, list[Question]] = {}
    finish, make = Deal.finish, deal.make_rehearsal

    def answers(context: TaskContext, model: PeftModel) -> list[Question]:
        texts = Dataset.from_dict({"input": list(CONTENT_FREE)})
        found = _on_new_texts(
            RehearsalConfig(), model, replace(context, rows=texts), [(context.task, 0)], len(CONTENT_FREE)
        )
        return found[0]

    def finish_with_answers(self: Deal) -> MethodState:
        state = finish(self)
        kept[self.context.task.name] = answers(self.context, self.model)
        return state

    def make_anchored(config: RehearsalConfig, model: PeftModel, context: TaskContext, *rest: Any) -> Rehearsal | None:
        made = make(config, model, context, *rest)
        if made is not None:
            made.__class__ = _AnchoredRehearsal
            made.anchors = [kept[old.name] for old in context.old_tasks]
        return made

    with patch.object(Deal, "finish", finish_with_answers), patch.object(deal, "make_rehearsal", make_anchored):
        yield


@contextmanager
def asking_about_own_texts(versions: Versions, num_rows: int, *, is_shared: bool) -> Iterator[None]:
    """Within the block, `deal` asks about texts of the old tasks; with `is_shared`, half of its questions are these."""
    make = deal.make_rehearsal

    def make_own(config: RehearsalConfig, model: PeftModel, context: TaskContext, *rest: Any) -> Rehearsal | None:
        made = make(config, model, context, *rest) if is_shared else None
        texts = texts_of(versions, range(len(context.old_tasks)), num_rows)
        own, _ = _questions(context.base, model, texts, context.train, lambda done, total, stage: None)
        arrived = made.kinds if made else []
        return Rehearsal(
            [own, *arrived], context.collator(), num_rows=config.rows_per_step, weight=config.weight, temperature=1.0,
            seed=context.train.seed + SEED_STRIDE * len(texts),
        )  # fmt: skip

    with patch.object(deal, "make_rehearsal", make_own):
        yield


@contextmanager
def keeping_first_answers(versions: Versions, num_rows: int) -> Iterator[None]:
    """Within the block, `deal` asks about texts of the old tasks, held to the answers right after their learning."""

    def make_saved(config: RehearsalConfig, model: PeftModel, context: TaskContext, *_: Any) -> Rehearsal | None:
        sets, tokenizer = [], context.base.tokenizer
        generator = random.Random(context.train.seed + SEED_STRIDE * len(context.old_tasks))
        for number, each in enumerate(texts_of(versions, range(len(context.old_tasks)), num_rows)):
            path = versions.folder / f"answers-{number}.json"
            if not path.is_file():  # the newest old task: the parent has just learned it
                goals_NL, _ = recentred_goals(model, tokenizer, each)
                path.write_text(json.dumps(goals_NL.tolist()))
            sets.append(questions_with(tokenizer, each, np.array(json.loads(path.read_text())), generator))
        return Rehearsal(
            [sets], context.collator(), num_rows=config.rows_per_step, weight=config.weight, temperature=1.0,
            seed=context.train.seed + SEED_STRIDE * len(sets),
        )  # fmt: skip

    with patch.object(deal, "make_rehearsal", make_saved):
        yield


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
        if arm != "anchors" and (versions.folder / str(number) / METHOD_FILE).is_file():  # anchors are kept in memory
            parent = str(number)
            continue
        setup = versions.setup(number, range(number))
        trainer = _ConsistentTrainer if arm == "consistency" else AdapterTrainer
        with patch.object(training, "AdapterTrainer", trainer):
            parent = versions.learn(str(number), versions.rows(number, 0, num_rows), setup, parent)
    assert parent is not None
    return parent


def texts_of(versions: Versions, numbers: Iterable[int], num_rows: int) -> list[TaskTexts]:
    """Training rows of tasks after those that are learned."""
    return [
        TaskTexts(task=versions.tasks[number].schema,
                   rows=versions.rows(number, num_rows, num_rows + MAX_OWN_TEXTS),
                   max_prompt_tokens=versions.train.max_prompt_tokens)
        for number in numbers
    ]  # fmt: skip


def recentre(versions: Versions, last: str, num_rows: int) -> str:
    """Re-centre a copy of the last version on the rows after those that were learned; return the copy's name."""
    texts = texts_of(versions, range(len(versions.tasks)), num_rows)
    name = f"{last}-recentred-{versions.train.recentre_steps}"
    shutil.copytree(versions.folder / last, versions.folder / name, dirs_exist_ok=True)
    for note in recentre_adapter(versions.base, versions.folder / name, texts, versions.train):
        typer.echo(note)
    return name


def _asking(arm: str, versions: Versions, num_rows: int) -> AbstractContextManager[None]:
    """What an arm changes of the rehearsal."""
    if arm == "anchors":
        return anchored()
    if arm == "saved":
        return keeping_first_answers(versions, num_rows)
    is_own = arm in ("own", "both")
    return asking_about_own_texts(versions, num_rows, is_shared=arm == "both") if is_own else nullcontext()


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
    names = tuple(task or TASKS)
    suite, model = load_suite(data, names), load_base(base, HomeSettings().cache_dir)
    settings = {"base": model.name, "strategy": strategy, "rows": rows, "tasks": names}
    digest = hashlib.sha256(json.dumps([model.sha256, settings]).encode()).hexdigest()[:8]
    settings |= {"recentre_steps": recentre_steps} if "recentred" in arm else {}
    trials: list[dict[str, Any]] = []
    for each in arm:
        for number in seed or [0]:
            train = TrainConfig(
                max_prompt_tokens=160, checkpoint_steps=0, seed=number, recentre_steps=recentre_steps
            )  # fmt: skip
            if each == "rate":
                train = replace(train, learning_rate=2 * train.learning_rate)
            with TemporaryDirectory() as temporary:
                folder = (keep or Path(temporary)) / f"{'plain' if each == 'recentred' else each}-{number}-{digest}"
                versions = Versions(model, [suite[name] for name in names], folder, strategy, train)
                with _asking(each, versions, rows):
                    last = learn_all(versions, each, rows)  # type: ignore[arg-type]
                if each == "recentred":
                    last = recentre(versions, last, rows)
                scores = versions.score(last, max_test_rows)
            outcomes = {name: outcome_text(found.outcomes) for name, found in scores.items()}
            accuracy = {name: 100 * text.count("1") / len(text) for name, text in outcomes.items()}
            mean = sum(accuracy.values()) / len(accuracy)
            trials.append({"arm": each, "seed": number, "mean": mean, "accuracy": accuracy, "outcomes": outcomes})
            write_result(out, {**settings, "trials": trials})


if __name__ == "__main__":
    typer.run(main)
