"""Does the arrival check tell wrong labels from new texts? Champions of the built-in base model have answered.

    python -m benchmarks.arrival_check run --data CL_BENCHMARK
    python -m benchmarks.arrival_check ask --data CL_BENCHMARK --chains WORK
    python -m benchmarks.arrival_check table

run: champions for other domains. Each learns one task of few rows, and answers a pool of rows that it has not learned,
and rows of another domain as rows of its task. Answers and confidences are stored, one file a champion; a second call
goes on.

ask: the same questions to versions of the chains that `benchmarks/method/memory.py` trains. Each answers test rows of
the task that it has just learned, and rows of another domain as rows of this task. Nothing is trained.

table: references and arrivals are drawn from stored answers. Good arrivals, wrong labels (each of the others alike) and
months whose rows are harder by a known number of points are those of the stored cells of the benchmark: each version
has answered the reported rows of the task that it has just learned. Everything goes through `judge_arrival` as it would
go through a lineage. None of these rows has chosen anything of the check: its limits were written before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.special import softmax

from benchmarks.continual.cell import unpack_answers
from benchmarks.continual.summary import read_cells
from benchmarks.output import RESULTS, Out, describe_machine, read, templates, write_result
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.data.reading.readers import read_rows
from deal_core.data.schema import label_key
from deal_core.evaluation.arrival_check import AnsweredRows, Verdict, judge_arrival
from deal_core.judging_config import GateConfig
from deal_core.regular_file import complete_file, sha256_of_file

if TYPE_CHECKING:
    from deal_core.evaluation.evaluate import TaskEvaluation

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
ANSWERS = RESULTS / "arrival_check"
CELLS = ("continual", "final")
"""Folders of the cells whose reported rows were answered, with the log-probabilities of all labels."""
STRATEGIES = ("deal", "replay", "seq_lora")
MIN_POOL = 300
"""Rows of the largest reference and the largest arrival together."""
PAGE = Path("benchmarks/arrival_check.md")
SIZES = (30, 60, 150)
"""Rows of a reference, and of an arrival."""
WRONG = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Shares of wrong labels."""
HARDER = (8, 12)
"""Points by which a month is harder."""
SHOWN = (150, 60)
"""The reference and the arrival of the table by task."""
GOOD = 0.75
"""Score from which on a champion is counted in the table by sizes: a worse one has few right answers to lose."""
NUM_DRAWS = 20
"""Arrivals of each kind, champion and pair of sizes."""

app = typer.Typer(help=__doc__, rich_markup_mode=None)


@dataclass(frozen=True)
class Domain:
    """Rows of a file of CL_Benchmark, as rows of a task."""

    file: str
    labels: Mapping[str, str]
    """Label in the file → label of the task; other rows are left out."""


@dataclass(frozen=True)
class Case:
    """A task, and another domain whose rows land as rows of it."""

    title: str
    instruction: str
    learned: Domain
    other: Domain

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the task."""
        return tuple(dict.fromkeys(self.learned.labels.values()))


POLARITY = {"very negative": "negative", "negative": "negative", "positive": "positive", "very positive": "positive"}
SENTIMENT = "What is the sentiment of the following paragraph? Choose one from the option."
TOPIC = "What is the topic of the following paragraph? Choose one from the option."
NEWS = {label: label for label in ("World", "Sports", "Business", "Science or Technology")}
CASES = {
    "yelp": Case("yelp → amazon, two labels", SENTIMENT, Domain("yelp", POLARITY), Domain("amazon", POLARITY)),
    "IMDB": Case(
        "IMDB → SST-2",
        SENTIMENT,
        Domain("IMDB", {"Good": "Good", "Bad": "Bad"}),
        Domain("SST-2", {"Good": "Good", "Bad": "Bad"}),
    ),
    "agnews": Case(
        "agnews → yahoo",
        TOPIC,
        Domain("agnews", NEWS),
        Domain(
            "yahoo",
            {
                "politics and government": "World",
                "sports": "Sports",
                "business": "Business",
                "science": "Science or Technology",
                "computers and internet": "Science or Technology",
            },
        ),
    ),
    # Other topics of one task: each label has classes that the champion has learned, and classes that are new to it.
    "kinds": Case(
        "dbpedia → its other classes",
        "What kind of thing is the following paragraph about? Choose one from the option.",
        Domain(
            "dbpedia",
            {"Artist": "person", "Building": "place", "Album": "work", "Company": "organisation", "Animal": "nature"},
        ),
        Domain(
            "dbpedia",
            {
                "Athlete": "person",
                "Office Holder": "person",
                "Village": "place",
                "Film": "work",
                "Written Work": "work",
                "Educational Institution": "organisation",
                "Plant": "nature",
            },
        ),
    ),
}
"""The tasks by name. Stars of reviews are read as negative or positive: with five of them, no champion of so few rows
is good enough for a gate."""


STARS = {label: label for label in ("very negative", "negative", "neutral", "positive", "very positive")}
REVIEWS = {"Good": "Good", "Bad": "Bad"}
TURNED = {
    "yelp": Domain("amazon", STARS),
    "amazon": Domain("yelp", STARS),
    "IMDB": Domain("SST-2", REVIEWS),
    "SST-2": Domain("IMDB", REVIEWS),
    "agnews": CASES["agnews"].other,
    "yahoo": Domain("agnews", {"World": "politics and government", "Sports": "sports", "Business": "business"}),
}
"""Task of a chain → rows of another domain that land as rows of it."""


@app.command()
def ask(
    data: Annotated[Path, typer.Option(help="Folder that benchmarks/cl_benchmark.py writes.")],
    chains: Annotated[Path, typer.Option(help="Folder of the chains of benchmarks/method/memory.py.")],
    pool: Annotated[int, typer.Option(help="Test rows of its task that a version answers.")] = SHOWN[0],
    others: Annotated[int, typer.Option(help="Rows of another domain that it answers.")] = 2 * SHOWN[1],
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="all cores")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the answers.")] = ANSWERS,
) -> None:
    """Let versions of chains answer, and store the answers that are missing."""
    import torch
    from datasets import Dataset

    from benchmarks.continual.suites import load_suite
    from deal_core.adapter.state import adapter_on
    from deal_core.base_model.load import load_base
    from deal_core.base_model.sources import DEFAULT_BASE
    from deal_core.config import TrainConfig
    from deal_core.evaluation.answering import ServedTask
    from deal_core.evaluation.evaluate import evaluate_task
    from infra.settings import HomeSettings

    if threads is not None:
        torch.set_num_threads(threads)
    base, train = load_base(DEFAULT_BASE, HomeSettings().cache_dir), TrainConfig(max_prompt_tokens=160)
    tasks = load_suite(data, tuple(TURNED))
    out.mkdir(parents=True, exist_ok=True)
    seen = set[str]()
    for version in sorted(chains.glob("chain-*/*/version.json")):
        name, chain = json.loads(version.read_text())["task"], version.parent.parent.name
        file, digest = out / f"{chain}-{name}.json", sha256_of_file(version.parent / WEIGHTS_FILE)
        if name not in TURNED or file.is_file() or digest in seen:  # two methods learn a first task alike
            seen.add(digest)
            continue
        seen.add(digest)
        schema, seed = tasks[name].schema, int(chain.split("-")[2])
        numbers = {label_key(label): number for number, label in enumerate(schema.labels)}
        asked = ServedTask(
            schema=schema,
            max_prompt_tokens=train.max_prompt_tokens,
            max_new_tokens=train.answer_tokens(schema.labels),
        )
        own = Domain(name, {label: label for label in schema.labels})
        result: dict[str, Any] = {"title": f"{name} → {TURNED[name].file}", "seed": seed, "labels": len(schema.labels)}
        with adapter_on(base.model, version.parent) as model:
            for part, domain, number in (("own", own, pool), ("other", TURNED[name], others)):
                rows = _rows_of(data, domain, seed, parts=("test",))[:number]
                found = evaluate_task(model, base.tokenizer, asked, Dataset.from_list(rows))
                result[part] = _answers(rows, found, numbers)
                typer.echo(f"{file.stem}: {part} {100 * found.accuracy:.1f} % of {len(rows)}")
        with complete_file(file) as part_file:
            part_file.write_text(json.dumps({**result, "machine": describe_machine()}) + "\n")


def _answers(rows: list[dict[str, str]], found: TaskEvaluation, numbers: Mapping[str, int]) -> dict[str, list[float]]:
    """Right answers and given ones as numbers of labels, -1 for none, and confidences."""
    return {
        "right": [numbers[label_key(row["output"])] for row in rows],
        "answers": [numbers.get(label_key(answer), -1) for answer in found.answers],
        "confidences": [round(each.confidence, 6) for each in found.confidences],
    }


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Folder that benchmarks/cl_benchmark.py writes.")],
    seeds: Annotated[int, typer.Option(help="Champions of each task.")] = 3,
    rows: Annotated[int, typer.Option(help="Rows that a champion learns.")] = 80,
    epochs: Annotated[int, typer.Option(help="Passes over them.")] = 2,
    pool: Annotated[int, typer.Option(help="Rows of its task that it answers.")] = 160,
    others: Annotated[int, typer.Option(help="Rows of another domain that it answers.")] = 100,
    longest: Annotated[int, typer.Option(help="Tokens of a prompt, at most.")] = 80,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="all cores")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the answers.")] = ANSWERS,
) -> None:
    """Train the champions that are missing, and store their answers."""
    import torch
    from datasets import Dataset

    from benchmarks.champions import champion_of
    from deal_core.adapter.state import adapter_on
    from deal_core.base_model.load import load_base
    from deal_core.base_model.sources import DEFAULT_BASE
    from deal_core.evaluation.evaluate import evaluate_task
    from deal_core.training.train import train_adapter
    from infra.settings import HomeSettings

    if threads is not None:
        torch.set_num_threads(threads)
    base = load_base(DEFAULT_BASE, HomeSettings().cache_dir)
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for name, case in CASES.items():
            file = out / f"{name}-{seed}.json"
            if file.is_file():
                continue
            own = _rows_of(data, case.learned, seed)
            learned, unused = own[:rows], own[rows : rows + pool]
            setup, asked = champion_of(name, case.labels, case.instruction, epochs=epochs, longest=longest, seed=seed)
            numbers = {label_key(label): number for number, label in enumerate(case.labels)}
            result: dict[str, Any] = {
                "title": case.title,
                "seed": seed,
                "labels": len(case.labels),
                "rows": len(learned),
            }
            with TemporaryDirectory() as work:
                adapter = Path(work) / "adapter"
                trained = train_adapter(
                    base,
                    Dataset.from_list(learned),
                    setup,
                    parent_folder=None,
                    output_folder=adapter,
                    checkpoint_folder=Path(work) / "checkpoints",
                )
                typer.echo(f"{file.stem}: trained in {trained.seconds:.0f} s")
                with adapter_on(base.model, adapter) as model:
                    for part, part_rows in (("own", unused), ("other", _rows_of(data, case.other, seed)[:others])):
                        found = evaluate_task(model, base.tokenizer, asked, Dataset.from_list(part_rows))
                        result[part] = _answers(part_rows, found, numbers)
                        typer.echo(f"{file.stem}: {part} {100 * found.accuracy:.1f} % of {len(part_rows)}")
            with complete_file(file) as part_file:
                part_file.write_text(json.dumps({**result, "machine": describe_machine()}) + "\n")


def _rows_of(data: Path, domain: Domain, seed: int, parts: Sequence[str] = ("train", "test")) -> list[dict[str, str]]:
    """The rows of a domain, by default training and test rows together, in an order of this seed."""
    files = [data / f"{domain.file}.{part}.jsonl" for part in parts]
    rows = [row.values for file in files for row in read_rows(file)]
    found = [
        {"input": row["text"], "output": domain.labels[row["label"]]} for row in rows if row["label"] in domain.labels
    ]
    random.Random(seed).shuffle(found)
    return found


@dataclass(frozen=True)
class Answers:
    """A champion's answers to rows of one domain. N rows."""

    right_N: Ints
    answers_N: Ints
    confidences_N: Floats
    num_labels: int

    @property
    def hits(self) -> Floats:
        """1 for a right answer, else 0."""
        return (self.answers_N == self.right_N).astype(np.float64)

    def at(self, places: Ints) -> Answers:
        """The rows at these places."""
        return Answers(self.right_N[places], self.answers_N[places], self.confidences_N[places], self.num_labels)

    def with_wrong_labels(self, share: float, generator: np.random.Generator) -> Answers:
        """The rows with another label, each of the others alike, at a share of them."""
        is_wrong = np.zeros(len(self.right_N), np.bool_)
        is_wrong[generator.permutation(len(is_wrong))[: round(share * len(is_wrong))]] = True
        others_N = (self.right_N + generator.integers(1, self.num_labels, len(is_wrong))) % self.num_labels
        return Answers(np.where(is_wrong, others_N, self.right_N), self.answers_N, self.confidences_N, self.num_labels)

    @property
    def answered(self) -> AnsweredRows:
        """What the check is given."""
        return AnsweredRows(scores=self.hits.tolist(), confidences=self.confidences_N.tolist())


@dataclass(frozen=True)
class Champion:
    """The stored answers of one champion."""

    case: str
    own: Answers
    other: Answers | None = None
    """To rows of another domain; None: it was not asked."""


def champions_of_cells() -> list[Champion]:
    """The versions of stored cells, with their answers to the reported rows of the task that they have just learned."""
    champions = []
    for cell in (cell for folder in CELLS for cell in read_cells(RESULTS / folder, oldest=2)):
        settings = cell["settings"]
        if settings["part"] != "reported" or settings["strategy"] not in STRATEGIES:
            continue
        for version in cell["versions"]:
            stored = unpack_answers(version["scores"].get(version["task"], {}))
            if stored is None or len(stored.targets_N) < MIN_POOL:
                continue
            # The confidence of an answer is the share of its first token among those of all labels.
            first = [label.split()[0] for label in stored.labels]
            shares_NL = softmax(stored.log_probs_NL, axis=1)
            same_LL = np.array([[one == other for other in first] for one in first], dtype=np.float64)
            tokens_NL = shares_NL @ same_LL
            answers_N = np.array([answer if isinstance(answer, int) else -1 for answer in stored.answers])
            at_answer_N = tokens_NL[np.arange(len(answers_N)), np.maximum(answers_N, 0)]
            confidences_N = np.where(answers_N < 0, tokens_NL.max(1), at_answer_N)
            own = Answers(stored.targets_N, answers_N, confidences_N, len(stored.labels))
            champions.append(Champion(version["task"], own))
    return champions


def read_champions(folder: Path) -> list[Champion]:
    """Read the answers that `run` has stored so far."""
    champions: list[Champion] = []
    for file in sorted(folder.glob("*.json")):
        stored = read(file)
        parts = [
            Answers(
                np.array(stored[part]["right"]),
                np.array(stored[part]["answers"]),
                np.array(stored[part]["confidences"]),
                stored["labels"],
            )
            for part in ("own", "other")
        ]
        champions.append(Champion(stored["title"], *parts))
    return champions


Draw = Callable[[Champion, Answers, int, np.random.Generator], Answers]
"""A champion, the rows that are not in the reference, the arrival's number of rows → the arrival."""


def _good(champion: Champion, rest: Answers, num_rows: int, generator: np.random.Generator) -> Answers:
    return rest.at(generator.permutation(len(rest.right_N))[:num_rows])


def _other(champion: Champion, rest: Answers, num_rows: int, generator: np.random.Generator) -> Answers:
    assert champion.other is not None, "the caller has looked"
    return champion.other.at(generator.permutation(len(champion.other.right_N))[:num_rows])


def _wrong(share: float) -> Draw:
    def draw(champion: Champion, rest: Answers, num_rows: int, generator: np.random.Generator) -> Answers:
        return _good(champion, rest, num_rows, generator).with_wrong_labels(share, generator)

    return draw


def _harder(points: int) -> Draw:
    """Rows of which the champion misses more, by so many points. They are drawn with replacement."""

    def draw(champion: Champion, rest: Answers, num_rows: int, generator: np.random.Generator) -> Answers:
        hits_N = rest.hits
        share = max(0.0, float(champion.own.hits.mean()) - points / 100)
        is_hit = generator.random(num_rows) < share
        hit, missed = (generator.choice(np.flatnonzero(hits_N == value), num_rows) for value in (1, 0))
        return rest.at(np.where(is_hit, hit, missed))

    return draw


OTHER = "other domain"
KINDS: dict[str, Draw] = {
    "good": _good,
    **{f"{share:.0%} wrong": _wrong(share) for share in WRONG},
    OTHER: _other,
    **{f"{points} points harder": _harder(points) for points in HARDER},
}


@dataclass(frozen=True)
class Outcome:
    """What the check said of one arrival."""

    case: str
    is_good: bool
    """Whether the champion's score is at least GOOD."""
    num_reference: int
    num_rows: int
    kind: str
    verdict: Verdict


def outcomes(champions: list[Champion], num_draws: int) -> Iterator[Outcome]:
    """Draw references and arrivals of all kinds and sizes, and judge them."""
    drop_points = GateConfig().arrival_drop_points
    for number, champion in enumerate(champions):
        is_good = bool(champion.own.hits.mean() >= GOOD)
        for num_reference, num_rows in product(SIZES, SIZES) if is_good else (SHOWN,):
            generator = np.random.default_rng([number, num_reference, num_rows])
            for kind, draw in KINDS.items():
                num_left = len(champion.own.right_N) - num_reference
                if kind == OTHER:
                    num_left = 0 if champion.other is None else len(champion.other.right_N)
                for _ in range(num_draws if num_left >= num_rows else 0):
                    places = generator.permutation(len(champion.own.right_N))
                    reference = champion.own.at(places[:num_reference]).answered
                    rest = champion.own.at(places[num_reference:])
                    judged = judge_arrival(
                        draw(champion, rest, num_rows, generator).answered,
                        reference=reference.scores,
                        calibration=reference,
                        drop_points=drop_points,
                    )
                    yield Outcome(champion.case, is_good, num_reference, num_rows, kind, judged.verdict)


@app.command()
def table(
    folder: Annotated[Path, typer.Option(help="Folder of the answers.")] = ANSWERS,
    draws: Annotated[int, typer.Option(help="Arrivals of each kind, champion and pair of sizes.")] = NUM_DRAWS,
    out: Out = RESULTS / "arrival_check.json",
    page: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Judge arrivals that are drawn from the stored answers; write the figures and the page."""
    champions, drop_points = [*champions_of_cells(), *read_champions(folder)], GateConfig().arrival_drop_points
    found = list(outcomes(champions, draws))

    def shares(chosen: list[Outcome]) -> dict[str, dict[str, float] | None]:
        """Of the arrivals of each kind the share that is held, and the share whose texts count as new, in percent."""
        verdicts = {kind: [each.verdict for each in chosen if each.kind == kind] for kind in KINDS}
        return {
            kind: {
                name: round(100 * given.count(verdict) / len(given), 1)
                for name, verdict in (("held", "labels disagree"), ("new", "texts are new"))
            }
            if given
            else None
            for kind, given in verdicts.items()
        }

    tasks = []
    for case in sorted({each.case for each in champions}):
        own = [each for each in champions if each.case == case]
        others = [float(each.other.hits.mean()) for each in own if each.other is not None]
        of_case = [each for each in found if (each.case, each.num_reference, each.num_rows) == (case, *SHOWN)]
        tasks.append(
            {
                "task": case,
                "labels": own[0].own.num_labels,
                "champions": len(own),
                "score": round(100 * float(np.mean([each.own.hits.mean() for each in own])), 1),
                "other": round(100 * float(np.mean(others)), 1) if others else None,
                "shares": shares(of_case),
            }
        )
    sizes = [
        {
            "reference": num_reference,
            "arrival": num_rows,
            "shares": shares(
                [
                    each
                    for each in found
                    if (each.num_reference, each.num_rows) == (num_reference, num_rows) and each.is_good
                ]
            ),
        }
        for num_reference, num_rows in product(SIZES, SIZES)
    ]
    good = [each for each in champions if each.own.hits.mean() >= GOOD]
    turned = [each for each in champions if each.other is not None]
    of_turned = [each for each in found if each.kind == OTHER and (each.num_reference, each.num_rows) == SHOWN]
    worst = max((task for task in tasks if task["other"] is not None), key=lambda task: task["shares"][OTHER]["held"])
    result = {
        "champions": len(champions),
        "good": len(good),
        "good_score": round(100 * GOOD),
        "draws": draws,
        "shown": SHOWN,
        "kinds": [*KINDS],
        "tasks": sorted(tasks, key=lambda task: (task["labels"], task["task"])),
        "sizes": sizes,
        "turned": len(turned),
        "turned_good": sum(bool(each.own.hits.mean() >= GOOD) for each in turned),
        "fell": sorted(
            round(100 * float(each.own.hits.mean() - each.other.hits.mean()), 1)
            for each in turned
            if each.other is not None and each.own.hits.mean() - each.other.hits.mean() >= drop_points / 100
        ),
        "drop_points": round(drop_points),
        "worst": {name: worst[name] for name in ("task", "score", "other")} | worst["shares"][OTHER],
        "turned_of_40": {
            name: round(40 * sum(each.verdict == verdict for each in of_turned) / max(1, len(of_turned)), 1)
            for name, verdict in (("held", "labels disagree"), ("new", "texts are new"))
        },
    }
    write_result(out, result)
    page.write_text(templates().get_template("arrival_check.md.j2").render(result))


if __name__ == "__main__":
    app()
