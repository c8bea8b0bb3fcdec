"""A task with chat prompts: learned, predicted, served, compared with plain PEFT, kept for the task's life."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tiny_tasks import write_tasks
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import load_answerer
from deal_core.evaluation.answering import SERVED_FILE, InputRow, read_served
from flows.benchmark import benchmark, spec_from_options
from tasks.context import current_store
from tasks.landing import choose_schema
from tasks.lineage.model_card import served_version
from tasks.predict import predict
from tasks.spec import TaskSpec
from tasks.validate import spec_to_check, validate
from tests.adapting import BANK, CLINIC, record_of, run

SCRIPT = Path(__file__).parents[3] / "docs" / "plain_peft.py"
TEXT = "I lost my card."

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


@pytest.mark.nightly
def test_chat_prompts_are_learned_asked_and_kept(tiny_base: Path, tmp_path: Path) -> None:
    first = run(tiny_base, {**BANK, "prompt": "chat"})
    second = run(tiny_base, CLINIC)
    store = current_store()
    record = record_of(second)
    assert [known.schema.prompt for known in record.tasks] == ["chat", "plain"]
    asked = TaskSpec(name="bank", data=BANK["data"])
    assert choose_schema(store, asked, record).prompt == "chat", "what nobody says stays as it was learned"
    for task, given in ((BANK, "plain"), (CLINIC, "chat")):
        with pytest.raises(ConfigError, match=f"prompt of '{task['name']}' is '{given}', but the lineage learned it"):
            run(tiny_base, {**task, "prompt": given}, again=True)

    answer = predict(TEXT, lineage="l", task="bank", version=first.version)
    assert answer.prompt.startswith("<|im_start|>user\nWhat is it about?\nOption: ")
    assert answer.prompt.endswith(f"\n{TEXT}<|im_end|>\n<|im_start|>assistant\n")
    assert predict(TEXT, lineage="l", task="clinic", version=None).prompt.endswith(f"\n{TEXT}\nAnswer:")
    shown = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            str(tiny_base),
            answer.adapter.removeprefix("file://"),
            answer.precision,
            answer.prompt,
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout.splitlines()
    likeliest = list(answer.first_token_logits.values())[:5]
    assert [float(line.split("\t")[0]) for line in shown] == pytest.approx(likeliest, abs=2e-2)

    folder = Path(shutil.copytree(answer.adapter.removeprefix("file://"), tmp_path / "version"))
    served = served_version(record_of(first))
    (folder / SERVED_FILE).write_text(json.dumps(served.to_json()))
    assert [task.schema.prompt for task in read_served(folder).tasks] == ["chat"]
    answerer = load_answerer(folder, tmp_path / "cache", str(tiny_base))
    assert answerer.answer([InputRow(TEXT, "bank")]) == [answer.answer]


def test_a_checked_file_shows_the_prompt_that_is_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"base_model: {tiny_base}\ntask: {{name: bank, data: {BANK['data']}, instruction: Which one, prompt: chat}}\n"
    )
    found = validate(*spec_to_check(BANK["data"], spec=spec))
    assert found.example is not None and found.example.prompt.startswith("<|im_start|>user\nWhich one\nOption: ")
    assert not found.example.answer.startswith(" ") and found.example.note is None


def test_a_benchmark_can_ask_in_chats(tiny_base: Path, tmp_path: Path) -> None:
    options = {
        "data": str(write_tasks(tmp_path)),
        "tasks": ["colours"],
        "rows": 8,
        "base_model": str(tiny_base),
        "train": '{"batch_size": 4, "max_steps": 1, "max_prompt_tokens": 64}',
        "methods": [],
        "strategies": ["seq_lora"],
        "out": tmp_path / "cells",
    }
    results = [asyncio.run(benchmark(spec_from_options(**options, prompt=form))) for form in ("plain", "chat")]
    assert [cell.status for result in results for cell in result.cells] == ["done", "done"]
    assert len(results[1].tables) == 2, "another form of prompts stands in another table"
