"""The tiny base model and the trainings of the product's tests, for cells."""

from tests.unit.deal_core.conftest import (  # noqa: F401  fixtures
    base,
    loaded_base,
    offline_hub,
    one_task_learned,
    parent,
    quiet,
)
