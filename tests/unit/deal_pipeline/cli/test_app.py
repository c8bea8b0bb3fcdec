"""The deal command: what it prints for people and machines, its exit codes, and how mistakes look."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from deal_pipeline.cli.app import TOPICS, app
from deal_pipeline.server.embedded import ui_address
from infra.store.format import write_format
from infra.store.local import FileStore
from tests.in_process import put_back
from tests.stored_versions import put_version, version

ROOT = Path(__file__).parents[4]
EXAMPLES = ROOT / "tests" / "data" / "examples"
Deal = Callable[..., Result]


@pytest.fixture
def deal(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deal]:
    """Runs the command in this process; what it sets in the environment is undone. Its store is empty, and may be."""
    monkeypatch.setattr("tasks.lineage.settings.require_any_lineage", lambda store: None)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    with put_back():
        yield invoke


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from deal_pipeline.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'prefect', 'mlflow', 'transformers', 'pandas', 'pyarrow', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapt" in done.stdout


def test_the_help_has_every_command_under_a_topic() -> None:
    listed = [name for names in TOPICS.values() for name in names]
    assert sorted(listed) == sorted(get_command(app).commands)  # type: ignore[attr-defined]
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(f"─ {topic} ─" in shown for topic in TOPICS) and "─ Commands ─" not in shown


def commands(command: Any = None, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group of `deal`, with the words that call it."""
    command = command or get_command(app)
    yield path, command
    for name, part in getattr(command, "commands", {}).items():
        yield from commands(part, *path, name)


@pytest.mark.parametrize(("path", "command"), [pytest.param(*found, id=" ".join(found[0])) for found in commands()])
def test_help_shows_every_text_that_is_declared(path: tuple[str, ...], command: Any) -> None:
    """Rich would take text in square brackets for markup and leave it out."""
    screen = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"}).stdout
    shown = " ".join(re.sub("[─-╿]", " ", screen).split())
    first = [(part.help or "").split("\n\n")[0] for part in getattr(command, "commands", {}).values()]
    texts = [command.help, command.epilog, *first]
    for parameter in command.params:
        texts += [parameter.help, parameter.show_default if isinstance(parameter.show_default, str) else None]
    for text in filter(None, texts):
        assert " ".join(text.split()) in shown


@pytest.mark.parametrize(
    ("path", "command"),
    [pytest.param(*found, id=" ".join(found[0])) for found in commands() if not hasattr(found[1], "commands")],
)
def test_every_command_has_the_common_options_and_two_examples_that_can_be_given(
    path: tuple[str, ...], command: Any
) -> None:
    options = [parameter.opts for parameter in command.params if parameter.name != "help"]
    assert options[-3:] == [["--home"], ["--json"], ["--debug"]]
    examples = command.epilog.removeprefix("Examples:").split("\n\n")[1:]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        words = words[words.index("deal") + 1 :]
        assert tuple(words[: len(path)]) == path, example
        command.make_context("deal", words[len(path) :])  # raises UsageError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "none.yaml"], "There is no file none.yaml"),
        (["adapt", "--task", "t"], "--task NAME and --data FILE"),
        (["adapt", "--task", "t", "--data", "x.csv", "--set", "strategy=magic"], "strategy is 'magic'; give deal"),
        (["check", str(EXAMPLES / "bank" / "train.jsonl"), "--task", "my task"], "'task.name' is 'my task'"),
        (["model", "fetch", "no such model!"], "no such model!"),
        (["task", "add-label", "bank"], "labels"),
        (["check", "x.csv", "--no-probe"], "go with --plan"),
        (["check", "x.csv", "--plan"], "--plan needs the task"),
        (["check", "s.yaml", "--task", "t"], "s.yaml is a spec"),
        (["adapt", "--task", "t", "--data", "x.csv", "--poll", "1"], "go with --watch"),
        (["adapt", "--watch", "--force"], "goes without --data, --test-data and --force"),
        (["version", "show", "1", "--out", "page.html"], "give --report too"),
        (["version", "requeue", "2", "--all"], "either versions or --all"),
        (["adapt", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_use_exits_2_with_one_clear_line(deal: Deal, arguments: list[str], message: str) -> None:
    result = deal(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_debug_shows_where_a_mistake_was_noticed(deal: Deal) -> None:
    assert "Traceback" in deal("adapt", "none.yaml", "--debug").stderr


def test_an_error_is_json_for_machines(deal: Deal) -> None:
    result = deal("adapt", "none.yaml", "--json")
    assert "There is no file none.yaml" in json.loads(result.stderr)["error"]
    assert result.stdout == ""


def test_check_tells_what_ingest_would_keep(deal: Deal) -> None:
    result = deal("check", str(EXAMPLES / "bank" / "train.jsonl"), "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)["data"]
    assert (told["accepted"], told["format"], told["num_read"], told["num_rejected"]) == (True, "labelled", 72, 0)
    assert len(told["labels"]) == 6 and told["num_train"] + told["num_test"] == 72


def test_check_takes_columns_and_labels_from_a_spec(deal: Deal) -> None:
    result = deal("check", str(EXAMPLES / "clinic" / "train.csv"), "--spec", str(EXAMPLES / "clinic" / "spec.yaml"))
    assert result.exit_code == 0 and "can be adapted" in result.stdout and "low iron" in result.stdout


def test_check_of_a_bad_file_exits_1_and_names_the_rows(deal: Deal, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("text,label\n,a\nfine,b\n")
    result = deal("check", str(path))
    assert result.exit_code == 1
    assert "is refused" in result.stdout and "empty text" in result.stdout
    told = json.loads(deal("check", str(path), "--json").stdout)["data"]
    assert not told["accepted"] and told["bad_rows"][0]["row"] == 1


@pytest.mark.parametrize(("rejected", "code"), [(True, 3), (False, 0)])
def test_requeue_exits_3_where_the_gate_rejects(
    deal: Deal, monkeypatch: pytest.MonkeyPatch, rejected: bool, code: int
) -> None:
    from flows.adapt_result import AdaptResult

    values = {"lineage": "l", "task": "t", "version": "1", "parent_version": None, "reasons": (), "run_key": "k"}
    counts = {"num_train": 1, "num_test": 1, "num_rejected": 0}
    values |= {"dataset": {"task": "t", "uri": "u", "sha256": "s", "landed_sha256": "l", **counts}, "message": "Done."}
    runs = [
        AdaptResult.model_validate({**values, "status": status, "rejected": status == "rejected"})
        for status in ("promoted", "rejected" if rejected else "promoted")
    ]
    monkeypatch.setattr("deal_pipeline.cli.session.Session.run", lambda self, start: runs)
    assert deal("version", "requeue", "2", "3").exit_code == code


def test_nothing_is_drawn_where_there_is_no_terminal(deal: Deal) -> None:
    result = deal("check", str(EXAMPLES / "bank" / "train.jsonl"))
    assert "\x1b" not in result.output and "\r" not in result.output


@pytest.fixture
def other(deal: Deal, tmp_path: Path) -> None:
    """The store has a lineage, so it is not empty."""
    (tmp_path / "other.yaml").write_text("lineage: other\n")
    assert deal("lineage", "apply", str(tmp_path / "other.yaml")).exit_code == 0


@pytest.mark.usefixtures("other")
def test_a_variable_names_the_lineage_and_the_option_wins(deal: Deal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_LINEAGE", "support")
    assert "'support' has no champion" in deal("version", "list").stderr
    assert "'desk' has no champion" in deal("version", "list", "--lineage", "desk").stderr
    monkeypatch.delenv("DEAL_LINEAGE")
    assert "'other' has no champion" in deal("version", "list").stderr


def test_ui_names_the_database_and_the_command(deal: Deal, home: Path) -> None:
    told = json.loads(deal("ui", "--json", "--port", "5123").stdout)
    assert told["tracking_uri"] == f"sqlite:///{home / 'mlflow.db'}"
    assert told["url"] == "http://127.0.0.1:5123"
    assert told["command"][:2] == ["mlflow", "ui"]
    assert told["environment"]["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{home / 'mlflow.db'}"
    shown = deal("ui").stdout.replace("\n", "")
    assert f"MLFLOW_BACKEND_STORE_URI=sqlite:///{home / 'mlflow.db'}" in shown and "mlflow ui --host 127.0.0.1" in shown


def test_ui_of_a_server_is_the_server(deal: Deal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    told = json.loads(deal("ui", "--json").stdout)
    assert (told["url"], told["command"]) == ("http://mlflow.example:5000", [])


def test_ui_shows_no_password(deal: Deal, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("http://me:secret@mlflow.example:5000", "postgresql://me:secret@db.example/mlflow"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for result in (deal("ui"), deal("ui", "--json")):
            assert "secret" not in result.output and ".example" in result.output
        assert "secret" not in " ".join(ui_address(5000).command), "every user of the machine can read arguments"


SERVER = """
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("ready").touch()
time.sleep(600)
"""
"""In MLflow's place: a server with a process of its own."""


def test_ui_that_is_told_to_end_leaves_no_server(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text(SERVER)
    command = [sys.executable, "-c", "from deal_pipeline.cli.app import main; main()", "ui", "--open"]
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ui = psutil.Popen([*command, "--home", str(home)], cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "ready").exists():
            assert ui.poll() is None
            time.sleep(0.05)
        servers = ui.children(recursive=True)
        assert len(servers) == 2
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(120) == 128 + signal.SIGTERM
        assert psutil.wait_procs(servers, timeout=120)[1] == []
    finally:
        for process in (ui, *ui.children(recursive=True)) if ui.is_running() else ():
            process.kill()


def test_what_nobody_expected_is_one_line_and_goes_to_the_log(
    deal: Deal, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("tasks.lineage.history.read_history", fail)
    result = deal("version", "list")
    assert result.exit_code == 1
    assert "RuntimeError: first line second line" in result.stderr and "--debug" in result.stderr
    assert str(home / "logs" / "deal.log") in result.stderr.replace("\n", "")
    assert "Traceback" in (home / "logs" / "deal.log").read_text()
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "num_shown"), [((), 30), (("--newest", "3"), 3), (("--newest", "0"), 40), (("--json",), None)]
)
def test_version_list_shows_the_newest_versions_and_programs_get_all(
    deal: Deal, home: Path, options: tuple[str, ...], num_shown: int | None
) -> None:
    store = FileStore(home / "store")
    write_format(store)
    for number in range(1, 41):
        put_version(store, version(number, reasons=(f"reason {number};",)))
    result = deal("version", "list", "--lineage", "l", *options)
    if num_shown is None:
        assert len(json.loads(result.stdout)) == 40
    else:
        assert [f"reason {number};" in result.stdout for number in range(1, 41)] == [
            number > 40 - num_shown for number in range(1, 41)
        ]
        assert ("There are earlier versions" in result.stdout) == (num_shown < 40)


def test_ctrl_c_exits_130(deal: Deal, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.lineage.history.read_history", stop)
    result = deal("version", "list")
    assert result.exit_code == 130 and "goes on from the last checkpoint" in result.stderr


def test_an_added_lineage_names_its_base_model_where_every_process_finds_it(
    deal: Deal, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "models" / "mine" / name).write_bytes(b"")
    spec = tmp_path / "support.yaml"
    for given, kept in (("models/mine", str(tmp_path / "models" / "mine")), ("owner/name", "owner/name")):
        spec.write_text(f"lineage: support\nbase_model: {given}\n")
        assert deal("lineage", "apply", str(spec)).exit_code == 0
        stored = (home / "store" / "lineages" / "support.yaml").read_text()
        assert f"base_model: {kept}\n" in stored


def test_a_lineage_of_an_absent_base_model_or_an_absurd_rank_is_not_added(
    deal: Deal, home: Path, tmp_path: Path
) -> None:
    spec = tmp_path / "support.yaml"
    for settings, said in {
        "base_model: /no/such/model": "There is no file or folder",
        "adapter: {rank: 100000000}": r"adapter.rank is 100000000; give at most 16384",
    }.items():
        spec.write_text(f"lineage: support\n{settings}\n")
        result = deal("lineage", "apply", str(spec))
        assert result.exit_code == 2 and said in result.stderr
    assert not list((home / "store").rglob("support.yaml"))


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The local time zone, one hour before UTC in January."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("at", "shown"),
    [
        ("2026-01-01", "At 2026-01-01T00:00:00+01:00 (local time, CET), no"),
        ("2026-07-01T09:30", "At 2026-07-01T09:30:00+02:00 (local time, CEST), no"),
        ("2026-01-01T09:30-05:00", "At 2026-01-01T09:30:00-05:00, no"),
        ("0001-01-01T00:00+14:00", "At 0001-01-01T00:00:00+14:00, no"),
    ],
)
def test_the_champion_at_a_time_is_asked_for_with_a_zone_or_in_the_local_one(deal: Deal, at: str, shown: str) -> None:
    result = deal("version", "list", "--at", at)
    assert result.exit_code == 0 and f"{shown} version was champion." in " ".join(result.stdout.split())
    told = json.loads(deal("version", "list", "--at", at, "--json").stdout)
    assert told == {"at": shown.split()[1].rstrip(","), "champion": None}


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize("at", ["0001-01-01", "yesterday", "9" * 5000])
def test_a_time_that_is_none_is_wrong_use(deal: Deal, at: str) -> None:
    result = deal("version", "list", "--at", at)
    assert result.exit_code == 2 and "not expected" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("feedback", "sample"), ("status", "--home"), ("adapt",), ("predict", "-d")],
)
def test_a_path_that_no_file_can_have_is_wrong_use(deal: Deal, arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = deal(*arguments, str(tmp_path / ("a" * 5000 + ".csv")))
    assert result.exit_code in (1, 2) and "too long" in result.stderr
    assert "not expected" not in result.stderr and len(result.stderr) < 700
