"""Addresses in specs and parameters: none holds a password, since both are kept in databases, reports and the store."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from deal_core.errors import ConfigError
from deal_core.masking import holds_secret


def refuse_secrets(address: str) -> str:
    """Return an address that holds no user, password or token.

    Raises:
        ConfigError: it holds one.
    """
    if holds_secret(address):
        raise ConfigError(
            f"{address!r} holds a user, password or token, which would be kept with every run; leave it out of the "
            "address. Credentials come from the environment: HF_TOKEN for a Hub, DEAL_S3_ACCESS_KEY_ID and "
            "DEAL_S3_SECRET_ACCESS_KEY for the store, DEAL_VLLM_API_KEY for a vLLM server."
        )
    return address


Address = Annotated[str, AfterValidator(refuse_secrets)]
"""A path, a name or an address without a secret in it."""
