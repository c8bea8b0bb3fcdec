"""Several processes that train one adapter, on the CPU: the same as one, and no rank outlives the others."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure, record

from deal_core.config import MIN_VALIDATED, AdapterConfig, TrainConfig
from deal_core.data.collate import (
    IGNORED,
    AnswerCollator,
    add_blank_row,
    answer_loss,
    encode_rows,
)
from deal_core.data.order import BucketSampler
from deal_core.errors import AdapterStateError, ConfigError, RankError
from deal_core.method_config import DealConfig, MethodConfig, RehearsalConfig
from deal_core.strategies.rehearsal import Rehearsal, RehearsedRow
from deal_core.training.elastic import describe, error_of, require_devices, run_in_processes
from deal_core.training.jobs import TrainingJob, read_job
from deal_core.training.train import TrainingResult, TrainingSetup, train_adapter
from deal_core.training.trainer import find_checkpoint, require_in_step
from tests.unit.deal_core.conftest import assert_close_weights

# 26 rows in batches of 4: the last step of an epoch has two rows, all of them rank 0's
STEPS = TrainConfig(
    num_epochs=2, batch_size=4, learning_rate=5e-3, max_prompt_tokens=64, checkpoint_steps=4, num_processes=2
)
ROOT = Path(__file__).parents[4]
MAIN = (
    "import sys; from pathlib import Path\nfrom deal_core.training.jobs import read_job\n"
    "from deal_core.training.elastic import run_in_processes\njob, folder = map(Path, sys.argv[1:])\n"
    "run_in_processes(read_job(job), folder, lambda message: print(message['step'], flush=True))\n"
)


@pytest.fixture
def job(base, tiny_base, task, rows, parent, tmp_path) -> TrainingJob:
    """The second task of a lineage; its rows' answers differ in length, so that the ranks' tokens differ in number."""
    rows_file = tmp_path / "rows" / "train.parquet"
    rows_file.parent.mkdir()
    rows(26).to_parquet(str(rows_file))
    lengths = {len(base.tokenizer(label)["input_ids"]) for label in task.labels}
    assert len(lengths) > 1
    return TrainingJob(
        setup=TrainingSetup(
            task=task,
            strategy="deal",
            adapter=AdapterConfig(rank=4),
            old_tasks=(replace(task, name="old", instruction="Say the colour."),),
            method=MethodConfig(),
            train=STEPS,
        ),
        base_source=str(tiny_base),
        base_sha256=base.sha256,
        cache_folder=tmp_path / "cache",
        precision="fp32",
        parent_folder=parent,
        rows_file=rows_file,
        output_folder=tmp_path / "two",
        checkpoint_folder=tmp_path / "two-checkpoints",
    )


def retrained(job: TrainingJob, **changes: object) -> TrainingJob:
    return replace(job, setup=replace(job.setup, train=replace(job.setup.train, **changes)))


def train_in_one(base, job: TrainingJob, folder: Path) -> TrainingResult:
    alone = retrained(job, num_processes=1)
    return replace(alone, output_folder=folder / "one", checkpoint_folder=folder / "one-cp").run(base)


def assert_same(one: TrainingResult, two: TrainingResult, *adapters: Path) -> None:
    assert [step for step, _ in two.losses] == [step for step, _ in one.losses] and one.num_steps >= 7
    assert [loss for _, loss in two.losses] == pytest.approx([loss for _, loss in one.losses], rel=1e-5)
    assert_close_weights(*adapters, rtol=1e-4, atol=1e-5)


def ranks_of(process: psutil.Process) -> dict[str, psutil.Process]:
    """The ranks below a process, by number."""
    below = process.children(recursive=True)
    return {each.environ()["RANK"]: each for each in below if "deal_core.training.main" in each.cmdline()}


@pytest.mark.nightly
def test_two_processes_choose_the_step_that_one_chooses(base, job, rows, tmp_path):
    """They divide the rows that are held back."""
    rows(MIN_VALIDATED).to_parquet(str(job.rows_file))
    job = retrained(job, num_epochs=1, batch_size=16, validation_share=0.05)
    two, one = run_in_processes(job, tmp_path / "ranks"), train_in_one(base, job, tmp_path)
    assert_same(one, two, tmp_path / "one", tmp_path / "two")
    assert len(one.validation_losses) == 2 and two.kept_step == one.kept_step
    assert dict(two.validation_losses) == pytest.approx(dict(one.validation_losses), rel=1e-4)


@pytest.mark.nightly
def test_deal_with_a_killed_rank_and_resumed_equals_one_process(base, job, tmp_path):
    def kill_rank_1(message: Mapping[str, Any]) -> None:
        if message["step"] == 5:
            ranks_of(psutil.Process())["1"].kill()

    with pytest.raises(RankError, match=r"Rank 1 of the 2 processes .* was killed by SIGKILL.*last words"):
        run_in_processes(job, tmp_path / "ranks", kill_rank_1)
    assert not ranks_of(psutil.Process()) and not job.output_folder.exists()
    seen: list[int] = []
    two = run_in_processes(job, tmp_path / "ranks", lambda message: seen.append(message["step"]))
    assert two.resumed_from_step in (4, 8, 12) and seen == list(range(1, 15))
    assert any("rehearsed" in note for note in two.notes)
    assert_same(train_in_one(base, job, tmp_path), two, tmp_path / "one", tmp_path / "two")


@pytest.mark.nightly
def test_seq_lora_whose_parent_was_killed_and_which_one_process_goes_on_with(base, job, tmp_path):
    """Four steps per epoch, and more epochs than the ranks could finish; the rate does not depend on their number."""
    job = retrained(job, num_epochs=9999, gradient_accumulation_steps=2, schedule="constant")
    job = replace(job, setup=replace(job.setup, strategy="seq_lora"))
    job.write(tmp_path / "job.json")
    command = [sys.executable, "-c", MAIN, str(tmp_path / "job.json"), str(tmp_path / "ranks")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        for line in parent.stdout:
            if int(line) == 13:
                break
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    alive = psutil.wait_procs(children, timeout=60)[1]
    for child in alive:
        child.kill()
    assert len(children) >= 3 and not alive  # the launcher and two ranks
    checkpoint = find_checkpoint(job.checkpoint_folder)
    assert checkpoint is not None
    num_steps = int(checkpoint.name.split("-")[1])  # steps that two processes did
    job = retrained(job, num_epochs=num_steps // 4 + 1)
    shutil.move(job.checkpoint_folder, tmp_path / "one-cp")
    gone_on = train_in_one(base, job, tmp_path)
    assert gone_on.resumed_from_step == num_steps >= 12
    (tmp_path / "one").rename(tmp_path / "two")
    shutil.rmtree(tmp_path / "one-cp")
    assert_same(train_in_one(base, job, tmp_path), gone_on, tmp_path / "one", tmp_path / "two")


@pytest.mark.nightly
def test_a_rank_ends_with_the_process_at_the_other_end_of_its_input():
    """A killed parent is noticed at any moment, not only when a step is reported."""
    code = (
        "import threading, deal_core.training.elastic as r; r.end_with_input(); print(1, flush=True)\n"
        "threading.Event().wait()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as rank:
        assert rank.stdin is not None and rank.stdout is not None and rank.stdout.readline()
        try:
            rank.stdin.close()
            assert rank.wait(timeout=60) == 1
        finally:
            rank.kill()


def test_a_job_is_read_as_it_was_written(job, tmp_path):
    method = MethodConfig(deal=DealConfig(energy=0.5), rehearsal=RehearsalConfig(rows=3))
    job = replace(job, setup=replace(job.setup, method=method))
    job.write(tmp_path / "job.json")
    assert read_job(tmp_path / "job.json") == job


def test_ranks_share_the_batches_that_one_process_has():
    lengths = [5, 3, 9, 2, 2, 8, 7, 1, 4, 6]
    alone = list(BucketSampler(lengths, 4, 0))
    shared = BucketSampler(lengths, 4, 0, blank=10)
    assert list(shared) == [*alone, 10, 10] and len(shared) == 12


def test_a_batch_of_blank_rows_has_no_loss_and_no_gradient(base, task, rows):
    encoded = encode_rows(rows(3), base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=8)
    with_blank = add_blank_row(encoded)
    assert list(with_blank)[:3] == list(encoded) and with_blank[3]["answer_ids"] == []
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False)
    loss = answer_loss(base.model, collate([with_blank[3], with_blank[3]]))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in base.model.parameters())
    seq2seq = AnswerCollator(base.tokenizer, is_seq2seq=True)([with_blank[3]])
    assert seq2seq["labels"].tolist() == [[IGNORED]]  # a decoder needs a position
    beside = answer_loss(base.model, collate([encoded[0], with_blank[3]]))
    torch.testing.assert_close(beside, answer_loss(base.model, collate([encoded[0]])))


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_the_mean_of_the_ranks_rehearsals_is_that_of_one(base, num_processes):
    rows = [RehearsedRow(list(range(10, 13 + i)), [20 + i] * (1 + i % 3)) for i in range(8)]
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False)
    rehearsal = Rehearsal([rows], collate, num_rows=4, weight=0.7, temperature=2.0, seed=0)
    alone = rehearsal.loss(base.model, 1)
    shares = [rehearsal.loss(base.model, 1, rank=rank, num_processes=num_processes) for rank in range(num_processes)]
    torch.testing.assert_close(torch.stack(shares).mean(), alone)
    assert all(share.requires_grad for share in shares)


def failure(rank: int, exitcode: int, error_file: Path | None = None) -> tuple[int, ProcessFailure]:
    return rank, ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(error_file or ""))


def recorded(error: Exception, path: Path, at: float, monkeypatch) -> Path:
    """The file in which PyTorch records the error of a process."""

    @record
    def fail() -> None:
        raise error

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(type(error)):
        fail()
    os.utime(path, (at, at))
    return path


def test_the_rank_that_died_first_is_named_with_its_last_words(monkeypatch, tmp_path):
    cause = recorded(RuntimeError("out of memory"), tmp_path / "cause.json", 1.25, monkeypatch)
    effect = recorded(RuntimeError("connection closed by peer"), tmp_path / "effect.json", 1.5, monkeypatch)
    killed, ended = failure(2, -signal.SIGKILL), failure(0, -signal.SIGTERM)
    assert describe(dict([failure(0, 1, effect), killed]))["rank"] == 2
    found = describe(dict([ended, failure(1, 1, effect), failure(3, 1, cause)]))
    assert found == {"rank": 3, "exitcode": 1, "message": "RuntimeError: out of memory"}
    error = error_of(found, 4, tmp_path)
    assert isinstance(error, RankError) and re.search(r"Rank 3 of the 4 .*exit code 1.*out of memory", str(error))


def test_an_error_of_ours_in_a_rank_is_raised_as_it_is(monkeypatch, tmp_path):
    path = recorded(ConfigError("The base has changed; start again."), tmp_path / "error.json", 1.0, monkeypatch)
    error = error_of(describe(dict([failure(1, 1, path)])), 2, tmp_path)
    assert type(error) is ConfigError and str(error) == "The base has changed; start again. (rank 1 of 2)"


def test_parameters_that_differ_are_found(monkeypatch):
    same, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3) * 1.01)
    monkeypatch.setattr("deal_core.training.trainer.broadcast", lambda tensor: torch.ones(3))
    require_in_step([same])
    with pytest.raises(AdapterStateError, match="rank 0 holds other parameters"):
        require_in_step([same, other])


def test_more_processes_than_devices_and_batches_that_do_not_divide_are_refused(monkeypatch, base, job, tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size is 6.*num_processes, 4.*multiple"):
        TrainConfig(batch_size=6, num_processes=4)
    with pytest.raises(ConfigError, match="num_processes is 0"):
        TrainConfig(num_processes=0)
    with pytest.raises(ConfigError, match="num_processes is 2, but here 1 train"):
        train_adapter(
            base,
            Dataset.from_parquet(str(job.rows_file)),
            replace(job.setup, old_tasks=()),
            parent_folder=None,
            output_folder=tmp_path / "o",
            checkpoint_folder=tmp_path / "c",
        )
    require_devices(9)  # on the CPU any number
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="num_processes is 3, and this machine has 2 CUDA devices"):
        require_devices(3)
