"""A lineage as a Python object: learn, evaluate, answer, look back, and move the champion."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deal_core.errors import ConfigError
from deal_pipeline.home import Home, Show, in_thread, require
from deal_pipeline.tables import Rows, as_file, as_texts

if TYPE_CHECKING:
    from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
    from flows.adapt import AdaptResult
    from flows.champions import EvaluateResult
    from infra.promotions import Decision, LeftBehind, Move
    from tasks.arrivals import HeldArrival
    from tasks.lineage.history import HistoryEntry
    from tasks.lineage.reports import WrittenReport
    from tasks.predict import Answer, FileAnswers, OnProgress
    from tasks.progress import Reporter
    from tasks.spec import AdaptSpec

_model = threading.RLock()
"""Held while the base model in memory has an adapter: it can have one at a time."""


class Lineage:
    """One adapter that learns arrival after arrival.

    Calls run in this process, and change nothing of it. Only trainings (`adapt`, `learn`, `requeue`, …) start a process
    of their own. The first `predict` loads the base model, which stays in memory until `close`.

    Args:
        name: Name of the lineage; the first arrival creates it.
        home: The `Home`, or the folder that holds everything. None: DEAL_HOME, or ./deal-home.
        show: Called with a line for every finished stage and every remark. None: nothing is shown. A `Home` has its
            own.
        environment: Variables in addition to the program's, such as DEAL_STORE_URI. A `Home` has its own.

    Raises:
        ConfigError: An argument is of another type (code "argument").

    Example:
        >>> lineage = Lineage("support")
        >>> lineage.adapt("intents.csv", task="intents").status  # doctest: +SKIP
        'promoted'
        >>> lineage.predict(["I lost my card"])  # doctest: +SKIP
        ['lost card']
    """

    def __init__(
        self,
        name: str = "default",
        *,
        home: Home | str | os.PathLike[str] | None = None,
        show: Show | None = print,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        require(name, str, "the argument name", "a text")
        self.name = name
        self.home = home if isinstance(home, Home) else Home(home, environment=environment, show=show)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- learn ---

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
    ) -> AdaptResult:
        """Learn one arrival, judge it, and promote it if it passes the gate.

        The training runs in a process of its own. Ctrl-C, or a notebook's stop, ends it at its next step; the same call
        goes on from there.

        Args:
            data: Rows to learn: a file, an address, or a table with the columns that a file would have. A table is
                kept as a file in the home's folder `tables`, unless no version was trained on it.
            task: Name of the task that the rows belong to, or the section `task` of a spec, with its name.
            test_data: Rows to judge the task by; None: a share of the rows.
            base: The base model of a new lineage: built-in name, Hub id, folder or GGUF file.
            strategy: How to learn; None: the lineage's own, else deal.
            settings: Other sections of a spec, such as {"train": {"num_epochs": 3}, "gate": {"max_drop_points": 5}}.
            force: Learn the rows even if the lineage has learned them.

        Returns:
            The version and how it ended. `accuracies` has a share from 0 to 1 for each task. A version that the gate
            rejects is no error: `rejected` is true then, and `reasons` says why.

        Raises:
            ConfigError: The data or a setting cannot be used. Nothing is lost.
            DataValidationError: The whole file is refused.
        """
        require(task, str | Mapping, "the argument task", "a name, or the section task of a spec as a dict")
        require(settings, Mapping | None, "the argument settings", "a dict of a spec's sections")
        if settings and "task" in settings:
            raise ConfigError("The settings have a section task; give it as the argument task.", code="argument")
        from tasks.lineage.settings import spec_from_values

        arrival: dict[str, Any] = {"name": task} if isinstance(task, str) else dict(task)
        folder, tables = self.home.folder / "tables", list[Path]()
        learned = _Learned(self.home.reporter)
        is_needed = False
        try:
            arrival["data"] = as_file(data, folder, tables)
            if (test_rows := arrival.get("test_data") if test_data is None else test_data) is not None:
                arrival["test_data"] = as_file(test_rows, folder, tables)
            values = {**(settings or {}), "task": arrival}
            with self.home.opened() as store:
                spec = spec_from_values(store, values, lineage=self.name, base_model=base, strategy=strategy)
            result = self.learn(spec, force=force, reporter=learned)
            is_needed = result.status != "repeat"
        finally:
            # A requeue reads the tables of a version again. A run that has died after its training may still become a
            # version: the lineage's next run completes it.
            if not (is_needed or learned.has_trained):
                for table in tables:
                    with suppress(OSError):
                        table.unlink()
        return result

    def learn(self, spec: AdaptSpec, *, force: bool = False, reporter: Reporter | None = None) -> AdaptResult:
        """Learn the arrival of a spec as `adapt` does; `reporter` gets the stages in place of the home's `show`."""
        from deal_pipeline.training import Adapt

        with self.home.importing():
            from flows.adapt import AdaptResult

        return self.home.train(Adapt(spec=spec, again=force), AdaptResult, reporter=reporter, trains=True)

    def left_behind(self) -> tuple[LeftBehind, ...]:
        """Return the accepted arrivals that the champion has not learned, oldest first.

        Raises:
            NoVersionError: The lineage has no version.
        """
        with self.home.opened_to_move():
            from tasks.lineage.promotion import find_left_behind

            return find_left_behind(self.name)

    def requeue(self, *versions: str | int) -> list[AdaptResult]:
        """Learn the arrivals of versions again, in a process of its own; without numbers, all that were left behind.

        Without numbers, held arrivals whose run was cancelled go on too.

        Raises:
            RegistryError: There is no such version.
            DataValidationError: A file is gone or was replaced by another.
        """
        from deal_pipeline.training import Requeue

        with self.home.importing():
            from flows.adapt import AdaptResult

        return self.home.train(Requeue(lineage=self.name, versions=tuple(map(str, versions))), list[AdaptResult])

    # --- look ---

    def evaluate(self, version: str | int | None = None) -> EvaluateResult:
        """Score a version (None: the champion) again on the frozen test rows of its tasks, in this process.

        Returns:
            By task `accuracies` and `recorded` (of the version's own run), shares from 0 to 1, and `num_rows`.

        Raises:
            RegistryError: There is no such version, or no champion.
            IntegrityError: The version's adapter is damaged.
        """
        with self.home.importing():
            from flows.champions import evaluate
        with _model:
            return self.home.run(evaluate, self.name, None if version is None else str(version), trains=True)

    def history(self, newest: int | None = None) -> list[HistoryEntry]:
        """Return the versions, oldest first: what each learned, scores (0 to 1), the gate's decision, aliases.

        Args:
            newest: Only so many of the newest; None: all.

        Returns:
            One entry for each version; empty if the lineage has none.

        Raises:
            StoreError: The store does not answer, or a version is damaged.
        """
        from tasks.lineage import history

        with self.home.opened():
            try:
                return history.read_history(self.name, newest)
            except history.NoVersionError:
                return []

    @property
    def champion(self) -> str | None:
        """Number of the version that answers; None: there is none yet. Errors are those of `history`."""
        from infra.versions import Versions

        with self.home.opened() as store:
            version = Versions(store).champion(self.name)
        return version.version if version else None

    def show(self, version: str | int) -> HistoryEntry:
        """Return what a version learned, its scores (0 to 1), and what the gate decided.

        Raises:
            RegistryError: There is no such version.
        """
        from tasks.lineage.history import no_version, read_history

        with self.home.opened():
            entry = next((entry for entry in read_history(self.name) if entry.version == str(version)), None)
        if entry is None:
            raise no_version(self.name, str(version))
        return entry

    def report(self, version: str | int, file: str | os.PathLike[str] | None = None) -> WrittenReport:
        """Write a version's page as HTML; None: into the home's folder `reports`. A present file is replaced.

        Raises:
            RegistryError: There is no such version, or it has no report.
            ConfigError: The file cannot be written.
        """
        from tasks.lineage.reports import save_report

        with self.home.opened():
            place = self.home.folder / "reports" / f"{self.name}-{version}.html" if file is None else Path(file)
            return save_report(self.name, str(version), place)

    def matrix(self) -> AccuracyMatrix:
        """Return the accuracy matrix up to the champion: one row for each version, one column for each task.

        A score is a share from 0 to 1 by the task's metric, and None where it was not measured. `frame` makes it a
        DataFrame.

        Raises:
            RegistryError: The lineage has no champion.
        """
        from tasks.lineage.history import find_version
        from tasks.lineage.record import read_record

        with self.home.opened() as store:
            return read_record(store, find_version(store, self.name, None)).matrix

    def moves(self) -> tuple[Move, ...]:
        """Return the promotion log, oldest first: which version became champion when, by whom, and why."""
        from infra.promotions import PromotionLog

        with self.home.opened() as store:
            return tuple(PromotionLog(store).moves(self.name))

    def champion_at(self, when: datetime) -> str | None:
        """Return the number of the version that was champion at a time with a zone; None: none was."""
        from infra.promotions import PromotionLog

        with self.home.opened() as store:
            return PromotionLog(store).champion_at(self.name, when)

    def held(self) -> tuple[HeldArrival, ...]:
        """Return the arrivals that are held: their run was cancelled, or their labels disagree with the champion."""
        from infra.lineage_state import read_state
        from tasks.arrivals import held_arrivals

        with self.home.opened() as store:
            return held_arrivals(read_state(store, self.name))

    # --- answer ---

    def predict(
        self, texts: str | Sequence[str], *, task: str | None = None, version: str | int | None = None
    ) -> list[str]:
        """Answer texts with the champion, in this process. The first call loads the model; later calls keep it.

        Args:
            texts: The texts: a list, a tuple, a Series or an array. A single text counts as a list of one.
            task: The task to ask; None: the newest one.
            version: Number of the version; None: the champion of now.

        Returns:
            One answer for each text, in their order.

        Raises:
            ConfigError: The lineage does not know the task, or a text cannot be answered.
            RegistryError: There is no champion, or no such version.
        """
        require(task, str | None, "the argument task", "the name of a task")
        asked, number = as_texts(texts), None if version is None else str(version)
        with self.home.opened(), self._answering():
            from tasks.predict import predict_texts

            return predict_texts(asked, lineage=self.name, task=task, version=number)

    def answer(self, text: str, *, task: str | None = None, version: str | int | None = None) -> Answer:
        """Answer one text, and tell how: the prompt, the first tokens' logits, whether it is a label of the task.

        Arguments and errors are those of `predict`.
        """
        with self.home.opened(), self._answering():
            from tasks.predict import predict

            return predict(text, lineage=self.name, task=task, version=None if version is None else str(version))

    def predict_file(
        self,
        data: str | os.PathLike[str],
        *,
        task: str | None = None,
        version: str | int | None = None,
        out: str | os.PathLike[str] | None = None,
        column: str | None = None,
        on_progress: OnProgress = lambda done, total: None,
    ) -> FileAnswers:
        """Answer every row of a file, of any size, into another file.

        Args:
            data: CSV, JSON lines or Parquet.
            task: The task to ask; None: the newest one.
            version: Number of the version; None: the champion of now.
            out: A .jsonl or .parquet file; None: a file next to `data`, named after it.
            column: The column with the text; None: it is found by its name.
            on_progress: Called with the number of answered rows and of all rows.

        Raises:
            ConfigError: The lineage does not know the task, or the output exists already or lies in the inbox.
            DataValidationError: The file cannot be read.
            RegistryError: There is no champion, or no such version.
        """
        with self.home.opened(), self._answering():
            from tasks.predict import predict_file

            return predict_file(
                Path(data),
                lineage=self.name,
                task=task,
                version=None if version is None else str(version),
                out=None if out is None else Path(out),
                column=column,
                on_progress=on_progress,
            )

    def close(self) -> None:
        """Free the memory of the base model that answers. The next answer loads it again."""
        if "tasks.base" in sys.modules:
            with _model:
                sys.modules["tasks.base"].release_base()

    # --- decide ---

    def promote(self, version: str | int, *, why: str = "approved", tells: bool = True) -> Decision:
        """Make a version champion, at once. Its parent must be the present champion.

        Args:
            version: Its number.
            why: The reason, for the promotion log.
            tells: Tell Prefect, the webhook and MLflow; without it, `tell` does so later.

        Raises:
            RegistryError: The version cannot become champion.
        """
        with self.home.opened_to_move():
            from tasks.lineage.promotion import promote_to

            decision = promote_to(self.name, str(version), who=self.home.who, why=why)
        return self._decided(decision, tells)

    def rollback(
        self, version: str | int | None = None, *, why: str = "rolled back by hand", tells: bool = True
    ) -> Decision:
        """Make an earlier version the champion again, at once; None: the one that the champion continues.

        Returns:
            The move; `left_behind` are the arrivals that the champion has not learned now. For the other arguments see
            `promote`.

        Raises:
            RegistryError: There is no such version, or the gate has rejected it.
        """
        with self.home.opened_to_move():
            from tasks.lineage.promotion import roll_back

            decision = roll_back(self.name, None if version is None else str(version), who=self.home.who, why=why)
        return self._decided(decision, tells)

    def reject(self, version: str | int, *, why: str, tells: bool = True) -> Decision:
        """Reject a version: it can never become champion. For the arguments see `promote`.

        Raises:
            RegistryError: The version is champion, or was rejected already.
        """
        with self.home.opened_to_move():
            from tasks.lineage.promotion import reject_version

            decision = reject_version(self.name, str(version), who=self.home.who, why=why)
        return self._decided(decision, tells)

    def tell(self, decision: Decision) -> str:
        """Tell Prefect, the webhook and MLflow of a decision, which holds all the same. No error is raised.

        Returns:
            What could not be told, in one line; empty if all was told.
        """
        with self.home.importing():
            import infra.tracking.tracker  # noqa: F401  # MLflow
            from flows.promote import tell_once
        with self.home.opened_to_move():
            return in_thread(lambda: tell_once(decision))

    def _decided(self, decision: Decision, tells: bool) -> Decision:
        if tells and (remark := self.tell(decision)):
            self.home.reporter.said(remark)
        return decision

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Hold the base model; its libraries show nothing of their own meanwhile."""
        from transformers.utils import logging as transformers_logging

        shows = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            with _model:
                yield
        finally:
            if shows:
                transformers_logging.enable_progress_bar()


class _Learned:
    """Passes the progress of a training on, and notes whether the training has ended. It is a `Reporter`."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.has_trained = False

    def stage_started(self, stage: str) -> None:
        self._reporter.stage_started(stage)

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        self._reporter.advanced(stage, done, total, detail)

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        self.has_trained = self.has_trained or stage == "train"
        self._reporter.stage_finished(stage, seconds, detail)

    def said(self, message: str) -> None:
        self._reporter.said(message)
