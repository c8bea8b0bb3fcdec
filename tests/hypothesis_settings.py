"""How hypothesis tries examples: on a busy machine an example may take any time."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

BUSY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The settings of every test."""
SHARED_FIXTURES = settings(BUSY, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
"""The settings of a test whose examples share its fixtures, such as one folder."""
