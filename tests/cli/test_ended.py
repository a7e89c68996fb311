"""Commands that the system ends, or leaves little memory: no torn file, no old file lost, one line where there is one to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ended_by_others

from minisd.library.places import tiny_checkpoint

SUPPORT = Path(__file__).parents[1] / "support"
KILLS = os.environ.get("MINISD_KILLS", "3")  # of each command with each signal; the figures in docs/limits.md are of 150
LEVELS = range(300, 1300, 50)  # MB


@pytest.mark.slow
def test_commands_that_are_ended_at_any_moment(tmp_path):
    """SIGKILL, SIGTERM and SIGINT; after the last two nothing unfinished is left either."""
    command = [sys.executable, str(SUPPORT / "killing.py"), str(tmp_path / "home"), KILLS, "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    print(done.stdout)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 36
    assert sum(row["stopped"] for row in rows) > 0.5 * sum(row["trials"] for row in rows)
    for row in rows:
        assert not row["faults"], row


def limited(megabytes: int, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command in so much address space."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    command = [sys.executable, "-m", "minisd", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, preexec_fn=limit)


@pytest.mark.parametrize("levels", [(300, 500), pytest.param(LEVELS, marks=pytest.mark.slow)], ids=["two", "all"])
def test_little_memory_is_told(tmp_path, levels):
    """From what an interpreter alone takes up to what is enough: a result, or exit 4 and one line."""
    tiny, lit = str(tiny_checkpoint()), str(tiny_checkpoint().with_name("tiny-lit.safetensors"))
    commands = {
        "draw": ["a star", "--steps", "1", "--size", "64x64", "--device", "cpu", "-o", "x.png"],
        "inspect": ["inspect", tiny],
        "merge": ["merge", tiny, lit, "-o", "x.safetensors"],
    }
    ended = 0
    for megabytes in levels:
        for name, arguments in commands.items():
            done = limited(megabytes, arguments, tmp_path)
            print(megabytes, name, done.returncode, done.stderr.strip()[:200])
            if ended_by_others(done.returncode, done.stderr):
                ended += 1
                for draft in (path for path in tmp_path.iterdir() if path.name.startswith(".")):
                    draft.unlink()
                continue
            assert done.returncode in (0, 4), (megabytes, name, done.stderr)
            said = done.stderr.splitlines()
            assert len(said) == (done.returncode == 4), (megabytes, name, done.stderr)
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert ended <= 3  # of 60
    assert limited(300, ["inspect", tiny], tmp_path).returncode == 0
