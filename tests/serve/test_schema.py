"""What the server says of itself is tried by schemathesis, in thousands of cases that fit and that do not."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from serving import serving

pytest.importorskip("schemathesis")
CASES = 2000


@pytest.mark.slow
def test_no_case_is_a_fault_of_the_server(tmp_path):
    limits = ("--max-steps", "50", "--max-pixels", "4096", "--max-images", "1", "-m", "tiny")
    with serving(tmp_path / "here", *limits) as running:
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{running.url}/openapi.json",
            "--checks",
            "not_a_server_error",
        ]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "30", "--seed", "1", "--no-color"]
        run = subprocess.run([*command, "--request-timeout", "60"], capture_output=True, text=True, cwd=tmp_path, timeout=3000)
        statuses = Counter(line["status"] for line in running.lines("request"))
        faults = running.lines("fault")
    assert sum(statuses.values()) >= CASES, (statuses, run.stdout[-2000:], run.stderr[-2000:])
    assert [status for status in statuses if status >= 500] == [], run.stdout[-4000:]
    assert faults == []
    assert run.returncode == 0, run.stdout[-4000:]
