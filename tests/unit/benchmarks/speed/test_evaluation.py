"""What the benchmark of evaluation answers."""

from __future__ import annotations

from benchmarks.speed.evaluation import read_tasks


def test_the_answers_are_labels_or_sentences():
    (bank, bank_rows), _ = read_tasks(texts=False)
    assert set(bank_rows["output"]) == set(bank.labels)
    ((repairs, repair_rows),) = read_tasks(texts=True)
    assert repairs.labels == () and all(" " in output for output in repair_rows["output"])
