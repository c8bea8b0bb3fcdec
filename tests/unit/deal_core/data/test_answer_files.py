"""Files of answers: their content, and that there is no incomplete one."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deal_core.data.answer_files import in_chunks, own_names, survey_rows, writing_answers
from deal_core.data.columns import find_input
from deal_core.data.reading.readers import read_rows
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError, DataValidationError


def write_all(source: Path, output: Path, *, size: int = 2) -> None:
    survey = survey_rows(source)
    with writing_answers(output, survey.types, own_names(survey.types)) as write:
        for rows in in_chunks(read_rows(source), size):
            own = [{"answer": f"answer {row.number}", "task": "t", "lineage": "l", "version": "1"} for row in rows]
            write([row.values for row in rows], own)


@pytest.fixture
def json_lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"text": "a", "number": 1, "share": 0.5, "mixed": 1, "more": {"x": [float("nan")]}, "big": 2**70},
        {"text": "b", "number": None, "share": 2, "mixed": "one", "late": True},
        {"text": "c", "number": 2**60, "share": float("nan"), "answer": "theirs", "late": float("nan")},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_appears_when_it_is_complete(json_lines: Path, tmp_path: Path, suffix: str) -> None:
    output, survey = tmp_path / f"out.{suffix}", survey_rows(json_lines)

    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    def cut_short() -> None:
        with writing_answers(output, survey.types, own_names(survey.types)) as write:
            write([{"text": "a"}], [{"answer": "b"}])
            assert output.name not in names()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert names() == {json_lines.name}, "nothing is left"
    write_all(json_lines, output)
    assert names() == {json_lines.name, output.name}
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        write_all(json_lines, output)
    assert output.read_bytes() == before


def test_parquet_keeps_types_where_the_values_have_one(json_lines: Path, tmp_path: Path) -> None:
    write_all(json_lines, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    kinds = {field.name: str(field.type) for field in table.schema}
    assert (kinds["number"], kinds["share"], kinds["late"]) == ("int64", "double", "bool")
    assert table.column("number").to_pylist() == [1, None, 2**60]
    assert table.column("mixed").to_pylist() == ["1", "one", None]
    assert table.column("late").to_pylist() == [None, True, None], "NaN is no value"
    assert table.column("more").to_pylist()[0] == '{"x": [null]}' and table.column("big").to_pylist()[0] == str(2**70)
    assert table.column("answer").to_pylist()[2] == "theirs"
    assert table.column("deal_answer").to_pylist() == ["answer 1", "answer 2", "answer 3"]


def test_json_lines_keep_the_rows_as_they_are(json_lines: Path, tmp_path: Path) -> None:
    write_all(json_lines, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0]["more"] == {"x": [None]} and rows[1]["mixed"] == "one" and rows[0]["big"] == 2**70
    assert "late" not in rows[0] and rows[2]["share"] is None
    assert [row["version"] for row in rows] == ["1"] * 3


def test_parquet_to_parquet_keeps_every_column_and_type(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b", "c"]),
            "day": pa.array([date(2026, 1, 2)] * 3),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "scores": pa.array([[1.5], None, []]),
            "count": pa.array([1, 2, 3], pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    write_all(tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(table.column_names).to_pylist() == table.to_pylist()
    assert found.schema.field("count").type == pa.int8() and pa.types.is_date(found.schema.field("day").type)
    write_all(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["day"] == "2026-01-02"


def test_a_time_that_python_cannot_hold_is_null_beside_its_answer(tmp_path: Path) -> None:
    seconds = pa.array([0, 2**38], pa.int64()).cast(pa.timestamp("s"))  # the second lies after the year 9999
    pq.write_table(pa.table({"text": ["a", "b"], "when": seconds}), tmp_path / "in.parquet")
    write_all(tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column("when").is_null().to_pylist() == [False, True]
    assert found.column("answer").to_pylist() == ["answer 1", "answer 2"]


def test_a_byte_that_is_no_text_stays_visible(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"text,more\na,\xff\n")
    for suffix in ("jsonl", "parquet"):
        write_all(tmp_path / "in.csv", tmp_path / f"out.{suffix}")
    assert pq.read_table(tmp_path / "out.parquet").column("more").to_pylist() == ["\\udcff"]
    assert b"\\udcff" in (tmp_path / "out.jsonl").read_bytes()


def test_names_that_are_all_taken_are_said() -> None:
    assert own_names(["text", "task"])["task"] == "deal_task"
    with pytest.raises(DataValidationError, match="deal_task"):
        own_names(["task", "deal_task"])


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\n")
    with pytest.raises(DataValidationError, match="has no rows"):
        survey_rows(tmp_path / "in.csv")


def test_the_asked_column_is_found_by_task_by_name_or_by_option() -> None:
    task = TaskSchema(name="t", columns={"text": "note", "label": "finding"})
    assert find_input(["id", "note"], task, "f.csv").names == {"text": "note"}
    assert find_input(["id", "Body"], task, "f.csv").names == {"text": "Body"}
    assert find_input(["id", "x"], task, "f.csv", "x").names == {"text": "x"}
    with pytest.raises(DataValidationError, match="--column"):
        find_input(["id", "x"], task, "f.csv")


def test_a_question_has_the_context_that_was_learned_with_it() -> None:
    task = TaskSchema(name="t", format="completion")
    assert find_input(["question", "context"], task, "f.csv").names == {"prompt": "question", "context": "context"}
    columns = find_input(["instruction", "input"], task, "f.csv")
    assert columns.names == {"prompt": "instruction", "context": "input"}
    named = TaskSchema(name="t", format="completion", columns={"context": "passage"})
    assert find_input(["prompt", "passage"], named, "f.csv").names == {"prompt": "prompt", "context": "passage"}
    assert find_input(["prompt", "input"], task, "f.csv", "input").names == {"prompt": "input"}
    both = TaskSchema(name="t", format="completion", columns={"prompt": "frage", "context": "absatz"})
    assert find_input(["prompt", "absatz"], both, "f.csv").names == {"prompt": "prompt", "context": "absatz"}
    assert find_input(["q", "absatz"], both, "f.csv", "q").names == {"prompt": "q", "context": "absatz"}
    assert find_input(["instruction", "input"], task, "f.csv", "instruction").names == columns.names
