"""Three made-up products and their defects.

`Washer` is a part on a ground, `Textile` a texture, `Blister` a structured pack. Each draws itself
into a board when it is made and keeps what its defects need; a defect changes the board and marks
exactly what it changed. Lengths are in the board's coordinates, where the image is 2 wide.
"""

import math
from typing import ClassVar, Protocol

import numpy as np
from scipy import ndimage

from apt_ray.data.samples.board import Board, Colour, Field


class Product(Protocol):
    """What a sample category is made of."""

    DEFECTS: ClassVar[tuple[str, ...]]  # names of the methods that add one

    def __init__(self, board: Board) -> None: ...


class Washer:
    """A turned steel ring that lies anywhere near the centre of a dark conveyor belt."""

    DEFECTS: ClassVar[tuple[str, ...]] = ("nick", "rust", "scratch")
    OUTER, INNER, CHAMFER = 0.70, 0.33, 0.035
    STEEL: Colour = (0.96, 0.99, 1.03)

    def __init__(self, board: Board, *, ribs: float | None = None) -> None:
        self.board = board
        self.x, self.y = board.between(-0.1, 0.1), board.between(-0.1, 0.1)
        dx, dy = board.x - self.x, board.y - self.y
        rho, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
        light = board.about(-2.2, 0.12)

        lay_belt(board, ribs)
        reach = 0.05
        cast = np.hypot(dx + reach * math.cos(light), dy + reach * math.sin(light))
        shadow = np.maximum(cast - self.OUTER, self.INNER - cast)
        board.shade(0.35, board.cover(shadow, softness=0.1))
        self.belt = board.pixels.copy()

        turning = ndimage.gaussian_filter1d(board.rng.standard_normal(400), 1.2)
        groove = np.interp(rho, np.linspace(0, 1, 400), turning).astype(np.float32)
        glint = np.cos(angle - light - 0.3 * (rho - 0.5)) ** 6
        cross = np.sin(angle - light + 0.5) ** 16
        face = 0.50 + 0.30 * glint + 0.12 * cross + (0.035 + 0.05 * glint) * groove
        face += 0.012 * board.noise(5) + 0.015 * board.noise(90)
        toward = np.cos(angle - light)
        for radius, side, middle, swing in (
            (self.OUTER - self.CHAMFER, 1, 0.52, 0.42),
            (self.INNER + self.CHAMFER, -1, 0.45, -0.38),
        ):
            chamfer = board.cover(side * (radius - rho), softness=0.012)
            face += chamfer * (middle + swing * toward - face)
            face *= 1 - 0.3 * np.exp(-(((rho - radius) / 0.007) ** 2))
        self.ring = board.cover(np.maximum(rho - self.OUTER, self.INNER - rho))
        board.paint(self.STEEL, self.ring, tone=face)

    def nick(self) -> None:
        """A bite out of the outer or inner edge, the metal around it bruised bright."""
        board = self.board
        rim = self.OUTER if board.rng.random() < 0.6 else self.INNER
        x, y, _ = self._spot(rim, rim)
        edge = board.blob(x, y, board.between(0.05, 0.09), 0.25) + 0.008 * board.noise(30)
        bruise = board.cover(edge - 0.02, softness=0.02) * self.ring
        board.shade(1.3, bruise)
        board.uncover(self.belt * 0.7, board.cover(edge) * self.ring)
        board.mark(bruise)

    def rust(self) -> None:
        board = self.board
        x, y, _ = self._spot(self.INNER, self.OUTER)
        edge = board.blob(x, y, board.between(0.08, 0.15), 0.3) + 0.02 * board.noise(30)
        coverage = board.cover(edge, softness=0.03) * self.ring
        tone = np.clip(0.75 + 0.18 * board.noise(70) + 0.12 * board.noise(20), 0.3, 1.3)
        board.paint((0.47, 0.27, 0.14), coverage * 0.85, tone)
        board.mark(coverage)

    def scratch(self) -> None:
        """A bright groove across the face with a raised, dark side."""
        board = self.board
        x, y, angle = self._spot(self.INNER + 0.08, self.OUTER - 0.1)
        heading = angle + board.rng.choice((-1.0, 1.0)) * board.between(0.9, 1.7)
        length, width = board.between(0.3, 0.55), board.between(0.014, 0.026)
        groove = board.stroke(x, y, heading, length, width)
        burr = np.roll(groove, (1, 2), axis=(0, 1)) * self.ring
        groove *= self.ring
        board.shade(0.5, burr)
        board.paint((0.93, 0.94, 0.95), groove * 0.8)
        board.mark(np.maximum(groove, burr))

    def _spot(self, low: float, high: float) -> tuple[float, float, float]:
        """A place whose distance from the axis is between two radii, and its angle."""
        rho, angle = self.board.between(low, high), self.board.between(-math.pi, math.pi)
        return self.x + rho * math.cos(angle), self.y + rho * math.sin(angle), angle


def lay_belt(board: Board, ribs: float | None = None) -> None:
    """Covers the board with conveyor belt, ribbed along x; `ribs`, 0..2, is where the ribs lie."""
    bend, drawn = 0.15 * board.noise(3), board.between(0, 2)
    rib = np.sin((board.y * 34 + bend + (drawn if ribs is None else ribs)) * math.pi)
    belt = 0.15 + 0.012 * rib + 0.012 * board.noise(3) + 0.018 * board.noise(150)
    board.paint((0.95, 1.0, 1.06), tone=belt * (1 - 0.25 * rib**8))


class Textile:
    """Denim close up: a 2/1 twill of indigo warp over undyed weft."""

    DEFECTS: ClassVar[tuple[str, ...]] = ("hole", "missing_thread", "slub", "stain")
    THREADS = 19  # per unit of length
    INDIGO: Colour = (0.25, 0.34, 0.52)
    UNDYED: Colour = (0.72, 0.73, 0.72)

    def __init__(self, board: Board) -> None:
        self.board = board
        turn = board.about(0, 0.035)
        u = board.x * math.cos(turn) + board.y * math.sin(turn) + 0.006 * board.noise(3)
        v = board.y * math.cos(turn) - board.x * math.sin(turn) + 0.006 * board.noise(3)
        # Shifted so that threads are counted from zero wherever the cloth lies.
        self.warp = (u + 2) * self.THREADS + board.between(0, 3)
        self.weft = (v + 2) * self.THREADS + board.between(0, 3)
        column, row = self.warp.astype(int), self.weft.astype(int)
        per_thread = board.rng.standard_normal((2, 5 * self.THREADS), dtype=np.float32)
        phase = (column - row) % 3
        weft_on_top = phase == 0

        # A warp thread floats over two wefts, then dives under the third.
        along = self.weft % 1 - (phase == 1)
        warp = self._thread(self.warp % 1, along)
        warp *= (
            1 + 0.07 * per_thread[0, column] + 0.05 * board.noise(5) + 0.13 * board.noise(90, 28)
        )
        weft = self._thread(self.weft % 1, 2 * (self.warp % 1) - 1)
        weft *= 1 + 0.05 * per_thread[1, row] + 0.10 * board.noise(28, 90)
        board.paint(self.INDIGO, tone=warp)
        board.paint(self.UNDYED, weft_on_top.astype(np.float32), tone=weft)

    def hole(self) -> None:
        """A torn spot with loose fibres hanging into it."""
        board = self.board
        x, y = self._spot()
        radius = board.between(0.06, 0.12)
        edge = board.blob(x, y, radius, 0.25) + 0.012 * board.noise(45)
        hole = board.cover(edge, softness=0.02)
        board.paint((0.05, 0.05, 0.06), hole)
        board.mark(hole)
        for _ in range(7):
            angle = board.between(-math.pi, math.pi)
            inward = board.about(angle + math.pi, 0.7)
            length = radius * board.between(0.5, 1.2)
            fibre = board.stroke(
                x + radius * math.cos(angle), y + radius * math.sin(angle), inward, length, 0.006, 1
            )
            board.paint((0.62, 0.63, 0.64), fibre * 0.8)
            board.mark(fibre)

    def missing_thread(self) -> None:
        """A weft thread is absent over a stretch: the warp floats on, slack and in the shade."""
        board = self.board
        x, y = self._spot()
        side = board.side
        row = math.floor(self.weft[int((y + 1) / 2 * side), int((x + 1) / 2 * side)])
        stretch = board.cover(np.abs(board.x - x) - board.between(0.25, 0.6), softness=0.05)
        band = board.cover((np.abs(self.weft - row - 0.5) - 0.75) / self.THREADS, softness=0.02)
        coverage = stretch * band
        slack = self._thread(self.warp % 1, np.zeros_like(self.warp))
        board.paint(self.INDIGO, coverage, tone=0.75 * slack**2)
        board.mark(coverage)

    def slub(self) -> None:
        """A lump of fibres spun into a weft thread."""
        board = self.board
        x, y = self._spot()
        half = board.between(0.12, 0.22)
        along = (board.x - x) / half
        across = board.y - y + 0.012 * board.noise(8)
        thickness = board.between(0.035, 0.055) * np.sqrt(np.clip(1 - along**2, 0, 1))
        coverage = board.cover(np.abs(across) - thickness + 0.008 * board.noise(60), softness=0.02)
        coverage *= np.abs(along) < 1
        body = np.sqrt(np.clip(1 - (across / 0.06) ** 2, 0, 1))
        tone = 0.45 + 0.6 * body + 0.12 * board.noise(24, 150)
        board.paint(self.UNDYED, coverage, tone)
        board.mark(coverage)

    def stain(self) -> None:
        """Oil: darker and browner, with a rim where it dried."""
        board = self.board
        x, y = self._spot()
        edge = board.blob(x, y, board.between(0.12, 0.22), 0.3) + 0.015 * board.noise(16)
        coverage = board.cover(edge, softness=0.05)
        board.shade(1.0, coverage * 0.75, (0.66, 0.58, 0.45))
        board.shade(0.8, coverage * np.exp(-(((edge + 0.02) / 0.02) ** 2)))
        board.mark(coverage)

    def _spot(self) -> tuple[float, float]:
        return self.board.between(-0.7, 0.7), self.board.between(-0.7, 0.7)

    @staticmethod
    def _thread(across: Field, along: Field) -> Field:
        """Tone of a round thread: `across` it from 0 to 1, `along` its float from -1 to 1."""
        roundness: Field = np.sqrt(np.clip(1 - ((across - 0.5) / 0.55) ** 2, 0, 1))
        return 0.22 + 0.88 * roundness * (1 - 0.55 * np.abs(along) ** 3)


class Blister:
    """A foil pack of nine scored tablets under clear domes, laid into a fixture."""

    DEFECTS: ClassVar[tuple[str, ...]] = ("broken_pill", "hair", "missing_pill", "spots")
    PITCH, POCKET, PILL = 0.58, 0.235, 0.18
    FOIL: Colour = (0.97, 0.99, 1.02)
    TABLET: Colour = (0.93, 0.62, 0.50)

    def __init__(self, board: Board) -> None:
        self.board = board
        turn = board.about(0, 0.02)
        x, y = board.x - board.about(0, 0.015), board.y - board.about(0, 0.015)
        u = x * math.cos(turn) + y * math.sin(turn)
        v = y * math.cos(turn) - x * math.sin(turn)
        light = board.about(-2.3, 0.15)
        light_u, light_v = math.cos(light), math.sin(light)
        self._draw_foil(u, v)

        # Each pixel belongs to the nearest pocket: (du, dv) from its centre, `cell` its number.
        column = np.clip(np.rint(u / self.PITCH), -1, 1)
        row = np.clip(np.rint(v / self.PITCH), -1, 1)
        self.cell = (3 * row + column + 4).astype(int)
        du, dv = u - column * self.PITCH, v - row * self.PITCH
        rho = np.hypot(du, dv)
        toward = (du * light_u + dv * light_v) / np.maximum(rho, 1e-3)
        board.shade(1 + 0.45 * toward, _ridge(rho, self.POCKET, 0.02))
        board.shade(1 - 0.5 * toward, _ridge(rho, self.POCKET - 0.045, 0.022) * 0.8)
        board.shade(0.8, board.cover(rho - self.POCKET))
        gloss = 0.42 * _ridge(rho, 0.17, 0.02) * np.clip(toward, 0, 1) ** 14
        gloss += 0.15 * _ridge(rho, 0.20, 0.014) * np.clip(-toward, 0, 1) ** 6
        self.empty = board.pixels + gloss

        # Tablets lie loosely: each has an offset and a turn of its own.
        offset_u, offset_v = board.rng.uniform(-0.02, 0.02, (2, 9)).astype(np.float32)
        turns = board.rng.uniform(0, math.pi, 9).astype(np.float32)
        self.pill_u, self.pill_v = du - offset_u[self.cell], dv - offset_v[self.cell]
        pill_rho = np.hypot(self.pill_u, self.pill_v)
        self.pill = board.cover(pill_rho - self.PILL)
        cast = np.hypot(self.pill_u + 0.025 * light_u, self.pill_v + 0.025 * light_v)
        self.shadow = board.cover(cast - self.PILL, softness=0.05)
        board.shade(0.5, self.shadow)

        bevel = np.clip(1 + (pill_rho - self.PILL) / 0.05, 0, 1)
        slope = (self.pill_u * light_u + self.pill_v * light_v) / self.PILL
        chalk = 0.96 + (0.03 + 0.30 * bevel) * slope - 0.10 * bevel**2 + 0.018 * board.noise(110)
        across = self.pill_u * np.cos(turns)[self.cell] + self.pill_v * np.sin(turns)[self.cell]
        chalk *= 1 - 0.32 * _ridge(across, 0, 0.012) * (pill_rho < self.PILL - 0.02)
        board.paint(self.TABLET, self.pill, tone=chalk)
        board.pixels += gloss

    def _draw_foil(self, u: Field, v: Field) -> None:
        """The bench, the pack's shadow on it and the knurled, perforated foil."""
        board = self.board
        board.paint(
            (0.90, 1.0, 1.08), tone=0.30 + 0.012 * board.noise(4) + 0.012 * board.noise(120)
        )
        half, corner = 0.92, 0.1
        over_u, over_v = np.abs(u) - half + corner, np.abs(v) - half + corner
        pack = np.hypot(np.maximum(over_u, 0), np.maximum(over_v, 0)) - corner
        pack += np.minimum(np.maximum(over_u, over_v), 0)
        board.shade(0.45, board.cover(pack - 0.01, softness=0.06))
        foil = 0.68 + 0.05 * board.noise(2) + 0.03 * board.noise(5) + 0.012 * board.noise(100)
        foil += 0.035 * np.sin((u + v) * 70) * np.sin((u - v) * 70)
        foil += 0.22 * _ridge(pack, -0.012, 0.01)
        line = np.minimum(np.abs(np.abs(u) - self.PITCH / 2), np.abs(np.abs(v) - self.PITCH / 2))
        foil *= 1 - 0.35 * board.cover(line - 0.006) * (np.sin((u + v) * 60) > -0.2)
        board.paint(self.FOIL, board.cover(pack), tone=foil)

    def broken_pill(self) -> None:
        """A piece of one tablet is gone."""
        board = self.board
        angle, depth = board.between(-math.pi, math.pi), board.between(-0.02, 0.09)
        crack = depth - self.pill_u * math.cos(angle) - self.pill_v * math.sin(angle)
        crack += 0.012 * board.noise(14) + 0.006 * board.noise(40)
        self._remove(self._one_pocket() * board.cover(crack))

    def hair(self) -> None:
        board = self.board
        hair = board.stroke(
            board.between(-0.6, 0.6),
            board.between(-0.6, 0.6),
            heading=board.between(-math.pi, math.pi),
            length=board.between(0.35, 0.7),
            width=0.016,
            bend=2.2,
        )
        board.paint((0.10, 0.08, 0.07), hair * 0.9)
        board.mark(hair)

    def missing_pill(self) -> None:
        self._remove(self._one_pocket())

    def spots(self) -> None:
        """Brown specks on one tablet, as moisture leaves them."""
        board = self.board
        pill = self.pill * self._one_pocket()
        rows, columns = np.nonzero(pill > 0.9)
        for _ in range(int(board.rng.integers(4, 8))):
            at = board.rng.integers(rows.size)
            x, y = float(board.x[0, columns[at]]), float(board.y[rows[at], 0])
            edge = board.blob(x, y, board.between(0.015, 0.035), 0.2)
            speck = board.cover(edge, softness=0.015) * pill
            board.shade(board.between(0.5, 0.7), speck, (1.0, 0.95, 0.7))
            board.mark(speck)

    def _one_pocket(self) -> Field:
        chosen = int(self.board.rng.integers(9))
        return np.asarray(self.cell == chosen, np.float32)

    def _remove(self, area: Field) -> None:
        """Takes the tablet and its shadow out of an area."""
        self.board.uncover(self.empty, area)
        self.board.mark(area * np.maximum(self.pill, self.shadow))


def _ridge(position: Field, centre: float, width: float) -> Field:
    """A bell of height 1 around `centre`."""
    bell: Field = np.exp(-(((position - centre) / width) ** 2))
    return bell
