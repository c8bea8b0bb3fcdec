"""The benchmark's tasks: their orders of arrival, and reading them from a folder.

Orders and families are those of the 15-task continual-learning benchmark of O-LoRA (arXiv 2310.14152), which later work
also uses.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deal_core.base_model.sources import HUB_DATASET, fetch_snapshot
from deal_core.data.reading.json_rows import unique_keys
from deal_core.data.reading.lines import open_text
from deal_core.data.reading.readers import read_head, read_rows
from deal_core.data.schema import SURROGATE, PromptForm, TaskSchema
from deal_core.errors import ConfigError, DataValidationError
from deal_core.evaluation.metrics import number_labels, plain_answer
from deal_core.safe_text import listed

Rows = tuple[dict[str, Any], ...]
Part = Literal["dev", "reported"]

_ORDERS: dict[str, dict[str, str]] = {
    "3": {
        "1": "agnews dbpedia yahoo",
    },
    "4": {
        "1": "dbpedia amazon yahoo agnews",
        "2": "dbpedia amazon agnews yahoo",
        "3": "yahoo amazon agnews dbpedia",
    },
    "8": {
        "1": "dbpedia QQP amazon RTE agnews BoolQA yahoo MNLI",
    },
    "9": {
        "1": "yelp amazon MNLI IMDB SST-2 dbpedia agnews yahoo BoolQA",
        "2": "BoolQA yahoo agnews dbpedia SST-2 IMDB MNLI amazon yelp",
    },
    "superni": {
        "1": (
            "samsum_summary sst2_polarity_classification xsum_summarization outcome_extraction "
            "quoref_answer_generation evalution_relation_extraction multi_woz_user_utterance_generation "
            "personachat_generate_next commonsenseqa_answer_generation diplomacy_text_generation "
            "glucose_reverse_cause_event_detection reddit_tifu_long_text_summarization sciq_answer_generation "
            "sentiment140_classification emotion_classification"
        ),
        "2": (
            "glucose_reverse_cause_event_detection commonsenseqa_answer_generation diplomacy_text_generation "
            "multi_woz_user_utterance_generation samsum_summary sentiment140_classification "
            "sciq_answer_generation sst2_polarity_classification evalution_relation_extraction "
            "personachat_generate_next outcome_extraction reddit_tifu_long_text_summarization "
            "quoref_answer_generation xsum_summarization emotion_classification"
        ),
    },
    "superni8": {
        "1": (
            "samsum_summary sst2_polarity_classification outcome_extraction evalution_relation_extraction "
            "commonsenseqa_answer_generation sciq_answer_generation sentiment140_classification "
            "emotion_classification"
        ),
        "2": (
            "commonsenseqa_answer_generation samsum_summary sentiment140_classification sciq_answer_generation "
            "sst2_polarity_classification evalution_relation_extraction outcome_extraction emotion_classification"
        ),
    },
    "15": {
        "1": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
        "2": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    },
}
SUITES = {suite: {order: tuple(names.split()) for order, names in orders.items()} for suite, orders in _ORDERS.items()}
"""Suite → order → tasks. "8" and "9" are this project's own. In "8" consecutive tasks differ much, so forgetting is
strong. "9" is for choosing settings: seven tasks of "15" on which methods differ, and two that share label words.
"superni" is generation: 15 tasks of Super-NaturalInstructions in the two orders of SAPT (arXiv 2401.08295). "superni8"
has those of its tasks with short prompts on which a separate adapter beats SmolLM2-135M-Instruct."""

HUB_SCHEME = "hf://"

NUM_DEV_ROWS = 200
FEW_ROWS, DEV_SHARE = 500, 0.4
"""Settings are chosen on a task's first NUM_DEV_ROWS test rows, or on DEV_SHARE of fewer than FEW_ROWS test rows."""
PARAGRAPH_FIRST = re.compile(
    r"(?P<paragraph>paragraph: .*?)(?P<question>\nquestion: .*\ncandidate answer: .*)", re.DOTALL
)
"""A row of MultiRC as the benchmark has it. Its question stands after 92 % of the text, on average."""


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task of a benchmark.

    Attributes:
        schema: How a row becomes a prompt.
        train: Training rows, columns input and output.
        test: Test rows with the same columns, and references if a row has several right answers.
        dev: Rows to choose settings on; None: they are a part of the test rows.
    """

    schema: TaskSchema
    train: Rows
    test: Rows
    dev: Rows | None = None

    def part(self, part: Part, limit: int | None = None) -> Rows:
        """Return the first `limit` test rows of a part: dev, to choose settings, or reported.

        Raises:
            DataValidationError: The part has no rows.
        """
        num_dev = NUM_DEV_ROWS if len(self.test) >= FEW_ROWS else int(DEV_SHARE * len(self.test))
        dev, reported = (self.test[:num_dev], self.test[num_dev:]) if self.dev is None else (self.dev, self.test)
        rows = dev if part == "dev" else reported
        if not rows:
            raise DataValidationError(
                f"Task {self.schema.name!r} has no row in part {part!r}, having {len(self.test)} test rows; "
                "give it 3 or more, so that both parts have rows."
            )
        return rows[:limit]


def order_of(suite: str, order: str) -> tuple[str, ...]:
    """Return the tasks of an order, first to last.

    Raises:
        ConfigError: There is no such suite or order.
    """
    if suite not in SUITES:
        raise ConfigError(f"Suite {suite!r} is not known; choose one of {', '.join(SUITES)}.")
    if order not in SUITES[suite]:
        raise ConfigError(f"Suite {suite} has no order {order!r}; it has {', '.join(SUITES[suite])}.")
    return SUITES[suite][order]


def name_of(tasks: tuple[str, ...]) -> tuple[str, str]:
    """Return (suite, order) of a sequence of tasks; ("own", the names) if it is in no suite.

    A suite's tasks in alphabetical order, as bounds are stored, are (suite, "any").
    """
    for suite, orders in SUITES.items():
        for order, names in orders.items():
            if tasks == names:
                return suite, order
    for suite, orders in SUITES.items():
        if tasks == tuple(sorted(next(iter(orders.values())))):
            return suite, "any"
    return "own", ", ".join(tasks)


def tasks_folder(source: str) -> Path:
    """Return the folder of tasks: `source`, or the fetched content of hf://datasets/OWNER/NAME[@REVISION].

    Raises:
        ConfigError: The repository cannot be fetched, or the address is not valid.
    """
    if not source.startswith(HUB_SCHEME):
        return Path(source)
    address = HUB_DATASET.fullmatch(source)
    if address is None or address["split"]:
        raise ConfigError(f"{source!r} is not a dataset of the Hub; give hf://datasets/OWNER/NAME, or a folder.")
    return fetch_snapshot(address["repository"], "dataset", ["tasks.json", "*.jsonl"], revision=address["revision"])


def load_suite(folder: Path, names: tuple[str, ...]) -> dict[str, SuiteTask]:
    """Read tasks from a folder.

    It has tasks.json ({task: {instruction, labels}}), and TASK.train.jsonl and TASK.test.jsonl with rows of text and
    label. Rows of prompt and completion make a task of generation, which is scored by ROUGE-L: its labels do not count,
    its rows may have references, and TASK.dev.jsonl may have rows to choose settings on.

    Raises:
        ConfigError: The folder has no tasks.json.
        DataValidationError: A task or a field of a row is missing, or a file has other content.
    """
    if not (folder / "tasks.json").is_file():
        raise ConfigError(
            f"{folder} holds no tasks: no tasks.json with TASK.train.jsonl and TASK.test.jsonl beside it."
        )
    return {name: _load_task(folder, name) for name in names}


def with_prompts(tasks: dict[str, SuiteTask], prompt: PromptForm) -> dict[str, SuiteTask]:
    """The same tasks with prompts of this form."""
    return {name: replace(task, schema=replace(task.schema, prompt=prompt)) for name, task in tasks.items()}


ALWAYS_SAID = ("name", "format", "labels", "instruction", "template", "columns")
"""Fields of a schema that are part of a digest even where they are the default, as in the digests of stored cells."""


def digest_of(tasks: dict[str, SuiteTask]) -> str:
    """Digest of the tasks' content; the order of the tasks does not count, and that of the rows does."""
    digest = hashlib.sha256()
    for name, task in sorted(tasks.items()):
        dev = [] if task.dev is None else [task.dev]
        defaults = TaskSchema(name=name).to_json()
        schema = {
            key: value for key, value in task.schema.to_json().items() if key in ALWAYS_SAID or value != defaults[key]
        }
        digest.update(json.dumps([name, schema, task.train, task.test, *dev], sort_keys=True).encode())
    return digest.hexdigest()


def _load_task(folder: Path, name: str) -> SuiteTask:
    path = folder / "tasks.json"
    described = _json(path)
    if not isinstance(described, dict) or name not in described:
        has = (", ".join(sorted(described)) or "nothing") if isinstance(described, dict) else "no JSON object"
        raise DataValidationError(f"{path} does not describe task {name!r}; it has {has}.")
    task = described[name] if isinstance(described[name], dict) else {}
    files = {part: folder / f"{name}.{part}.jsonl" for part in ("train", "test", "dev")}
    is_generation = "completion" in read_head(files["train"]).columns
    if not isinstance(task.get("instruction"), str) or not (is_generation or _are_texts(task.get("labels"))):
        raise DataValidationError(
            f"{path} does not say what task {name!r} asks; give it an 'instruction', a text, and 'labels', a list of "
            "texts. A task of generation, with rows of prompt and completion, needs no labels."
        )
    columns = ("prompt", "completion") if is_generation else ("text", "label")
    train, test = (_rows(files[part], *columns) for part in ("train", "test"))
    if is_generation:
        dev = _rows(files["dev"], *columns) if files["dev"].is_file() else None
        schema = TaskSchema(name=name, format="completion", instruction=task["instruction"], metric="rouge_l")
        return SuiteTask(schema=schema, train=train, test=test, dev=dev)
    known = number_labels(task["labels"])
    if odd := sorted({row["output"] for row in (*train, *test) if plain_answer(row["output"]) not in known}):
        raise DataValidationError(
            f"Rows of task {name!r} have the labels {listed(odd)}, which {path} does not list; add them."
        )
    schema = TaskSchema(name=name, labels=tuple(task["labels"]), instruction=task["instruction"])
    return SuiteTask(schema=schema, train=asking_first(train), test=asking_first(test))


def asking_first(rows: Rows) -> Rows:
    r"""Put the question of a MultiRC row before its paragraph: prompts are cut at their end, where the question stands.

    Example:
        >>> asking_first(({"input": "paragraph: Long. \nquestion: Why?\ncandidate answer: So.", "output": "True"},))
        ({'input': 'question: Why?\\ncandidate answer: So.\nparagraph: Long.', 'output': 'True'},)
    """
    return tuple(
        {**row, "input": f"{parts['question'].strip()}\n{parts['paragraph'].strip()}"}
        if (parts := PARAGRAPH_FIRST.fullmatch(row["input"]))
        else row
        for row in rows
    )


def _json(path: Path) -> Any:
    try:
        with open_text(path, newline="\n") as file:
            text = file.read()
        if SURROGATE.search(text):
            raise ValueError("it is not UTF-8")
        return json.loads(text, object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise DataValidationError(f"{path} cannot be read as JSON ({error}); the task needs it.") from None


def _rows(path: Path, text: str, label: str) -> Rows:
    """The rows of a file of JSON lines."""
    rows = list(read_rows(path))
    if not rows:
        raise DataValidationError(f"{path} holds no rows; give it at least one.")
    for row in rows:
        place, values = f"Row {row.number} (line {row.line}) of {path}", row.values
        if row.fault is not None:
            raise DataValidationError(f"{place} cannot be read ({row.fault.why}); correct it.")
        if not {text, label} <= values.keys():
            raise DataValidationError(f"{place} lacks {text!r} or {label!r}; give the row both.")
        if not _are_texts(values.get("references", [])):
            raise DataValidationError(f"{place} has 'references' that are no list of texts; give texts.")
        if any(SURROGATE.search(str(cell)) for cell in (values[text], values[label], *values.get("references", []))):
            raise DataValidationError(f"{place} is not UTF-8; save the file as UTF-8.")
    has_references = any(row.values.get("references") for row in rows)
    return tuple(
        {"input": str(values[text]).strip(), "output": str(values[label]).strip()}
        | ({"references": values.get("references") or [str(values[label])]} if has_references else {})
        for values in (row.values for row in rows)
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
