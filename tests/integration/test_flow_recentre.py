"""With `evaluate.recentre` a version is judged and served with an offset per label."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from deal_core.config import EvaluateConfig
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import load_answerer
from deal_core.evaluation.answering import InputRow, read_served
from flows.cli.app import app
from infra.settings import HomeSettings, VllmSettings
from infra.tracking.registry import open_registry
from infra.tracking.tracker import open_tracker
from tasks.adaptation.evaluate import score_version
from tasks.context import current_store
from tasks.lineage.history import find_version, version_ref
from tasks.lineage.record import read_record
from tasks.predict import predict
from tasks.serving.vllm import publish
from tests.adapting import BANK, CLINIC, run
from tests.in_process import put_back

TEXTS = ["I cannot find my card.", "The payment was taken twice.", "Why was I charged a fee?", "Where is my new card?"]

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


def test_a_version_is_served_with_the_offsets_that_it_was_judged_with(tiny_base: Path, tmp_path: Path) -> None:
    assert run(tiny_base, BANK).status == "promoted"
    first = find_version(open_registry(), "l", "1")
    plain = predict(TEXTS[0], lineage="l", task=None, version="1").answer

    result = run(tiny_base, CLINIC, evaluate={"recentre": True})
    assert (result.status, result.version) == ("promoted", "2")
    info = find_version(open_registry(), "l", "2")
    record = read_record(current_store(), info.adapter_uri)
    assert [len(task.label_offsets) for task in record.tasks] == [len(task.schema.labels) for task in record.tasks]
    assert all(any(task.label_offsets) for task in record.tasks), "the old task too"
    assert result.tracking_id is not None
    evaluation = open_tracker().run(result.tracking_id).read_json("evaluation.json")
    assert evaluation["label_offsets"] == {task.schema.name: [*task.label_offsets] for task in record.tasks}
    assert evaluation["parent_outcomes"].keys() == {"bank", "clinic"}

    folder = tmp_path / "served"
    open_registry().download("l", "2", folder)
    assert {task.schema.name: task.label_offsets for task in read_served(folder).tasks} == {
        task.schema.name: task.label_offsets for task in record.tasks
    }
    answerer = load_answerer(folder, HomeSettings().cache_dir)
    served = answerer.answer([InputRow(text, "bank") for text in TEXTS])
    assert served[0] == predict(TEXTS[0], lineage="l", task="bank", version="2").answer
    assert set(served) <= set(record.tasks[0].schema.labels)
    assert plain not in record.tasks[0].schema.labels, "after three steps a tiny model answers no label by itself"

    again = score_version(version_ref(info), EvaluateConfig())
    assert again.accuracies == again.recorded
    assert read_record(current_store(), first.adapter_uri).tasks[0].label_offsets == ()

    with pytest.raises(ConfigError, match=r"labels of bank, clinic are re-centred.*evaluate.recentre false"):
        publish("l", tmp_path / "vllm", VllmSettings(), model="base")
    card = (folder / "README.md").read_text()
    assert "bank, clinic: judged with the label offsets of `deal.json`" in card

    with put_back():
        added = CliRunner().invoke(app, ["labels", "bank", "--add", "swallowed card", "--lineage", "l", "--json"])
    assert added.exit_code == 0
    more = tmp_path / "more.jsonl"
    more.write_text("".join(f'{{"text": "Machine {n} kept my card.", "label": "swallowed card"}}\n' for n in range(9)))
    assert run(tiny_base, {"name": "bank", "data": str(more)}).version == "3"
    greedy = find_version(open_registry(), "l", "3")
    assert not any(task.label_offsets for task in read_record(current_store(), greedy.adapter_uri).tasks)
    again = score_version(version_ref(greedy), EvaluateConfig())
    assert again.accuracies == again.recorded, "it was judged without its parent's offsets"
