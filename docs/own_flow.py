"""A flow of your own: it trains, scores and judges an arrival, and registers nothing.

Every stage is a Prefect task, which has retries and is shown on the page of the run. What such a run leaves goes with
`deal data gc`. To run it:

    python docs/own_flow.py examples/bank/spec.yaml
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from prefect import flow

from flows.adapt import begin
from flows.adapt_result import AdaptResult
from flows.lock import lock_lineage
from infra.store.opening import open_store
from tasks.adaptation.evaluate import evaluate_version
from tasks.adaptation.gate import judge_version
from tasks.adaptation.train import train_version
from tasks.spec import AdaptSpec, read_spec


@flow(name="try-out")
async def try_out(spec: AdaptSpec) -> str:
    """Say in one line whether the gate would accept what the lineage learns from an arrival."""
    async with lock_lineage(spec.lineage):  # no other run works on the lineage meanwhile
        prepared = await begin(open_store(), spec)  # the parent, the rows, the base model
        if isinstance(prepared, AdaptResult):  # nothing is trained, for example since the rows were learned before
            return prepared.message
        trained = await train_version(prepared)
        report = await evaluate_version(prepared, trained)
        decision = await judge_version(report, spec.gate)
    scores = ", ".join(f"{task} {share:.0%}" for task, share in report.accuracies.items())
    return f"{'accepted' if decision.accepted else 'rejected'}: {scores}"


if __name__ == "__main__":
    print(asyncio.run(try_out(read_spec(Path(sys.argv[1])))))
