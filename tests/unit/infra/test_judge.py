"""A judge is asked once, by its own server's format, and never says more than one verdict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from deal_core.errors import ConfigError
from infra.judge import MAX_FAILURES, Judge, JudgeError
from infra.settings import JudgeSettings
from tests.fake_judge import FakeJudge

SECRET = "Swordfish"


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    with FakeJudge(lambda first, second: "A" if len(first) > len(second) else "B") as server:
        yield server


def judge_of(server: FakeJudge, folder: Path, **changes: Any) -> Judge:
    given = {"url": SecretStr(server.url), "model": "j", **changes}
    return Judge(JudgeSettings(**given), folder)


def test_the_better_answer_is_named_and_a_question_is_asked_once(server: FakeJudge, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path, api_key=SecretStr(SECRET))
    assert judge.better("Sum it up.", ["Short."], "long", "x") == "A"
    assert judge.better("Sum it up.", ["Short."], "x", "long") == "B"
    assert len(server.questions) == 2 and server.tokens == {f"Bearer {SECRET}"}
    assert "Request:\nSum it up." in server.questions[0] and "- Short." in server.questions[0]
    server.status = 500
    assert judge_of(server, tmp_path).better("Sum it up.", ["Short."], "x", "long") == "B", "another process finds it"
    assert len(server.questions) == 2
    for other in (judge_of(server, tmp_path, model="k"), judge_of(server, tmp_path, url=SecretStr(server.url + "/"))):
        try:
            other.better("Sum it up.", ["Short."], "x", "long")
        except JudgeError:
            continue
    assert len(server.questions) == 3, "another model has verdicts of its own"
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(kept) == ["A", "B"], "no text is kept"


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("A", "A"),
        (" B.\n", "B"),
        ("C", "C"),
        ("**A**", "A"),
        ("<think>A or B? A is short.</think>\n\nB", "B"),
        ("A is better than B", None),
        ("", None),
        ("neither", None),
        ("ABC", None),
    ],
)
def test_only_one_letter_is_a_verdict(said: str, verdict: str | None, server: FakeJudge, tmp_path: Path) -> None:
    server.decide = lambda first, second: said
    if verdict is not None:
        assert judge_of(server, tmp_path).better("q", [], "x", "y") == verdict
        return
    with pytest.raises(JudgeError, match="gave no verdict"):
        judge_of(server, tmp_path).better("q", [], "x", "y")
    assert not list(tmp_path.iterdir()), "a failure is not kept"


def test_a_failure_says_what_failed_and_no_secret(server: FakeJudge, tmp_path: Path) -> None:
    url = SecretStr(server.url.replace("http://", f"http://me:{SECRET}@"))
    server.status = 503
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1 answered 503") as refused:
        judge_of(server, tmp_path, url=url).better("q", [], "x", "y")
    server.status, server.pause = 200, 2.0
    with pytest.raises(JudgeError, match=r"does not answer \(ReadTimeout\)") as late:
        judge_of(server, tmp_path, url=url, seconds=0.2).better("q", [], "x", "y")
    with pytest.raises(JudgeError, match=r"does not answer \(ConnectError\)") as away:
        judge_of(server, tmp_path, url=SecretStr(f"http://me:{SECRET}@127.0.0.1:9/{SECRET}")).better("q", [], "x", "y")
    assert not any(SECRET in str(each.value) for each in (refused, late, away))


def test_a_judge_that_is_away_is_asked_no_more(server: FakeJudge, tmp_path: Path) -> None:
    server.status, judge = 500, judge_of(server, tmp_path)
    for number in range(MAX_FAILURES + 3):
        with pytest.raises(JudgeError, match="500" if number < MAX_FAILURES else "asked no more"):
            judge.better(f"q {number}", [], "x", "y")
    assert len(server.questions) == MAX_FAILURES


@pytest.mark.parametrize("missing", ["url", "model"])
def test_a_judge_without_address_or_model_is_refused(missing: str, server: FakeJudge, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set DEAL_JUDGE_URL .* and DEAL_JUDGE_MODEL"):
        judge_of(server, tmp_path, **{missing: None})
