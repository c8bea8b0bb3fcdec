"""The tiny base model and the trainings of the product's tests, for strategies and scores that are here."""

import benchmarks  # noqa: F401  it makes them known
from tests.unit.deal_core.conftest import (  # noqa: F401  fixtures
    base,
    killed_and_resumed,
    loaded_base,
    one_task_learned,
    parent,
    quiet,
    rows,
    task,
    train,
)
from tests.unit.deal_core.selection.conftest import half_learned  # noqa: F401  a fixture
