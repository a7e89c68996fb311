"""Batches on a real Ray of this machine: the same bytes as without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batches import QUICK, drawn, errors, rows, write

from minisd.batch import draw_rows
from minisd.batch.rows import seed_of
from minisd.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
COUNT = 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    lines = [*rows(COUNT), {"id": "bad", "prompt": "a star", "width": 13}]
    return write(tmp_path_factory.mktemp("manifest") / "m.jsonl", lines)


@pytest.fixture(scope="module")
def alone(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    assert main(["batch", manifest, "-o", str(out), *QUICK, "--workers", "1", "--shard-rows", "10"]) == 1
    return out


@pytest.fixture(scope="module")
def ray():
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.parametrize("actors", ["1", "2"])
def test_actors_draw_the_same_bytes(ray, manifest, alone, tmp_path, actors):
    argv = ["batch", manifest, "-o", str(tmp_path), *QUICK, "--ray", "--workers", actors, "--shard-rows", "10"]
    assert main(argv) == 1
    assert drawn(tmp_path) == drawn(alone)
    assert errors(tmp_path) == errors(alone)
    assert ray.is_initialized()  # whose it was, his it stays


def test_a_process_joins_a_cluster_and_makes_tars_at_a_url(ray, manifest, tmp_path):
    argv = ["batch", manifest, *QUICK, "--format", "wds", "--shard-rows", "10"]
    more = ["-o", (tmp_path / "ray").as_uri(), "--ray", ray.get_runtime_context().gcs_address, "--workers", "1"]
    done = subprocess.run([sys.executable, "-m", "minisd", *argv, *more], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert main([*argv, "-o", str(tmp_path / "alone"), "--workers", "1"]) == 1
    assert drawn(tmp_path / "ray") == drawn(tmp_path / "alone")
    assert sorted(path.name for path in (tmp_path / "ray").glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]


def test_rows_of_ones_own_dataset(ray, tiny, tmp_path):
    """`draw_rows` with map_batches: pictures come back, or are written; what cannot be drawn says why."""
    given = [*rows(3), {"id": "bad", "prompt": "a star", "steps": 0}]
    made = ray.data.from_items(given).repartition(2)
    options = {"steps": 1, "width": 16, "height": 16, "device": "cpu"}
    common = {"batch_size": 2, "compute": ray.data.ActorPoolStrategy(size=1), "num_cpus": 0.5}
    found = made.map_batches(draw_rows, fn_constructor_kwargs=options, **common).take_all()
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in given)
    for row in found:
        if row["id"] == "bad":
            assert "steps: expected a whole number" in row["error"]
            continue
        expected = tiny(row["prompt"], seed=seed_of(0, row["id"]), steps=1, width=16, height=16).images[0]
        assert np.array_equal(row["image"], np.asarray(expected))
        assert row["error"] is None
    written = made.map_batches(draw_rows, fn_constructor_kwargs={**options, "out": str(tmp_path)}, **common).take_all()
    paths = {row["id"]: row["path"] for row in written}
    assert paths.pop("bad") is None
    assert all(Path(path).exists() and Path(path).parents[1] == tmp_path for path in paths.values())


def test_an_address_that_is_none(manifest, tmp_path):
    argv = [sys.executable, "-m", "minisd", "batch", manifest, "-o", str(tmp_path / "out"), "--ray", "127.0.0.1:1"]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=150, env=os.environ | {"RAY_gcs_rpc_server_connect_timeout_s": "1"}
    )
    assert done.returncode == 2, done.stderr
    assert "minisd: error: --ray: expected the address of a cluster" in done.stderr
