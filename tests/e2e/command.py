"""The `deal` command of this checkout, as a process of its own starts it."""

from __future__ import annotations

import sys

DEAL = (sys.executable, "-c", "from flows.cli import main; main()")
