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
from tests.built import write_rows


def answered(source: Path, suffix: str) -> Path:
    """The file with its answers, written by twos."""
    survey, output = survey_rows(source), source.with_name(f"out.{suffix}")
    with writing_answers(output, survey.types, own_names(survey.types)) as write:
        for rows in in_chunks(read_rows(source), 2):
            own = [{"answer": f"answer {row.number}", "task": "t", "lineage": "l", "version": "1"} for row in rows]
            write([row.values for row in rows], own)
    return output


@pytest.fixture
def json_lines(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"text": "a", "number": 1, "share": 0.5, "mixed": 1, "more": {"x": [float("nan")]}, "big": 2**70},
        {"text": "b", "number": None, "share": 2, "mixed": "one", "late": True},
        {"text": "c", "number": 2**60, "share": float("nan"), "answer": "theirs", "late": float("nan")},
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_appears_when_it_is_complete(json_lines: Path, suffix: str) -> None:
    output, survey = json_lines.with_name(f"out.{suffix}"), survey_rows(json_lines)

    def names() -> set[str]:
        return {path.name for path in output.parent.iterdir()}

    def cut_short() -> None:
        with writing_answers(output, survey.types, own_names(survey.types)) as write:
            write([{"text": "a"}], [{"answer": "b"}])
            assert output.name not in names()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_short()
    assert names() == {json_lines.name}, "nothing is left"
    before = answered(json_lines, suffix).read_bytes()
    assert names() == {json_lines.name, output.name}
    with pytest.raises(ConfigError):
        answered(json_lines, suffix)
    assert output.read_bytes() == before


def test_values_keep_their_types_where_a_column_has_one(json_lines: Path) -> None:
    table = pq.read_table(answered(json_lines, "parquet"))
    kinds = {field.name: str(field.type) for field in table.schema}
    assert (kinds["number"], kinds["share"], kinds["late"]) == ("int64", "double", "bool")
    assert table.column("number").to_pylist() == [1, None, 2**60]
    assert table.column("mixed").to_pylist() == ["1", "one", None]
    assert table.column("late").to_pylist() == [None, True, None], "NaN is no value"
    assert table.column("more").to_pylist()[0] == '{"x": [null]}' and table.column("big").to_pylist()[0] == str(2**70)
    assert table.column("answer").to_pylist()[2] == "theirs"
    assert table.column("deal_answer").to_pylist() == ["answer 1", "answer 2", "answer 3"]
    rows = [json.loads(line) for line in answered(json_lines, "jsonl").read_text().splitlines()]
    assert rows[0]["more"] == {"x": [None]} and rows[1]["mixed"] == "one" and rows[0]["big"] == 2**70
    assert "late" not in rows[0] and rows[2]["share"] is None and {row["version"] for row in rows} == {"1"}


def test_parquet_to_parquet_keeps_every_column_and_type(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b", "c"]),
            "day": pa.array([date(2026, 1, 2)] * 3),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "scores": pa.array([[1.5], None, []]),
            "count": pa.array([1, 2, 3], pa.int8()),
            "when": pa.array([0, 1, 2**38], pa.int64()).cast(pa.timestamp("s")),  # the last lies after the year 9999
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    found = pq.read_table(answered(tmp_path / "in.parquet", "parquet"))
    names = [name for name in table.column_names if name != "when"]
    assert found.select(names).to_pylist() == table.select(names).to_pylist()
    assert found.schema.field("count").type == pa.int8() and pa.types.is_date(found.schema.field("day").type)
    assert found.column("when").is_null().to_pylist() == [False, False, True], "Python cannot hold it"
    assert found.column("answer").to_pylist() == ["answer 1", "answer 2", "answer 3"]
    lines = answered(tmp_path / "in.parquet", "jsonl").read_text().splitlines()
    assert json.loads(lines[0])["day"] == "2026-01-02"


def test_a_byte_that_is_no_text_stays_visible(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"text,more\na,\xff\n")
    assert b"\\udcff" in answered(tmp_path / "in.csv", "jsonl").read_bytes()
    table = pq.read_table(answered(tmp_path / "in.csv", "parquet"))
    assert table.column("more").to_pylist() == ["\\udcff"]


def test_files_that_answers_do_not_fit_into_are_refused(tmp_path: Path) -> None:
    assert own_names(["text", "task"])["task"] == "deal_task"
    with pytest.raises(DataValidationError, match="deal_task"):
        own_names(["task", "deal_task"])
    with pytest.raises(DataValidationError, match="has no rows"):
        survey_rows(write_rows(tmp_path / "in.jsonl", []))


@pytest.mark.parametrize(
    ("fields", "file_columns", "option", "found"),
    [
        ({"columns": {"text": "note", "label": "finding"}}, "id note", None, {"text": "note"}),
        ({"columns": {"text": "note"}}, "id Body", None, {"text": "Body"}),
        ({"columns": {"text": "note"}}, "id x", "x", {"text": "x"}),
        ({"format": "completion"}, "question context", None, {"prompt": "question", "context": "context"}),
        ({"format": "completion"}, "instruction input", None, {"prompt": "instruction", "context": "input"}),
        ({"format": "completion"}, "instruction input", "instruction", {"prompt": "instruction", "context": "input"}),
        ({"format": "completion"}, "prompt input", "input", {"prompt": "input"}),
        (
            {"format": "completion", "columns": {"context": "passage"}},
            "prompt passage",
            None,
            {"prompt": "prompt", "context": "passage"},
        ),
        *(
            (
                {"format": "completion", "columns": {"prompt": "frage", "context": "absatz"}},
                f"{prompt} absatz",
                option,
                {"prompt": prompt, "context": "absatz"},
            )
            for prompt, option in (("prompt", None), ("q", "q"))
        ),
    ],
)
def test_the_asked_columns_are_found_by_task_by_name_or_by_option(
    fields: dict[str, Any], file_columns: str, option: str | None, found: dict[str, str]
) -> None:
    task = TaskSchema(**{"name": "t", **fields})
    assert find_input(file_columns.split(), task, "f.csv", option).names == found


def test_a_file_without_the_asked_column_is_refused_with_the_option_that_names_it() -> None:
    with pytest.raises(DataValidationError, match="--column"):
        find_input(["id", "x"], TaskSchema(name="t", columns={"text": "note"}), "f.csv")
