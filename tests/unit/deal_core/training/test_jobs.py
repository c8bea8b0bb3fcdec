"""Jobs in several processes: by each launch the same adapter, sharded or whole; and rows that all of them answer."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.base_model.load import load_base
from deal_core.base_model.sharding import is_sharded, shard_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import answer_collator
from deal_core.errors import ConfigError, DeviceMemoryError, RankError
from deal_core.evaluation.evaluate import evaluate_task
from deal_core.method_config import MethodConfig
from deal_core.training.elastic import run_in_processes
from deal_core.training.jobs import AnswerJob, AnswerResult, TrainingJob, read_result, train_within_memory
from deal_core.training.train import KeptSource, TrainingSetup
from infra.launch import launch_job
from tests.unit.deal_core.conftest import TASK, as_served, make_rows, train_into
from tests.unit.deal_core.training.test_elastic import assert_same

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEPS = TrainConfig(batch_size=4, learning_rate=5e-3, num_epochs=1, max_prompt_tokens=64, checkpoint_steps=2)
ROOT = Path(__file__).parents[4]
OLD = replace(TASK, name="old", instruction="Say the colour.")


@pytest.fixture
def job(base, tiny_base, tmp_path) -> TrainingJob:
    """A second task, which rehearses the first one; of the last of its seven steps rank 0 has the only rows."""
    kept = train_into(
        tmp_path / "kept", base, "deal", task=OLD, rows=make_rows(48, first=100), train=replace(STEPS, max_steps=1)
    )
    make_rows(26).to_parquet(str(tmp_path / "train.parquet"))
    return TrainingJob(
        base_source=str(tiny_base),
        base_sha256=base.sha256,
        cache_folder=tmp_path / "cache",
        precision="fp32",
        parent_folder=kept.folder,
        rows_file=tmp_path / "train.parquet",
        setup=TrainingSetup(
            task=TASK,
            strategy="deal",
            adapter=AdapterConfig(rank=4),
            old_tasks=(OLD,),
            method=MethodConfig(),
            train=replace(STEPS, num_processes=2),
        ),
        output_folder=tmp_path / "adapter",
        checkpoint_folder=tmp_path / "checkpoints",
    )


@pytest.fixture
def answer_job(base, tiny_base, parent, tmp_path) -> AnswerJob:
    """Labels, a free answer that one of two processes has alone, and a measured metric."""
    make_rows(13, first=50).to_parquet(str(tmp_path / "rows.parquet"))
    make_rows(1, first=70).to_parquet(str(tmp_path / "row.parquet"))
    free = replace(TASK, name="free", labels=())
    return AnswerJob(
        kind="score",
        base_source=str(tiny_base),
        base_sha256=base.sha256,
        cache_folder=tmp_path / "cache",
        precision="fp32",
        num_processes=2,
        adapter_folder=parent,
        tasks=(as_served(TASK), as_served(free, 9), as_served(replace(free, name="likely", metric="loss"), 9)),
        rows_files=tuple(tmp_path / name for name in ("rows.parquet", "row.parquet", "rows.parquet")),
    )


@pytest.mark.parametrize("starts_from_parent", [True, False])
def test_a_parent_whose_kept_rows_are_handed_on_is_brought_once(tmp_path: Path, starts_from_parent: bool) -> None:
    parent = tmp_path / "parent"
    together = TrainingJob(
        base_source="base",
        base_sha256="b" * 64,
        cache_folder=tmp_path,
        parent_folder=parent if starts_from_parent else None,
        rows_file=tmp_path / "rows.parquet",
        setup=TrainingSetup(
            task=TASK, strategy="seq_lora", adapter=AdapterConfig(rank=4), method=MethodConfig(), train=STEPS
        ),
        output_folder=tmp_path / "adapter",
        checkpoint_folder=tmp_path / "checkpoints",
        kept=KeptSource(folder=parent, learned=(TASK,)),
    )
    inputs, there = together.inputs(), together.moved(Path("/there"))
    assert list(inputs.values()).count(parent) == 1
    assert there.kept is not None and there.kept.folder.name in inputs
    assert there.parent_folder == (there.kept.folder if starts_from_parent else None)


def in_folder(job: TrainingJob, folder: Path, **changes: Any) -> TrainingJob:
    return replace(job, output_folder=folder / "adapter", checkpoint_folder=folder / "checkpoints", **changes)


def alone(job: TrainingJob, base, folder: Path) -> Any:
    train = replace(job.setup.train, num_processes=1)
    return in_folder(job, folder, setup=replace(job.setup, train=train)).run(base)


def test_out_of_memory_a_training_goes_on_with_half_the_rows_at_once_and_the_same_rows_in_a_step(base, job, tmp_path):
    train = replace(job.setup.train, num_processes=1, balance_labels=False)
    job = replace(job, setup=replace(job.setup, train=train, strategy="seq_lora"))
    whole = in_folder(job, tmp_path / "whole").run(base)
    steps: list[int] = []

    def full_from_step_6(_: object, inputs: object, options: dict[str, torch.Tensor]) -> None:
        num_rows, num_tokens = options["input_ids"].shape
        if len(steps) >= 5 and num_rows > most_rows and num_tokens > 1:  # one token is read before the first step
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def run(job: TrainingJob) -> Any:
        return job.run(base, lambda message: steps.append(message["step"]))

    with base.model.register_forward_pre_hook(full_from_step_6, with_kwargs=True):
        most_rows = 2
        resumed = train_within_memory(in_folder(job, tmp_path / "resumed"), run)
        assert steps == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7] and resumed.resumed_from_step == 4
        assert [loss for _, loss in resumed.losses] == pytest.approx([loss for _, loss in whole.losses], rel=1e-4)
        assert "micro-batches of 2" in resumed.notes[0]
        most_rows = 0
        with pytest.raises(DeviceMemoryError):
            train_within_memory(in_folder(job, tmp_path / "never"), run)


@pytest.mark.nightly
def test_torchrun_trains_a_sharded_base_as_one_process_trains_a_whole_one(base, job, tmp_path):
    one = alone(job, base, tmp_path / "one")
    sharded = in_folder(job, tmp_path / "sharded", shard="base")
    two = run_in_processes(sharded, tmp_path / "ranks", command=TORCHRUN)
    assert_same(one, two, tmp_path / "one/adapter", tmp_path / "sharded/adapter")
    states = [load_method_state(tmp_path / name / "adapter").tensors for name in ("one", "sharded")]
    assert len(states[0]) == 2 and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert "rehearsed 12 rows of one old task, 4 a step" in two.notes


@pytest.mark.nightly
@pytest.mark.parametrize("shard", ["none", "base"])
def test_processes_answer_as_one(base, answer_job, tmp_path, shard):
    one = replace(answer_job, num_processes=1).run(base)
    messages: list[Mapping[str, Any]] = []
    two = run_in_processes(replace(answer_job, shard=shard), tmp_path / "ranks", messages.append)
    assert isinstance(two, AnswerResult) and [len(given) for given in two.answers] == [13, 1, 13]
    assert two.perplexity == pytest.approx(one.perplexity, rel=1e-4)
    for expected, found in zip(one.answers, two.answers, strict=True):
        assert [row.text for row in found] == [row.text for row in expected]
    assert {message["task"] for message in messages} == {0, 1, 2}
    assert sum(message["rows"] for message in messages if message["task"] == 0) == 14


RANK = """
import json, os, resource, sys
from dataclasses import replace
from pathlib import Path

from deal_core.training.jobs import read_job
from deal_core.training.main import run_job

job_file, without_weights, folder = map(Path, sys.argv[1:])
job, rank, messages = read_job(job_file), os.environ["RANK"], []
if rank == "1":
    job = replace(job, base_source=str(without_weights))
run_job(job, messages.append)
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(folder / f"{rank}.json").write_text(json.dumps({"peak": peak, "messages": messages}))
"""
"""What each of two processes runs. The second one's base model has a file of weights that nobody can read."""


@pytest.mark.nightly(minutes=2)
def test_of_two_processes_the_first_one_alone_reads_a_sharded_base(base, answer_job, tmp_path):
    config = copy.deepcopy(base.model.config)
    config.update({"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "head_dim": 128})
    large, without_weights = tmp_path / "large", tmp_path / "without"
    LlamaForCausalLM(config).save_pretrained(large)
    base.tokenizer.save_pretrained(large)
    num_bytes = (large / "model.safetensors").stat().st_size
    shutil.copytree(large, without_weights)
    (without_weights / "model.safetensors").write_bytes(b"no weights")
    whole = load_base(str(large), tmp_path / "cache", precision="fp32")
    job = replace(answer_job, base_source=str(large), base_sha256=whole.sha256, adapter_folder=None, shard="base")
    expected = replace(job, num_processes=1, shard="none").run(whole)
    job.write(tmp_path / "job.json")
    (tmp_path / "rank.py").write_text(RANK)
    command = [*TORCHRUN, *map(str, (tmp_path / "rank.py", tmp_path / "job.json", without_weights, tmp_path))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    answers = read_result(job, first["messages"][-1]["result"]).answers
    assert [[row.text for row in given] for given in answers] == [
        [row.text for row in given] for given in expected.answers
    ]
    assert first["peak"] - second["peak"] > num_bytes / 4, "the second one holds half of the layers, and one at a time"


def test_one_process_answers_each_row_in_its_place(base, answer_job, tmp_path):
    found = replace(answer_job, num_processes=1, kind="answer").run(base)
    assert found.perplexity is None and [len(given) for given in found.answers] == [13, 1, 13]
    rows = Dataset.from_parquet(str(answer_job.rows_files[2]), cache_dir=str(tmp_path))
    with adapter_on(base.model, answer_job.adapter_folder) as model:
        expected = evaluate_task(model, base.tokenizer, answer_job.tasks[2], rows)
    assert tuple(row.text for row in found.answers[2]) == expected.answers and len(set(expected.answers)) > 9
    assert all(row.confidence for given in found.answers[:2] for row in given)
    assert all(row.confidence is None and 0 < float(row.text) < 1 for row in found.answers[2])


def test_what_cannot_be_sharded_is_refused(base, monkeypatch):
    with pytest.raises(ConfigError, match="One process cannot shard"):
        shard_base(base.model)
    monkeypatch.setattr(base.model.config, "is_encoder_decoder", True)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        shard_base(base.model)
    base.model.is_quantized = True
    with pytest.raises(ConfigError, match="8 or 4 bits"):
        shard_base(base.model)


def test_processes_of_a_sharded_model_read_equally_often(base, monkeypatch):
    """A prefix that rows share would be one more pass, of some processes only."""
    assert answer_collator(base.model, base.tokenizer, reads_whole_rows=False).shares_prefix
    assert not is_sharded(base.model)
    monkeypatch.setattr("deal_core.data.collate.is_sharded", lambda _: True)
    assert not answer_collator(base.model, base.tokenizer, reads_whole_rows=False).shares_prefix


@pytest.mark.nightly
def test_a_process_started_from_outside_needs_no_input_and_tells_its_error(base, job, tmp_path):
    """As a pod starts it: standard input is empty. An error of ours is told as what it is."""
    job.write(tmp_path / "job.json")
    wrong = replace(job, base_sha256="0" * 64)
    closed = f'{shlex.join(TORCHRUN)} "$@" < /dev/null'
    command = ["bash", "-c", closed.replace('"$@"', '"${@:1:3}"'), "bash"]  # without the option of a lifeline
    two = run_in_processes(job, tmp_path / "ranks", command=command)
    assert two.num_steps == 7
    with pytest.raises(ConfigError, match=r"has changed since the run began.*\(rank \d of 2\)"):
        run_in_processes(wrong, tmp_path / "ranks", command=command)


@pytest.mark.nightly
def test_torchrun_ends_with_the_process_that_started_it(base, job, tmp_path):
    started, stop = stopping_at_step_3()
    with pytest.raises(InterruptedError):
        run_in_processes(job, tmp_path / "ranks", stop, TORCHRUN)
    assert alive_after_minutes(started) == []
    with pytest.raises(RankError, match="launcher of 2 processes died"):
        run_in_processes(job, tmp_path / "ranks", command=["false"])


def stopping_at_step_3() -> tuple[list[psutil.Process], Callable[[Mapping[str, Any]], None]]:
    """What raises InterruptedError at step 3, and the processes that were started until then."""
    others = psutil.Process().children(recursive=True)  # servers of other tests
    started: list[psutil.Process] = []

    def stop(message: Mapping[str, Any]) -> None:
        if message["step"] == 3:
            started.extend(set(psutil.Process().children(recursive=True)).difference(others))
            raise InterruptedError

    return started, stop


def alive_after_minutes(processes: list[psutil.Process]) -> list[str]:
    """Which of several processes do not end within minutes. Ray's own agents look after their cluster once a minute."""
    assert len(processes) > 2
    return [str(process) for process in psutil.wait_procs(processes, timeout=180)[1]]


@pytest.fixture
def on_ray(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("DEAL_LAUNCH", "ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


@pytest.mark.nightly
@pytest.mark.usefixtures("on_ray")
def test_one_worker_of_ray_trains_as_this_process(base, job, tmp_path):
    from infra.store.opening import open_store

    one = alone(job, base, tmp_path / "one")
    train = replace(job.setup.train, num_processes=1)
    other = in_folder(job, tmp_path / "ray", setup=replace(job.setup, train=train))
    seen: list[int] = []
    result = launch_job(
        open_store(), other, "adapters/l/r/jobs", tmp_path / "r", lambda message: seen.append(message["step"])
    )
    assert_same(one, result, tmp_path / "one/adapter", tmp_path / "ray/adapter")
    assert seen == [1, 2, 3, 4, 5, 6, 7] and not list(open_store().list("adapters"))


@pytest.mark.nightly(minutes=4)
@pytest.mark.usefixtures("on_ray")
def test_each_launch_trains_as_this_process_and_one_killed_worker_changes_nothing(base, job, tmp_path, monkeypatch):
    """Ray's group starts again from the checkpoint in the store, and each step is seen once."""
    from infra.store.opening import open_store

    killed: list[psutil.Process] = []
    seen: list[int] = []

    def follow(message: Mapping[str, Any]) -> None:
        seen.append(message["step"])
        if launch == "ray" and message["step"] == 5 and not killed:
            below = psutil.Process().children(recursive=True)
            workers = [each for each in below if "RayTrainWorker" in str(each.cmdline())]
            killed.append(workers[-1])
            workers[-1].kill()

    one = alone(job, base, tmp_path / "one")
    for launch in ("local", "torchrun", "ray"):
        monkeypatch.setenv("DEAL_LAUNCH", launch)
        seen.clear()
        two = in_folder(job, tmp_path / launch)
        result = launch_job(open_store(), two, "adapters/l/r/jobs", tmp_path / "ranks", follow)
        assert_same(one, result, tmp_path / "one/adapter", tmp_path / launch / "adapter")
        assert seen == [1, 2, 3, 4, 5, 6, 7]
        assert result.resumed_from_step in ((2, 4) if killed else (None,))
    assert len(killed) == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("on_ray")
def test_workers_of_ray_end_with_the_process_that_wanted_them(base, job, tmp_path):
    from infra.store.opening import open_store

    started, stop = stopping_at_step_3()

    with pytest.raises(InterruptedError):
        launch_job(open_store(), job, "adapters/l/r/jobs", tmp_path / "r", stop)
    assert alive_after_minutes(started) == []
