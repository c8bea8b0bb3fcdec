"""The deal command: what it prints for people and machines, its exit codes, and how mistakes look."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tenacity
from typer.main import get_command
from typer.testing import CliRunner, Result

from flows.cli.app import TOPICS, app
from flows.server.embedded import ui_address
from tests.in_process import put_back

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


def test_help_loads_nothing_heavy_and_names_every_command() -> None:
    code = (
        "import sys; from flows.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'prefect', 'mlflow', 'transformers', 'pandas', 'pyarrow', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in (
        "demo",
        "init",
        "check",
        "adapt",
        "predict",
        "version",
        "data",
        "model",
        "ui",
    ):
        assert name in done.stdout


def test_the_programs_version_is_that_of_the_package(deal: Deal) -> None:
    assert deal("--version").stdout == f"deal-pipeline {importlib.metadata.version('deal-pipeline')}\n"


def test_a_shell_can_complete_commands(deal: Deal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # whatever shell runs the tests
    monkeypatch.setattr("typer.testing._get_command", get_command)  # the tests' one tree was made without the variable
    shown = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="deal")
    assert shown.exit_code == 0 and "_DEAL_COMPLETE=complete_bash" in shown.stdout


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
def test_every_command_has_the_common_options_last(path: tuple[str, ...], command: Any) -> None:
    options = [parameter.opts for parameter in command.params if parameter.name != "help"]
    assert options[-3:] == [["--home"], ["--json"], ["--debug"]]


@pytest.mark.parametrize(
    ("path", "command"),
    [pytest.param(*found, id=" ".join(found[0])) for found in commands() if not hasattr(found[1], "commands")],
)
def test_every_command_ends_with_two_examples_that_can_be_given(path: tuple[str, ...], command: Any) -> None:
    examples = command.epilog.removeprefix("Examples:").split("\n\n")[1:]
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        words = words[words.index("deal") + 1 :]
        assert tuple(words[: len(path)]) == path, example
        command.make_context("deal", words[len(path) :])  # raises UsageError


def test_the_first_help_has_at_most_twenty_commands_each_on_one_line() -> None:
    screen = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).stdout
    top = next(command for path, command in commands() if not path)
    assert len(top.commands) <= 20
    for name, command in top.commands.items():
        first = (command.help or "").split("\n\n")[0]
        assert re.search(rf"│ {name} +{re.escape(first)} +│", screen), name


def test_the_package_is_cheap_to_import_and_has_the_entry_point() -> None:
    code = "import sys, flows.cli; assert 'typer' not in sys.modules; flows.cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "adapt" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt"], "--task NAME and --data FILE"),
        (["adapt", "none.yaml"], "There is no file none.yaml"),
        (["adapt", "--task", "t"], "--task NAME and --data FILE"),
        (["adapt", "--task", "t", "--data", "x.csv", "--set", "strategy=magic"], "strategy is 'magic'; give deal"),
        (["adapt", "none.yaml", "--watch", "--once"], "There is no file none.yaml"),
        (["check", str(EXAMPLES / "bank" / "train.jsonl"), "--task", "my task"], "'task.name' is 'my task'"),
        (["model", "fetch", "no such model!"], "no such model!"),
        (["task", "add-label", "bank"], "labels"),
        (["check", "x.csv", "--no-probe"], "go with --plan"),
        (["check", "x.csv", "--precision", "fp32"], "go with --plan"),
        (["check", "x.csv", "--plan"], "--plan needs the task"),
        (["check", "s.yaml", "--task", "t"], "s.yaml is a spec"),
        (["adapt", "--task", "t", "--data", "x.csv", "--poll", "1"], "go with --watch"),
        (["adapt", "--task", "t", "--task", "u", "--data", "x.csv"], "go with --watch"),
        (["adapt", "--watch", "--data", "x.csv"], "goes without --data"),
        (["adapt", "--watch", "--force"], "goes without --data, --test-data and --force"),
        (["version", "show", "1", "--out", "page.html"], "give --report too"),
        (["version", "requeue", "2", "--all"], "either versions or --all"),
        (["adapt", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
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


def test_check_tells_the_shape_and_shows_a_row_as_the_model_sees_it(deal: Deal, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": f"Do {i}", "input": f"it {i}", "output": "done"} for i in range(30)]))
    told = json.loads(deal("check", str(path), "--json").stdout)["data"]
    assert told["shape"] == "Alpaca rows (instruction with input under it, output)"
    number = told["example"]["prompt"].split()[1]
    assert told["example"] == {"prompt": f"Do {number}\nit {number}", "answer": " done", "rejected": None, "note": None}
    shown = deal("check", str(path)).stdout
    assert "recognised as Alpaca rows" in shown and f"it {number} done" in shown


def test_check_shows_a_chat_even_without_its_base_model(deal: Deal, tmp_path: Path) -> None:
    path, spec = tmp_path / "rows.jsonl", tmp_path / "spec.yaml"
    turns = [{"role": role, "content": f"[b]{role}"} for role in ("user", "assistant", "user")]
    chats = [[*turns, {"role": "assistant", "content": f"end {number}"}] for number in range(30)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    spec.write_text("base_model: nobody/nothing\ntask: {name: t, data: x}\n")
    shown = deal("check", str(path), "--spec", str(spec)).stdout
    assert "user: [b]user" in shown and "without the base model's chat template" in shown and "end " in shown


def test_check_shows_what_stands_where_the_columns_names_should(deal: Deal, tmp_path: Path) -> None:
    path = tmp_path / "bare.csv"
    path.write_text("My card is lost,lost_card\nWhere is it?,card_arrival\n")
    result = deal("check", str(path))
    assert result.exit_code != 0 and "'lost_card'" in result.stderr, "who holds the file may see it"


def test_check_of_a_missing_file_says_so(deal: Deal) -> None:
    result = deal("check", "none.csv")
    assert result.exit_code in (1, 2) and "none.csv" in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(("rejected", "code"), [(True, 3), (False, 0)])
def test_requeue_exits_3_where_the_gate_rejects(
    deal: Deal, monkeypatch: pytest.MonkeyPatch, rejected: bool, code: int
) -> None:
    from flows.adapt import AdaptResult

    values = {"lineage": "l", "task": "t", "version": "1", "parent_version": None, "reasons": (), "run_key": "k"}
    counts = {"num_train": 1, "num_test": 1, "num_rejected": 0}
    values |= {"dataset": {"task": "t", "uri": "u", "sha256": "s", "landed_sha256": "l", **counts}, "message": "Done."}
    runs = [
        AdaptResult.model_validate({**values, "status": status, "rejected": status == "rejected"})
        for status in ("promoted", "rejected" if rejected else "promoted")
    ]
    monkeypatch.setattr("flows.cli.session.Session.run", lambda self, start: runs)
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


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("arguments", [["version", "list"], ["predict", "text"], ["task", "add-label", "bank", "late"]])
def test_an_unknown_lineage_says_what_to_do(deal: Deal, arguments: list[str]) -> None:
    result = deal(*arguments, "--lineage", "nobody")
    assert result.exit_code == 1
    assert "'nobody' has no champion" in result.stderr and "deal adapt" in result.stderr


def test_a_server_tells_its_events_as_lines(deal: Deal, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(store: object, lineage: str, home: Path, *, say: Any, ready: Any, **options: object) -> bool:
        ready("http://127.0.0.1:8000", "3")
        say("Version 4 answers now.")
        return True

    monkeypatch.setattr("infra.serving.run.serve", serve)
    told = [json.loads(line) for line in deal("serve", "--lineage", "l", "--json").stdout.splitlines()]
    ready = {"url": "http://127.0.0.1:8000", "lineage": "l", "version": "3"}
    assert told == [ready, {"event": "Version 4 answers now."}]
    shown = deal("serve", "--lineage", "l").stdout
    assert shown == "l answers at http://127.0.0.1:8000/invocations. Ctrl-C ends it.\nVersion 4 answers now.\n"


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


def test_ui_starts_the_server_with_no_password_among_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db.example/mlflow")
    address = ui_address(5000)
    assert "secret" not in " ".join(address.command)
    assert address.environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:secret@db.example/mlflow"


def test_ui_that_is_told_to_end_leaves_no_server(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from flows.cli.app import main; main()", "ui", "--open", "--port", str(port)]
    ui = psutil.Popen([*command, "--home", str(home)], env={**os.environ, "BROWSER": "true"}, stdout=subprocess.DEVNULL)
    try:
        for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(300)):
            with attempt:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
        servers = ui.children(recursive=True)
        assert servers
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(120) == 128 + signal.SIGTERM
        assert psutil.wait_procs(servers, timeout=120)[1] == []
    finally:
        for process in (ui, *ui.children(recursive=True)) if ui.is_running() else ():
            process.kill()


def test_home_option_wins_over_the_environment(deal: Deal, tmp_path: Path) -> None:
    told = json.loads(deal("ui", "--json", "--home", str(tmp_path / "other")).stdout)
    assert told["tracking_uri"] == f"sqlite:///{tmp_path / 'other' / 'mlflow.db'}"


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
    ("options", "num_shown"),
    [((), 30), (("--newest", "3"), 3), (("--newest", "40"), 40), (("--newest", "0"), 40), (("--json",), None)],
)
def test_version_list_shows_the_newest_versions_and_programs_get_all(
    deal: Deal, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], num_shown: int | None
) -> None:
    from tasks.lineage.history import HistoryEntry

    values = dict.fromkeys(HistoryEntry.model_fields) | {"accepted": True, "reasons": (), "aliases": ()}
    values |= dict.fromkeys(("lesson", "task", "strategy", "dataset_sha256", "run_key", "adapter"), "x")
    values |= {"debts": {}, "general": {}, "kind": "adaptation", "unsure": ()}
    values["created"] = datetime.now(UTC)
    entries = [HistoryEntry.model_validate({**values, "version": str(number)}) for number in range(1, 41)]

    def read(lineage: str, newest: int | None) -> list[HistoryEntry]:
        return entries[-newest:] if newest else entries

    monkeypatch.setattr("tasks.lineage.history.read_history", read)
    monkeypatch.setattr("flows.cli.version.show_history", lambda lineage, entries: [f"{len(entries)} versions"])
    result = deal("version", "list", "--lineage", "support", *options)
    if num_shown is None:
        assert len(json.loads(result.stdout)) == 40
    else:
        assert f"{num_shown} versions" in result.stdout
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
        ("2026-01-01T09:30:15Z", "At 2026-01-01T09:30:15+00:00, no"),
        ("2026-01-01T09:30-05:00", "At 2026-01-01T09:30:00-05:00, no"),
        ("0001-01-01T00:00+14:00", "At 0001-01-01T00:00:00+14:00, no"),
        ("9999-12-31T23:59-14:00", "At 9999-12-31T23:59:00-14:00, no"),
    ],
)
def test_the_champion_at_a_time_is_asked_for_with_a_zone_or_in_the_local_one(deal: Deal, at: str, shown: str) -> None:
    result = deal("version", "list", "--at", at)
    assert result.exit_code == 0 and f"{shown} version was champion." in " ".join(result.stdout.split())
    told = json.loads(deal("version", "list", "--at", at, "--json").stdout)
    assert told == {"at": shown.split()[1].rstrip(","), "champion": None}


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("0001-01-01", "--at is '0001-01-01'; give a time such as"),
        ("yesterday", "--at is 'yesterday'; give a time such as"),
        ("9" * 5000, "give a time such as"),
    ],
)
def test_a_time_that_is_none_is_wrong_use(deal: Deal, at: str, said: str) -> None:
    result = deal("version", "list", "--at", at)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split())
    assert "not expected" not in result.stderr


def test_a_time_zone_that_there_is_not_is_said_before_anything_else(
    deal: Deal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC+99")
    time.tzset()
    try:
        result = deal("version", "list")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert result.exit_code == 2 and "TZ is 'UTC+99', which is no time zone" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("feedback", "sample"), ("status", "--home"), ("adapt",), ("predict", "-d")],
)
def test_a_path_that_no_file_can_have_is_wrong_use(deal: Deal, arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = deal(*arguments, str(tmp_path / ("a" * 5000 + ".csv")))
    assert result.exit_code in (1, 2) and "too long" in result.stderr
    assert "not expected" not in result.stderr and len(result.stderr) < 700
