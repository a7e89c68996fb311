"""The simulator of docs/scale.md keeps its books."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulate_batch import Plan, simulate

SMALL = Plan(pictures=256 * 640, gpus=64, slow=0.0, deaths=0.0)


def test_without_deaths_it_takes_what_it_must():
    for static in (False, True):
        found = simulate(replace(SMALL, static=static))
        assert found.hours == pytest.approx(256 * 10 * SMALL.picture / 3600)
        assert (found.drawn, found.twice, found.idle) == (SMALL.pictures, 0, pytest.approx(0))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kept", [1, 4, 256])
def test_every_picture_is_drawn_once_and_what_dies_again(static, kept):
    plan = replace(SMALL, deaths=2.0, kept=kept, static=static)
    found = simulate(plan)
    assert found.drawn == plan.pictures
    assert found.deaths > 3
    assert found.twice < found.deaths * 8 * kept
    assert (found.twice == 0) == (kept == 1)
    assert found.hours > simulate(SMALL).hours


def test_a_slow_gpu_keeps_all_waiting_only_where_shards_are_given_out():
    slow = replace(SMALL, slow=0.05)
    pool, given = simulate(slow), simulate(replace(slow, static=True))
    assert given.hours == pytest.approx(2 * simulate(SMALL).hours)
    assert pool.hours < 0.65 * given.hours
