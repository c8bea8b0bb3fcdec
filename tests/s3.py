"""The S3 and SQS server of the tests: moto's, over HTTP.

moto looks whether an object exists, and then writes it. Between the two another thread can write, so two conditional
puts may both win. On a real server that is one step. Here a lock makes it one.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

put_in_two_steps, _one_at_a_time = S3Response.put_object, Lock()


def _put_in_one_step(self: S3Response) -> Any:
    with _one_at_a_time:
        return put_in_two_steps(self)


S3Response.put_object = _put_in_one_step  # type: ignore[method-assign]

__all__ = ["ThreadedMotoServer", "put_in_two_steps"]
