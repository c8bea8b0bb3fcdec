"""docs/plain_peft.py, without this project's code, gives the logits that `deal predict` shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deal_core.adapter.state import adapter_on
from deal_core.data.prompts import render_prompt
from deal_core.evaluation.generation import first_answer_logits

SCRIPT = Path(__file__).parents[3] / "docs" / "plain_peft.py"


def test_a_version_loads_without_this_project(base, task, parent, train, tiny_base, tmp_path):
    folder = train("deal", parent).folder
    with adapter_on(base.model, folder) as model:
        logits = first_answer_logits(model, base.tokenizer, task, "about the sea", max_prompt_tokens=64)
    prompt = render_prompt(task, "about the sea", base.tokenizer)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tiny_base), str(folder), "float32", prompt],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    shown = [line.split("\t") for line in done.stdout.splitlines()]
    assert [float(value) for value, _ in shown] == pytest.approx(logits.topk(5).values.tolist(), abs=2e-4)
    assert [token for _, token in shown] == [repr(base.tokenizer.decode([i])) for i in logits.topk(5).indices.tolist()]
    source = SCRIPT.read_text()
    assert not any(name in source for name in ("deal_core", "tasks", "flows", "infra"))
