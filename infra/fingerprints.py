"""The fingerprints of base models in the store, by which `deal serve` knows what an engine has loaded."""

from __future__ import annotations

from collections.abc import Callable

from deal_core.base_model.fingerprint import text_log_probs
from deal_core.base_model.load import BaseModel
from deal_core.config import Quantize
from infra.store.base import ObjectStore
from infra.store.keys import fingerprint_key
from infra.store.stored import Stored, read_stored, write_stored


class Fingerprint(Stored):
    """What a base model makes of a fixed text (`deal_core.base_model.fingerprint`)."""

    base_sha256: str
    """Digest of the base model."""
    quantize: Quantize
    """How its linear layers were quantized: that changes what it makes of a text, and not its digest."""
    tokens: tuple[int, ...]
    """The text's token ids."""
    log_probs: tuple[float, ...]
    """Log-probability of each token after those before it, in nats, without the first one's."""


def read_fingerprint(store: ObjectStore, base_sha256: str, quantize: Quantize) -> Fingerprint | None:
    """Return the fingerprint of a base model; None: none is stored. StoreError: it is damaged."""
    what = f"the fingerprint of the base model {base_sha256[:12]}"
    remedy = "Delete it: deal serve --engine writes it anew from the base model."
    return read_stored(store, fingerprint_key(base_sha256, quantize), Fingerprint, what=what, remedy=remedy)


def keep_fingerprint(
    store: ObjectStore, base_sha256: str, quantize: Quantize, load: Callable[[], BaseModel]
) -> Fingerprint | None:
    """Return the fingerprint of a base model; None: an encoder-decoder. `load` is called only if none is stored."""
    stored = read_fingerprint(store, base_sha256, quantize)
    if stored is None:
        base = load()
        if base.kind == "seq2seq":  # no engine serves adapters on it
            return None
        tokens, log_probs = text_log_probs(base.model, base.tokenizer)
        stored = Fingerprint(
            base_sha256=base.sha256, quantize=base.quantize, tokens=tuple(tokens), log_probs=tuple(log_probs)
        )
        write_stored(store, fingerprint_key(base.sha256, base.quantize), stored)
    return stored
