"""The rows of `benchmarks.speed.sft_trainer`, and its message on a machine without TRL."""

from __future__ import annotations

from pathlib import Path

from datasets import disable_progress_bars
from transformers import AutoTokenizer

from benchmarks.speed.sft_trainer import compare, encode, example_task, fitting, lengthen
from deal_core.config import TrainConfig


def test_rows_that_a_trainer_would_cut_are_left_out(tiny_base: Path) -> None:
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    task = example_task("clinic")
    lengths = [len(row["prompt_ids"]) for row in encode(task.train, task.schema, tokenizer)]
    limit = sorted(lengths)[len(lengths) // 2]
    kept = fitting(task.train, task.schema, tokenizer, TrainConfig(max_prompt_tokens=limit), None)
    assert list(kept) == [row for row, length in zip(task.train, lengths, strict=True) if length <= limit]
    assert fitting(task.train, task.schema, tokenizer, TrainConfig(max_prompt_tokens=limit), 3) == kept[:3]


def test_a_lengthened_instruction_is_the_tasks_own_again_and_again(tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    task = example_task("clinic").schema
    longer = lengthen(task, tokenizer, 100)
    assert len(tokenizer.encode(longer.instruction)) >= 100
    assert set(longer.instruction.replace(task.instruction, "").split()) == set()
    assert lengthen(task, tokenizer, 0) == task


def test_ratios_are_of_the_same_round() -> None:
    names = ("seconds", "loop_seconds", "peak_memory_mib", "held_out_loss")
    slow, fast = (
        [{"rows_per_second": each * times, **dict.fromkeys(names, 1.0)} for each in (1.0, 5.0, 2.0)] for times in (1, 3)
    )
    assert compare(fast, slow)["median_of_paired_ratios_to_trl_defaults"] == 3.0
    assert compare(fast, slow)["median_rows_per_second"] == 6.0
