"""An adapter that favours a label learns to favour it less. The tiny base model learns slowly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from scipy.special import softmax

from benchmarks.method.asked import TaskTexts
from benchmarks.method.recentre import recentre_adapter
from deal_core.adapter.state import adapter_on
from deal_core.config import TrainConfig
from deal_core.evaluation.label_scores import label_scores

CLOSING = TrainConfig(batch_size=8, learning_rate=2e-2, max_prompt_tokens=64)


def texts_of(task, rows: Dataset) -> TaskTexts:
    return TaskTexts(task=task, rows=rows, max_prompt_tokens=64, max_new_tokens=50)


def shares(base, task, folder: Path, texts: TaskTexts) -> np.ndarray:
    """The labels' mean probabilities."""
    with adapter_on(base.model, folder) as model:
        scores, _ = label_scores(model, base.tokenizer, task, texts.rows, max_prompt_tokens=64)
    return softmax(scores, axis=1).mean(0)


@pytest.fixture
def favours_red(task, rows, train) -> Path:
    """A version that knows the labels, and then learned red rows alone."""
    steps = {"batch_size": 8, "schedule": "constant", "max_prompt_tokens": 64}
    knowing = train("seq_lora", rows=rows(72, first=300), train=TrainConfig(max_steps=30, learning_rate=2e-2, **steps))
    red = Dataset.from_list([row for row in rows(72, first=300) if row["output"] == "red"])
    return train(
        "seq_lora", knowing.folder, rows=red, train=TrainConfig(max_steps=3, learning_rate=1e-2, **steps)
    ).folder


def test_a_favoured_label_is_unlearned_on_other_texts_too(base, task, rows, favours_red):
    texts, others = texts_of(task, rows(48, first=1000)), texts_of(task, rows(48, first=2000))
    before = shares(base, task, favours_red, others)
    (note,) = recentre_adapter(base, favours_red, [texts], CLOSING, 40)
    after = shares(base, task, favours_red, others)
    assert before[0] / before[1] > 2 * after[0] / after[1]
    assert note == "re-centred the labels of 1 tasks in 40 steps"
