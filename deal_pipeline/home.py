"""A home as a Python object: where its lineages lie, who is told of progress, and how its calls run."""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from deal_core.errors import ConfigError

if TYPE_CHECKING:
    from deal_pipeline.training import Training
    from infra.settings import Place
    from infra.store.base import ObjectStore
    from tasks.progress import Reporter

Result = TypeVar("Result")
Show = Callable[[str], object]


class Runner(Protocol):
    """Runs a flow in this process, which has entered the home, as a command does."""

    def __call__(self, start: Callable[[], Coroutine[Any, Any, Result]], **options: bool) -> Result:
        """Run the coroutine that `start` makes. For the options see `run_flow`."""


class _Lines:
    """Shows a line for every finished stage and every remark. It is a `tasks.progress.Reporter`."""

    def __init__(self, show: Show | None) -> None:
        self._show = show

    def stage_started(self, stage: str) -> None:
        """Show nothing."""

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        """Show nothing."""

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        self.said(f"{stage:<9} {seconds:6.1f} s  {detail}")

    def said(self, message: str) -> None:
        if self._show is not None:
            with suppress(Exception):  # the work goes on, whatever the caller does with a line
                self._show(message)


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
        require(folder, str | os.PathLike | None, "the argument home", "the path of a folder")
        require(store, str | None, "the argument store", "an address such as s3://bucket/prefix")
        require(environment, Mapping | None, "the argument environment", "a dict of texts")
        for name_or_value in (text for pair in (environment or {}).items() for text in pair):
            require(name_or_value, str, "the argument environment", "a dict of texts")
        self._given = dict(environment or {})
        if folder is not None:
            self._given["DEAL_HOME"] = os.path.abspath(os.path.expanduser(folder))
        if store is not None:
            self._given["DEAL_STORE_URI"] = store
        self.reporter: Reporter = _Lines(show)
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

        variables = {**os.environ, **self._given}
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
        from tasks.context import current_store
        from tasks.progress import reporting_to

        with at_place(self.place), reporting_to(self.reporter):
            yield current_store()

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Undo at the end what imports in the block do to the caller's process.

        Prefect takes the root logger's handlers. MLflow asks the environment once, while it is imported, whether it may
        send telemetry and print its log; it may not. The process of a command is its own, and is left as imports make
        it.
        """
        from infra.settings import QUIET

        if self._runner is not None:
            yield
            return
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        quiet = {**QUIET, "MLFLOW_CONFIGURE_LOGGING": "false"}
        added = {name: value for name, value in quiet.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)
            root.handlers[:], root.level = handlers, level

    @contextmanager
    def opened_to_move(self) -> Iterator[ObjectStore]:
        """Do what `opened` does, and let Prefect's client use the home's server, if it has one."""
        with self.importing():
            from prefect.settings import PREFECT_API_URL, temporary_settings

            import tasks.lineage.promotion  # noqa: F401  # it imports Prefect
        if self._runner is not None:  # the process has the home's variables
            with self.opened() as store:
                yield store
            return
        url = self.place.variables.get("PREFECT_API_URL")
        updates, defaults = ({PREFECT_API_URL: url}, ()) if url else ({}, (PREFECT_API_URL,))
        with self.opened() as store, temporary_settings(updates=updates, restore_defaults=defaults):
            yield store

    def train(
        self, training: Training, result: type[Result], *, reporter: Reporter | None = None, **options: bool
    ) -> Result:
        """Run a training to its end and return its result. A call that was stopped goes on when it is repeated.

        Args:
            training: What is trained.
            result: The type of the result.
            reporter: Gets the stages of a training in a child; None: those who are shown everything.
            options: Those of `run_flow`, for a command's process.

        Raises:
            DealError: The error of the training.
        """
        if self._runner is not None:
            return self._runner(training.start, **options)
        from pydantic import TypeAdapter

        from deal_pipeline.training_child import train_in_child

        return TypeAdapter(result).validate_python(train_in_child(training, self.place, reporter or self.reporter))

    def run(self, flow: Any, *arguments: Any, **options: bool) -> Any:
        """Run a flow that trains nothing: as a flow run for a command, else as a plain function, without Prefect's API.

        `options` are those of `run_flow`. Errors are the flow's.
        """
        if self._runner is not None:
            return self._runner(lambda: flow(*arguments), **options)
        with self.opened():
            return in_thread(lambda: asyncio.run(flow.fn(*arguments)))


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
