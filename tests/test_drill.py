"""Kills runs at random moments, restarts them, and compares them with runs that were left alone.

`pytest -m drill` kills at least 100 times, single processes and pairs of processes. A short drill is among the slow
tests.
"""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import read_files
from tests.processes import Processes
from tests.training import test_resume

SETTINGS = f"""{test_resume.SETTINGS.rstrip()}
evaluation:
  ir: [{{golden}}/data/small_news.jsonl]
  sts: [{{golden}}/data/small_questions.jsonl]
  every_steps: 3
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXIT_CODES = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {0, -signal.SIGTERM},  # the latter before Python runs any of this project's code
    signal.SIGINT: {130, -signal.SIGINT, 1},  # the latter two likewise
}
KILLS_PER_RUN = 4


def outcome(run: Path) -> dict[str, object]:
    """Returns everything that a finished run leaves behind and that does not depend on time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    export = read_files(run / "export")
    steps = [int(path.name) for path in (run / "checkpoints").iterdir()]
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "evaluation": evaluation,
        # The two newest and the best; SIGTERM saves one more, so the older of the two newest may be another.
        "checkpoints": (max(steps), evaluation["step"] in steps, len(steps) <= 3),
        "files": sorted(path.name for path in run.iterdir() if path.name != "tensorboard"),
        "export": export,
    }


def drill(folder: Path, golden: Path, processes: int, kills: int) -> dict[str, int]:
    """Kills and restarts runs until there were `kills` kills. Returns how often each signal was sent in which phase."""
    randomness = random.Random(processes)
    config = folder / "settings.yaml"
    config.write_text(SETTINGS.format(golden=golden, output_dir="unused"))
    devices = 1 if processes > 1 else 2
    flags = ["--heartbeat", "5", "--connect", "20"]
    duration = 0.0
    for name in ("whole", "again"):  # the first compiles, and takes longer than those that will be killed
        start = time.monotonic()
        with Processes(folder, config, name, processes, devices, *flags) as run:
            run.finish()
        duration = time.monotonic() - start
    expected = outcome(folder / "whole")
    assert outcome(folder / "again") == expected
    counts: dict[str, int] = {}
    done = number = 0
    while done < kills:
        number += 1
        name = f"run-{number}"
        if number % 2:  # every other run prepares its data again
            shutil.rmtree(folder / "cache")
        attempts = 0
        while True:
            with Processes(folder, config, name, processes, devices, *flags) as run:
                if attempts < KILLS_PER_RUN and done < kills:
                    attempts += 1
                    ended = kill(run, randomness.choice(SIGNALS), randomness, duration)
                    if ended is not None:
                        done += 1
                        phase = f"{ended} while {phase_of(folder / name)}"
                        counts[phase] = counts.get(phase, 0) + 1
                        continue
                run.finish()
                break
        assert outcome(folder / name) == expected, name
        shutil.rmtree(folder / name)
    return counts


def kill(run: Processes, number: signal.Signals, randomness: random.Random, duration: float) -> str | None:
    """Sends a signal to one process, or to all, at a random moment, and checks how they end.

    Returns the name of the signal, or None if the run has ended before.
    """
    chosen = randomness.choice([*([process] for process in run.processes), run.processes])
    deadline = time.monotonic() + randomness.uniform(0, duration)
    while time.monotonic() < deadline:
        if all(process.poll() is not None for process in run.processes):
            return None
        time.sleep(0.005)
    for process in chosen:
        if process.poll() is None:
            process.send_signal(number)
    ended = run.wait(120)
    output = "\n".join(output for _, output in ended)
    assert "Traceback" not in output or "codiemb_jax/" not in output, output
    if len(run.processes) == 1:
        assert ended[0][0] in EXIT_CODES[number] | {0}, output  # 0 if the run had just ended
    return number.name


def phase_of(run: Path) -> str:
    """Returns what a run was doing, judging by the files that it left."""
    if not (run / "config.yaml").exists():
        return "starting"
    if any(path.name.startswith(".export") for path in run.iterdir()):
        return "exporting"
    if (run / "export").exists():
        return "ending"
    if not (run / "metrics.jsonl").exists():
        return "evaluating"
    saving = (run / "checkpoints").exists() and any(
        not path.name.isdecimal() for path in (run / "checkpoints").iterdir()
    )
    return "saving" if saving else "training"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "kills"), [(1, 6), (2, 3)])
def test_short_drill(processes, kills, golden, tmp_path):
    drill(tmp_path, golden, processes, kills)


@pytest.mark.drill
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("processes", "kills"), [(1, 70), (2, 40)])
def test_drill(processes, kills, golden, tmp_path, capsys):
    counts = drill(tmp_path, golden, processes, kills)
    with capsys.disabled():
        print(f"\n{processes} process{'es' * (processes > 1)}: " + ", ".join(f"{n} {c}" for c, n in counts.items()))
    assert sum(counts.values()) >= kills
