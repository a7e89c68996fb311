"""A batch at the scale of the internet, on paper: how long, how dear, and how much is drawn twice where machines die.

    python scripts/simulate_batch.py                      (100 million pictures of SDXL on 512 GPUs; the table of docs/scale.md)
    python scripts/simulate_batch.py --deaths 0.5 --static

Every GPU takes a shard, draws it call by call, and takes the next.  A machine dies with all of its GPUs at a given rate, and
another takes its place after a while; what was not written by then is drawn again.  Some GPUs are slow for good.
Nothing is measured here: step times are what they are said to be.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass, replace

GPUS_OF_A_MACHINE = 8
PUTS_OF_A_PREFIX = 3500  # a second, that S3 promises (Amazon S3 user guide, "Best practices design patterns")


@dataclass(frozen=True)
class Plan:
    """Of a batch.  Times in seconds, money in dollars."""

    pictures: int = 100_000_000
    gpus: int = 512
    steps: int = 20
    step: float = 0.045  # of one picture with guidance, in a call of one
    rest: float = 0.15  # of decoding and what else there is of a picture
    together: int = 4  # pictures of a call
    gain: float = 0.1  # of its time that a picture saves in a large call: step times grow nearly with the batch
    shard_rows: int = 256
    kept: int = 4  # pictures after which what is drawn is safe: a call with files, a shard where only whole tars are
    deaths: float = 0.05  # of a machine, an hour
    boot: float = 300.0  # until another machine draws: boot, image, the model's file
    slow: float = 0.01  # share of GPUs that are half as fast
    static: bool = False  # shards are given out before (--shard I/N), not taken from one pool
    dollars: float = 2.5  # a GPU, an hour
    put: float = 0.005 / 1000  # dollars that an object costs to write
    objects: float = 2.0  # that are written of a picture
    seed: int = 0

    @property
    def picture(self) -> float:
        """Seconds that one takes."""
        return self.steps * self.step * (1 - self.gain * (1 - 1 / self.together)) + self.rest


@dataclass
class Outcome:
    hours: float = 0.0  # until the last picture is there
    drawn: int = 0
    twice: int = 0  # pictures that were drawn and lost
    deaths: int = 0
    down: float = 0.0  # hours of GPUs between a death and the next picture
    idle: float = 0.0  # hours of GPUs that had nothing left to do

    def facts(self, plan: Plan) -> dict[str, float]:
        paid = self.hours * plan.gpus - (0 if not plan.static else self.idle)  # a task that has nothing to do gives its GPU back
        return {
            "hours": self.hours,
            "GPU hours": paid,
            "dollars": paid * plan.dollars + plan.pictures * plan.objects * plan.put,
            "drawn twice, %": 100 * self.twice / plan.pictures,
            "deaths": self.deaths,
            "down, GPU hours": self.down,
            "idle, GPU hours": self.idle,
            "objects a second": plan.pictures * plan.objects / self.hours / 3600,
        }


class Gpu:
    """Draws shards.  left: pictures of the one at hand; since: when it began with these."""

    def __init__(self, own: int, pace: float) -> None:
        self.own, self.pace = own, pace  # shards that were given to it before; seconds a picture
        self.left, self.since, self.turn = 0, 0.0, 0

    def begin(self, pool: list[int], rows: int, now: float) -> bool:
        """Goes on with what is left, or takes a shard of its own, or of the pool; False where there is none."""
        if not self.left:
            if self.own:
                self.own -= 1
                self.left = rows
            elif pool:
                self.left = pool.pop()
            else:
                return False
        self.since, self.turn = now, self.turn + 1
        return True


def simulate(plan: Plan) -> Outcome:
    """Shard by shard, death by death."""
    rng, found = random.Random(plan.seed), Outcome()
    shards = -(-plan.pictures // plan.shard_rows)
    shares = [shards // plan.gpus + (i < shards % plan.gpus) if plan.static else 0 for i in range(plan.gpus)]
    gpus = [Gpu(share, plan.picture * (2 if rng.random() < plan.slow else 1)) for share in shares]
    pool = [] if plan.static else [plan.shard_rows] * shards
    ends = [0.0] * plan.gpus
    events: list[tuple[float, int, int]] = []  # (when, GPU or -1 - machine, turn)

    def go(number: int, now: float) -> None:
        gpu = gpus[number]
        if gpu.begin(pool, plan.shard_rows, now):
            heapq.heappush(events, (now + gpu.left * gpu.pace, number, gpu.turn))

    def next_death(machine: int, now: float) -> None:
        if plan.deaths:
            heapq.heappush(events, (now + rng.expovariate(plan.deaths / 3600), -1 - machine, 0))

    for number in range(plan.gpus):
        go(number, 0.0)
    for machine in range(-(-plan.gpus // GPUS_OF_A_MACHINE)):
        next_death(machine, 0.0)
    total = shards * plan.shard_rows
    while found.drawn < total:
        now, number, turn = heapq.heappop(events)
        if number < 0:
            die(plan, found, gpus, pool, -1 - number, now, events)
            next_death(-1 - number, now + plan.boot)
        elif turn == gpus[number].turn:
            found.drawn, gpus[number].left, ends[number] = found.drawn + gpus[number].left, 0, now
            go(number, now)
        elif turn == -gpus[number].turn:  # a new machine is there
            go(number, now)
    found.hours = now / 3600
    found.idle = sum(now - end for end in ends) / 3600
    return found


def die(
    plan: Plan, found: Outcome, gpus: list[Gpu], pool: list[int], machine: int, now: float, events: list[tuple[float, int, int]]
) -> None:
    """What is written is kept; the rest is drawn again, by who has time, or where shards are given out by the next machine."""
    found.deaths += 1
    for number in range(machine * GPUS_OF_A_MACHINE, min(len(gpus), (machine + 1) * GPUS_OF_A_MACHINE)):
        gpu = gpus[number]
        if gpu.left:
            drawn = min(gpu.left, int((now - gpu.since) / gpu.pace))
            safe = drawn - drawn % plan.kept
            found.drawn, found.twice, gpu.left = found.drawn + safe, found.twice + drawn - safe, gpu.left - safe
            if not plan.static and gpu.left:
                pool.append(gpu.left)
                gpu.left = 0
        found.down += plan.boot / 3600
        gpu.turn += 1
        heapq.heappush(events, (now + plan.boot, number, -gpu.turn))


CASES = {
    "files, one pool": {},
    "no deaths": {"deaths": 0.0},
    "a death a machine every two hours": {"deaths": 0.5},
    "the same, whole tars alone are kept": {"deaths": 0.5, "kept": 256},
    "the same, tars of 10,000": {"deaths": 0.5, "kept": 10_000, "shard_rows": 10_000},
    "shards given out before": {"static": True},
    "the same, no slow GPUs": {"static": True, "slow": 0.0},
    "pictures one by one": {"together": 1, "kept": 1},
    "16 in a call": {"together": 16, "kept": 16},
    "shards of 10,000": {"shard_rows": 10_000},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Plan()).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(value), default=value, metavar="N", help=f"(default: {value:g})")
    plan = Plan(**vars(parser.parse_args()))
    cases = CASES if plan == Plan() else {"as asked": {}}
    for i, (name, change) in enumerate(cases.items()):
        changed = replace(plan, **change)  # type: ignore[arg-type]
        facts = simulate(changed).facts(changed)
        if i == 0:
            print(f"| {'':<36} | " + " | ".join(facts) + " |\n|---|" + "---|" * len(facts))
        print(
            f"| {name:<36} | " + " | ".join(f"{value:,.2f}" if value < 10 else f"{value:,.0f}" for value in facts.values()) + " |"
        )


if __name__ == "__main__":
    main()
