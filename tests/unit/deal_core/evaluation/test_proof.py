"""The proof that an engine applies an adapter: what passes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from peft import PeftModel

from deal_core.adapter.files import PROOF_FILE
from deal_core.adapter.state import adapter_on
from deal_core.base_model.fingerprint import TEXT, token_log_probs
from deal_core.base_model.language_model import LanguageModel
from deal_core.base_model.load import BaseModel
from deal_core.data.prompts import encode_prompt
from deal_core.errors import AdapterStateError
from deal_core.evaluation.answering import ServedVersion
from deal_core.evaluation.proof import NUM_PLACES, Proof, Verdict, make_proof, read_proof, text_of

CHANCE = np.random.default_rng(0)
BASE = CHANCE.normal(-3.0, 1.0, 30)
DELTA = CHANCE.normal(0.0, 1.0, 30)
PROOF = Proof(
    texts=(tuple(range(31)),),
    places=tuple((0, place) for place in range(30)),
    adapter=tuple((BASE + DELTA).tolist()),
    base=tuple(BASE.tolist()),
)


@pytest.mark.parametrize(
    ("applied", "noise", "verdict"),
    [
        (DELTA, 0.0, "proven"),
        (DELTA + CHANCE.normal(0, 0.05, 30), 0.02, "proven"),
        (0.0 * DELTA, 0.0, "ignored"),
        (-DELTA, 0.0, "ignored"),
        (2.0 * DELTA, 0.0, "otherwise"),
        (0.54 * DELTA + CHANCE.normal(0, 1.0, 30), 0.0, "otherwise"),
        (np.full(30, np.nan), 0.0, "otherwise"),
        (DELTA, 2.0, "too small"),
    ],
)
def test_an_engine_passes_if_it_changes_what_the_adapter_changed(
    applied: np.ndarray, noise: float, verdict: Verdict
) -> None:
    own_base = BASE + 0.3  # the engine's precision moves both
    found, residual = PROOF.judge(own_base + applied, own_base, own_base + noise)
    assert found == verdict
    assert verdict != "proven" or residual < 0.1


def test_an_adapter_that_changes_nothing_cannot_be_told() -> None:
    small = replace(PROOF, adapter=tuple((BASE + DELTA / 100).tolist()))
    assert small.judge(BASE, BASE, BASE)[0] == "too small"


@pytest.fixture
def proof(base: BaseModel, served_version: ServedVersion, served_folder: Path) -> Proof:
    with adapter_on(base.model, served_folder) as model:
        made = make_proof(cast(PeftModel, model), base.tokenizer, served_version.tasks)
    assert made is not None
    return made


def test_the_proof_of_an_adapter_is_met_by_this_adapter_and_not_by_the_base_model(
    proof: Proof, base: BaseModel, served_folder: Path, tmp_path: Path
) -> None:
    assert len(proof.places) <= NUM_PLACES == 64

    def measured(model: LanguageModel) -> list[float]:
        return [token_log_probs(model, [*before, token])[-1] for before, token in proof.asked]

    on_base = measured(base.model)
    with adapter_on(base.model, served_folder) as model:
        on_adapter = measured(model)
    assert proof.judge(on_adapter, on_base, on_base)[0] == "proven"
    assert proof.judge(on_base, on_base, on_base)[0] == "ignored"
    (tmp_path / PROOF_FILE).write_text(json.dumps(proof.to_json()))
    assert read_proof(tmp_path) == proof and read_proof(served_folder) is None
    (tmp_path / PROOF_FILE).write_text(json.dumps({**proof.to_json(), "schema_version": 99}))
    with pytest.raises(AdapterStateError):
        read_proof(tmp_path)


def test_a_text_is_the_instruction_a_fixed_text_and_the_labels_and_as_long_as_an_engine_takes(
    base: BaseModel, served_version: ServedVersion
) -> None:
    task = next(task for task in served_version.tasks if task.schema.labels)
    wide = replace(task, max_prompt_tokens=400, max_new_tokens=200)
    ids = text_of(base.tokenizer, wide)
    prompt = encode_prompt(base.tokenizer, task.schema, TEXT, 400)
    assert ids[: len(prompt)] == prompt
    rest = base.tokenizer.decode(ids[len(prompt) :])
    assert all(label in rest for label in task.schema.labels)
    narrow = text_of(base.tokenizer, replace(task, max_new_tokens=2))
    assert len(narrow) < task.max_prompt_tokens + 2
