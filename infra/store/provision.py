"""The buckets of a new S3 server, and a user for each that needs one, with the rights that it needs.

`python -m infra.store.provision` makes them; compose.yaml begins with it. DEAL_S3_* name the server and its
administrator, and STORE_USER_ACCESS_KEY and STORE_USER_SECRET_KEY the keys of each user. On servers other than RustFS
and MinIO users are made by hand; `python -m infra.store.provision USER` prints the policy of one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError
from botocore.httpsession import URLLib3Session
from pydantic import SecretStr

from deal_core.errors import ConfigError, DealError, StoreError
from infra.settings import StoreSettings
from infra.store import keys
from infra.store.s3 import make_client

BUCKETS = {"worker": "deal", "front": "deal", "mlflow": "mlflow"}
"""The bucket of each user."""
ROWS = (keys.INBOX, keys.DATASETS, keys.QUARANTINE)
"""Folders with the rows of arrivals, which the front may not read."""
LOGS = (keys.PREDICTIONS, keys.FEEDBACK)
"""Folders in which the front writes, and removes what is too old."""
RUSTFS, MINIO = "/rustfs/admin/v3/", "/minio/admin/v3/"
"""Where the servers have their administration. RustFS took over MinIO's, without its encryption."""


def policy_of(user: str) -> dict[str, Any]:
    """Return what a user may do, in the words of S3's policies."""
    bucket = f"arn:aws:s3:::{BUCKETS[user]}"

    def statement(effect: str, actions: list[str], *folders: str) -> dict[str, Any]:
        objects = [f"{bucket}/{folder}/*" for folder in folders] or [f"{bucket}/*"]
        return {"Effect": effect, "Action": [f"s3:{action}" for action in actions], "Resource": objects}

    listing = ["s3:ListBucket", "s3:GetBucketLocation"]
    if user == "front":
        statements = [
            statement("Allow", ["GetObject"]),
            statement("Deny", ["GetObject"], *ROWS),
            statement("Allow", ["PutObject"], *LOGS, "base_models"),
            statement("Allow", ["DeleteObject"], *LOGS),
        ]
    else:
        listing.append("s3:ListBucketMultipartUploads")  # of killed processes, which `deal data gc` ends
        uploading = ["AbortMultipartUpload", "ListMultipartUploadParts"]
        statements = [statement("Allow", ["GetObject", "PutObject", "DeleteObject", *uploading])]
    statements.insert(0, {"Effect": "Allow", "Action": listing, "Resource": [bucket]})
    return {"Version": "2012-10-17", "Statement": statements}


def provision(settings: StoreSettings, environment: Mapping[str, str]) -> None:
    """Make what is missing of the buckets and users.

    Raises:
        ConfigError: A variable with a key is missing.
        StoreError: The server does not answer, refuses a request, or has no user with these keys and rights.
    """
    missing = [name for user in BUCKETS for name in _variables(user) if not environment.get(name)]
    if missing:
        raise ConfigError(f"{missing[0]} is not set; set the keys of the store's users.", code="store-keys")
    try:
        client = make_client(settings)
        for bucket in {*BUCKETS.values()} - {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=bucket)
        for user in BUCKETS:
            _make_user(settings, user, *(environment[name] for name in _variables(user)))
    except (BotoCoreError, ClientError) as error:
        raise StoreError(f"The store's buckets and users could not be made: {error}; see the server's log.") from error


def _variables(user: str) -> tuple[str, str]:
    return f"STORE_{user.upper()}_ACCESS_KEY", f"STORE_{user.upper()}_SECRET_KEY"


def _make_user(settings: StoreSettings, user: str, access_key: str, secret_key: str) -> None:
    for administration in (RUSTFS, MINIO):
        if _asked_to_make_user(settings, administration, user, access_key, secret_key):
            break
    own = settings.model_copy(
        update={"s3_access_key_id": SecretStr(access_key), "s3_secret_access_key": SecretStr(secret_key)}
    )
    try:
        make_client(own).list_objects_v2(Bucket=BUCKETS[user], MaxKeys=1)
    except ClientError as error:
        raise StoreError(
            f"The store refuses the user {user} with {_variables(user)[0]}: {error}. On a server other than RustFS "
            f"and MinIO make the user there; its rights: python -m infra.store.provision {user}",
            code="store-user",
        ) from error


def _asked_to_make_user(
    settings: StoreSettings, administration: str, user: str, access_key: str, secret_key: str
) -> bool:
    """Ask one kind of administration for a user with its policy; return whether the server has it."""
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("add-user", {"accessKey": access_key}, {"secretKey": secret_key, "status": "enabled"}),
        ("add-canned-policy", {"name": f"deal-{user}"}, policy_of(user)),
        ("set-user-or-group-policy", {"policyName": f"deal-{user}", "userOrGroup": access_key, "isGroup": "false"}, {}),
    ]
    for name, query, values in requests:
        content = json.dumps(values).encode() if values else b""
        if administration == MINIO and name == "add-user":
            content = _encrypted(settings, content)
        status = _ask(settings, f"{administration}{name}?{urlencode(query)}", content)
        if status in (404, 405, 501):
            return False
        if status >= 300:
            raise StoreError(f"The store answered {status} to {name} for the user {user}; see its log.")
    return True


def _encrypted(settings: StoreSettings, content: bytes) -> bytes:
    """Encrypt by the administrator's secret key, as MinIO demands of keys."""
    try:
        from minio.crypto import encrypt
    except ImportError:
        raise ConfigError("MinIO's administration needs the extra `minio`: pip install '.[minio]'.") from None
    return encrypt(content, str(_administrator(settings).secret_key))


def _administrator(settings: StoreSettings) -> Credentials:
    key, secret = settings.s3_access_key_id, settings.s3_secret_access_key
    if key and secret:
        return Credentials(key.get_secret_value(), secret.get_secret_value())
    return make_client(settings)._get_credentials()


def _ask(settings: StoreSettings, path: str, content: bytes) -> int:
    """Put a request of the administrator; return the status."""
    client = make_client(settings)
    request = AWSRequest("PUT", client.meta.endpoint_url + path, data=content)
    S3SigV4Auth(_administrator(settings), "s3", client.meta.region_name).add_auth(request)
    return int(URLLib3Session().send(request.prepare()).status_code)


def main() -> None:
    """The command of this file's docstring."""
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(policy_of(sys.argv[1]), indent=2) + "\n")
        return
    try:
        provision(StoreSettings(), os.environ)
    except DealError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
