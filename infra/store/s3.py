"""An object store in an S3 bucket, Amazon's or another server's."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from deal_core.errors import ConfigError, StoreError
from infra.settings import StoreSettings, without_password
from infra.store.base import (
    RESERVED,
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
    check_key,
    check_source,
    complete_file,
    folder_of,
)

PROBE = f"{RESERVED}/if-none-match"
_probed: set[tuple[str, str]] = set()
"""Pairs of a server and a bucket that refused a second conditional put in this process."""

NUM_TRIES = 20
"""How often a conditional put is sent again while the server reports another one in progress."""


def make_client(settings: StoreSettings, service: str = "s3") -> Any:
    """A boto3 client of S3 or another service. boto3's own sources give what the settings leave open.

    Raises:
        ConfigError: only one of the two keys is set, or the server's address is not usable or holds a password.
    """
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    if (key is None) != (secret is None):
        raise ConfigError("Only one of DEAL_S3_ACCESS_KEY_ID and DEAL_S3_SECRET_ACCESS_KEY is set; set both or none.")
    # Some servers other than Amazon's do not know the checksums that boto3 adds by default. AWS_* variables turn them
    # off for a server that AWS_ENDPOINT_URL names.
    names = ("request_checksum_calculation", "response_checksum_validation") if settings.s3_endpoint_url else ()
    config = Config(
        retries={"mode": "standard", "max_attempts": settings.s3_max_attempts}, **dict.fromkeys(names, "when_required")
    )
    try:
        client = boto3.session.Session().client(
            service,
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            aws_access_key_id=key and key.get_secret_value(),
            aws_secret_access_key=secret and secret.get_secret_value(),
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        reason = without_password(str(error)).rstrip(".")
        raise ConfigError(f"The S3 settings do not fit: {reason}; check DEAL_S3_* and AWS_*.") from None
    address = client.meta.endpoint_url
    if "@" in address:  # S3 makes no use of it, and every error would show it
        raise ConfigError(
            f"The address {without_password(address)} has a user or a password in it; take it out of "
            "DEAL_S3_ENDPOINT_URL (or AWS_ENDPOINT_URL), and set DEAL_S3_ACCESS_KEY_ID and DEAL_S3_SECRET_ACCESS_KEY."
        )
    return client


class S3Store(ObjectStore):
    """Objects of one bucket, below an optional prefix. The bucket must exist."""

    def __init__(self, bucket: str, root: str, settings: StoreSettings) -> None:
        self.bucket = bucket
        self.root = folder_of(root)
        self.uri = f"s3://{bucket}/{self.root}".removesuffix("/")
        self.client = make_client(settings)
        self._encryption = _encryption_of(settings)

    def get_bytes(self, key: str, *, at_most: int | None = None) -> bytes:
        """Read the object."""
        with self._saying("read", key):
            answer = self.client.get_object(Bucket=self.bucket, Key=self._name(key))
            with closing(answer["Body"]) as body:  # what is left of it is not fetched
                return bytes(body.read(at_most))

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write the object; with `If-None-Match: *` exactly one of several concurrent writers wins."""
        name = self._name(key)
        with self._saying("write", key):
            if if_absent:
                self.check()
                return self._put_if_absent(name, data)
            self.client.put_object(Bucket=self.bucket, Key=name, Body=data, **self._encryption)
            return True

    def check(self) -> None:
        """Put one test object twice, once in a process; one request is enough when the object is there already."""
        place = (self.client.meta.endpoint_url, self.bucket)
        if place in _probed:
            return
        with self._saying("write", PROBE):
            if self._put_if_absent(self.root + PROBE, b"") and self._put_if_absent(self.root + PROBE, b""):
                raise StoreError(
                    f"{place[0]} takes no notice of If-None-Match: of two writers at once both would believe to be "
                    "first, and what one wrote would be lost. Use a server that keeps conditional writes, as those of "
                    "Amazon, Ceph and MinIO do."
                )
        _probed.add(place)

    def find(self, key: str) -> ObjectInfo | None:
        """Ask for the object's head."""
        try:
            with self._saying("look up", key):
                head = self.client.head_object(Bucket=self.bucket, Key=self._name(key))
        except ObjectNotFoundError:
            return None
        etag = head["ETag"].strip('"')
        return ObjectInfo(key=key, size=head["ContentLength"], etag=etag, modified=head["LastModified"])

    def _list_all(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects below a folder, page by page."""
        folder = self.root + folder_of(prefix)
        with self._saying("list", prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
            for item in (item for page in pages for item in page.get("Contents", ())):
                key = item["Key"].removeprefix(self.root)
                if key.endswith("/") or key == PROBE:  # consoles store the former to show an empty folder
                    continue
                etag = item["ETag"].strip('"')
                yield ObjectInfo(key=key, size=item["Size"], etag=etag, modified=item["LastModified"])

    def upload_file(self, local: Path, key: str) -> None:
        """Upload in parts, as boto3's transfer manager does."""
        with self._saying("write", key):
            source = str(check_source(local, key))
            self.client.upload_file(source, self.bucket, self._name(key), ExtraArgs=self._encryption)

    def download_file(self, key: str, local: Path) -> None:
        """Download in parts, as boto3's transfer manager does."""
        with self._saying("read", key), complete_file(local) as part:
            self.client.download_file(self.bucket, self._name(key), str(part))

    def _delete_one(self, key: str) -> None:
        """Delete the object by a request of its own: some servers refuse the checksum of the call for many."""
        with self._saying("delete", key):
            self.client.delete_object(Bucket=self.bucket, Key=self._name(key))

    def _name(self, key: str) -> str:
        return self.root + check_key(key)

    def _put_if_absent(self, name: str, data: bytes) -> bool:
        """Store unless the key is taken. A put whose answer got lost is sent again and then finds its own object."""
        writer = uuid.uuid4().hex
        for remaining in reversed(range(NUM_TRIES)):
            try:
                self.client.put_object(
                    Bucket=self.bucket, Key=name, Body=data, IfNoneMatch="*", Metadata={"writer": writer},
                    **self._encryption,
                )  # fmt: skip
                return True
            except ClientError as error:
                code = _code_of(error)
                if code in ("PreconditionFailed", "412"):
                    found = self.client.head_object(Bucket=self.bucket, Key=name)
                    return bool(found["Metadata"].get("writer") == writer)
                if code not in ("ConditionalRequestConflict", "409") or not remaining:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _saying(self, doing: str, key: str) -> Iterator[None]:
        """Turn an error of boto3 into a StoreError that says what failed, where, and what to do."""
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error, OSError) as error:
            # the transfer manager wraps the server's answer
            answer = error.__context__ if isinstance(error, Boto3Error) else error
            if isinstance(answer, ClientError) and _code_of(answer) in ("NoSuchKey", "NotFound", "404"):
                raise ObjectNotFoundError(f"There is no object {key!r} in {self.uri}; check the name.") from error
            raise StoreError(f"Cannot {doing} {key!r} in {self.uri}: {_explain(answer or error)}.") from error


def _encryption_of(settings: StoreSettings) -> dict[str, str]:
    """Arguments of every write.

    Raises:
        ConfigError: a key is named for an encryption that uses none.
    """
    if settings.s3_kms_key_id and settings.s3_encryption != "aws:kms":
        raise ConfigError("DEAL_S3_KMS_KEY_ID is set, but DEAL_S3_ENCRYPTION is not aws:kms; set both or none.")
    found = {"ServerSideEncryption": settings.s3_encryption, "SSEKMSKeyId": settings.s3_kms_key_id}
    return {name: value for name, value in found.items() if value}


def _explain(error: BaseException) -> str:
    """What happened, and what to do about it."""
    if isinstance(error, ClientError):
        return f"{_code_of(error)}; {_remedy(_code_of(error))}"
    if isinstance(error, NoCredentialsError):
        return "no keys; set AWS_* or DEAL_S3_*"
    if isinstance(error, OSError) and not isinstance(error, BotoCoreError):  # some are both
        return f"{error.strerror or error}; check the local path"
    return f"{str(error).rstrip('.')}; check address and network"


def _code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _remedy(code: str) -> str:
    if code == "NoSuchBucket":
        return "make the bucket first"
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return "check the keys and what they are allowed to do"
    return "check the server's log"
