"""The suites of general ability: small sets of requests whose answers a program checks.

Each suite is a file in `rows/`: a request, its checks and an answer that passes on each line. A name that begins with
`lm_eval:` is a task of lm-evaluation-harness, see `deal_core.general.harness`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deal_core.config import HARNESS
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.general import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deal_core.base_model.language_model import LanguageModel
    from deal_core.evaluation.generation import OnProgress
    from deal_core.evaluation.score import AnswerInputs

ROWS_FOLDER = Path(__file__).with_name("rows")
MAX_PROMPT_TOKENS = 1024
"""No request of a suite is as long, with any tokenizer."""
MAX_NEW_TOKENS = {"arithmetic": 32, "instructions": 96, "json": 128, "refusal": 48, "tools": 96}
"""Longest answers. Those that pass are at most half as long."""
VERSIONS = {"arithmetic": 1, "instructions": 1, "json": 1, "refusal": 1, "tools": 1}
"""Raise the number of a suite when its rows, its checks, its longest answer or its prompt change: then no score of
before is compared with a new one."""


class Suite(Protocol):
    """Requests that tell how much of an ability a model has."""

    @property
    def name(self) -> str:
        """Its name in `evaluate.general`."""

    @property
    def identity(self) -> str:
        """What stands for all that decides the scores, apart from the model. Scores of one identity are compared."""

    def __len__(self) -> int:
        """Number of its rows."""

    def score(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        answer: AnswerInputs | None = None,
        on_progress: OnProgress | None = None,
    ) -> tuple[float, ...]:
        """Return the score of every row, 0 to 1. `answer` answers in the model's place, if it can."""


def suite_of(name: str) -> Suite:
    """Return a suite by its name.

    Raises:
        ConfigError: It is a task of lm-evaluation-harness, which is not installed or does not know the task.
    """
    if name.startswith(HARNESS):
        from deal_core.general.harness import HarnessTask

        return HarnessTask(name)
    return read_suite(name)


@dataclass(frozen=True, kw_only=True)
class CheckedSuite:
    """A suite that ships with the project."""

    name: str
    prompts: tuple[str, ...]
    checks: tuple[Mapping[str, Any], ...]
    """What an answer to each prompt has to pass; see `deal_core.general.checks`."""
    examples: tuple[str, ...]
    """An answer to each prompt that passes."""

    @property
    def identity(self) -> str:
        """Its name and its version."""
        return f"{self.name} {VERSIONS[self.name]}"

    def __len__(self) -> int:
        """Number of its rows."""
        return len(self.prompts)

    def score(
        self,
        model: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        answer: AnswerInputs | None = None,
        on_progress: OnProgress | None = None,
    ) -> tuple[float, ...]:
        """Return 1 for every row whose answer passes its checks, else 0."""
        from deal_core.evaluation.generation import answer_inputs

        answers = (answer or partial(answer_inputs, model, tokenizer))(self.asked(tokenizer), self.prompts, on_progress)
        return self.scores_of([each.text for each in answers])

    def asked(self, tokenizer: PreTrainedTokenizerBase) -> ServedTask:
        """Return how a model is asked: by its own chat template, if it has one."""
        is_chat = bool(tokenizer.chat_template)
        schema = TaskSchema(
            name=self.name,
            format="completion",
            prompt="chat" if is_chat else "plain",
            template=None if is_chat else "{text}\nAnswer:",
        )
        return ServedTask(schema=schema, max_prompt_tokens=MAX_PROMPT_TOKENS, max_new_tokens=MAX_NEW_TOKENS[self.name])

    def scores_of(self, answers: Sequence[str]) -> tuple[float, ...]:
        """Return the scores of given answers, one to each prompt."""
        return tuple(float(checks.passes(text, wanted)) for text, wanted in zip(answers, self.checks, strict=True))


@cache
def read_suite(name: str) -> CheckedSuite:
    """Read a suite that ships with the project."""
    rows = [json.loads(line) for line in (ROWS_FOLDER / f"{name}.jsonl").read_bytes().splitlines()]
    return CheckedSuite(
        name=name,
        prompts=tuple(row["prompt"] for row in rows),
        checks=tuple(row["checks"] for row in rows),
        examples=tuple(row["answer"] for row in rows),
    )
