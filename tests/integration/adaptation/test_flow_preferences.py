"""Preferences through the adapt flow: recognised, learned, judged, kept while another task is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.adapting import BANK, PASS, page_of, run

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")
THINGS = ("lost card", "late parcel", "low iron", "broken bone", "customs hold")


def write(file: Path, *, is_swapped: bool = False) -> str:
    """Preferences of short answers over long ones, or the other way round."""
    rows = []
    for number, thing in enumerate(THINGS * 6):
        answers = [f"A {thing}.", f"It is about a {thing}, no doubt."]
        chosen, rejected = reversed(answers) if is_swapped else answers
        split = "test" if number % 3 == 0 else "train"
        prompt = f"Message {number} about a {thing}."
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_preferences_are_learned_kept_and_judged_by_their_numbers(tiny_base: Path, tmp_path: Path) -> None:
    train = {"max_steps": 12, "max_prompt_tokens": 64, "max_answer_tokens": 20, "preference_learning_rate": 2e-2}
    task = {"name": "tone", "data": write(tmp_path / "tone.jsonl")}
    gate = {**PASS, "min_gain_points": 10}
    first = run(tiny_base, task, train=train, gate=gate)
    assert (first.status, first.metrics) == ("promoted", {"tone": "preference"}), first.reasons
    assert first.matrix is not None and (first.accuracies["tone"], first.matrix["base"][0]) == (1.0, 0.5)
    _, page = page_of(first)
    assert "preferred answers" in page and "preferences (DPO): before, the better answer was the likelier one" in page

    second = run(tiny_base, BANK, train={**train, "max_steps": 3})
    assert second.status == "promoted" and second.metrics == {"tone": "preference", "bank": "exact"}
    _, page = page_of(second)
    assert "rehearsed 10 rows of one old task, 4 a step" in page, "both answers of a quarter of 20 pairs"
    assert "settings that differ from version 1&#39;s: train.max_steps 3 (before: 12), gate.min_gain_points" in page

    opposite = {"name": "tone", "data": write(tmp_path / "opposite.jsonl", is_swapped=True)}
    strict = {**PASS, "max_drop_points": 10, "min_gain_over_champion_points": 0}
    # without rehearsal: the pairs that were kept would hold it to the first preferences
    worse = run(tiny_base, opposite, strategy="seq_lora", train=train, gate=strict)
    assert worse.rejected and "tone: preferred answers" in worse.reasons[0]
