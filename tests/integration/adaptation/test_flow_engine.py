"""A lineage whose test rows a vLLM server answers: the stand-in, which computes with the tests' base model."""

from __future__ import annotations

from pathlib import Path

import pytest

from deal_core.evaluation.answerer import load_answerer
from deal_core.evaluation.answering import InputRow
from deal_core.evaluation.proof import read_proof
from infra.serving.version_files import fetch_version
from infra.settings import HomeSettings
from infra.store.keys import fingerprint_key
from infra.store.opening import open_store
from tasks.lineage.frozen_rows import load_test_set, read_answers
from tasks.lineage.record import read_record
from tests.adapting import BANK, CLINIC, evaluation_of, run, version_of
from tests.fake_vllm import RELEASE, FakeVllm, running

NAME = f"vllm {RELEASE}"


@pytest.mark.usefixtures("without_mlflow")
def test_the_engine_answers_the_test_rows_and_only_answers_of_one_engine_are_compared(
    prefect_api: None, home: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del prefect_api
    store, engine = open_store(), FakeVllm(tiny_base)
    with running(engine):
        monkeypatch.setenv("DEAL_EVALUATE_ENGINE", engine.url)
        learned = run(tiny_base, BANK)
        first = version_of(learned)
        loaded = [name for call, name in engine.calls if call == "load"]
        assert len(loaded) == 1 and loaded[0].startswith("evaluate-"), "the base model is asked without an adapter"
        assert engine.adapters == {} and list((home / "engine-adapters").iterdir()) == []
        assert store.exists(fingerprint_key(first.base_sha256, "none"))

        # the answers are those of the version, computed here
        kept = read_answers(store, first.adapter_uri)
        assert kept.answerer == f"{NAME}, quantize none, stops 2"
        assert f"the test rows were answered by {NAME}" in evaluation_of(learned)["notes"]
        (task,) = read_record(store, first).tasks
        rows = load_test_set(store, task).rows
        fetch_version(store, first, tmp_path / "first", with_proof=True)
        assert read_proof(tmp_path / "first") is not None, "its digest is one of the version's"
        here = load_answerer(tmp_path / "first", HomeSettings().cache_dir, precision="fp32")
        answers = here.answer([InputRow(text, "bank") for text in rows["input"]])
        assert kept.now["bank"] == dict(zip(rows["sha256"], answers, strict=True))

        num_asked = len(engine.calls)
        second = version_of(run(tiny_base, CLINIC))
        assert read_answers(store, second.adapter_uri).before.keys() == {"clinic"}, "the parent's answers are stored"
        assert len(engine.calls) > num_asked

    monkeypatch.delenv("DEAL_EVALUATE_ENGINE")
    third = version_of(run(tiny_base, BANK, again=True))
    kept = read_answers(store, third.adapter_uri)
    assert kept.answerer == "this project, quantize none, stops 2"
    assert kept.before.keys() >= {"bank", "clinic"}, "the parent was asked again, by the process"
