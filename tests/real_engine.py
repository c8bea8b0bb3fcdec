"""Tests that need the environment of a real vLLM server."""

from __future__ import annotations

import pytest

from benchmarks.speed.real_engine import PROGRAM

needs_engine = pytest.mark.skipif(not PROGRAM.exists(), reason="there is no vLLM here; `make engine` installs it")
