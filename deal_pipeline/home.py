"""A home as a Python object: where its lineages lie, who is told of progress, and how its calls run."""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from contextvars import copy_context
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deal_core.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from deal_pipeline.results import CheckedRows, FetchedBase, LineageFile
    from deal_pipeline.server.status import Status
    from deal_pipeline.training import Training
    from flows.forget import ForgetResult
    from flows.gc import GcResult
    from infra.settings import Place
    from infra.store.base import ObjectStore
    from tasks.housekeeping.arrivals import ListedArrival
    from tasks.housekeeping.forgetting import ForgetPlan
    from tasks.lineage.settings import LineageWithPause
    from tasks.mlflow_mirror import Synced
    from tasks.progress import Reporter
    from tasks.spec import AdaptSpec

SCORED_ROWS = 20_000
"""Rows of a file from which those are chosen that the champion answers; of more, the first ones."""
_model = threading.RLock()
"""Held by whoever uses the base model in memory, which can have one adapter at a time."""
Result = TypeVar("Result")
Show = Callable[[str], object]
Runner = Callable[..., Any]
"""Runs the coroutine that its first argument makes, in this process, which has entered the home, as a command does."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep remarks of libraries about themselves from the caller's screen; filters are as before after the block."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(tqdm|transformers|peft|datasets)\b")
        yield


class Home:
    """The folder of lineages, or their bucket, and the settings of this machine.

    Nothing of the caller's process changes: not its environment, event loop or log handlers. Calls that read, move or
    answer run in this process. A training starts a process of its own; `deal_pipeline.training_child` says why.

    Args:
        folder: Folder that holds everything. None: DEAL_HOME, or ./deal-home.
        store: Where versions and rows lie, if not in the folder: s3://bucket/prefix or file:///folder.
        environment: Variables in addition to the program's, such as DEAL_S3_REGION. Those of other programs, such as
            AWS_PROFILE, reach a training only.
        show: Called with a line for every finished stage and every remark. None: nothing is shown.

    Raises:
        ConfigError: An argument is of another type (code "argument").
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        store: str | None = None,
        environment: Mapping[str, str] | None = None,
        show: Show | None = print,
    ) -> None:
        from tasks.progress import QuietReporter

        require(folder, str | os.PathLike | None, "the argument home", "the path of a folder")
        require(store, str | None, "the argument store", "an address such as s3://bucket/prefix")
        require(environment, Mapping | None, "the argument environment", "a dict of texts")
        for name_or_value in (text for pair in (environment or {}).items() for text in pair):
            require(name_or_value, str, "the argument environment", "a dict of texts")
        self._variables = dict(environment or {})
        if folder is not None:
            self._variables["DEAL_HOME"] = os.path.abspath(os.path.expanduser(folder))
        if store is not None:
            self._variables["DEAL_STORE_URI"] = store

        def show_line(line: str) -> None:
            if show is not None:
                with suppress(Exception):  # the work goes on, whatever the caller does with a line
                    show(line)

        self.reporter: Reporter = QuietReporter(
            lambda stage, seconds, detail: show_line(f"{stage:<9} {seconds:6.1f} s  {detail}"), show_line
        )
        self._runner: Runner | None = None

    @classmethod
    def of_command(cls, reporter: Reporter, runner: Runner) -> Home:
        """Return the home that this process has entered. Its flows run in this process."""
        home = cls()
        home.reporter, home._runner = reporter, runner
        return home

    @property
    def place(self) -> Place:
        """The settings: the program's environment as it is now, what was given, and the servers of `deal server up`."""
        from deal_pipeline.server.embedded import running_servers
        from infra.settings import Place, make_places_absolute

        variables = {**os.environ, **self._variables}
        make_places_absolute(variables)
        folder = variables["DEAL_HOME"] = os.path.realpath(
            os.path.expanduser(variables.get("DEAL_HOME") or "deal-home")
        )
        return Place({**running_servers(Path(folder), variables), **variables})

    @property
    def folder(self) -> Path:
        """The folder that holds everything, as an absolute path."""
        return Path(self.place.variables["DEAL_HOME"])

    @property
    def who(self) -> str:
        """Name of the account that runs this process: the author of moves."""
        try:
            return getpass.getuser()
        except (OSError, KeyError):  # a container's user may have no name
            return "unknown account"

    @contextmanager
    def opened(self) -> Iterator[ObjectStore]:
        """Let what runs in this block use this home, and give its store.

        Raises:
            ConfigError: The address is not valid, or another release made the store (`FormatError`).
            StoreError: The store does not answer.
        """
        from infra.settings import at_place
        from infra.store.opening import open_store
        from tasks.progress import reporting_to

        with at_place(self.place), reporting_to(self.reporter), quiet_libraries():
            yield open_store()

    def load(self, *modules: str) -> None:
        """Import modules, and undo what Prefect and MLflow do to a caller's process while they are imported.

        Prefect takes the root logger's handlers. MLflow asks the environment once whether it may send telemetry and
        print its log; it may not. The process of a command is its own, and imports modules where it needs them.
        """
        from infra.settings import QUIET

        if self._runner is not None:
            return
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        quiet = {**QUIET, "MLFLOW_CONFIGURE_LOGGING": "false"}
        added = {name: value for name, value in quiet.items() if name not in os.environ}
        os.environ.update(added)
        try:
            for module in modules:
                import_module(module)
        finally:
            for name in added:
                os.environ.pop(name, None)
            root.handlers[:], root.level = handlers, level

    @contextmanager
    def opened_with_prefect(self) -> Iterator[ObjectStore]:
        """Do what `opened` does, and let Prefect's client use the home's server, or none if it has none."""
        if self._runner is not None:  # the process has the home's variables
            with self.opened() as store:
                yield store
            return
        self.load("prefect")
        from prefect.settings import PREFECT_API_URL, temporary_settings

        url = self.place.variables.get("PREFECT_API_URL")
        updates, defaults = ({PREFECT_API_URL: url}, ()) if url else ({}, (PREFECT_API_URL,))
        with self.opened() as store, temporary_settings(updates=updates, restore_defaults=defaults):
            yield store

    def train(self, training: Training, *, reporter: Reporter | None = None, **options: Any) -> Any:
        """Run a training to its end and return its result. A call that was stopped goes on when it is repeated.

        Args:
            training: What is trained.
            reporter: Gets the stages of a training in a child; None: the home's own.
            options: Those of a command's runner.

        Raises:
            DealError: The error of the training.
        """
        if self._runner is not None:
            return self._runner(training.coroutine, **options)
        from pydantic import TypeAdapter

        from deal_pipeline.training_child import train_in_child

        self.load("prefect")  # the types of results are beside the flows
        with quiet_libraries():
            result = TypeAdapter(training.result_type())
        return result.validate_python(train_in_child(training, self.place, reporter or self.reporter))

    def run(
        self,
        work: Callable[..., Coroutine[Any, Any, Result]],
        *arguments: Any,
        flow: Callable[..., Any] | None = None,
        computes: bool = False,
        **options: Any,
    ) -> Result:
        """Call a coroutine function in this process, without Prefect's API, and return its result.

        Args:
            work: The function. It makes no version.
            arguments: Its arguments.
            flow: The same as a flow. A command calls it instead, so that Prefect has a run of it.
            computes: Whether it needs the model in memory.
            options: Those of a command's runner.

        Raises:
            DealError: The function's error.
        """
        if self._runner is not None:
            call: Callable[..., Any] = flow or work
            result: Result = self._runner(
                lambda: call(*arguments), in_prefect=flow is not None, trains=computes, **options
            )
            return result
        with self.opened_with_prefect(), self.computing() if computes else nullcontext():
            return in_thread(lambda: asyncio.run(work(*arguments)))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Hold the model in memory, which can have one adapter at a time. Its libraries show nothing meanwhile."""
        with _model:
            if self._runner is not None:
                from deal_pipeline.server.embedded import calm_libraries

                calm_libraries()
                yield
                return
            from transformers.utils import logging as transformers_logging

            shows = transformers_logging.is_progress_bar_enabled()
            transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            try:
                yield
            finally:
                if shows:
                    transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]

    # --- what concerns the whole home ---

    def lineages(self) -> list[LineageWithPause]:
        """Return the settings of the lineages that learn from the inbox, and whether they are paused."""
        from tasks.lineage.settings import list_lineages, with_pause

        with self.opened() as store:
            return [with_pause(store, lineage) for lineage in list_lineages(store)]

    def apply(self, spec: str | os.PathLike[str]) -> LineageFile:
        """Let a lineage learn from the inbox, or change its settings.

        Args:
            spec: File of the lineage's settings (YAML).

        Raises:
            ConfigError: A setting is not valid, or there is no such base model.
        """
        from deal_core.base_model.sources import check_base
        from deal_pipeline.results import LineageFile
        from tasks.lineage.settings import WatchedLineage, add_lineage
        from tasks.spec import parse, read_lineage_values

        values = read_lineage_values(Path(spec))
        lineage = parse(WatchedLineage, values, str(spec))
        if lineage.base_model is not None and (unknown := check_base(lineage.base_model)):
            self.reporter.said(f"The base model was not checked. {unknown}")
        with self.opened() as store:
            return LineageFile(lineage=lineage.lineage, file=add_lineage(store, lineage, values))

    def fetch(self, source: str = "smollm2-135m-instruct") -> FetchedBase:
        """Fetch, check and convert a base model, so that trainings need no network.

        Args:
            source: Built-in name, Hub id, local folder or GGUF file.

        Raises:
            ConfigError: There is no such model, or it cannot be used.
        """
        from deal_core.base_model.sources import resolve_base
        from deal_pipeline.results import FetchedBase
        from infra.settings import HomeSettings

        with self.opened():
            folder = resolve_base(
                source,
                HomeSettings().cache_dir,
                lambda doing, done, total: self.reporter.advanced("fetch", done, total, doing),
            )
        return FetchedBase(source=source, folder=str(folder))

    def sync(self, *lineages: str) -> list[Synced]:
        """Write into MLflow what it lacks of the store: runs, models, versions and aliases.

        A problem of MLflow is in a result, not raised. A lineage that is being learned is left to its run.

        Args:
            lineages: Their names; none: all that have a version.
        """
        self.load("prefect", "infra.tracking.tracker")
        from flows.mlflow import mirror_all

        with self.opened_with_prefect() as store:
            return in_thread(lambda: asyncio.run(mirror_all(store, lineages)))

    def status(self) -> Status:
        """Return what runs, waits, failed or is damaged: processes, lineages, and the runs of a Prefect server."""
        from deal_pipeline.server.status import read_status

        place = self.place
        has_server = self._runner is None and place.variables.get("PREFECT_API_URL")
        with self.opened_with_prefect() if has_server else self.opened():
            return in_thread(lambda: asyncio.run(read_status(self.folder, place.variables)))

    def arrivals(self) -> list[ListedArrival]:
        """Return the arrivals by task: their rows, the versions that learned them, and those that are held."""
        from tasks.housekeeping.arrivals import list_data

        with self.opened() as store:
            return list_data(store)

    def plan_deletion(self, arrival: str) -> ForgetPlan:
        """Return what `delete` would remove; change nothing. Arguments and errors are its own."""
        self.load("prefect")
        from flows.forget import plan_forget

        with self.opened() as store:
            return plan_forget(store, arrival)

    def delete(self, arrival: str, *, reason: str = "") -> ForgetResult:
        """Remove an arrival's rows from everything that is stored. `Lineage.relearn` makes its versions again too.

        Args:
            arrival: Name of its file, key inbox/TASK/FILE, or digest of the dataset.
            reason: Reason for the history. It must not quote any rows.

        Returns:
            What was removed, with sizes in bytes, and every version that learned from the rows.

        Raises:
            ConfigError: There is no such arrival, or more than one.
            StoreError: The store does not answer, or something in it is damaged.
        """
        self.load("prefect", "infra.tracking.tracker")
        from flows.forget import forget, forget_arrival

        return self.run(forget_arrival, arrival, reason, flow=forget, doing="forgetting", makes_room=True)

    def collect(self, lineage: str | None = None, *, older_than: str = "30d", dry_run: bool = False) -> GcResult:
        """Remove what is no longer needed: checkpoints, old rejected adapters, stored training rows, old logs.

        Args:
            lineage: Only this lineage; None: all.
            older_than: Minimum age of what is removed: 12h, 30d, 4w.
            dry_run: Only list what would be removed, with sizes in bytes.

        Raises:
            ConfigError: The age is none.
        """
        self.load("prefect")
        from flows.gc import collect_garbage

        return self.run(collect_garbage, lineage, older_than, dry_run, doing="looking")

    def check(
        self,
        spec: AdaptSpec,
        task_file: Path | None = None,
        *,
        with_model: bool = False,
        score: bool = True,
        plan: bool = False,
        device: str | None = None,
        probe: bool = True,
    ) -> CheckedRows:
        """Check the rows of a spec as a training would. Nothing is stored, and no weights are fetched.

        Args:
            spec: The spec.
            task_file: The task.yaml whose settings are in the spec, if any.
            with_model: Let the base model look for wrong labels too; this takes time.
            score: Let the champion answer the rows, if it knows the task; this takes time.
            plan: Say what a training takes: memory in bytes, steps, and seconds.
            device: With `plan`: other devices, as "1x A100 80GB" or "cpu 16GB"; None: what is free here.
            probe: With `plan`: time three steps, if the base model is here.

        Raises:
            ConfigError: A setting cannot be used.
            DataValidationError: The file cannot be read.
        """
        from deal_pipeline.results import CheckedRows
        from tasks.arrival_check import find_landed, score_rows
        from tasks.validate import validate

        first_rows: list[pa.RecordBatch] = []

        def keep(batch: pa.RecordBatch) -> None:
            if sum(map(len, first_rows)) < SCORED_ROWS:
                first_rows.append(batch)

        with self.opened() as store:
            data = validate(
                store,
                spec,
                task_file,
                with_model=with_model,
                on_progress=lambda done: self.reporter.advanced("checking", done, None),
                on_model=lambda done, total: self.reporter.advanced("labels", done, total),
                on_rows=keep,
            )
            arrival = None
            if score and data.accepted and (landed := find_landed(store, spec, first_rows)) is not None:
                with self.computing():
                    arrival = score_rows(store, landed)
            if not plan or not data.accepted:
                return CheckedRows(data=data, plan=None, arrival=arrival)
            with self.computing():
                from tasks.planning import plan as plan_training

                planned = plan_training(
                    store, spec, device=device, probe=probe, on_progress=self.reporter.stage_started
                )
            return CheckedRows(data=data, plan=planned, arrival=arrival)


def in_thread(call: Callable[[], Result]) -> Result:
    """Call in a thread of its own, where an event loop can run, and wait for the end.

    An interrupt stops the call at its next step.
    """
    from tasks.progress import Interrupted, ask_to_stop

    ended: Future[Result] = Future()

    def work() -> None:
        try:
            ended.set_result(call())
        except BaseException as error:
            ended.set_exception(error)

    thread = threading.Thread(target=copy_context().run, args=(work,))
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        ask_to_stop()
        thread.join()
        raise
    try:
        return ended.result()
    except Interrupted:
        raise KeyboardInterrupt from None


def require(value: object, kinds: Any, what: str, wanted: str) -> None:
    """Refuse a value of another type in one sentence."""
    if not isinstance(value, kinds):
        raise ConfigError(f"{what[0].upper()}{what[1:]} is {kind_of(value)}; give {wanted}.", code="argument")


def kind_of(value: object) -> str:
    """Name the type of a value, for a message."""
    return "None" if value is None else f"of the type {type(value).__name__}"
