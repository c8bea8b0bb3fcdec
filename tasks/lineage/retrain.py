"""When a lineage is trained on what has landed: the section `retrain` of its file, and the one function that decides.

The module reads no store and no clock: who asks gives the files that wait and the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, NamedTuple, Self
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BaseModel, Field, model_validator

from deal_core.errors import ConfigError
from deal_core.limits import Count, Flag, Positive, ShareAboveZero


def _require_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (LookupError, ValueError, OSError):  # unknown, a path, or a folder of the database
        raise ValueError("no time zone has this name; give one such as Europe/Berlin or UTC") from None
    return name


def _require_cron(text: str) -> str:
    if len(text.split()) == 6:  # CronSim would read the first one as seconds
        raise ConfigError(
            "retrain.cron has six fields; give five: minute, hour, day, month and day of the week, such as "
            "'0 2 * * 0' for Sundays at two.",
            code="cron-fields",
        )
    try:
        next(CronSim(text, datetime.now(UTC)))
    except CronSimError as error:
        raise ValueError(
            f"this is no cron expression: {error}. Give minute, hour, day, month and day of the week, such as "
            "'0 2 * * 0' for Sundays at two"
        ) from None
    except StopIteration:
        raise ValueError("this cron expression names no time within 50 years") from None
    return text


class RetrainPolicy(BaseModel, frozen=True, extra="forbid"):
    """When a lineage is trained on what has landed. These settings change no version and no digest.

    `deal adapt FILE` does not ask them. If something may have to wait, the files of one task that wait together are
    learned together, as one arrival.
    """

    when: Literal["arrival", "schedule"] = "arrival"
    """arrival: as soon as something has landed, or `min_rows` rows have. schedule: at the times of `cron`."""
    cron: Annotated[str, AfterValidator(_require_cron)] | None = None
    """The times of `schedule`: minute, hour, day, month, day of the week; "0 2 * * 0" is Sundays at two."""
    timezone: Annotated[str, AfterValidator(_require_zone)] = "UTC"
    """Time zone of `cron`, of the month of `budget_hours`, and of the times in `deal status`."""
    min_rows: Count | None = None
    """Rows of a task that must have landed. With a schedule they are counted at each of its times."""
    max_wait_days: Annotated[Positive, Field(le=3650)] | None = None  # a longer time may end after Python's last date
    """Days after which a task is trained anyway: with fewer rows, and between the times of a schedule."""
    test_first: Flag = False
    """Without effect: the champion answers every arrival of a task that it knows before anything is trained."""
    skip_if_accuracy: ShareAboveZero | None = None
    """The champion's accuracy on the new rows, 0 to 1, from which on there is nothing to learn. The arrival is then
    `skipped`: nothing is trained, and test rows stay as they are. An arrival with new labels is trained. None: nothing
    is skipped."""
    budget_hours: Annotated[Positive, Field(le=744)] | None = None  # a month has no more
    """Hours of finished trainings of the lineage in a calendar month. When they are used up, what lands waits for the
    next month. The training that exceeds them ends."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.when == "schedule" and self.cron is None:
            raise ValueError("retrain.cron is missing; retrain.when: schedule needs it, such as cron: '0 2 * * 0'")
        if self.when == "arrival" and self.cron is not None:
            raise ValueError("retrain.cron needs retrain.when: schedule")
        if self.max_wait_days is not None and self.when == "arrival" and self.min_rows is None:
            raise ValueError(
                "retrain.max_wait_days needs retrain.when: schedule or retrain.min_rows; without them nothing waits"
            )
        return self

    @property
    def may_wait(self) -> bool:
        """Whether something that has landed may have to wait. If not, each file is learned on its own, at once."""
        return self.when == "schedule" or self.min_rows is not None or self.budget_hours is not None

    @property
    def zone(self) -> ZoneInfo:
        """The time zone."""
        return ZoneInfo(self.timezone)

    def skips(self, accuracy: float, *, brings_labels: bool) -> bool:
        """Return whether there is nothing to learn from an arrival whose rows the champion answers so well."""
        return self.skip_if_accuracy is not None and accuracy >= self.skip_if_accuracy and not brings_labels

    def month_of(self, now: datetime) -> tuple[datetime, datetime]:
        """Return the beginning of the calendar month and of the next one."""
        first = now.astimezone(self.zone).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        return first, (first + timedelta(days=32)).replace(day=1)

    def next_time(self, now: datetime) -> datetime:
        """Return the first time of the schedule after now."""
        assert self.cron is not None, "a schedule has a cron expression"
        return next(CronSim(self.cron, now.astimezone(self.zone)))

    def last_time(self, now: datetime) -> datetime:
        """Return the last time of the schedule up to and including now."""
        assert self.cron is not None, "a schedule has a cron expression"
        following = now.astimezone(self.zone).replace(microsecond=0) + timedelta(seconds=1)
        return next(CronSim(self.cron, following, reverse=True))


DEFAULT_POLICY = RetrainPolicy()
"""Nothing waits, and nothing is skipped."""


class WaitingFile(NamedTuple):
    """A file or folder that has landed and was not learned."""

    landed: datetime
    num_rows: int
    num_files: int = 1
    is_asked_for: bool = False
    """Whether a person has asked for it (`deal version requeue`)."""


class Waiting(BaseModel, frozen=True):
    """The files of one task that a lineage has not learned, and when it learns them."""

    task: str
    num_files: int
    num_rows: int
    since: datetime
    """When the oldest file landed."""
    is_due: bool
    """Whether the next run trains on them."""
    why: str
    """Why the files wait or are due, in a few words."""
    until: datetime | None = None
    """When they are learned even if nothing else lands; None: they are due, or wait for more rows."""

    def line(self) -> str:
        """Return everything in one line."""
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        verb = "has" if self.num_files == 1 else "have"
        rows = "1 row" if self.num_rows == 1 else f"{self.num_rows} rows"
        if self.is_due:
            then = "The next run trains on this"
        elif self.until is None:
            then = "No time is set for this"
        else:
            then = f"Training starts by {_said(self.until)} at the latest"
        return f"{self.task}: {files} with {rows} {verb} been waiting since {_said(self.since)}. {self.why}. {then}."


def when_to_train(
    policy: RetrainPolicy,
    task: str,
    files: Sequence[WaitingFile],
    *,
    now: datetime,
    spent_hours: Callable[[], float],
) -> Waiting | None:
    """Decide when a lineage is trained on the files of one task that have landed and were not learned.

    `spent_hours` returns the hours of the trainings that ended this month. It is only asked if all else is met.

    Returns:
        What waits, and whether it is due; None: nothing waits.
    """
    if not files:
        return None
    since = min(file.landed for file in files)
    is_met, why, until = _conditions(policy, files, since.astimezone(policy.zone), now)
    is_asked_for = any(file.is_asked_for for file in files)
    if is_asked_for:
        is_met, why = True, "A person has asked for this"
    elif is_met and policy.budget_hours is not None and (spent := spent_hours()) >= policy.budget_hours:
        _, until = policy.month_of(now)
        is_met, why = False, f"{spent:.1f} of the {policy.budget_hours:g} training hours of this month are used"
    return Waiting(
        task=task,
        num_files=sum(file.num_files for file in files),
        num_rows=sum(file.num_rows for file in files),
        since=since.astimezone(policy.zone),
        is_due=is_met,
        why=why,
        until=None if is_met else until,
    )


def _conditions(
    policy: RetrainPolicy, files: Sequence[WaitingFile], since: datetime, now: datetime
) -> tuple[bool, str, datetime | None]:
    """Whether schedule, rows and waiting time let a task be trained; why; and when they will if nothing else lands."""
    latest = None if policy.max_wait_days is None else since + timedelta(days=policy.max_wait_days)
    if latest is not None and now >= latest:
        return True, f"The longest wait of {policy.max_wait_days:g} days is over", None
    wanted, num_rows = policy.min_rows or 0, sum(file.num_rows for file in files)
    counted = f"{num_rows} of {wanted} rows have landed"
    if policy.when == "arrival":
        return num_rows >= wanted, counted if wanted else "This has landed", latest
    # What landed after the schedule's last time waits for the next one, also if that makes the rows enough.
    last, following = policy.last_time(now), policy.next_time(now)
    in_time = [file.num_rows for file in files if file.landed <= last]
    if in_time and sum(in_time) >= wanted:
        return True, f"The schedule's time was {_said(last)}", None
    if num_rows >= wanted:
        return (
            False,
            "The rows are enough" if wanted else "The schedule decides",
            following if latest is None else min(following, latest),
        )
    return False, f"{counted}; the next check is on {_said(following)}", latest


def _said(time: datetime) -> str:
    return f"{time:%a %Y-%m-%d %H:%M %Z}"
