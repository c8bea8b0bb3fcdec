"""The ids of logged answers. Any server of a lineage knows an id that one of them gave, without looking it up.

An id is 32 hexadecimal digits: 18 are drawn at random, and 14 are a keyed digest of these (HMAC-SHA256, shortened). The
servers of a lineage share the key, which lies in the object store. So feedback for ids that nobody gave is refused, and
no list of ids has to be kept.
"""

from __future__ import annotations

import hmac
import secrets
import threading

from deal_core.errors import StoreError
from infra.store.base import ObjectStore
from infra.store.keys import answer_ids_key

NUM_RANDOM = 18
"""Digits of an id that are drawn at random."""


class AnswerIds:
    """Makes ids for one server of a lineage. Until `share` has succeeded, only this server knows them."""

    def __init__(self, store: ObjectStore, lineage: str) -> None:
        self._store, self._place = store, answer_ids_key(lineage)
        self._keys = [secrets.token_bytes(32)]
        """The key of new ids comes first. Those of earlier ids follow."""
        self._sharing = threading.Lock()
        self._is_shared = False

    def share(self) -> None:
        """Take the key that the lineage's servers share; the first server makes it. Later calls do nothing.

        Raises:
            StoreError: The store does not answer.
        """
        with self._sharing:
            if self._is_shared:
                return
            self._store.put_bytes(self._place, secrets.token_hex(32).encode(), if_absent=True)
            shared = self._store.get_bytes(self._place, at_most=1024)
            if not shared.strip():
                raise StoreError(f"{self._store.uri_of(self._place)} is empty; delete it.")
            self._keys, self._is_shared = [shared.strip(), *self._keys], True

    def new(self) -> str:
        """Return an id that no other answer has."""
        drawn = secrets.token_hex(NUM_RANDOM // 2)
        return drawn + _digest(self._keys[0], drawn)

    def is_given(self, answer_id: str) -> bool:
        """Return whether a server of the lineage has made this id."""
        drawn, digest = answer_id[:NUM_RANDOM], answer_id[NUM_RANDOM:]
        return any(hmac.compare_digest(digest.encode(), _digest(key, drawn).encode()) for key in self._keys)


def _digest(key: bytes, drawn: str) -> str:
    return hmac.digest(key, drawn.encode(), "sha256").hex()[: 32 - NUM_RANDOM]
