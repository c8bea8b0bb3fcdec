"""What a lineage as a Python object reads from its environment."""

from __future__ import annotations

import pytest

from deal_pipeline.lineage import KEY, _token


def test_the_token_is_the_one_that_the_server_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert _token({}) == ""
    monkeypatch.setenv(KEY, "theirs\n")  # as a secret that was made from a file
    assert _token({}) == "theirs" and _token({KEY: " mine \n"}) == "mine"
