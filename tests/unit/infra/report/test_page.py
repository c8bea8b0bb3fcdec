"""A run's page and its figures: their content, their colours, and that they run and load nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

import infra.report
from deal_core.errors import RegistryError
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.judging_config import DriftLimits, RolloutTerms
from deal_core.monitoring.drift import compare
from deal_core.monitoring.report import LiveLook
from infra.report.charts import MAX_CHARS, MAX_LABELS, shown_labels
from infra.report.figures import accuracy_over_versions, loss_curve
from infra.report.page import (
    NUM_SHADES,
    matrix_rows,
    render_page,
    row_names_of,
    verdict_of,
)
from infra.report.run_report import Changed, Example, Quality, QuarantinedRow, RunReport
from infra.versions import Version
from tests.monitored import feedback_on, free_rows, logged_rows
from tests.report_sample import DIGEST, REASONS, TASKS, sample_evaluation, sample_report, sample_versions

HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg/onload=alert(3)>{{ 7*7 }}"
CSS = Path(infra.report.__file__).parent / "templates" / "page.css"


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def render(versions: Sequence[Version] = (), **changes: object) -> str:
    return render_page(versions or sample_versions(), sample_report(**changes), sample_evaluation())


def verdict(**changes: object) -> str:
    return verdict_of(sample_versions(**changes)[-1])


def test_the_verdict_comes_first_with_every_reason() -> None:
    page = render()
    body = page[page.index("<body>") :]
    sentence = f"Version 4 of support, trained on {TASKS[2]}, was rejected by the gate; version 2 stays champion."
    places = [body.index(text) for text in (sentence, *REASONS, "Accuracy of every version")]
    assert places == sorted(places)
    assert verdict(branch=1).endswith("was rejected by the gate; branch 1 stays at version 2.")
    assert "there is no champion yet" in verdict(parent_version=None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "was promoted"),
        ({"approval": "awaiting"}, "waits for a person's approval"),
        ({"rollout": RolloutTerms("canary", 0.1, 200, 10.0, 0.95)}, "is tried on live traffic"),
        ({"branch": 1}, "was put on branch 1, whose newest version becomes champion in one swap."),
        ({"branch": 1, "promoted": 7}, "was promoted"),
        (
            {"approval": "refused", "standing": "rejected by a person"},
            "was rejected by a person; version 2 stays champion.",
        ),
    ],
)
def test_the_verdict_says_what_became_of_the_version(changes: dict[str, object], words: str) -> None:
    assert words in verdict(accepted=True, **changes)


def test_the_page_tells_the_whole_run() -> None:
    text = " ".join(Tags(render()).text.split())
    for said in (
        "22.0 → 25.0 %",
        "−15.0 points",
        "+1, −3",
        "120 steps in 14 min, 3.2 rows/s; it was interrupted and continued from step 40",
        "may.csv: 130 rows read, 96 for training, 20 for testing, 14 in quarantine",
        "empty text10",
        "Texts with several labels: 3 (6 training rows, 0 test rows).",
        "row 12 (line 14): label outside the task's set: 'cardd'",
        "Lost: 3",
        "Gained: 1",
        "Where is my card?",
        "A note.",
        "evaluate2 min",
        "deal version show 4 --report --lineage support",
        DIGEST,
        "2026-05-04 12:30 UTC",
    ):
        assert said in text, said


def test_rows_that_a_selection_left_out_do_not_count_as_learned() -> None:
    training = sample_report().training
    for num_rows, said in ((96, "learned from 96 rows,"), (24, "from 24 of 96 rows,")):
        text = " ".join(Tags(render(training=training.model_copy(update={"num_rows": num_rows}))).text.split())
        assert said in text


def test_the_page_shows_how_each_label_is_answered() -> None:
    (body,) = re.findall(r"<h2>Each label</h2>.*?<h2>", render(), re.DOTALL)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr><td.*?</tr>", body, re.DOTALL)]
    assert rows == [
        ["<bdi>lost card</bdi>", "75.0", "60.0", "45.0"],
        ["<bdi>fee &lt;dispute&gt;</bdi>", "–", "40.0", "50.0"],
        ["<i>no label of the task</i>", "–", "0.0", "5.0"],
    ]
    assert "bank: 20 test rows, 2 labels" in body
    assert "Each label" not in render_page(sample_versions(), sample_report(), replace(sample_evaluation(), labels={}))


def test_of_a_file_that_was_forgotten_the_page_has_the_numbers() -> None:
    quality = Quality(num_read=130, num_train=96, num_test=20, num_rejected=14)
    text = " ".join(Tags(render(quality=quality)).text.split())
    assert "A file that was forgotten since: 130 rows read, 96 for training, 20 for testing, 14 in quarantine" in text
    assert "Format" not in text and "None" not in text


def test_nothing_on_the_page_runs_or_is_loaded_whatever_a_row_says() -> None:
    row = Example(row=HOSTILE, text=HOSTILE, expected=HOSTILE, before=HOSTILE, now=HOSTILE, scores=(1.0, 0.0))
    report = sample_report(
        changed=(Changed(task="bank", num_rows=9, num_gained=1, num_lost=1, gained=(row,), lost=(row,)),),
        quality=sample_report().quality.model_copy(
            update={
                "source": HOSTILE,
                "problems": {HOSTILE: 1},
                "bad_rows": (QuarantinedRow(file=HOSTILE, row=1, line=1, problems=(HOSTILE,)),),
                "warnings": (HOSTILE,),
            }
        ),
    )
    page = render_page(sample_versions(reasons=(HOSTILE,)), report, sample_evaluation())
    plain = {tag for tag, _ in Tags(render()).tags}
    found = Tags(page)
    assert {tag for tag, _ in found.tags} == plain, "a row's text became a tag"
    assert not plain & {"script", "img", "iframe", "link", "object", "form", "a"}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action")], tag
        assert (attributes.get("href") or "#").startswith("#"), "a part of the same page"
    assert found.text.count("{{ 7*7 }}") == 14, (
        "unchanged: reason, file twice, problem twice, warning, two rows' four texts"
    )
    assert page.count("url(") == page.count("url(#"), "a part of the same page"
    assert "@import" not in page and "http://" not in page and "https://" not in page
    (policy,) = (each["content"] for tag, each in found.tags if each.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and "script" not in policy


def test_a_report_of_another_release_or_a_damaged_one_is_refused() -> None:
    values = sample_report().model_dump(mode="json")
    with pytest.raises(RegistryError, match="schema version 2, this release reads 1"):
        RunReport.from_json({**values, "schema_version": 2})
    with pytest.raises(RegistryError, match="damaged"):
        RunReport.from_json({**values, "seconds": "many"})
    with pytest.raises(RegistryError, match="schema version None"):
        RunReport.from_json([])


def test_rows_of_the_matrix_have_the_numbers_of_their_versions() -> None:
    versions, evaluation = sample_versions(), sample_evaluation()
    rows = matrix_rows(evaluation.matrix, row_names_of(versions, evaluation))
    assert [(row.name, row.trained) for row in rows] == [
        ("base", ""),
        ("1", "bank"),
        ("2", "clinic"),
        ("4", TASKS[2]),
    ]
    assert [cell.text for cell in rows[1].cells] == ["90.0", "15.0", "–"]
    assert [cell.is_trained for cell in rows[3].cells] == [False, False, True]
    assert rows[1].cells[2].shade is None and rows[1].cells[0].shade == 9
    assert row_names_of(versions[-1:], evaluation) == ["row 1", "row 2", "row 3"], "no number instead of a wrong number"


def test_a_score_of_few_rows_has_its_interval_and_a_version_that_few_rows_judged_is_yellow() -> None:
    evaluation, few = sample_evaluation(), AccuracyMatrix()
    few = few.with_row("bank", {"bank": 0.85}, base_accuracy=0.25, parent_accuracy=None, num_rows={"bank": 20})
    (base, first) = matrix_rows(few, ["1"])
    assert [cell.sureness for cell in (*base.cells, *first.cells)] == ["11–47, n 20", "64–95, n 20"]
    assert not any(cell.sureness for row in matrix_rows(evaluation.matrix, list("124")) for cell in row.cells)
    sure, unsure = (
        render(sample_versions(accepted=True, reasons=())),
        render(sample_versions(accepted=True, reasons=(), unsure=("<few rows>",))),
    )
    assert 'class="verdict promoted"' in sure and 'class="verdict unsure"' in unsure
    assert "&lt;few rows&gt;" in unsure


def test_what_is_not_known_is_said() -> None:
    training = sample_report().training.model_copy(update={"losses": ()})
    text = " ".join(Tags(render(changed=(), seconds={}, training=training)).text.split())
    for said in (
        "the answers of version 2 were not kept",
        "the run was completed after a crash",
        "No loss was logged",
    ):
        assert said in text


def test_without_texts_rows_are_named_by_their_digests() -> None:
    changed = Changed(
        task="bank", num_rows=20, num_gained=0, num_lost=1, gained=(), lost=(Example(row=DIGEST, scores=(1.0, 0.0)),)
    )
    text = Tags(render(changed=(changed,), include_texts=False)).text
    assert DIGEST in text and "data.include_texts is off" in text and "expected" not in text


def luminance(colour: str) -> float:
    full = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    parts = [int(full[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_shade_of_the_heat_map_can_be_read_in_light_and_dark() -> None:
    shades = re.findall(r"\.s(\d+) \{ background: (#\w+); color: (#\w+); \}", CSS.read_text(encoding="utf-8"))
    assert [int(number) for number, _, _ in shades] == 2 * list(range(NUM_SHADES))
    for number, background, colour in shades:
        low, high = sorted((luminance(background), luminance(colour)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"shade {number} ({background})"
    for scheme in (shades[:NUM_SHADES], shades[NUM_SHADES:]):
        values = [luminance(background) for _, background, _ in scheme]
        assert values in (sorted(values), sorted(values, reverse=True)), "one direction, also in grey"


def test_the_charts_name_versions_as_the_registry_does_and_keep_their_text() -> None:
    text = render()
    start = text.index("<svg")
    chart = Tags(text[start : text.index("</svg>")])
    words = chart.text.split()
    assert [word for word in words if word in "1234"] == ["1", "2", "4"], "3 was rejected"
    assert {"bank", "clinic", TASKS[2]} <= set(words)


def figures() -> dict[str, Figure]:
    training = sample_report().training
    return {
        "tasks": accuracy_over_versions(sample_evaluation().matrix),
        "loss": loss_curve(training.losses),
    }


def live_look(task: str = "bank") -> LiveLook:
    """A look with an alarm, a task without labels, and a task that was not compared."""
    shifted = logged_rows(300, 1, task=task, shares={"loan": 0.6, "fraud": 0.1, "<b>fee</b>": 0.2, None: 0.1})
    live = pd.concat([shifted, free_rows(150, 2), logged_rows(5, 3, task="clinic")])
    reference = pd.concat([logged_rows(300, 4, task=task), free_rows(150, 5), logged_rows(50, 6, task="clinic")])
    drift = compare(reference, live, DriftLimits(), feedback=feedback_on(shifted, [True] * 30))
    return LiveLook(lineage="support", version="4", looked=datetime(2026, 5, 5, 4, tzinfo=UTC), drift=drift)


def test_live_traffic_has_a_section_with_a_picture_for_each_task_that_was_compared() -> None:
    assert "Live traffic" not in render()
    page = render_page(sample_versions(), sample_report(), sample_evaluation(), live_look())
    tags = Tags(page)
    titles = [attributes["aria-label"] for name, attributes in tags.tags if name == "svg"]
    assert [title for title in titles if title and "Live" in title] == [
        "Live traffic of bank and its reference",
        "Live traffic of notes and its reference",
    ]
    assert "clinic: too few rows" in tags.text and "bank: drift" in tags.text and "notes: no alarm" in tags.text
    assert "labels: PSI" in tags.text and "no label" in tags.text
    assert "Accuracy measured by feedback: 100.0 %" in tags.text
    assert "<b>fee</b>" not in page and "<b>fee</b>" in tags.text, "a label is text"
    assert page == render_page(sample_versions(), sample_report(), sample_evaluation(), live_look())
    ids = [attributes["id"] for _, attributes in tags.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_a_picture_shows_the_labels_that_moved_and_sums_up_the_others() -> None:
    shares = {f"label {number}": (0.05, 0.05) for number in range(18)} | {"up" * 20: (0.0, 0.1), "down": (0.1, 0.0)}
    shown = shown_labels(shares)
    assert len(shown) == MAX_LABELS and "down" in shown and "upupup" in " ".join(shown)
    assert max(map(len, shown)) <= MAX_CHARS
    assert [sum(side) for side in zip(*shown.values(), strict=True)] == pytest.approx([1.0, 1.0])
    assert len(shown_labels({"a" * 30: (0.5, 0.5), "a" * 31: (0.5, 0.5)})) == 2, "names that are cut stay apart"
