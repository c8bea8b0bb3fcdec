"""What `deal check` says about rows together: rare labels and, with a model, wrong labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from deal_core.errors import ConfigError, DataValidationError
from infra.store.opening import open_store
from tasks.validate import ValidateResult, spec_to_check, validate

KINDS = {"loan": "money and interest for a house", "card": "plastic that was lost in a shop", "app": "an update of it"}


@pytest.fixture
def check(home: Path, tiny_base: Path, tmp_path: Path):
    """Validate training rows of (text, label), with test rows of their own."""

    def run(rows: list[tuple[str, str]], with_model: bool = False, num_test: int = 60) -> ValidateResult:
        file, test, spec = (tmp_path / name for name in ("rows.jsonl", "test.jsonl", "spec.yaml"))
        file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
        test.write_text(
            "".join(
                json.dumps({"text": f"a text of its own {number}", "label": rows[0][1]}) + "\n"
                for number in range(num_test)
            )
        )
        values = {"base_model": str(tiny_base), "task": {"name": "t", "data": str(file), "test_data": str(test)}}
        spec.write_text(yaml.safe_dump(values))
        return validate(open_store(), *spec_to_check(open_store(), file, spec=spec), with_model=with_model)

    return run


def rows_of(number: int) -> list[tuple[str, str]]:
    kinds = list(KINDS)
    return [(f"{chr(97 + row % 26) * 9} {row**3} {KINDS[kinds[row % 3]]}", kinds[row % 3]) for row in range(number)]


def test_rare_labels_are_warned_of(check) -> None:
    found = check([*rows_of(30), ("something rare indeed happened", "rare")])
    assert found.accepted and found.label_check is None and not found.likely_wrong
    (balance,) = found.warnings
    assert "1 of 4 labels have few rows (rare 1)" in balance
    assert not check(rows_of(30)).warnings


def test_contradictions_and_labels_in_doubt_are_warned_of_with_texts(check) -> None:
    contrary = [("my parcel is late", "card"), ("my parcel is late", "loan"), ("something else", "yes, please")]
    found = check([*rows_of(30), *contrary])
    several, separated, balance = found.warnings
    assert found.accepted and found.num_train == 33, "all of them are learned"
    assert several.startswith(
        "Texts with several labels: 1 (2 training rows, 0 test rows). Each of these rows is learn"
    )
    assert several.endswith("For example 'my parcel is late': 'loan' and 'card'.")
    assert "1 of 4 ('yes, please')" in separated and "few rows (yes, please 1)" in balance
    (single,) = check([(text, "card") for text, _ in rows_of(30)]).warnings
    assert single.startswith("The task has one label, 'card'.")


def test_too_few_test_rows_to_judge_are_warned_of(check) -> None:
    (few,) = check(rows_of(30), num_test=20).warnings
    assert few == "With 20 test rows a drop of 20 points cannot be seen reliably; give 200 with --test-data."
    assert not check(rows_of(30), num_test=52).warnings


def test_a_model_names_labels_that_are_probably_wrong(check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that tell the kinds apart take the place of the tiny base's, which do not."""
    kinds = list(KINDS)
    rows = rows_of(60)
    rows[7] = (rows[7][0], kinds[(kinds.index(rows[7][1]) + 1) % 3])

    def features(model, tokenizer, task, inputs, **settings):
        return torch.stack(
            [8.0 * torch.eye(3)[next(i for i, k in enumerate(kinds) if KINDS[k] in text)] for text in inputs]
        )

    assert check(rows).label_check is None
    monkeypatch.setattr("deal_core.selection.label_noise.features", features)
    found = check(rows, with_model=True)
    assert found.label_check is not None and "1 of 60 labels that were checked are probably wrong" in found.label_check
    (wrong,) = found.likely_wrong
    assert (wrong.text, wrong.label, wrong.likelier) == (*rows[7], kinds[7 % 3]) and wrong.share <= 0.1


def test_a_task_file_beside_the_file_decides_unless_the_task_is_named(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    folder.mkdir()
    for name, first in (("may.jsonl", 0), ("test.jsonl", 60)):
        rows = ({"words": text, "label": label} for text, label in rows_of(90)[first : first + 30])
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"columns": {"text": "words"}, "test_data": "test.jsonl", "labels": [*KINDS, "other"]}
    (folder / "task.yaml").write_text(yaml.safe_dump(told))
    found = validate(open_store(), *spec_to_check(open_store(), folder / "may.jsonl"))
    assert found.accepted and (found.num_train, found.num_test) == (30, 30) and "other" in found.labels
    assert found.task_file == str(folder / "task.yaml")
    with pytest.raises(DataValidationError, match="has the columns 'words'"):
        validate(open_store(), *spec_to_check(open_store(), folder / "may.jsonl", task="bank"))
    (folder / "task.yaml").write_text("labels: 5")
    with pytest.raises(ConfigError, match=r"task\.yaml.*labels"):
        validate(open_store(), *spec_to_check(open_store(), folder / "may.jsonl"))
