"""The automations that `deal server register` makes."""

from __future__ import annotations

from deal_pipeline.server.automations import NEVER_BEGAN, NEVER_STARTED, automations


def test_a_run_that_ended_before_it_began_is_not_started_again_without_end() -> None:
    """Prefect counts a start when the run begins: in a broken installation the count stays 0."""
    again = [each for each in automations(NEVER_BEGAN) if each.trigger.expect == {"prefect.flow-run.Crashed"}]
    matches = [each.trigger.match.model_dump() for each in again]
    assert [each["prefect.run-count"] for each in matches] == [["1", "2", "3"], "0"]
    assert matches[1]["prefect.state-message"] == NEVER_STARTED, "what the automation before says"
