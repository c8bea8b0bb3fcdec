"""Registers the versions of a lost registry again, with their old numbers.

MLflow gives numbers in order, and no number twice while the registered model exists. A number whose version is unknown
is used up by a version that is deleted at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from deal_core.errors import RegistryError
from deal_core.safe_text import without_secrets
from infra.tracking.client import report_errors
from infra.tracking.facts import Alias, VersionFacts
from infra.tracking.reader import OWNER, REBUILDING
from infra.tracking.registry import DESCRIPTION, Registry


class LineageRebuild:
    """The rebuild of one lineage. The caller must hold the lineage's lock."""

    def __init__(self, registry: Registry, lineage: str) -> None:
        self._registry = registry
        self._client = registry.client
        self._lineage = lineage

    def refuse_what_is_known(self) -> None:
        """Raise RegistryError if the registry has versions of the lineage, or the registered model is no lineage."""
        where = without_secrets(self._registry.uri)
        model = self._registry.find_model(self._lineage)
        if model is None or REBUILDING in model.tags:
            return
        if not OWNER.items() <= model.tags.items():
            raise RegistryError(
                f"MLflow at {where} has a registered model {self._lineage!r} that is no lineage of this pipeline; "
                "nothing was changed. Check MLFLOW_TRACKING_URI."
            )
        with report_errors("search versions", self._registry.uri):
            found = self._client.search_model_versions(f"name = '{self._lineage}'")
        if found:
            raise RegistryError(
                f"MLflow at {where} knows versions of lineage '{self._lineage}' (the newest is "
                f"{max(int(each.version) for each in found)}), so no rebuild is needed; nothing was changed. See: deal "
                f"history --lineage {self._lineage}"
            )

    def begin(self) -> None:
        """Make a new registered model, whose numbers start at 1. It replaces the result of an interrupted rebuild.

        Raises:
            RegistryError: As `refuse_what_is_known`.
        """
        self.refuse_what_is_known()
        with report_errors(f"make {self._lineage!r} again", self._registry.uri):
            if self._registry.find_model(self._lineage) is not None:  # without a version, or rebuilt in part
                self._client.delete_registered_model(self._lineage)
            self._client.create_registered_model(
                self._lineage, tags={**OWNER, REBUILDING: "begun"}, description=DESCRIPTION
            )

    def make(
        self, number: int, facts: VersionFacts, *, tracking_id: str, model_id: str, more: Mapping[str, str]
    ) -> None:
        """Make a version with its old number. Smaller numbers without a version are used up.

        Raises:
            RegistryError: MLflow has used this number already.
        """
        while (made := self._make(facts, tracking_id, model_id, more)) < number:
            self._delete(made)
        if made > number:
            raise RegistryError(
                f"MLflow gave the number {made} to version {number} of '{self._lineage}', probably because an answer "
                f"was lost; begin the rebuild again: deal lineage rebuild {self._lineage}"
            )
        self._registry.show_version(self._lineage, str(number), model_id)

    def leave_out(self, made: int, last: int, facts: VersionFacts, *, tracking_id: str, model_id: str) -> None:
        """Use up the numbers after `made` up to `last`, so that no later version gets them.

        `facts` are those of any version, and `tracking_id` and `model_id` name its MLflow run and its logged model.
        """
        while made < last:
            made = self._make(facts, tracking_id, model_id, {})
            self._delete(made)

    def end(self, aliases: Mapping[Alias, str]) -> None:
        """Set the aliases and end the rebuild."""
        for alias, version in aliases.items():
            self._registry.set_alias(self._lineage, alias, version)
        with report_errors(f"end the rebuild of {self._lineage!r}", self._registry.uri):
            self._client.delete_registered_model_tag(self._lineage, REBUILDING)

    def _make(self, facts: VersionFacts, tracking_id: str, model_id: str, more: Mapping[str, str]) -> int:
        made = self._registry.make_version(self._lineage, facts, tracking_id=tracking_id, model_id=model_id, more=more)
        return int(made)

    def _delete(self, number: int) -> None:
        with report_errors(f"leave out version {number} of {self._lineage!r}", self._registry.uri):
            self._client.delete_model_version(self._lineage, str(number))
