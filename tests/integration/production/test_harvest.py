"""From an answer to a row that is learned: a file to fill in, feedback, harvest, and the arrival in the inbox."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, validate_file
from deal_core.data.reading.readers import read_rows
from deal_core.data.schema import TaskSchema
from deal_core.data.source_files import files_at
from deal_core.errors import ConfigError, DataValidationError, StoreError
from deal_core.evaluation.answerer import Answered
from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion
from deal_core.evaluation.generation import Confidence
from deal_core.monitoring.feedback import read_entry
from infra.predictions import read_feedback, read_predictions
from infra.serving.prediction_log import PredictionLog
from infra.store.keys import harvest_key
from infra.store.local import FileStore
from infra.store.opening import open_store
from tasks.inbox import task_spec
from tasks.monitoring import harvest as harvesting
from tasks.monitoring.feedback import row_columns, take_feedback_file
from tasks.monitoring.harvest import harvest_feedback
from tasks.monitoring.select import select_to_label
from tasks.predict import predict_file
from tasks.validate import spec_to_check, validate
from tests.adapting import CLINIC, run
from tests.conftest import MakeOnce
from tests.in_process import deal, deal_json

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")
FINDINGS = ("A cough that will not go away for weeks.", "The knee hurts when I climb the stairs.")


@pytest.fixture(scope="module")
def learned_home(tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage l knows the task clinic, whose files have columns of their own names."""
    return home_made_once("clinic-learned", lambda folder: run(tiny_base, CLINIC))


@pytest.fixture
def labels(home: Path, learned_home: Path) -> tuple[str, ...]:
    """The labels of clinic, in a copy of that home."""
    shutil.copytree(learned_home, home, dirs_exist_ok=True)
    return tuple(harvesting.task_schemas(open_store(), "l")["clinic"].labels)


def log_answers(
    texts: Mapping[str, str],
    schema: TaskSchema,
    *,
    keeps_texts: bool = True,
    sureness: Sequence[float] | None = None,
) -> list[str]:
    """Log these answers of version 1, with these confidences; return their ids."""
    served = ServedVersion(
        lineage="l",
        base_source="b",
        base_name="b",
        base_sha256="0",
        newest_task=schema.name,
        tasks=(ServedTask(schema=schema, max_prompt_tokens=64, max_new_tokens=8),),
    )
    log = PredictionLog(open_store(), "l", keeps_texts=keeps_texts, retention_days=30)
    log.start()
    confidences = [Confidence(each, 0.5) for each in sureness or [0.5] * len(texts)]
    answered = Answered([*texts.values()], served, "1", confidences)
    ids = [*log.note([InputRow(text) for text in texts], answered, 0.1).ids]
    log.close()
    return ids


def say(*entries: dict[str, Any]) -> None:
    """Feedback by POST /feedback."""
    log = PredictionLog(open_store(), "l", keeps_texts=True, retention_days=30)
    log.take_feedback([read_entry(each, "", source="api", now=number).feedback for number, each in enumerate(entries)])


def write_csv(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "label", "reviewer"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def landed(key: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in open_store().get_bytes(key).decode().splitlines()]


def clinic(labels: tuple[str, ...]) -> TaskSchema:
    return TaskSchema(name="clinic", labels=labels)


def test_the_newest_answer_to_a_text_counts(labels: tuple[str, ...]) -> None:
    first, second, *_ = labels
    one, two = log_answers({FINDINGS[0]: first, f" {FINDINGS[0]} ": first}, clinic(labels))
    said = [{"id": one, "label": second, "reviewer": "Jo"}, {"id": two, "label": first, "reviewer": "Jo"}]
    say(*said, {"id": two, "label": second})
    (row,) = landed(harvest_feedback(open_store(), "clinic", "l").key or "")
    assert (row["finding"], row["answer_id"]) == (first, two), "what no person checked changes nothing"
    (three,) = log_answers({FINDINGS[0]: second}, clinic(labels))
    say({"id": three, "label": first, "reviewer": "Jo"})
    assert harvest_feedback(open_store(), "clinic", "l").key is None, "the same right answer to the same text"


def test_numbers_have_nothing_to_harvest(home: Path, labels: tuple[str, ...]) -> None:
    (one,) = log_answers({FINDINGS[0]: labels[0]}, clinic(labels), keeps_texts=False)
    file = home / "answers.jsonl"
    for answer_id in (one, "f" * 32):
        file.write_text(json.dumps({"id": answer_id, "answer": "a text"}) + "\n")
        with pytest.raises(DataValidationError, match="Row 1 has an answer, and the log keeps no texts; send is_right"):
            take_feedback_file(open_store(), file, "l")
    say({"id": one, "label": labels[0], "reviewer": "Jo"})
    found = harvest_feedback(open_store(), "clinic", "l")
    assert (found.key, found.skipped) == (None, {harvesting.NO_TEXT: 1})
    with pytest.raises(ConfigError, match="knows no task 'bank'; it knows clinic"):
        harvest_feedback(open_store(), "bank", "l")


def test_a_harvest_keeps_out_only_its_own_lineage_and_task() -> None:
    with harvesting._alone("a-b", "c"):
        with harvesting._alone("a", "b-c"):
            pass
        with pytest.raises(ConfigError, match="Another process harvests"), harvesting._alone("a-b", "c"):
            pass


@pytest.mark.parametrize("is_written", [True, False])
def test_a_crash_between_file_and_note_lands_no_row_twice_and_loses_none(
    labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    (one,) = log_answers({FINDINGS[0]: labels[0]}, clinic(labels))
    say({"id": one, "label": labels[1], "reviewer": "Jo"})
    put = FileStore.put_bytes

    def die(store: FileStore, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if key.startswith("inbox/"):
            if is_written:
                put(store, key, data, if_absent=if_absent)
            raise StoreError("the machine is off")
        return put(store, key, data, if_absent=if_absent)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "put_bytes", die)
        with pytest.raises(StoreError, match="the machine is off"):
            harvest_feedback(open_store(), "clinic", "l")
    assert (harvest_feedback(open_store(), "clinic", "l").key is None) == is_written
    assert harvest_feedback(open_store(), "clinic", "l").key is None
    (info,) = open_store().list("inbox/clinic")
    assert len(landed(info.key)) == 1


def test_a_damaged_note_is_named_and_a_wrong_file_is_refused_as_a_whole(
    tmp_path: Path, labels: tuple[str, ...]
) -> None:
    (one,) = log_answers({FINDINGS[0]: labels[0]}, clinic(labels))
    good, wrong = {"id": one, "label": labels[0]}, {"id": one, "label": "no such label"}
    message = r"Row 2 has the label 'no such label'.*Its labels are: .*1 more rows"
    with pytest.raises(DataValidationError, match=message):
        take_feedback_file(
            open_store(), write_csv(tmp_path / "a.csv", good, wrong, {"id": "x", "label": "y"}, wrong, wrong), "l"
        )
    with pytest.raises(DataValidationError, match="has no feedback"):
        take_feedback_file(open_store(), write_csv(tmp_path / "b.csv", {"id": one}), "l")
    assert read_feedback(open_store(), "l").empty
    take_feedback_file(open_store(), write_csv(tmp_path / "c.csv", good), "l")
    open_store().put_bytes(harvest_key("l", "clinic"), b"{")
    with pytest.raises(StoreError, match="the note of harvested feedback, is damaged"):
        harvest_feedback(open_store(), "clinic", "l")


def test_the_least_certain_texts_are_filled_in_and_learned(
    tiny_base: Path, tmp_path: Path, labels: tuple[str, ...]
) -> None:
    first, second, *_ = labels
    frozen = next(read_rows(Path(CLINIC["test_data"]))).values["note"]
    new = [f'Finding {number}: "sore",\nsince spring; =1+1, é.' for number in range(12)]
    texts, sureness = [*new, frozen, "Told."], [0.9 - 0.05 * number for number in range(12)] + [0.01, 0.02]
    *_, told = log_answers(dict.fromkeys(texts, first), clinic(labels), sureness=sureness)
    say({"id": told, "is_right": False})
    file = tmp_path / "new" / "to-label.csv"
    sample = ("feedback", "sample", "clinic", "--number", "4", "--out", str(file), "--lineage", "l")
    done = deal_json(*sample)
    assert (done["num_rows"], done["num_random"], done["num_inputs"], done["num_known"]) == (4, 1, 14, 2), done
    rows = [row.values for row in read_rows(file)]
    assert [*rows[0]] == ["id", "note", "finding", "champion_answer", "confidence", "is_random"]
    drawn = [row["note"] for row in rows if row["is_random"] == "true"]
    least = [text for text in reversed(new) if text not in drawn][:3]
    assert {row["note"] for row in rows} == {*drawn, *least} and len(drawn) == 1
    assert {(row["finding"], row["champion_answer"]) for row in rows} == {("", first)}
    assert "exists already" in deal(*sample, code=2) and next(read_rows(file)).values == rows[0]

    filled = [{**row, "finding": second if row["note"] in (*drawn, least[0]) else ""} for row in rows]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0]])
        writer.writeheader()
        writer.writerows([*filled, {"id": "f" * 32, "finding": second, "is_random": "false"}])
    taken = deal_json("feedback", "add", str(file), "--lineage", "l")
    assert (taken["num_taken"], taken["num_blank"], taken["num_unknown"]) == (3, 2, 1)
    stored = read_feedback(open_store(), "l")
    assert stored[stored["label"] == second]["is_random"].tolist().count(True) == 1
    harvested = deal_json("feedback", "export", "clinic", "--lineage", "l")
    rows = landed(harvested["key"])
    assert {(row["note"], row["finding"]) for row in rows} == {(text, second) for text in (*drawn, least[0])}
    assert {(row["reviewed_by"], row["answered_by"]) for row in rows} == {("command", "l@1")}
    again = harvest_feedback(open_store(), "clinic", "l")
    assert (again.key, again.num_rows, again.skipped[harvesting.KNOWN]) == (None, 0, 2)
    for log in ("predictions", "feedback"):
        for info in [*open_store().list(f"{log}/l")]:
            open_store().delete(info.key)
    log_answers(dict.fromkeys(new, first), clinic(labels))
    left = select_to_label(open_store(), "clinic", "l", out=tmp_path / "more.jsonl", number=99)
    assert (left.num_rows, left.num_known) == (10, 2), "what has landed is not chosen"
    learned = run(tiny_base, {"name": "clinic", "data": task_spec(open_store(), harvested["key"]).data})
    assert (learned.dataset.num_train, learned.dataset.num_rejected) == (2, 0)


def test_unlabelled_texts_of_a_file_are_answered_chosen_and_learned(tmp_path: Path, labels: tuple[str, ...]) -> None:
    frozen = next(read_rows(Path(CLINIC["test_data"]))).values["note"]
    texts = [f"Finding {number}, {'very ' * number}sore." for number in range(8)]
    data = tmp_path / "new.jsonl"
    data.write_text("".join(json.dumps({"note": text}) + "\n" for text in (*texts, texts[0], "", frozen)))
    every = select_to_label(open_store(), "clinic", "l", data=data, out=tmp_path / "every.jsonl", number=99)
    assert (every.num_rows, every.num_known, every.num_unusable) == (8, 1, 1)
    sureness = {row.values["note"]: row.values["confidence"] for row in read_rows(tmp_path / "every.jsonl")}
    assert {*sureness} == {*texts} and len({*sureness.values()}) > 1
    some = select_to_label(
        open_store(), "clinic", "l", data=data, out=tmp_path / "some.csv", number=4, random_share=0.5
    )
    rows = [row.values for row in read_rows(tmp_path / "some.csv")]
    chosen = {row["note"] for row in rows}
    certain = [sureness[row["note"]] for row in rows if row["is_random"] == "false"]
    assert (some.num_rows, some.num_random) == (4, 2)
    assert len(certain) == 2 and max(certain) <= min(sureness[text] for text in texts if text not in chosen)
    predict_file(
        open_store(), data, lineage="l", task="clinic", version=None, out=tmp_path / "answers.jsonl", column=None
    )
    answers = {row.values["note"]: row.values["answer"] for row in read_rows(tmp_path / "answers.jsonl")}
    assert all(row["champion_answer"] == answers[row["note"]] and row["id"] == "" for row in rows)

    late = tmp_path / "late.csv"

    def meanwhile(done: int, total: int) -> None:
        late.write_text(f"{done} of {total}")

    with pytest.raises(ConfigError, match="exists already"):
        select_to_label(open_store(), "clinic", "l", data=data, out=late, on_progress=meanwhile)
    assert late.read_text() == "8 of 8"

    with (tmp_path / "filled.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0]])
        writer.writeheader()
        writer.writerows({**row, "finding": labels[0]} for row in rows)
    checked = validate(open_store(), *spec_to_check(open_store(), tmp_path / "filled.csv", task="clinic", lineage="l"))
    assert (checked.num_train, checked.num_rejected) == (4, 0), "the file is learned as it is"
    with pytest.raises(DataValidationError, match="Row 1 has no id of an answer"):
        take_feedback_file(open_store(), tmp_path / "filled.csv", "l")


def test_without_texts_there_is_nothing_to_select(tmp_path: Path, labels: tuple[str, ...]) -> None:
    out = tmp_path / "x.csv"
    with pytest.raises(ConfigError, match=r"has no answers of version 1 .*DEAL_LOG_PREDICTIONS=texts.* --data FILE"):
        select_to_label(open_store(), "clinic", "l", out=out)
    log_answers({FINDINGS[0]: labels[0]}, clinic(labels), keeps_texts=False)
    with pytest.raises(ConfigError, match=r"has no texts, only 1 rows .*DEAL_LOG_PREDICTIONS=texts.* --data FILE"):
        select_to_label(open_store(), "clinic", "l", out=out)
    with pytest.raises(ConfigError, match="knows no task 'bank'"):
        select_to_label(open_store(), "bank", "l", out=out)
    with pytest.raises(ConfigError, match=r"\.csv or \.jsonl"):
        select_to_label(open_store(), "clinic", "l", out=tmp_path / "x.parquet")
    (one,) = log_answers({FINDINGS[1]: labels[0]}, clinic(labels))
    say({"id": one, "label": labels[0]})
    with pytest.raises(ConfigError, match="1 different texts have feedback"):
        select_to_label(open_store(), "clinic", "l", out=out)
    assert not out.exists()


def test_columns_are_those_of_the_task_and_earlier_answers_are_not_learned() -> None:
    asked = [{"role": "user", "content": "Hi", "tools": [{"name": "add"}]}]
    told = [*asked, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
    chat = TaskSchema(name="t", format="chat", assistant_turns="all", columns={"messages": "talk"})
    said = {"source": "command", "reviewer": None, "label": "Hello"}
    for schema, text, problem in (
        (chat, asked, ""),
        (chat, told, harvesting.EARLIER_TURNS),
        (TaskSchema(name="t", format="chat"), told, ""),
    ):
        assert harvesting._problem(said, {"input": json.dumps(text)}, schema) == problem
    values = row_columns(chat, json.dumps(asked), "Hello", "Yes?")
    answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert values == {"talk": answered, "tools": [{"name": "add"}]}
    completion = TaskSchema(name="t", format="completion", columns={"context": "about", "split": "part"})
    assert row_columns(completion, "p", "c", "a") == {"prompt": "p", "completion": "c", "about": "", "part": "train"}


def test_corrections_of_a_task_of_preferences_are_learned_over_the_answers_that_were_given(tmp_path: Path) -> None:
    tone = TaskSchema(name="tone", format="completion", metric="preference", learns_preferences=True)
    asked = {"Which tap?": "The tap.", "Which door?": "The left door."}
    tap, door = log_answers(asked, tone)
    answers = {row["id"]: row for row in read_predictions(open_store(), "l").to_dict("records")}
    first = answers[tap]
    row = row_columns(tone, first["input"], "The kitchen tap.", first["output"])
    assert row == {"prompt": "Which tap?", "chosen": "The kitchen tap.", "rejected": "The tap."}
    right = {"source": "command", "reviewer": None, "label": "The left door. "}
    assert harvesting._problem(right, answers[door], tone) == harvesting.NOTHING_TO_PREFER

    chat = TaskSchema(name="tone", format="chat", metric="preference", learns_preferences=True)
    asked_in_chats = [[{"role": "user", "content": f"Hi {number}"}] for number in range(30)]
    rows = [row_columns(chat, json.dumps(messages), "Hello", "Yes?") for messages in asked_in_chats]
    assert rows[0]["rejected"] == [*asked_in_chats[0], {"role": "assistant", "content": "Yes?"}]
    file = tmp_path / "feedback.jsonl"
    file.write_text("".join(json.dumps({**row, "answer_id": "x", "is_random": False}) + "\n" for row in rows))
    report = validate_file(Landing(sources=files_at(file), task=chat, config=DataConfig()))
    assert report.refusal is None and report.manifest.num_rejected == 0, "ingest takes the file as it is"
