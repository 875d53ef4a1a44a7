"""Kinds of surface and part, each rendered for a whole batch at once.

A renderer draws the *style* (what two pictures of one product share) and the *pose* (what differs
between them) from separate streams, and returns a picture in 0..1 with the region that belongs to
the part; a surface fills the picture.

Shapes: B images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

from apt_ray.pretraining.surfaces.electronics import board, cell, traces, wafer
from apt_ray.pretraining.surfaces.parts import capsule, flange, nut, rod
from apt_ray.pretraining.surfaces.scene import Rendering, Scene
from apt_ray.pretraining.surfaces.textures import (
    brushed,
    casting,
    dots,
    grains,
    honeycomb,
    label,
    leather,
    marble,
    mesh,
    panel,
    ribs,
    rough,
    slab,
    smooth,
    tiles,
    weave,
    wood,
)

__all__ = [
    "BOARD_LIKE",
    "HELD_OUT_SURFACES",
    "SOLAR_LIKE",
    "SURFACES",
    "TRAINING_SURFACES",
    "Renderer",
    "Rendering",
    "Scene",
]

Renderer = Callable[[Scene], Rendering]
TRAINING_SURFACES: dict[str, Renderer] = {
    "rough": rough,
    "brushed": brushed,
    "smooth": smooth,
    "weave": weave,
    "mesh": mesh,
    "tiles": tiles,
    "grains": grains,
    "wood": wood,
    "leather": leather,
    "ribs": ribs,
    "dots": dots,
    "label": label,
    "board": board,
    "wafer": wafer,
    "flange": flange,
    "capsule": capsule,
    "rod": rod,
    "traces": traces,
    "cell": cell,
    "casting": casting,
}
BOARD_LIKE = ("board", "traces")
SOLAR_LIKE = ("wafer", "cell")
HELD_OUT_SURFACES: dict[str, Renderer] = {
    "marble": marble,
    "honeycomb": honeycomb,
    "slab": slab,
    "panel": panel,
    "nut": nut,
}
SURFACES = TRAINING_SURFACES | HELD_OUT_SURFACES
