"""Workers, and whole runs, that are ended by SIGKILL at random moments, and manifests of a million rows."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from batches import QUICK, drawn, rows, write


def started(manifest: str, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minisd", "batch", manifest, "-o", str(out), *QUICK, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Those that draw; Python has a process beside them that tracks what is shared."""
    found = []
    for each in psutil.Process(process.pid).children():
        try:
            if "spawn_main" in " ".join(each.cmdline()):
                found.append(each.pid)
        except psutil.Error:  # gone meanwhile
            continue
    return found


def killed_at_random(manifest: str, out: Path, kills: int, seed: int, gap: float) -> int:
    """Kills workers, and every fifth time the run itself, which is then started again.  Returns how many it were."""
    rng, done = random.Random(seed), 0
    process = started(manifest, out, "--workers", "2")
    while True:
        try:
            process.communicate(timeout=rng.uniform(0.1, gap))
        except subprocess.TimeoutExpired:
            if done < kills:
                targets = workers_of(process) if done % 5 else [process.pid]
                if targets:
                    os.kill(rng.choice(targets), signal.SIGKILL)
                    done += 1
            continue
        if process.returncode == 0:
            return done
        assert process.returncode == -signal.SIGKILL, process.returncode
        process = started(manifest, out, "--workers", "2")


@pytest.mark.parametrize(
    ("count", "kills"), [pytest.param(120, 6, marks=pytest.mark.slow), pytest.param(2000, 20, marks=pytest.mark.seldom)]
)
def test_workers_and_runs_that_are_killed(tmp_path, count, kills):
    """Every picture is there once, whole, and bit for bit that of a run in peace."""
    manifest = write(tmp_path / "m.jsonl", rows(count))
    peace = started(manifest, tmp_path / "peace", "--workers", "2", "--json")
    out, err = peace.communicate(timeout=1200)
    assert peace.returncode == 0, err
    gap = max(1.0, 0.8 * json.loads(out)["seconds"] / kills) * 2
    done = killed_at_random(manifest, tmp_path / "war", kills, count, gap)
    assert done > kills / 2
    found, expected = drawn(tmp_path / "war"), drawn(tmp_path / "peace")
    names = [name.split("/")[1] for name in found if name.endswith(".png")]
    assert len(names) == len(set(names)) == count
    assert found == expected
    again = started(manifest, tmp_path / "war", "--workers", "2", "--json")
    facts = json.loads(again.communicate(timeout=120)[0])
    assert (facts["drawn"], facts["already"], facts["failed"]) == (0, count, 0)
    time.sleep(1.5)  # workers of a run that was killed end by themselves
    assert not list((tmp_path / "war").glob(".*"))


MILLION = """
import json, sys, time
from pathlib import Path
from minisd.batch import running
from minisd.batch.job import Job
from minisd.batch.running import Run
from minisd.batch.shards import Done
from minisd.batch.store import store_of

class Nobody:
    '''Draws nothing, and says so: what is left is reading, and looking for what is there.'''
    def __init__(self): self.rows = []
    def ask(self, what, row): return "cpu"
    def hungry(self): return not self.rows
    def give(self, piece): self.rows += piece.missing
    def busy(self): return bool(self.rows)
    def answers(self, patience):
        found, self.rows = [Done(row.line) for row in self.rows], []
        return found
    def close(self, at_once): return []

start = time.monotonic()
job = Job(sys.argv[2])
tally = Run(job, Nobody(), store_of(job.out)).draw(sys.argv[1])
assert "torch" not in sys.modules
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024  # not ru_maxrss, which knows of the process that this one was forked from
print(json.dumps({"drawn": tally.drawn, "already": tally.already, "seconds": time.monotonic() - start, "peak": peak}))
"""


@pytest.mark.parametrize(
    "count", [pytest.param(20_000, marks=pytest.mark.slow), pytest.param(1_000_000, marks=pytest.mark.seldom)]
)
def test_many_rows_are_read_in_little_memory(tmp_path, count):
    """Nine of ten are there already: of a million less than 300 MB and 60 s (without what drawing takes)."""
    with open(tmp_path / "m.jsonl", "w") as file:
        for i in range(count):
            file.write(f'{{"id": "picture-{i:09}", "prompt": "a red circle on a blue background, number {i}", "steps": 20}}\n')
    for i in range(count):
        shard = tmp_path / "out" / f"{i // 256:05}"
        if i % 256 == 0:
            shard.mkdir(parents=True)
        if i % 10:
            (shard / f"picture-{i:09}.png").touch()
            (shard / f"picture-{i:09}.json").touch()
    command = [sys.executable, "-c", MILLION, str(tmp_path / "m.jsonl"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    print(facts)
    assert (facts["drawn"], facts["already"]) == (count // 10, count - count // 10)
    assert facts["peak"] < 300e6
    assert facts["seconds"] < 60
