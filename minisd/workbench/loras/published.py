"""The weights of the families as they were published, for files that come without a checkpoint."""

from __future__ import annotations

from functools import cache

from ...models.family import REFINER, SD1, SD2, SDXL, Family
from ...models.shapes import Shapes
from .. import blueprint


@cache
def shapes_of(family: Family) -> Shapes:
    return {SD1: blueprint.sd15, SD2: blueprint.sd21, SDXL: blueprint.sdxl, REFINER: blueprint.refiner}[family]()
