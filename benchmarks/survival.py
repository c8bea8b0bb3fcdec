"""Kill −9 of a random process at a random time, round after round; nothing may get lost, doubled or out of order.

    python -m benchmarks.survival --rounds 25 --out benchmarks/results/survival.json

It starts `deal server up` and lets files land for two lineages: once undisturbed, then in every round with one kill
among servers, workers, runs and watchers. A round is right if both lineages end with the versions of the undisturbed
run: the same datasets in the same order, each continuing the last, the same adapters byte for byte, and a champion that
loads. Rounds that are stored are not run again. The base model is tiny, because the chain is measured.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from safetensors.torch import load_file

from benchmarks.output import DEAL, RESULTS, Out, bare_environment
from benchmarks.speed.stack import free_ports, inbox_of, texts_to_land
from benchmarks.tiny_base import NO_LIMITS, build_tiny_base
from infra.store.base import ObjectStore
from infra.store.local import FileStore
from infra.versions import Versions

ARRIVALS = {"a": 3, "b": 2}
SETTINGS = {
    "train": {"max_steps": 60, "max_prompt_tokens": 192, "checkpoint_steps": 10},
    "gate": NO_LIMITS,
}
LOOK_SECONDS = 2.0
GIVE_UP_SECONDS = 900.0


def main(
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 25,
    seed: Annotated[int, typer.Option(help="Seed of the first round; each next one has the next.")] = 0,
    out: Out = RESULTS / "survival.json",
) -> None:
    """Run the rounds that are missing and write what they gave."""
    results = json.loads(out.read_text())["rounds"] if out.is_file() else []
    missing = sorted({*range(seed, seed + rounds)} - {result["seed"] for result in results})
    if missing:
        with tempfile.TemporaryDirectory(prefix="deal-survival-") as folder:
            for result in run_rounds(Path(folder), missing):
                results.append(result)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps({"rounds": results}, indent=1) + "\n")
                typer.echo(str(result))
    right = sum(result["right"] for result in results)
    typer.echo(f"{right} of {len(results)} rounds ended with the versions of the undisturbed run")
    raise typer.Exit(int(right != len(results)))


def run_rounds(folder: Path, seeds: list[int]) -> Any:
    """Yield what each round gave; the servers stay up from round to round."""
    home, base = folder / "home", folder / "tiny-base"
    home.mkdir()
    build_tiny_base(base)
    environment = bare_environment() | {"DEAL_HOME": str(home), "DEAL_CACHE_DIR": str(folder / "cache")}
    prefect_port, mlflow_port = map(str, free_ports(2))
    up = ("server", "up", "--prefect-port", prefect_port, "--mlflow-port", mlflow_port, "--trainings", "2")
    subprocess.run([*DEAL, *up], env=environment, check=True)
    os.environ["DEAL_HOME"] = str(home)
    try:
        started = time.monotonic()
        land(home, "undisturbed", base)
        wait_until_learned("undisturbed")
        seconds = time.monotonic() - started
        wanted = versions_of("undisturbed")
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        for seed in seeds:
            yield {"seed": seed, "undisturbed_seconds": round(seconds), **one_round(home, base, seed, seconds, wanted)}
    finally:
        subprocess.run([*DEAL, "server", "down"], env=environment, check=True)


def one_round(home: Path, base: Path, seed: int, seconds: float, wanted: Any) -> dict[str, Any]:
    """Let files land, kill one process, wait, compare."""
    chance = random.Random(seed)
    name = f"round{seed}"
    land(home, name, base)
    started = time.monotonic()
    at = chance.uniform(0, seconds)
    time.sleep(at)
    victim = chance.choice(candidates(home))
    killed = describe(victim)
    with suppress(psutil.NoSuchProcess):  # it may just have ended by itself
        victim.send_signal(signal.SIGKILL)
    try:
        wait_until_learned(name)
        versions: Any = versions_of(name)
    except TimeoutError as error:
        versions = str(error)
    took = time.monotonic() - started
    result = {"killed": killed, "at_seconds": round(at, 1), "took_seconds": round(took), "right": versions == wanted}
    return result if versions == wanted else {**result, "found": versions, "wanted": wanted}


def land(home: Path, name: str, base: Path) -> None:
    """Make two lineages that learn a task each; the tasks' files, the same in every round, then are new to them."""
    texts = texts_to_land(max(ARRIVALS.values()))
    for letter, count in ARRIVALS.items():
        for number in range(count):
            target = inbox_of(home, letter) / f"{number}.jsonl"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(texts[number])
        lineage = f"{name}-{letter}"
        values = {"lineage": lineage, "base_model": str(base), "tasks": [f"task-{letter}"], **SETTINGS}
        path = home / "lineage.yaml"
        path.write_text(yaml.safe_dump(values))
        subprocess.run([*DEAL, "lineage", "apply", str(path)], check=True, capture_output=True)


def candidates(home: Path) -> list[psutil.Process]:
    """Every process of `deal server up` but the supervisor, which restarts the others."""
    parts = json.loads((home / "stack.json").read_text())["parts"]
    pids = [part["pid"] for part in parts if part["name"] != "supervisor" and psutil.pid_exists(part["pid"])]
    roots = map(psutil.Process, pids)
    return [process for root in roots for process in (root, *root.children(recursive=True))]


def describe(process: psutil.Process) -> str:
    """What a process is, in a few words."""
    words = process.cmdline()
    names = ("server", "worker", "prefect.engine", "uvicorn", "mlflow", "resource_tracker", "spawn")
    return " ".join(name for name in names if any(name in word for word in words)) or " ".join(words)[:60]


def wait_until_learned(name: str) -> None:
    """Wait until every arrival of a round has its version and is champion's history."""
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while time.monotonic() < deadline:
        counts = {letter: champion_number(f"{name}-{letter}") for letter in ARRIVALS}
        if counts == ARRIVALS:
            return
        time.sleep(LOOK_SECONDS)
    raise TimeoutError(f"not learned after {GIVE_UP_SECONDS:.0f} s: {counts}")


def champion_number(lineage: str) -> int:
    """Number of the champion; 0 without one."""
    champion = Versions(store_of_home()).champion(lineage)
    return int(champion.version) if champion else 0


def versions_of(name: str) -> dict[str, Any]:
    """What a round's lineages hold, by what can be compared from round to round."""
    store, of_lineage = store_of_home(), {}
    for letter in ARRIVALS:
        versions = Versions(store).all(f"{name}-{letter}")
        champion = next(version for version in versions if "champion" in version.aliases)
        with tempfile.TemporaryDirectory() as folder:
            store.download_folder(champion.adapter_uri, Path(folder) / "adapter")
            num_tensors = len(load_file(Path(folder) / "adapter" / "adapter_model.safetensors"))
        of_lineage[letter] = {
            "versions": [(v.version, v.parent_version, v.dataset_sha256, v.adapter_sha256) for v in versions],
            "champion": champion.version,
            "tensors_of_champion": num_tensors,
        }
    return json.loads(json.dumps(of_lineage))


def store_of_home() -> ObjectStore:
    """The store that the rounds write to."""
    return FileStore(Path(os.environ["DEAL_HOME"]) / "store")


if __name__ == "__main__":
    typer.run(main)
