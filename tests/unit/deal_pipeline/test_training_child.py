"""A training in a child process: its messages, its errors, and its end with a stop or with its parent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deal_core.errors import ConfigError
from deal_pipeline import Home, training_child
from deal_pipeline.training import Requeue
from deal_pipeline.training_child import CHILD, TrainingDiedError

TRAINING = Requeue(lineage="support")
Behaving = Callable[[str], None]


@pytest.fixture
def behaving(monkeypatch: pytest.MonkeyPatch) -> Behaving:
    """Let the child be another program, with the parent's words of a training as its first line."""

    def replace(program: str) -> None:
        monkeypatch.setattr(training_child, "CHILD", (sys.executable, "-c", program))

    return replace


def test_every_message_was_shown_when_the_result_is_there(behaving: Behaving, tmp_path: Path) -> None:
    behaving('print(\'{"said": "line"}\\n\' * 100 + \'{"result": []}\')')
    shown: list[str] = []
    assert Home(tmp_path, show=shown.append).train(TRAINING) == []
    assert shown == ["line"] * 100


def test_what_a_caller_does_with_a_line_does_not_stop_the_training(behaving: Behaving, tmp_path: Path) -> None:
    behaving('print(\'{"said": "line"}\\n{"result": []}\')')
    assert Home(tmp_path, show=lambda line: 1 / 0).train(TRAINING) == []


def test_a_child_that_dies_is_an_error_with_its_last_lines(behaving: Behaving, tmp_path: Path) -> None:
    behaving("import os, sys; sys.stderr.write('no memory\\n' * 9999); sys.stderr.flush(); os.kill(os.getpid(), 9)")
    with pytest.raises(TrainingDiedError, match=r"code -9.*no memory"):
        Home(tmp_path).train(TRAINING)


def test_an_error_has_its_class_and_code_also_outside_the_child(tmp_path: Path) -> None:
    """This is the real child: it cannot use this home."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used") as refused:
        Home(tmp_path / "file").train(TRAINING)
    assert refused.value.code == ConfigError.code


def test_a_stop_ends_the_child_at_its_next_step(behaving: Behaving, tmp_path: Path) -> None:
    step = tmp_path / "step"
    behaving(
        "import signal, sys, pathlib\n"
        f"def stop(*_): pathlib.Path({str(step)!r}).touch(); print('much more ' * 99999); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        'print(\'{"said": "working"}\', flush=True)\n'
        "signal.pause()"
    )

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Home(tmp_path, show=interrupt).train(TRAINING)
    assert step.exists()


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """This is the real child. The end of its input tells that the parent is gone."""
    child = subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, text=True)
    written, _ = child.communicate(TRAINING.model_dump_json() + "\n", timeout=300)
    ends = [json.loads(line) for line in written.splitlines()]
    assert child.returncode != 0 and not [end for end in ends if "result" in end]
