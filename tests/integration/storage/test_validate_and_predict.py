"""Validation with a lineage's test rows, and prediction in bulk, on a base model of two layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deal_core.errors import ConfigError
from flows.adapt_result import AdaptResult
from infra.store.opening import open_store
from tasks.predict import FileAnswers, predict, predict_file
from tasks.validate import spec_to_check, validate
from tests.adapting import BANK
from tests.in_process import deal, deal_json
from tests.integration.storage.conftest import SECRET, holding

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


def test_validation_knows_what_the_lineage_knows(first: AdaptResult, tmp_path: Path) -> None:
    file = tmp_path / "june.jsonl"
    test_row = json.loads(Path(BANK["test_data"]).read_text().splitlines()[0])
    rows = [test_row, {"text": "Something else.", "label": "a new label"}]
    rows += [{**test_row, "text": f" {test_row['text'].upper().rstrip('.')}."}]
    rows += [{"text": f"Message {number}", "label": "lost card"} for number in range(20)]
    file.write_text("".join(json.dumps({**row, "split": "train"}) + "\n" for row in rows))
    found = validate(open_store(), *spec_to_check(open_store(), file, task="bank", lineage="l"))
    problems = {"text of a test row": 1, "nearly a test row": 1, "label outside the task's set": 1}
    assert found.accepted and found.problems == problems, "row 3 is a test row but for case and a final dot"
    assert (
        set(validate(open_store(), *spec_to_check(open_store(), file, task="bank", lineage="unknown")).problems)
        == set()
    )

    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps({"task": {"name": "fresh", "data": "x.jsonl", "test_data": "own.jsonl"}}))
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "Message 3", "label": "lost card"}) + "\n")
    told = validate(open_store(), *spec_to_check(open_store(), file, spec=spec))
    with pytest.raises(ConfigError, match="give either --spec or --task"):
        validate(open_store(), *spec_to_check(open_store(), file, spec=spec, task="fresh"))
    assert (told.num_test, told.problems) == (1, {"text of a test row": 1})


def test_a_checked_file_shows_the_prompt_that_is_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"base_model: {tiny_base}\ntask: {{name: bank, data: {BANK['data']}, instruction: Which one, prompt: chat}}\n"
    )
    found = validate(open_store(), *spec_to_check(open_store(), BANK["data"], spec=spec))
    assert found.example is not None and found.example.prompt.startswith("<|im_start|>user\nWhich one\nOption: ")
    assert not found.example.answer.startswith(" ") and found.example.note is None


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.csv"
    texts = [json.loads(line)["text"] for line in Path(BANK["test_data"]).read_text().splitlines()[:10]]
    file.write_text("id,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(texts)) + "10,\n")
    return file


def answer(data: Path, out: Path) -> FileAnswers:
    return predict_file(open_store(), data, out=out, lineage="l", task=None, version=None, column=None)


def test_a_file_is_answered_and_a_call_that_was_cut_short_leaves_none(
    tiny_base: Path, first: AdaptResult, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """The death of a process."""

    def die(done: int, total: int) -> None:
        assert total == 11
        if done > 4:
            raise Killed

    monkeypatch.setattr("tasks.predict.CHUNK_ROWS", 4)
    before = {path.name for path in tmp_path.iterdir()}
    for suffix in ("jsonl", "parquet"):
        out = tmp_path / f"whole.{suffix}"
        with pytest.raises(Killed):
            predict_file(
                open_store(), questions, out=out, lineage="l", task=None, version=None, column=None, on_progress=die
            )
        assert not out.exists()
        result = answer(questions, out)
        assert (result.num_rows, result.num_bad, result.version) == (11, 1, "1")
    assert {path.name for path in tmp_path.iterdir()} - before == {"whole.jsonl", "whole.parquet"}
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert rows == pq.read_table(tmp_path / "whole.parquet").to_pylist()
    assert [row["id"] for row in rows] == [str(number) for number in range(11)]
    assert rows[10]["answer"] is None and rows[10]["problem"] == "empty text: text is empty"
    assert {(row["task"], row["lineage"], row["version"]) for row in rows} == {("bank", "l", "1")}
    alone = predict(open_store(), rows[3]["text"], lineage="l", task=None, version=None)
    assert (rows[3]["answer"], rows[3]["problem"]) == (alone.answer, alone.problem)
    labels = {row["label"] for row in map(json.loads, Path(BANK["data"]).read_text().splitlines())}
    no_label = [row for row in rows[:10] if row["answer"] not in labels]
    assert {row["problem"] for row in no_label} <= {"the answer is no label of bank"}
    assert [row["problem"] for row in rows[:10] if row not in no_label] == [None] * (10 - len(no_label))
    assert result.num_no_label == len(no_label)

    with pytest.raises(ConfigError, match=r"whole\.jsonl exists already"):
        answer(questions, tmp_path / "whole.jsonl")


@pytest.mark.parametrize("is_named", [False, True])
def test_answers_do_not_land_in_the_inbox(home: Path, tmp_path: Path, questions: Path, is_named: bool) -> None:
    inbox = home / "store" / "inbox" / "bank"
    inbox.mkdir(parents=True)
    data = questions if is_named else Path(shutil.copy(questions, inbox))
    (tmp_path / "link").symlink_to(inbox)
    out = tmp_path / "link" / "answers.jsonl" if is_named else None
    before = sorted(inbox.iterdir())
    with pytest.raises(ConfigError) as refused:
        predict_file(open_store(), data, out=out, lineage="l", task=None, version=None, column=None)
    assert refused.value.code == "answers-in-inbox" and sorted(inbox.iterdir()) == before


def test_the_commands_do_what_their_functions_do(
    first: AdaptResult, home: Path, questions: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    deal("predict", "--data", str(questions), "--lineage", "l", "--out", str(out))
    assert all(json.loads(line)["version"] == "1" for line in out.read_text().splitlines())
    assert deal_json("data", "gc", "--dry-run", "--older-than", "1h")["dry_run"] is True
    digest = first.dataset.sha256[:8]
    (arrival,) = deal_json("data", "list")
    assert arrival["name"] == first.dataset.sha256[:12] and arrival["state"] == "learned"
    assert (arrival["task"], arrival["learned_by"]) == ("bank", ["l/1"])
    version = deal_json("version", "show", "1")["version"]
    assert arrival["file"] == "may.jsonl" and arrival["landed"] < version["created"]
    assert deal_json("data", "delete", arrival["file"], "--dry-run")["sha256"] == first.dataset.sha256
    assert (arrival["num_train"], arrival["num_test"]) == (first.dataset.num_train, first.dataset.num_test)
    shown = deal_json("version", "show", "1")
    assert (shown["version"]["version"], shown["version"]["task"], shown["page"]) == ("1", "bank", None)
    assert "has no version 9" in deal("version", "show", "9", code=1)
    assert deal_json("data", "delete", digest, "--dry-run")["learned"][0]["version"] == "1"
    assert "give --yes" in deal("data", "delete", digest, code=2) and holding(home, SECRET)
    assert deal_json("data", "delete", digest, "--yes", "--reason", "asked")["tombstone"]["versions"] == ["l/1"]
    assert not holding(home, SECRET)
    (arrival,) = deal_json("data", "list")
    assert arrival["state"].startswith("forgotten on ") and "(asked)" in arrival["state"]
