"""A lineage as a Python object: learn, evaluate, answer, look back, and move the champion."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deal_core.errors import ConfigError
from deal_pipeline.dataframes import Rows, as_file, as_texts
from deal_pipeline.home import Home, Show, in_thread, require

if TYPE_CHECKING:
    from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
    from deal_pipeline.results import ChampionAt, CheckedRows, LineageFile, ReleasedArrivals, ShownVersion
    from flows.adapt_result import AdaptResult
    from flows.branch import BranchPlan, BranchResult
    from flows.champions import EvaluateResult
    from flows.relearn import RelearnPlan
    from flows.watch import WatchResult
    from infra.branches import KnownBranch
    from infra.promotions import Move
    from infra.versions import Decision, Version
    from tasks.arrivals import HeldArrival
    from tasks.lineage.consolidation import ConsolidationPlan, Start
    from tasks.lineage.requests import LabelsResult, RenewalResult
    from tasks.lineage.settings import LineageWithPause, WatchedLineage
    from tasks.monitoring.feedback import FeedbackResult
    from tasks.monitoring.harvest import HarvestResult
    from tasks.monitoring.look import MonitorResult
    from tasks.monitoring.rollout import RolloutLook
    from tasks.monitoring.select import SelectResult
    from tasks.predict import Answer, FileAnswers, OnProgress
    from tasks.progress import Reporter
    from tasks.serving.export import Exported, Target
    from tasks.serving.publish import Published
    from tasks.spec import AdaptSpec


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
        from tasks.progress import QuietReporter

        folder, tables, are_needed = self.home.folder / "tables", list[Path](), False

        def stage_finished(stage: str, seconds: float, detail: str) -> None:
            nonlocal are_needed
            # A run that dies after its training may still become a version: the lineage's next run completes it.
            are_needed = are_needed or stage == "train"
            self.home.reporter.stage_finished(stage, seconds, detail)

        try:
            spec = self._spec_of(data, task, test_data, settings, folder, tables, base_model=base, strategy=strategy)
            result = self.learn(spec, force=force, reporter=QuietReporter(stage_finished, self.home.reporter.said))
            are_needed = are_needed or result.status != "repeat"  # a requeue reads the tables of a version again
        finally:
            if not are_needed:
                for table in tables:
                    with suppress(OSError):
                        table.unlink()
        return result

    def learn(self, spec: AdaptSpec, *, force: bool = False, reporter: Reporter | None = None) -> AdaptResult:
        """Learn the arrival of a spec as `adapt` does; `reporter` gets the stages in place of the home's `show`."""
        from deal_pipeline.training import Adapt

        result: AdaptResult = self.home.train(Adapt(spec=spec, again=force), reporter=reporter, trains=True)
        return result

    def watch(
        self, spec: WatchedLineage | None = None, *, once: bool = False, poll_seconds: float = 2.0
    ) -> WatchResult:
        """Learn what lands in the inbox (STORE/inbox/TASK/NAME), each file once, until the call is stopped.

        The watch and its trainings run in a process of their own. A stop ends it at its next step.

        Args:
            spec: The settings; None: those of the lineage's file.
            once: Learn what is there, then end.
            poll_seconds: Time between two looks.

        Raises:
            ConfigError: The lineage does not learn from the inbox.
        """
        from deal_pipeline.training import Watch

        if spec is None:
            from tasks.lineage.settings import read_lineage

            with self.home.opened() as store:
                spec = read_lineage(store, self.name)
        result: WatchResult = self.home.train(Watch(spec=spec, once=once, poll_seconds=poll_seconds))
        return result

    def check(
        self,
        data: Rows,
        *,
        task: str | Mapping[str, Any],
        test_data: Rows | None = None,
        settings: Mapping[str, Any] | None = None,
        with_model: bool = False,
        score: bool = True,
        plan: bool = False,
    ) -> CheckedRows:
        """Check rows as `adapt` would, in this process. Nothing is stored, and no weights are fetched.

        Args:
            data: The rows, as for `adapt`; so are task, test_data and settings.
            task: The task.
            test_data: Rows to judge the task by.
            settings: Other sections of a spec.
            with_model: Let the base model look for wrong labels too; this takes time.
            score: Let the champion answer the rows, if it knows the task.
            plan: Say what a training takes: memory in bytes, steps, and seconds, if the base model is here.

        Raises:
            ConfigError: An argument cannot be used.
            DataValidationError: The file cannot be read.
        """
        with tempfile.TemporaryDirectory(prefix="deal-") as folder:
            spec = self._spec_of(data, task, test_data, settings, Path(folder), [])
            return self.home.check(spec, with_model=with_model, score=score, plan=plan)

    def _spec_of(
        self,
        data: Rows,
        task: str | Mapping[str, Any],
        test_data: Rows | None,
        settings: Mapping[str, Any] | None,
        folder: Path,
        tables: list[Path],
        **options: str | None,
    ) -> AdaptSpec:
        """Make a spec of the arguments of `adapt`, over the lineage's file. Tables become files in `folder`."""
        from tasks.lineage.settings import spec_from_values

        require(task, str | Mapping, "the argument task", "a name, or the section task of a spec as a dict")
        require(settings, Mapping | None, "the argument settings", "a dict of a spec's sections")
        for section in settings or {}:
            require(section, str, "a key of the argument settings", "the name of a spec's section")
        if settings and "task" in settings:
            raise ConfigError("The settings have a section task; give it as the argument task.", code="argument")
        arrival: dict[str, Any] = {"name": task} if isinstance(task, str) else dict(task)
        arrival["data"] = as_file(data, folder, tables)
        if (test_rows := arrival.get("test_data") if test_data is None else test_data) is not None:
            arrival["test_data"] = as_file(test_rows, folder, tables)
        with self.home.opened() as store:
            return spec_from_values(store, {**(settings or {}), "task": arrival}, lineage=self.name, **options)

    def left_behind(self) -> tuple[Version, ...]:
        """Return the accepted versions whose arrivals the champion has not learned, oldest first.

        Raises:
            NoVersionError: The lineage has no version.
        """
        with self.home.opened_with_prefect() as store:
            from tasks.lineage.promotion import find_left_behind

            return find_left_behind(store, self.name)

    def requeue(self, *versions: str | int) -> list[AdaptResult]:
        """Learn the arrivals of versions again, in a process of its own; without numbers, all that were left behind.

        Without numbers, held arrivals whose run was cancelled go on too.

        Raises:
            RegistryError: There is no such version.
            DataValidationError: A file is gone or was replaced by another.
        """
        from deal_pipeline.training import Requeue

        results: list[AdaptResult] = self.home.train(Requeue(lineage=self.name, versions=tuple(map(str, versions))))
        return results

    # --- look ---

    def evaluate(self, version: str | int | None = None) -> EvaluateResult:
        """Score a version (None: the champion) again on the frozen test rows of its tasks, in this process.

        Returns:
            By task `accuracies` and `recorded` (of the version's own run), shares from 0 to 1, and `num_rows`.

        Raises:
            RegistryError: There is no such version, or no champion.
            IntegrityError: The version's adapter is damaged.
        """
        self.home.load("prefect")
        from flows.champions import evaluate, score_again

        return self.home.run(score_again, self.name, _number(version), flow=evaluate, computes=True)

    def history(self) -> tuple[Version, ...]:
        """Return the versions, oldest first: what each learned, scores (0 to 1), the gate's decision, aliases.

        The tuple is empty if the first arrival is held.

        Raises:
            NoVersionError: The lineage has neither a version nor a held arrival.
            StoreError: The store does not answer, or a version is damaged.
        """
        from tasks.lineage.history import NoVersionError, read_history

        with self.home.opened() as store:
            try:
                return read_history(store, self.name)
            except NoVersionError:
                if not self.held():
                    raise
                return ()

    @property
    def champion(self) -> str | None:
        """Number of the version that answers; None: there is none yet. Errors are those of `history`."""
        from infra.versions import Versions

        with self.home.opened() as store:
            version = Versions(store).champion(self.name)
        return version.version if version else None

    def show(
        self, version: str | int, *, report: bool = False, out: str | os.PathLike[str] | None = None
    ) -> ShownVersion:
        """Return what a version learned, its scores (0 to 1), and what the gate decided.

        Args:
            version: Its number.
            report: Also write its page, an HTML file. A present file is replaced.
            out: The file of the page; None: one in the home's folder `reports`.

        Raises:
            RegistryError: There is no such version, or it has no report.
            ConfigError: The file cannot be written.
        """
        from deal_pipeline.results import ShownVersion
        from tasks.lineage.history import no_version, read_history
        from tasks.lineage.reports import save_report

        number = str(version)
        with self.home.opened() as store:
            entry = next((entry for entry in read_history(store, self.name) if entry.version == number), None)
            if entry is None:
                raise no_version(self.name, number)
            file = self.home.folder / "reports" / f"{self.name}-{number}.html" if out is None else Path(out)
            page = str(save_report(store, self.name, number, file)) if report else None
            return ShownVersion(version=entry, page=page)

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

    def champion_at(self, when: datetime) -> ChampionAt:
        """Return the number of the version that was champion at a time, which has a zone."""
        from deal_pipeline.results import ChampionAt
        from infra.promotions import PromotionLog

        with self.home.opened() as store:
            return ChampionAt(at=when.isoformat(), champion=PromotionLog(store).champion_at(self.name, when))

    def held(self) -> tuple[HeldArrival, ...]:
        """Return the arrivals that are held: their run was cancelled, or their labels disagree with the champion."""
        from infra.lineage_state import read_state
        from tasks.arrivals import held_arrivals

        with self.home.opened() as store:
            return held_arrivals(read_state(store, self.name))

    def release(self, *arrivals: str) -> ReleasedArrivals:
        """Let held arrivals go on; without names, all of them.

        Args:
            arrivals: Names as inbox/TASK/FILE, or paths.

        Raises:
            ConfigError: A named arrival is not held (code "not-held").
        """
        from deal_pipeline.results import ReleasedArrivals
        from tasks.arrivals import release

        with self.home.opened() as store:
            return ReleasedArrivals(lineage=self.name, released=release(store, self.name, arrivals))

    def settings(self) -> LineageWithPause:
        """Return the lineage's settings: those of its file, and the defaults of all others.

        Raises:
            ConfigError: It does not learn from the inbox, or a setting is not valid.
        """
        from tasks.lineage.settings import read_lineage, with_pause

        with self.home.opened() as store:
            return with_pause(store, read_lineage(store, self.name))

    def pause(self, why: str = "by command") -> LineageWithPause:
        """Pause the lineage: a running training finishes, and new files wait until `resume`.

        Raises:
            ConfigError: The lineage has no valid file, or learns nothing anyway.
        """
        return self._paused(why)

    def resume(self) -> LineageWithPause:
        """Let the paused lineage learn again, also what landed meanwhile. Errors are those of `pause`."""
        return self._paused(None)

    def _paused(self, why: str | None) -> LineageWithPause:
        from tasks.lineage.settings import pause_lineage

        with self.home.opened() as store:
            return pause_lineage(store, self.name, why)

    def remove_settings(self) -> LineageFile:
        """Let the lineage learn no longer from the inbox, by deleting its file of settings. Its versions stay.

        Raises:
            ConfigError: There is no file, or it is the only one.
        """
        from deal_pipeline.results import LineageFile
        from tasks.lineage.settings import remove_lineage

        with self.home.opened() as store:
            return LineageFile(lineage=self.name, file=remove_lineage(store, self.name))

    def add_labels(self, task: str, labels: Sequence[str]) -> LabelsResult:
        """Let a task's next arrivals use more labels. For errors see `tasks.lineage.requests.add_labels`."""
        from tasks.lineage.requests import add_labels

        with self.home.opened() as store:
            return add_labels(store, self.name, task, labels)

    def renew_tests(self, task: str) -> RenewalResult:
        """Let a task's next arrival bring new test rows. For errors see `tasks.lineage.requests.renew_tests`."""
        from tasks.lineage.requests import renew_tests

        with self.home.opened() as store:
            return renew_tests(store, self.name, task)

    def monitor(self, data: str | os.PathLike[str] | None = None, *, new_reference: bool = False) -> MonitorResult:
        """Compare the champion's live traffic with its test rows: drift, and accuracy (0 to 1). No model is needed.

        Args:
            data: File of answers that another server gave, in place of the prediction log. Nothing is announced then.
            new_reference: Compare with the present live rows from now on, until another version is champion.

        Raises:
            RegistryError: The lineage has no champion.
            DataValidationError: The file cannot be read.
        """
        self.home.load("prefect", "infra.tracking.tracker")
        from flows.champions import compare_traffic, monitor

        file = None if data is None else os.path.abspath(data)
        return self.home.run(compare_traffic, self.name, file, new_reference, flow=monitor)

    # --- people's answers ---

    def sample_feedback(
        self,
        task: str,
        *,
        data: str | os.PathLike[str] | None = None,
        column: str | None = None,
        out: str | os.PathLike[str] | None = None,
        number: int = 50,
        random_share: float = 0.25,
        on_progress: OnProgress | None = None,
    ) -> SelectResult:
        """Write a file of texts that are worth labelling: the least certain answers, and a random share.

        Args:
            task: Task whose texts are chosen.
            data: File of texts that the champion answers first; None: the prediction log.
            column: With `data`: the column with the text; None: it is found by its name.
            out: New .csv or .jsonl file; None: TASK-to-label.csv.
            number: Most texts in the file.
            random_share: Share that is drawn at random, above 0 and at most 1.
            on_progress: Called with the number of answered rows and of all rows; None: nobody is told.

        Raises:
            ConfigError: The lineage does not know the task, or the file exists already.
            RegistryError: The lineage has no champion.
        """
        with self.home.opened() as store, self.home.computing():
            from tasks.monitoring.select import select_to_label

            return select_to_label(
                store,
                task,
                self.name,
                data=None if data is None else Path(data),
                column=column,
                out=None if out is None else Path(out),
                number=number,
                random_share=random_share,
                on_progress=on_progress or (lambda done, total: None),
            )

    def add_feedback(self, file: str | os.PathLike[str]) -> FeedbackResult:
        """Take right answers to logged requests from a file: CSV, JSON lines or Parquet with id and label or answer.

        Raises:
            DataValidationError: The file cannot be read, or has other columns.
        """
        from tasks.monitoring.feedback import take_feedback_file

        with self.home.opened() as store:
            return take_feedback_file(store, Path(file), self.name)

    def export_feedback(self, task: str) -> HarvestResult:
        """Write a task's reviewed right answers into its inbox, as an ordinary file. Each lands once.

        Raises:
            ConfigError: The lineage does not know the task.
        """
        from tasks.monitoring.harvest import harvest_feedback

        with self.home.opened() as store:
            return harvest_feedback(store, task, self.name)

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
        inputs = as_texts(texts)
        with self.home.opened() as store, self.home.computing():
            from tasks.predict import predict_texts

            return predict_texts(store, inputs, lineage=self.name, task=task, version=_number(version))

    def answer(self, text: str, *, task: str | None = None, version: str | int | None = None) -> Answer:
        """Answer one text, and tell how: the prompt, the first tokens' logits, whether it is a label of the task.

        Arguments and errors are those of `predict`.
        """
        with self.home.opened() as store, self.home.computing():
            from tasks.predict import predict

            return predict(store, text, lineage=self.name, task=task, version=_number(version))

    def predict_file(
        self,
        data: str | os.PathLike[str],
        *,
        task: str | None = None,
        version: str | int | None = None,
        out: str | os.PathLike[str] | None = None,
        column: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> FileAnswers:
        """Answer every row of a file, of any size, into another file.

        Args:
            data: CSV, JSON lines or Parquet.
            task: The task to ask; None: the newest one.
            version: Number of the version; None: the champion of now.
            out: A .jsonl or .parquet file; None: a file next to `data`, named after it.
            column: The column with the text; None: it is found by its name.
            on_progress: Called with the number of answered rows and of all rows; None: nobody is told.

        Raises:
            ConfigError: The lineage does not know the task, or the output exists already or lies in the inbox.
            DataValidationError: The file cannot be read.
            RegistryError: There is no champion, or no such version.
        """
        with self.home.opened() as store, self.home.computing():
            from tasks.predict import predict_file

            return predict_file(
                store,
                Path(data),
                lineage=self.name,
                task=task,
                version=_number(version),
                out=None if out is None else Path(out),
                column=column,
                on_progress=on_progress or (lambda done, total: None),
            )

    def close(self) -> None:
        """Free the memory of the base model that answers. The next answer loads it again."""
        if "tasks.base" in sys.modules:
            with self.home.computing():
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
        with self.home.opened_with_prefect() as store:
            from tasks.lineage.promotion import promote_to

            decision = promote_to(store, self.name, str(version), who=self.home.who, why=why)
        return self._decided(decision, tells)

    def rollback(
        self, version: str | int | None = None, *, why: str = "rolled back by hand", tells: bool = True
    ) -> Decision:
        """Make an earlier version the champion again, at once; None: the one that the champion continues.

        Returns:
            The move; `left_behind` are the versions whose arrivals the champion has not learned now. For the other
            arguments see `promote`.

        Raises:
            RegistryError: There is no such version, or the gate has rejected it.
        """
        with self.home.opened_with_prefect() as store:
            from tasks.lineage.promotion import roll_back

            decision = roll_back(store, self.name, _number(version), who=self.home.who, why=why)
        return self._decided(decision, tells)

    def reject(self, version: str | int, *, why: str, tells: bool = True) -> Decision:
        """Reject a version: it can never become champion. For the arguments see `promote`.

        Raises:
            RegistryError: The version is champion, or was rejected already.
        """
        with self.home.opened_with_prefect() as store:
            from tasks.lineage.promotion import reject_version

            decision = reject_version(store, self.name, str(version), who=self.home.who, why=why)
        return self._decided(decision, tells)

    def rollout(self, *, apply: bool = False, tells: bool = True) -> RolloutLook:
        """Compare the version that is tried on live traffic with the champion.

        Args:
            apply: Promote or reject the version if the figures say so.
            tells: As for `promote`.

        Raises:
            RegistryError: The champion has changed meanwhile, or the version cannot become champion.
        """
        if not apply:
            from tasks.monitoring.rollout import RolloutLook, look_at_rollout

            with self.home.opened() as store:
                return RolloutLook(status=look_at_rollout(store, self.name))
        with self.home.opened_with_prefect() as store:
            from flows.champions import check_rollout

            look = check_rollout(store, self.name)
        if look.decision is not None:
            self._decided(look.decision, tells)
        return look

    def finish_rollout(self, *, why: str = "rollout finished by hand", tells: bool = True) -> Decision:
        """Make the version that is tried on live traffic the champion, whatever the figures say.

        For the arguments see `promote`.

        Raises:
            RegistryError: No version is tried, or it cannot become champion.
        """
        with self.home.opened_with_prefect() as store:
            from flows.champions import finish_rollout

            decision = finish_rollout(store, self.name, who=self.home.who, why=why)
        return self._decided(decision, tells)

    def abort_rollout(self, *, why: str = "rollout aborted by hand", tells: bool = True) -> Decision:
        """Reject the version that is tried on live traffic: it can never become champion.

        For the arguments see `promote`.

        Raises:
            RegistryError: No version is tried.
        """
        with self.home.opened_with_prefect() as store:
            from flows.champions import abort_rollout

            decision = abort_rollout(store, self.name, who=self.home.who, why=why)
        return self._decided(decision, tells)

    def tell(self, decision: Decision) -> str:
        """Tell Prefect, the webhook and MLflow of a decision, which holds all the same. No error is raised.

        Returns:
            What could not be told, in one line; empty if all was told.
        """
        self.home.load("prefect", "infra.tracking.tracker")
        from flows.promote import tell_once

        with self.home.opened_with_prefect() as store:
            return in_thread(lambda: tell_once(store, decision))

    # --- give away ---

    def export(self, version: str | int, *, to: Target, out: str | os.PathLike[str]) -> Exported:
        """Export a version for other programs, and compare its logits with those of the served version.

        Args:
            version: Its number.
            to: merged: a transformers folder. peft: the PEFT folder, without rows. hub: the same, on the Hub.
            out: The new folder; for hub the repository OWNER/NAME.

        Raises:
            ConfigError: The target is not free or no valid name, or the base model is quantized.
            IntegrityError: The export answers otherwise than the served version; nothing was written.
            RegistryError: The version may not leave: it was rejected, waits for a person, or learned from deleted rows.
        """
        with self.home.opened() as store, self.home.computing():
            from tasks.serving.export import export_version

            return export_version(store, self.name, str(version), to, os.fspath(out))

    def publish(
        self, version: str | int | None, folder: str | os.PathLike[str], *, base_model: str | None = None
    ) -> Published:
        """Write a version (None: the champion) into a folder of adapters that vLLM's filesystem resolver reads.

        Args:
            version: Its number.
            folder: The servers' folder of adapters, as this machine sees it.
            base_model: The model that `vllm serve` was started with, word for word; None: the Hub id of the lineage's
                base model, or its folder.

        Raises:
            ConfigError: The servers cannot load such an adapter, or the folder has another one under the name.
            RegistryError: There is no such version, or it may not leave.
        """
        from infra.settings import EngineSettings
        from tasks.serving.publish import publish

        with self.home.opened() as store:
            return publish(store, self.name, Path(folder), EngineSettings(), version=_number(version), model=base_model)

    # --- make versions again ---

    def plan_consolidation(self, start: Start | None = None) -> ConsolidationPlan:
        """Return what `consolidate` would learn; change nothing. Arguments and errors are its own."""
        self.home.load("prefect")
        from flows.consolidate import plan

        with self.home.opened() as store:
            return plan(store, self.name, start)

    def consolidate(self, start: Start | None = None) -> AdaptResult:
        """Learn what is left of all arrivals together, as one version that the gate judges against the champion.

        The training runs in a process of its own, as that of `adapt`.

        Args:
            start: Start from the "base" model or the "champion"; None: as the lineage's file says.

        Raises:
            ConfigError: The lineage cannot be consolidated.
            RegistryError: It has no champion.
        """
        from deal_pipeline.training import Consolidate

        result: AdaptResult = self.home.train(Consolidate(lineage=self.name, start=start), trains=True)
        return result

    def plan_rebase(self, base: str) -> BranchPlan:
        """Return what `rebase` would learn and lose; change nothing. Arguments and errors are its own."""
        from tasks.spec import resolve_base

        self.home.load("prefect")
        from flows.rebase import plan_rebase

        with self.home.opened() as store:
            return plan_rebase(store, self.name, resolve_base(base, Path.cwd()), who=self.home.who)

    def rebase(
        self, base: str, *, skip_rejected: bool = False, accept_lost: bool = False, engines: Sequence[str] = ()
    ) -> BranchResult:
        """Learn the arrivals again on another base model, and make the result champion if no task is worse.

        The trainings run in a process of their own. A call that was stopped goes on when it is repeated.

        Args:
            base: The new base model: Hub id, folder or GGUF file.
            skip_rejected: Go on without an arrival whose new version its gate rejects.
            accept_lost: Go on although arrivals cannot be learned again.
            engines: Addresses of vLLM servers. The swap waits until one of them has the new base model.

        Raises:
            ConfigError: It is the base model of today, or arrivals would be lost.
            RegistryError: The lineage cannot begin a branch now, or a person has moved its champion since.
        """
        from deal_pipeline.training import Rebase
        from tasks.spec import refuse_secrets, resolve_base

        for url in engines:
            refuse_secrets(url)
        result: BranchResult = self.home.train(
            Rebase(
                lineage=self.name,
                base=resolve_base(base, Path.cwd()),
                skip_rejected=skip_rejected,
                accept_lost=accept_lost,
                engines=tuple(engines),
                who=self.home.who,
            ),
            doing="looking",
            trains=True,
        )
        return result

    def plan_relearn(self, arrival: str, *, stops_serving: bool = False) -> RelearnPlan:
        """Return what `relearn` would remove, learn and lose; change nothing. Arguments and errors are its own."""
        self.home.load("prefect")
        from flows.relearn import plan_relearn

        with self.home.opened() as store:
            return plan_relearn(store, self.name, arrival, stops_serving=stops_serving, who=self.home.who)

    def relearn(
        self,
        arrival: str,
        *,
        reason: str = "",
        skip_rejected: bool = False,
        stops_serving: bool = False,
        accept_lost: bool = False,
    ) -> BranchResult:
        """Delete an arrival, and make every version that learned from it again, as if it had never landed.

        The trainings run in a process of their own. A call that was stopped goes on when it is repeated.

        Args:
            arrival: Name of its file, key inbox/TASK/FILE, or digest of the dataset.
            reason: Reason for the history. It must not quote any rows.
            skip_rejected: Go on without an arrival whose new version its gate rejects.
            stops_serving: Let no version serve until the new ones do.
            accept_lost: Go on although arrivals cannot be learned again.

        Raises:
            ConfigError: There is no such arrival, or nothing would be left to serve.
            RegistryError: The lineage cannot begin a branch now.
        """
        from deal_pipeline.training import Relearn

        result: BranchResult = self.home.train(
            Relearn(
                lineage=self.name,
                named=arrival,
                reason=reason,
                skip_rejected=skip_rejected,
                stops_serving=stops_serving,
                accept_lost=accept_lost,
                who=self.home.who,
            ),
            doing="looking",
            trains=True,
        )
        return result

    def branches(self) -> tuple[KnownBranch, ...]:
        """Return what was made again, oldest first, with the attestations of deleted rows."""
        from infra.branches import Branches

        with self.home.opened() as store:
            return tuple(Branches(store).all(self.name))

    def accept_branch(self, *, why: str) -> BranchResult:
        """Go on with an open branch of `relearn` although its result is worse than the champion, and swap it in.

        Raises:
            RegistryError: The lineage has no such branch.
        """
        from deal_pipeline.training import Relearn
        from tasks.lineage.branch import accept_result

        with self.home.opened() as store:
            named = accept_result(store, self.name, who=self.home.who, why=why)
        # The result may have been made with --skip-rejected. Another result would be judged anew.
        training = Relearn(lineage=self.name, named=named, skip_rejected=True, who=self.home.who)
        result: BranchResult = self.home.train(training, doing="ending", trains=True)
        return result

    def give_up_branch(self) -> KnownBranch:
        """End the open branch: its champion of before stays. Rows that it has deleted stay deleted.

        Raises:
            RegistryError: The lineage has no open branch.
        """
        from deal_pipeline.training import GiveUp

        branch: KnownBranch = self.home.train(GiveUp(lineage=self.name, who=self.home.who), doing="ending")
        return branch

    def _decided(self, decision: Decision, tells: bool) -> Decision:
        if tells and (remark := self.tell(decision)):
            self.home.reporter.said(remark)
        return decision


def _number(version: str | int | None) -> str | None:
    return None if version is None else str(version)
