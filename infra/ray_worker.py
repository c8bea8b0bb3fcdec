"""A worker of Ray Train. The driver and Ray's controller import this module too, so it imports little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deal_core.errors import DealError


def work_for_ray(config: Mapping[str, Any]) -> None:
    """Do a stored job as a worker of Ray Train; `messages` is a queue of Ray that the driver reads.

    An error that was raised on purpose is told and not raised: Ray would try again, and the driver ends the workers.
    """
    from deal_core.training.elastic import failure_of
    from infra.stored_job import work_on

    send = config["messages"].put
    try:
        work_on(config["prefix"], send)
    except DealError as error:
        send(failure_of(error))
