"""S3, of Amazon or another server: the object store in a bucket, and the queue of the bucket's events."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Barrier
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from deal_core.errors import ConfigError, StoreError
from deal_core.regular_file import complete_file
from deal_core.safe_text import without_secrets
from infra.settings import LandingSettings, StoreSettings
from infra.store.base import RESERVED, ObjectInfo, ObjectNotFoundError, ObjectStore, check_key, check_source, folder_of

logger = logging.getLogger(__name__)

PROBE = f"{RESERVED}/conditions"
"""How the names of test objects begin, and that of the note of the server that has passed the test."""
NUM_RACERS = 16
"""Concurrent conditional puts of a test object."""
NUM_TRIES = 20
"""How often a conditional put is sent again while the server reports a conflict with another put."""
MISSING = ("NoSuchKey", "NotFound", "404")
"""Codes of the answers that there is no such object."""
PIECE_BYTES = 1 << 20
MAX_WAIT_SECONDS = 20
MAX_MESSAGES = 10
_probed: set[tuple[str, str]] = set()
"""Stores that this process knows to have passed the test, each as its server and its address."""


def make_client(settings: StoreSettings, service: str = "s3") -> Any:
    """Return a boto3 client of S3 or another service. boto3's own sources give the settings that are not set.

    Raises:
        ConfigError: Only one of the two keys is set, or the server's address is not valid or contains a password.
    """
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    if (key is None) != (secret is None):
        raise ConfigError("Only one of DEAL_S3_ACCESS_KEY_ID and DEAL_S3_SECRET_ACCESS_KEY is set; set both or none.")
    # Some servers other than Amazon's do not know the checksums that boto3 adds by default. AWS_* variables turn them
    # off for a server that AWS_ENDPOINT_URL names.
    names = ("request_checksum_calculation", "response_checksum_validation") if settings.s3_endpoint_url else ()
    config = Config(
        retries={"mode": "standard", "max_attempts": settings.s3_max_attempts},
        max_pool_connections=NUM_RACERS,
        **dict.fromkeys(names, "when_required"),
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
        reason = without_secrets(str(error)).rstrip(".")
        raise ConfigError(f"The S3 settings do not fit: {reason}; check DEAL_S3_* and AWS_*.") from None
    address = client.meta.endpoint_url
    if "@" in address:  # S3 ignores a password there, and every error would show it
        raise ConfigError(
            f"The address {without_secrets(address)} has a user or a password in it; take it out of "
            "DEAL_S3_ENDPOINT_URL (or AWS_ENDPOINT_URL), and set DEAL_S3_ACCESS_KEY_ID and DEAL_S3_SECRET_ACCESS_KEY."
        )
    return client


class S3Store(ObjectStore):
    """A store whose objects are in one bucket, below an optional prefix. The bucket must exist.

    Raises:
        ConfigError: As `make_client`, or a key is set for an encryption that uses none.
    """

    def __init__(self, bucket: str, root: str, settings: StoreSettings) -> None:
        self.bucket = bucket
        self.root = folder_of(root)
        self.uri = f"s3://{bucket}/{self.root}".removesuffix("/")
        self.client = make_client(settings)
        if settings.s3_kms_key_id and settings.s3_encryption != "aws:kms":
            raise ConfigError("DEAL_S3_KMS_KEY_ID is set, but DEAL_S3_ENCRYPTION is not aws:kms; set both or none.")
        encryption = {"ServerSideEncryption": settings.s3_encryption, "SSEKMSKeyId": settings.s3_kms_key_id}
        self._encryption = {name: value for name, value in encryption.items() if value}

    def get_bytes(self, key: str, *, at_most: int | None = None) -> bytes:
        """Read the object."""
        with self._report_errors("read", key):
            answer = self.client.get_object(Bucket=self.bucket, Key=self._name(key))
            with closing(answer["Body"]) as body:  # so the rest is not fetched
                return bytes(body.read(at_most))

    def sha256_of(self, key: str) -> str:
        """Read the object."""
        digest = hashlib.sha256()
        with self._report_errors("read", key):
            answer = self.client.get_object(Bucket=self.bucket, Key=self._name(key))
            with closing(answer["Body"]) as body:
                for piece in body.iter_chunks(PIECE_BYTES):
                    digest.update(piece)
        return digest.hexdigest()

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Read the object. Its tag is the server's ETag."""
        with self._report_errors("read", key):
            answer = self.client.get_object(Bucket=self.bucket, Key=self._name(key))
            with closing(answer["Body"]) as body:
                return bytes(body.read()), str(answer["ETag"])

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write the object. With `If-None-Match: *` exactly one of several concurrent writers wins."""
        name = self._name(key)
        with self._report_errors("write", key):
            if if_absent:
                self.check()
                return self._put_if(name, data, IfNoneMatch="*")
            self.client.put_object(Bucket=self.bucket, Key=name, Body=data, **self._encryption)
            return True

    def replace_bytes(self, key: str, data: bytes, tag: str) -> bool:
        """Write the object with `If-Match: TAG`."""
        with self._report_errors("write", key):
            self.check()
            return self._put_if(self._name(key), data, IfMatch=tag)

    def check(self) -> None:
        """Let several conditional puts of a test object race, once a store: a note in the store names the server.

        A server that looks at the object and then writes it would pass one put after the other.

        Raises:
            StoreError: Not exactly one put has won.
        """
        server = self.client.meta.endpoint_url
        if (server, self.uri) in _probed:
            return
        note = f"{self.root}{PROBE}"
        with self._report_errors("write", PROBE):
            try:
                with closing(self.client.get_object(Bucket=self.bucket, Key=note)["Body"]) as body:
                    is_noted = body.read().decode() == server  # a copy of the store may be on another server
            except ClientError as error:
                if _code_of(error) not in MISSING:
                    raise
                is_noted = False
            if not is_noted:
                name = f"{note}-{uuid.uuid4().hex}"
                try:
                    self._race(name, IfNoneMatch="*")
                    self._race(name, IfMatch=self.client.head_object(Bucket=self.bucket, Key=name)["ETag"])
                finally:
                    with suppress(ClientError):  # who may not delete leaves an object, which no listing shows
                        self.client.delete_object(Bucket=self.bucket, Key=name)
                self.client.put_object(Bucket=self.bucket, Key=note, Body=server.encode(), **self._encryption)
        _probed.add((server, self.uri))

    def _race(self, name: str, **condition: str) -> None:
        """Let conditional puts race; raise StoreError if not exactly one wins."""
        start = Barrier(NUM_RACERS)

        def race(_: int) -> bool:
            start.wait()
            return self._put_if(
                name, uuid.uuid4().bytes, **condition
            )  # a content that was there has the ETag of before

        with ThreadPoolExecutor(NUM_RACERS) as pool:
            num_won = sum(pool.map(race, range(NUM_RACERS)))
        if num_won != 1:
            header = "If-Match" if "IfMatch" in condition else "If-None-Match"
            raise StoreError(
                f"{self.client.meta.endpoint_url} let {num_won} of {NUM_RACERS} concurrent puts with {header} win, so "
                "two writers could overwrite each other. Use a server with atomic conditional writes, such as those of "
                "Amazon and Ceph.",
                code="store-conditions",
            )

    def find(self, key: str) -> ObjectInfo | None:
        """Request the object's head."""
        try:
            with self._report_errors("look up", key):
                head = self.client.head_object(Bucket=self.bucket, Key=self._name(key))
        except ObjectNotFoundError:
            return None
        etag = head["ETag"].strip('"')
        return ObjectInfo(key=key, size=head["ContentLength"], etag=etag, modified=head["LastModified"])

    def _list_all(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects below a folder, page by page."""
        folder = self.root + folder_of(prefix)
        with self._report_errors("list", prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
            for item in (item for page in pages for item in page.get("Contents", ())):
                key = item["Key"].removeprefix(self.root)
                if key.endswith("/") or key.startswith(PROBE):  # consoles store keys with / at the end as empty folders
                    continue
                etag = item["ETag"].strip('"')
                yield ObjectInfo(key=key, size=item["Size"], etag=etag, modified=item["LastModified"])

    def upload_file(self, local: Path, key: str) -> None:
        """Upload in parts, as boto3's transfer manager does."""
        with self._report_errors("write", key):
            source = str(check_source(local, key))
            self.client.upload_file(source, self.bucket, self._name(key), ExtraArgs=self._encryption)

    def uploads(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield what boto3's transfer manager has begun. Without the right to list that, nothing, which is logged."""
        folder = self.root + folder_of(prefix)
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=folder)
        try:
            items = [item for page in pages for item in page.get("Uploads", ())]
        except ClientError as error:
            needed = "s3:ListBucketMultipartUploads, s3:ListMultipartUploadParts and s3:AbortMultipartUpload"
            self.warn_once("?uploads", f"Unfinished uploads are not looked for: {_explain(error)}; allow {needed}.")
            return
        for item in items:
            with self._report_errors("look up", item["Key"].removeprefix(self.root)), suppress(self._gone):
                parts = self.client.get_paginator("list_parts").paginate(**self._named(item["Key"], item["UploadId"]))
                yield ObjectInfo(
                    key=item["Key"].removeprefix(self.root),
                    size=sum(part["Size"] for page in parts for part in page.get("Parts", ())),
                    etag=item["UploadId"],
                    modified=item["Initiated"],
                )

    def abort_upload(self, upload: ObjectInfo) -> None:
        """Abort it, unless it has ended."""
        with self._report_errors("delete", upload.key), suppress(self._gone):
            self.client.abort_multipart_upload(**self._named(self._name(upload.key), upload.etag))

    @property
    def _gone(self) -> type[ClientError]:
        """The error of an upload that has ended."""
        error: type[ClientError] = self.client.exceptions.NoSuchUpload
        return error

    def _named(self, name: str, upload: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": name, "UploadId": upload}

    def download_file(self, key: str, local: Path) -> None:
        """Download in parts, as boto3's transfer manager does."""
        with self._report_errors("read", key), complete_file(local) as part:
            self.client.download_file(self.bucket, self._name(key), str(part))

    def _delete_one(self, key: str) -> None:
        """Delete the object by its own request: some servers refuse the checksum of the request for many objects."""
        with self._report_errors("delete", key):
            self.client.delete_object(Bucket=self.bucket, Key=self._name(key))

    def _name(self, key: str) -> str:
        return self.root + check_key(key)

    def _put_if(self, name: str, data: bytes, **condition: str) -> bool:
        """Store under a condition. boto3 repeats a put whose answer got lost; the repeat finds its own object."""
        writer = uuid.uuid4().hex
        for remaining in reversed(range(NUM_TRIES)):
            try:
                self.client.put_object(
                    Bucket=self.bucket,
                    Key=name,
                    Body=data,
                    Metadata={"writer": writer},
                    **condition,
                    **self._encryption,
                )
                return True
            except ClientError as error:
                code = _code_of(error)
                if code in MISSING and "IfMatch" in condition:  # deleted since it was read
                    return False
                if code in ("PreconditionFailed", "412"):
                    try:
                        head = self.client.head_object(Bucket=self.bucket, Key=name)
                    except ClientError as gone:
                        if _code_of(gone) in MISSING:  # deleted since it was read, in Ceph's words
                            return False
                        raise
                    if head["Metadata"].get("writer") == writer:
                        return True
                    if head["ETag"] != condition.get("IfMatch"):
                        return False
                    # The object is what was read, and the server refused it: Ceph compares the tag without its quotes.
                    condition["IfMatch"] = head["ETag"].strip('"')
                elif code not in ("ConditionalRequestConflict", "409") or not remaining:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _report_errors(self, action: str, key: str) -> Iterator[None]:
        """Replace an error of boto3 by a StoreError with the action and place that failed, and what to do."""
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error, OSError) as error:
            # boto3's transfer manager wraps the server's answer
            answer = error.__context__ if isinstance(error, Boto3Error) else error
            if isinstance(answer, ClientError) and _code_of(answer) in MISSING:
                raise ObjectNotFoundError(f"There is no object {key!r} in {self.uri}; check the name.") from error
            raise StoreError(f"Cannot {action} {key!r} in {self.uri}: {_explain(answer or error)}.") from error


def _explain(error: BaseException) -> str:
    """Return the reason of an error, and what to do."""
    if isinstance(error, ClientError):
        code = _code_of(error)
        if code == "NoSuchBucket":
            return f"{code}; make the bucket first"
        if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            return f"{code}; check the keys and what they are allowed to do"
        return f"{code}; check the server's log"
    if isinstance(error, NoCredentialsError):
        return "no keys; set AWS_* or DEAL_S3_*"
    if isinstance(error, OSError) and not isinstance(error, BotoCoreError):  # some errors are both
        return f"{error.strerror or error}; check the local path"
    return f"{str(error).rstrip('.')}; check address and network"


def _code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


class LandingQueue:
    """The SQS queue of the bucket's events: a notification says that a file may have landed.

    The inbox itself is read from the store, so repeated, late and lost notifications are harmless.
    """

    def __init__(self, settings: LandingSettings) -> None:
        assert settings.landing_queue_url is not None
        self._url = settings.landing_queue_url
        self._shown = without_secrets(self._url)
        self._client = make_client(settings, "sqs")
        self._received: list[str] = []

    def wait(self, seconds: float) -> bool:
        """Wait for a notification, at most so long and at most 20 s; return whether a notification came.

        If the queue does not answer, a warning is logged and the result is False.
        """
        try:
            answer = self._client.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=MAX_MESSAGES,
                WaitTimeSeconds=max(0, min(MAX_WAIT_SECONDS, int(seconds))),
            )
        except (ClientError, BotoCoreError) as error:
            logger.warning("The queue %s does not answer: %s; the inbox is read without it.", self._shown, error)
            return False
        self._received += [message["ReceiptHandle"] for message in answer.get("Messages", ())]
        return bool(self._received)

    def done(self) -> None:
        """Delete the received notifications from the queue, after the inbox was read."""
        while self._received:
            handle = self._received.pop()
            try:
                self._client.delete_message(QueueUrl=self._url, ReceiptHandle=handle)
            except (ClientError, BotoCoreError) as error:
                logger.warning("The queue %s keeps a notification: %s; it will come again.", self._shown, error)


def open_landing_queue(settings: LandingSettings | None = None) -> LandingQueue | None:
    """Return the queue of DEAL_LANDING_QUEUE_URL; None: it is not set, or not usable, which is logged."""
    settings = settings or LandingSettings()
    if not settings.landing_queue_url:
        return None
    try:
        return LandingQueue(settings)
    except ConfigError as error:  # for example without a region
        logger.error("The queue cannot be used: %s; check DEAL_S3_REGION. The inbox is read without it.", error)
        return None
