"""The stage that decides whether a version may become champion. Its rules are in `deal_core.evaluation.gate`."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from prefect import task

from deal_core.evaluation.gate import GateDecision, decide
from deal_core.evaluation.metrics import right_answers, score_answers
from deal_core.evaluation.report import EvaluationReport, Scores
from deal_core.judging_config import GateConfig
from infra.store.base import ObjectStore
from infra.store.keys import dataset_sha256
from infra.versions import Version
from tasks.adaptation.evaluate import answer_again
from tasks.adaptation.resume import read_findings
from tasks.adaptation.run import STAGE
from tasks.lineage.frozen_rows import load_test_set, read_answers
from tasks.lineage.record import read_record
from tasks.lineage.tombstones import forgotten_tests
from tasks.progress import staged
from tasks.spec import AdaptSpec, parse


@task(name="gate", **STAGE)
@staged("gate", lambda decision: "accepted" if decision.accepted else " ".join(decision.reasons))
def judge_version(report: EvaluationReport, gate: GateConfig) -> GateDecision:
    """Accept or reject a version by the rules of `gate` in a spec."""
    return decide(report, gate)


class Judged(NamedTuple):
    """A version against another one that it does not continue."""

    decision: GateDecision
    before: dict[str, float]
    """Accuracy of the other version by task, on the rows that both answered."""
    accuracies: dict[str, float]
    num_rows: dict[str, int]
    """Rows of each of these tasks."""
    missing: tuple[str, ...]
    """Tasks that only the other version knows."""
    unjudged: tuple[str, ...]
    """Tasks that both know, and of which no test row judges both."""
    waits_if_unsure: bool
    """Whether the version's gate says `unsure: approve`."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a person has to accept the version in place of the other one; empty: nobody has to."""
        return (*self.decision.reasons, *(self.decision.unsure if self.waits_if_unsure else ()))


def judge_against(store: ObjectStore, version: Version, other: Version) -> Judged:
    """Judge a version against one that it does not continue, on every task of that one, by the version's own limits.

    The answers of both were stored by their evaluations. The other version is asked the rows that judge both again if
    its answers went with deleted rows, or if something else gave them on the same base model. Without answers of the
    same rows, the recorded accuracies are compared if they are of the same rows, and every loss counts.
    """
    findings = read_findings(store, version.adapter_uri)
    new, old = read_record(store, version), read_record(store, other)
    now, then = read_answers(store, version.adapter_uri), read_answers(store, other.adapter_uri)
    # Two base models end their turns at tokens of their own. Answers of one base model end at the same tokens.
    has_own_base = version.base_sha256 != other.base_sha256
    if not then.now or not (has_own_base or now.answerer == then.answerer):
        then = answer_again(store, other, now.now)
    is_comparable = has_own_base or now.answerer == then.answerer
    report = findings.evaluation
    before: dict[str, float] = {}
    accuracies, outcomes, parent_outcomes = dict(report.accuracies), dict(report.outcomes), dict[str, Scores]()
    num_rows = dict(report.num_rows)
    for known in old.tasks:
        name = known.schema.name
        if (learned := new.task(name)) is None:
            continue
        if is_comparable and forgotten_tests(store, name, learned.test_uris) is None:
            rows = load_test_set(store, learned).rows
            both = now.now.get(name, {}).keys() & then.now.get(name, {}).keys()
            rows = rows.select([place for place, digest in enumerate(rows["sha256"]) if digest in both])
            if len(rows):
                metric, right, digests = learned.schema.metric, right_answers(rows), list(rows["sha256"])
                marks = [
                    score_answers(metric, [kept.now[name][each] for each in digests], right) for kept in (now, then)
                ]
                outcomes[name], parent_outcomes[name] = marks
                accuracies[name], before[name] = (sum(each) / len(each) for each in marks)
                num_rows[name] = len(rows)
                continue
        is_same = [*map(dataset_sha256, known.test_uris)] == [*map(dataset_sha256, learned.test_uris)]
        if is_same and name in old.accuracies() and name in accuracies:
            before[name] = old.accuracies()[name]
    compared = replace(
        report,
        parent_accuracies=before,
        parent_outcomes=parent_outcomes,
        accuracies=accuracies,
        outcomes=outcomes,
        num_rows=num_rows,
        parent_accuracy_new_task=None,
    )
    gate = parse(AdaptSpec, findings.spec, f"version {version.version}").gate
    names = [known.schema.name for known in old.tasks]
    return Judged(
        decision=decide(compared, gate),
        before=before,
        accuracies={name: accuracies[name] for name in before},
        num_rows={name: num_rows[name] for name in before if name in num_rows},
        missing=tuple(name for name in names if new.task(name) is None),
        unjudged=tuple(name for name in names if new.task(name) is not None and name not in before),
        waits_if_unsure=gate.unsure == "approve",
    )
