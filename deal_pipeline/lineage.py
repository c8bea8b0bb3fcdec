"""A lineage as a Python object: learn, evaluate, answer, look back, and move the champion."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import uuid
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import pandas as pd

from deal_pipeline.command import Command, CommandError, Show, end, run_command

if TYPE_CHECKING:
    from datasets import Dataset

Rows: TypeAlias = "str | Path | list[dict[str, Any]] | pd.DataFrame | Dataset"
"""A file, an address, or a table with the columns that a file would have: a list of rows, a DataFrame or a Dataset."""
ANSWER_SECONDS = 330.0
"""Longest wait for an answer; the server itself gives up a little earlier."""
NUM_ROWS = 64
"""Texts of one request."""
KEY = "DEAL_SERVE_API_KEY"
"""The variable that makes the server ask for a token."""
NO_VERSION = ("has no champion here", "Nothing is learned here yet")
"""Part of the message of a lineage without a version."""


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The outcome of one arrival.

    Attributes:
        version: The version that was made, or that had learned the same data before.
        status: How it ended: promoted, rejected, awaiting approval, rollout or repeat.
        accepted: Whether the gate has let the version pass.
        reasons: Why the gate has rejected the version.
        scores: Task → score of the version on its test rows, 0 to 1, by the task's metric.
        metrics: Task → the name of its metric.
        message: The outcome as a sentence.
        values: Everything that `deal adapt --json` prints.
    """

    version: str
    status: str
    accepted: bool
    reasons: tuple[str, ...]
    scores: Mapping[str, float]
    metrics: Mapping[str, str]
    message: str
    values: Mapping[str, Any]


class Lineage:
    """One adapter that learns arrival after arrival.

    Every call runs a command of its own, so the caller's environment and event loop stay as they are. The first
    `predict` starts a server on this machine, which answers until `close`, or until the program ends.

    Args:
        name: Name of the lineage; the first arrival creates it.
        home: Folder that holds everything. None: DEAL_HOME, or ./deal-home.
        show: Called with a line for every finished stage. None: nothing is shown.
        environment: Variables for the commands in addition to the program's, such as DEAL_STORE_URI.

    Raises:
        CommandError: An argument is of another type.

    Example:
        >>> lineage = Lineage("support")
        >>> lineage.adapt("intents.csv", task="intents").accepted  # doctest: +SKIP
        True
        >>> lineage.predict(["I lost my card"])  # doctest: +SKIP
        ['lost card']
    """

    def __init__(
        self,
        name: str = "default",
        *,
        home: str | Path | None = None,
        show: Show | None = print,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        _require(name, str, "the argument name", "a text")
        _require(environment, Mapping | None, "the argument environment", "a dict of texts")
        for text in chain.from_iterable((environment or {}).items()):
            _require(text, str, "the argument environment", "a dict of texts")
        self.name = name
        self._environment = dict(environment or {})
        if home is not None:
            _require(home, str | os.PathLike, "the argument home", "the path of a folder")
            self._environment["DEAL_HOME"] = os.path.abspath(os.path.expanduser(home))
        self._show = show
        self._server: _Server | None = None
        self._starting = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def adapt(
        self,
        data: Rows,
        *,
        task: str | Mapping[str, Any],
        test_data: Rows | None = None,
        base: str | None = None,
        strategy: str | None = None,
        settings: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> Adaptation:
        """Learn one arrival, judge it, and promote it if it passes the gate. A stopped call goes on when repeated.

        Args:
            data: Rows to learn: a file, an address, or a table with the columns that a file would have. A table is
                kept as a file in the home's folder `tables`, unless no version was trained on it.
            task: Name of the task that the rows belong to, or the section `task` of a spec, with its name.
            test_data: Rows to judge the task by; None: a share of the rows.
            base: The base model of a new lineage.
            strategy: How to learn; None: the lineage's own, else deal.
            settings: Other sections of a spec, such as {"train": {"num_epochs": 3}, "gate": {"max_drop_points": 5}}.
            force: Learn the rows even if the lineage has learned them.

        Raises:
            CommandError: The data, a setting or the home cannot be used. Nothing is lost.
        """
        _require(task, str | Mapping, "the argument task", "a name, or the section task of a spec as a dict")
        _require(settings, Mapping | None, "the argument settings", "a dict of a spec's sections")
        if settings and "task" in settings:
            raise CommandError("The settings have a section task; give it as the argument task.", 2)
        arrival = {"name": task} if isinstance(task, str) else dict(task)
        tables: list[Path] = []
        stages: set[str] = set()
        is_needed = False
        try:
            arrival["data"] = self._as_file(data, tables)
            if (test_rows := arrival.get("test_data") if test_data is None else test_data) is not None:
                arrival["test_data"] = self._as_file(test_rows, tables)
            text = _as_json(
                {**(settings or {}), "task": arrival},
                "The settings or the task cannot be written as YAML",
                ensure_ascii=False,
            )
            # JSON is YAML, but YAML does not join JSON's two escapes of one character
            text = re.sub("[^ -~]", lambda match: f"\\U{ord(match[0]):08x}", text)
            with tempfile.TemporaryDirectory(prefix="deal-") as folder:
                spec = Path(folder) / "spec.yaml"
                spec.write_text(text, encoding="utf-8")
                named = {"base_model": base, "strategy": strategy}
                changes = [f"--set={name}={json.dumps(value)}" for name, value in named.items() if value is not None]
                values = self._run("adapt", str(spec), *changes, "--force" if force else None, stages=stages)
            is_needed = values["status"] != "repeat"
        finally:
            # A requeue reads the tables of a version again. A run that has died after its training may still become a
            # version: the lineage's next run completes it.
            if not (is_needed or "train" in stages):
                for table in tables:
                    with suppress(OSError):
                        table.unlink()
        return Adaptation(
            version=values["version"],
            status=values["status"],
            accepted=not values["rejected"],
            reasons=tuple(values["reasons"]),
            scores=values["accuracies"],
            metrics=values["metrics"],
            message=values["message"],
            values=values,
        )

    def evaluate(self, version: str | int | None = None) -> pd.DataFrame:
        """Score a version (None: the champion) again on the test rows of its tasks.

        Returns:
            One row per task: score (0 to 1), recorded (the score of the version's own run) and num_rows.

        Raises:
            CommandError: There is no such version.
        """
        values = self._run("version", "evaluate", version)
        columns = {"score": values["accuracies"], "recorded": values["recorded"], "num_rows": values["num_rows"]}
        return pd.DataFrame(columns).rename_axis("task")

    def history(self) -> pd.DataFrame:
        """Return the versions of the lineage, oldest first: task, scores, the gate's decision, aliases.

        The table is empty if the lineage has no version.

        Raises:
            CommandError: The home or its servers cannot be used.
        """
        versions = [{**version, **version["since"]} for version in self._versions() or []]
        return pd.DataFrame(versions, columns=None if versions else ["version", "task", "aliases"]).set_index("version")

    def matrix(self) -> pd.DataFrame:
        """Return the accuracy matrix up to the champion: one row per learned arrival, one column per task.

        An entry is a score from 0 to 1 by the task's metric; it is missing where it was not measured.

        Raises:
            CommandError: The lineage has no champion.
        """
        matrix = self._versions("--matrix") or {"trained": [], "rows": [], "tasks": []}
        rows = pd.Index(matrix["trained"], name="learned")
        return pd.DataFrame(matrix["rows"], index=rows, columns=matrix["tasks"], dtype=float)

    @property
    def champion(self) -> str | None:
        """Number of the version that answers; None: there is none yet. Errors are those of `history`."""
        aliases = self.history()["aliases"]
        return next((str(number) for number, names in aliases.items() if "champion" in names), None)

    def rollback(self, version: str | int | None = None) -> None:
        """Make an earlier version the champion again, at once; None: the one that the champion continues.

        Raises:
            CommandError: There is no such version, or the gate has rejected it.
        """
        self._run("version", "rollback", version)

    def predict(self, texts: str | Sequence[str], *, task: str | None = None) -> list[str]:
        """Answer texts with the champion. The first call loads the model; later calls follow the champion.

        Args:
            texts: The texts: a list, a tuple, a Series or an array. A single text counts as a list of one.
            task: The task to ask; None: the newest one.

        Raises:
            CommandError: There is no champion, or a text cannot be answered.
        """
        _require(texts, str | list | tuple | pd.Series | np.ndarray, "the argument texts", "a text or a list of texts")
        _require(task, str | None, "the argument task", "the name of a task")
        rows = [{"input": text, "task": task} for text in ([texts] if isinstance(texts, str) else texts)]
        for number, row in enumerate(rows, start=1):
            _require(row["input"], str, f"text {number}", "a text")
        with self._starting:
            if self._server is None or not self._server.is_alive:
                self._server = _Server(self.name, self._environment)
            server = self._server  # another thread may close it, which ends the answers with an error of their own
        parts = [rows[start : start + NUM_ROWS] for start in range(0, len(rows), NUM_ROWS)]
        return [answer for part in parts for answer in server.answers(part)]

    def close(self) -> None:
        """End the server that `predict` has started. The next `predict` starts it again."""
        with self._starting:
            if self._server is not None:
                self._server.close()
                self._server = None

    def _as_file(self, data: Rows, tables: list[Path]) -> str:
        """Return a file's path from the root, or an address as it is. A table becomes a file, which joins `tables`."""
        if isinstance(data, str | os.PathLike):
            address = os.fspath(data)
            return address if "://" in address else os.path.abspath(os.path.expanduser(address))
        if isinstance(data, Mapping):
            keys = ", ".join(map(str, data))
            raise CommandError(
                f"The data is a dict of {keys}; give one split of it, or its rows as a list of dicts.", 2
            )
        datasets = sys.modules.get("datasets")  # who has a Dataset has imported it
        is_dataset = datasets is not None and isinstance(data, datasets.Dataset)
        if not isinstance(data, list | pd.DataFrame) and not is_dataset:
            raise CommandError(
                f"The data is {_kind(data)}; give a file, an address, a list of rows as dicts, a pandas DataFrame or a "
                "datasets.Dataset.",
                2,
            )
        home = self._environment.get("DEAL_HOME") or os.environ.get("DEAL_HOME") or "deal-home"
        lines = []
        for number, row in enumerate(data if isinstance(data, list) else (), start=1):
            _require(row, Mapping, f"row {number} of the data", "a dict with the columns that a file would have")
            lines.append(_as_json(dict(row), f"Row {number} of the data is no JSON") + "\n")
        name = uuid.uuid4().hex + (".jsonl" if isinstance(data, list) else ".parquet")
        place = Path(os.path.abspath(os.path.expanduser(home)), "tables", name)
        tables.append(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, list):
                place.write_text("".join(lines), encoding="utf-8")
            elif isinstance(data, pd.DataFrame):
                data.to_parquet(place, index=False)
            else:
                data.to_parquet(place)
        except OSError as error:
            raise CommandError(
                f"The table cannot be written to {place} ({error.strerror}); check the home.", 1
            ) from None
        except Exception as error:  # the cells may be of any type, and each has its own errors
            why = " ".join(str(error).split()).rstrip(".")
            raise CommandError(
                f"The table cannot be kept as Parquet: {why}. Give each column its own name and one type, or leave it "
                "out.",
                2,
            ) from None
        return str(place)

    def _versions(self, *options: str) -> Any:
        """Return what `deal version list` prints; None: the lineage, or the whole home, has no version."""
        try:
            return self._run("version", "list", *options)
        except CommandError as error:
            if not any(message in str(error) for message in NO_VERSION):
                raise
            return None

    def _run(self, *command: str | int | None, stages: set[str] | None = None) -> Any:
        """Run a command about this lineage. Parts that are None are left out. For `stages` see `run_command`."""
        arguments = [str(part) for part in (*command, "--lineage", self.name) if part is not None]
        return run_command(arguments, self._environment, self._show, stages)


def _as_json(value: Any, problem: str, *, ensure_ascii: bool = True) -> str:
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    except (TypeError, ValueError, RecursionError) as error:
        raise CommandError(f"{problem}: {error}; give texts, numbers, lists and dicts.", 2) from None


def _require(value: object, kinds: Any, what: str, wanted: str) -> None:
    """Refuse a value of another type in one sentence."""
    if not isinstance(value, kinds):
        raise CommandError(f"{what[0].upper()}{what[1:]} is {_kind(value)}; give {wanted}.", 2)


def _kind(value: object) -> str:
    return "None" if value is None else f"of the type {type(value).__name__}"


def _token(environment: Mapping[str, str]) -> str:
    """Return the token that the server asks for, as it reads it; "": none."""
    return (environment.get(KEY) or os.environ.get(KEY) or "").strip()


class _Server:
    """A `deal serve` of this program. It ends with the object, or with the program."""

    def __init__(self, lineage: str, environment: Mapping[str, str]) -> None:
        command = Command(["serve", "--lineage", lineage, "--port", "0"], environment)
        self._process = command.process
        self.close = weakref.finalize(self, end, command.process)
        self._key = _token(environment)
        for line in command.output:
            event = json.loads(line)
            if "url" in event:
                self._url = f"{event['url']}/invocations"
                break
        else:  # the server has ended
            raise command.error("The server has not started.")
        command.listen_to(command.output)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        import httpx  # a program that imports this package need not pay for it

        body = json.dumps({"dataframe_records": rows})
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        headers = {"Content-Type": "application/json", **key}
        try:  # without the environment's proxies: texts and token stay on this machine
            answered = httpx.post(self._url, content=body, headers=headers, timeout=ANSWER_SECONDS, trust_env=False)
        except httpx.TransportError as error:
            raise CommandError(f"The server at {self._url} does not answer ({error}); call predict again.", 1) from None
        values = answered.json()
        if answered.is_error:
            raise CommandError(values["error"], 1)
        return [str(row["output"]) for row in values["predictions"]]
