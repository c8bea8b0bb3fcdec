"""Make buckets where there are none: `python -m infra.store.buckets NAME ...`. compose.yaml begins with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from infra.settings import StoreSettings
from infra.store.s3 import make_client


def make_buckets(names: Sequence[str]) -> None:
    """Make the buckets that are not there, on the server that DEAL_S3_* names."""
    client = make_client(StoreSettings())
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in names:
        if name not in present:
            client.create_bucket(Bucket=name)


if __name__ == "__main__":
    make_buckets(sys.argv[1:])
