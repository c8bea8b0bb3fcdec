"""Versions registered again under their old numbers, in a registry that has lost them.

MLflow gives numbers in order, and none twice while the registered model is there. So a number whose version is unknown
is given to a version that is deleted at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from deal_core.errors import RegistryError
from deal_core.masking import without_secrets
from infra.tracking.client import saying
from infra.tracking.registry import DESCRIPTION, OWNER, Alias, Registry, VersionFacts

REBUILDING = "deal.rebuilding"
"""Tag of a registered model from the beginning of its rebuild to the end."""


def is_being_rebuilt(registry: Registry, lineage: str) -> bool:
    """Whether a lineage's versions are being registered again, or that was cut short."""
    model = registry.find_model(lineage)
    return model is not None and REBUILDING in model.tags


class LineageRebuild:
    """The rebuild of one lineage; whoever calls holds the lineage."""

    def __init__(self, registry: Registry, lineage: str) -> None:
        self._registry = registry
        self._client = registry.client
        self._lineage = lineage

    def refuse_what_is_known(self) -> None:
        """Refuse to touch what is there.

        Raises:
            RegistryError: the registry has versions of the lineage, or a registered model of that name is no lineage.
        """
        where = without_secrets(self._registry.uri)
        model = self._registry.find_model(self._lineage)
        if model is None or REBUILDING in model.tags:
            return
        if not OWNER.items() <= model.tags.items():
            raise RegistryError(
                f"MLflow at {where} has a registered model {self._lineage!r} that is no lineage of this pipeline; "
                "nothing was changed. Check MLFLOW_TRACKING_URI."
            )
        with saying("search versions", self._registry.uri):
            found = self._client.search_model_versions(f"name = '{self._lineage}'")
        if found:
            raise RegistryError(
                f"MLflow at {where} knows versions of lineage '{self._lineage}' (the newest is "
                f"{max(int(each.version) for each in found)}), so that nothing has to be registered again; nothing was "
                f"changed. See: deal history --lineage {self._lineage}"
            )

    def begin(self) -> None:
        """Make the registered model anew, so that numbers begin at 1. What an earlier rebuild left is replaced.

        Raises:
            RegistryError: as `refuse_what_is_known`.
        """
        self.refuse_what_is_known()
        with saying(f"make {self._lineage!r} anew", self._registry.uri):
            if self._registry.find_model(self._lineage) is not None:  # without a version, or half rebuilt
                self._client.delete_registered_model(self._lineage)
            self._client.create_registered_model(
                self._lineage, tags={**OWNER, REBUILDING: "begun"}, description=DESCRIPTION
            )

    def make(
        self, number: int, facts: VersionFacts, *, tracking_id: str, model_id: str, more: Mapping[str, str]
    ) -> None:
        """Make a version under its number; the numbers before it that were not made are left out for ever.

        Raises:
            RegistryError: MLflow is past that number.
        """
        while (made := self._make(facts, tracking_id, model_id, more)) < number:
            self._delete(made)
        if made > number:
            raise RegistryError(
                f"MLflow gave the number {made} to version {number} of '{self._lineage}', as happens where an answer "
                f"is lost on the way; give the command again, which starts anew: deal lineage rebuild {self._lineage}"
            )
        self._registry.show_version(self._lineage, str(number), model_id)

    def leave_out(self, made: int, last: int, facts: VersionFacts, *, tracking_id: str, model_id: str) -> None:
        """See that no later version gets a number after `made` and up to `last`, by versions that are deleted at once.

        Args:
            made: the highest number that was made.
            last: the highest number that the lineage has used.
            facts: of some version.
            tracking_id: its MLflow run.
            model_id: its logged model.
        """
        while made < last:
            made = self._make(facts, tracking_id, model_id, {})
            self._delete(made)

    def end(self, aliases: Mapping[Alias, str]) -> None:
        """Set the aliases, and say that the rebuild is done."""
        for alias, version in aliases.items():
            self._registry.set_alias(self._lineage, alias, version)
        with saying(f"end the rebuild of {self._lineage!r}", self._registry.uri):
            self._client.delete_registered_model_tag(self._lineage, REBUILDING)

    def _make(self, facts: VersionFacts, tracking_id: str, model_id: str, more: Mapping[str, str]) -> int:
        return int(
            self._registry.make_version(
                self._lineage, facts, tracking_id=tracking_id, model_id=model_id, more=more
            )
        )  # fmt: skip

    def _delete(self, number: int) -> None:
        with saying(f"leave out version {number} of {self._lineage!r}", self._registry.uri):
            self._client.delete_model_version(self._lineage, str(number))
