"""Compositional captions: phrases with what they require of a picture or of a patch.

A phrase is a conjunction of requirements on attributes, so whether it is true of every patch and
picture of a batch is one tensor operation.

Shapes: K phrases, A attributes, L tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_ray.pretraining.generator import DEFECT_NAMES, SURFACE_NAMES, Attribute

NORMAL_STATES = (
    "normal",
    "flawless",
    "perfect",
    "unblemished",
    "intact",
    "without defect",
    "without damage",
    "clean",
)
ANOMALOUS_STATES = (
    "anomalous",
    "defective",
    "damaged",
    "broken",
    "flawed",
    "with a defect",
    "with damage",
    "abnormal",
)
TEMPLATES = (
    "{}",
    "a {} surface",
    "a {} part",
    "a {} object",
    "a {} product",
    "a photo of a {} surface",
    "a photo of a {} part",
    "a close-up of a {} product",
    "a photo of a {} object",
    "an image of a {} item",
)
COLOURS = ("dark", "gray", "white", "red", "yellow", "green", "cyan", "blue", "purple")

_STATES = (NORMAL_STATES, ANOMALOUS_STATES)
_NOUNS = ("surface", "part", "object", "product", "item", "material", "sample", "piece")
_SURFACE_WORDS: dict[str, tuple[str, ...]] = {
    "rough": ("rough", "coarse", "cast", "concrete", "stone"),
    "brushed": ("brushed", "brushed metal", "steel", "ground metal"),
    "smooth": ("smooth", "plain", "painted", "plastic", "polished"),
    "weave": ("woven", "fabric", "textile", "cloth", "canvas"),
    "mesh": ("mesh", "wire mesh", "grid", "net"),
    "tiles": ("tiled", "tile", "brick", "paved"),
    "grains": ("grainy", "cellular", "granular", "crystalline"),
    "wood": ("wooden", "wood", "timber", "veneer"),
    "leather": ("leather", "hide", "wrinkled leather"),
    "ribs": ("ribbed", "striped", "corrugated", "grooved"),
    "dots": ("dotted", "perforated", "spotted", "punched"),
    "label": ("printed", "label", "lettered", "marked"),
    "board": ("circuit board", "electronic board", "circuit", "pcb"),
    "wafer": ("wafer", "solar cell", "silicon", "photovoltaic"),
    "flange": ("flange", "round metal", "disk", "washer", "machined"),
    "capsule": ("capsule", "pill", "tablet", "moulded", "bean"),
    "rod": ("rod", "screw", "bolt", "pin"),
    "traces": ("conductor", "copper trace", "wiring", "circuit board", "conductor pattern"),
    "cell": ("solar cell", "luminescent cell", "photovoltaic cell", "panel"),
    "casting": ("cast", "ferrite", "magnetic tile", "sintered", "ground casting"),
}
_DEFECT_WORDS: dict[str, tuple[str, ...]] = {
    "scratch": ("scratch", "scrape", "score line"),
    "crack": ("crack", "fracture", "fissure"),
    "pit": ("pit", "hole", "blowhole", "puncture"),
    "dent": ("dent", "bump", "dimple", "bulge"),
    "stain": ("stain", "spill", "blotch", "mark"),
    "chip": ("chip", "break", "missing piece", "breakage"),
    "fibre": ("fibre", "hair", "thread", "strand"),
    "particle": ("particle", "foreign body", "crumb", "contamination"),
    "pores": ("porosity", "cluster of pores", "speckle", "pinholes"),
    "discolour": ("discolouration", "colour change", "uneven colour", "fading"),
    "smear": ("smear", "smudge", "drag mark", "blurred area"),
    "warp": ("distortion", "misalignment", "deformation", "bent area"),
    "burn": ("burn", "scorch mark", "burnt area"),
    "worn": ("worn area", "abrasion", "missing texture", "rubbed area"),
    "splice": ("spur", "excess material", "mouse bite", "pinhole", "gap"),
    "dead area": ("dead area", "inactive area", "dark patch", "missing segment"),
    "dashes": ("interrupted finger", "broken line", "broken finger", "dashes"),
    "uneven": ("uneven area", "unevenness", "cloudy area"),
    "bridge": ("bridge", "short circuit", "open circuit", "cut"),
    "graft": ("frayed area", "wrong texture", "other material", "unground area"),
    "shade": ("shade", "uneven half", "change of brightness", "step in brightness"),
}
_SHAPES: dict[str, tuple[str, ...]] = {
    "line": ("scratch", "crack", "fibre", "dashes", "bridge"),
    "thin mark": ("scratch", "crack", "fibre", "dashes", "bridge"),
    "round spot": ("pit", "dent", "burn"),
    "small spot": ("splice", "pit", "particle"),
    "irregular spot": ("stain", "chip", "particle", "discolour", "worn"),
    "area": (
        "discolour",
        "smear",
        "warp",
        "worn",
        "stain",
        "dead area",
        "uneven",
        "graft",
        "shade",
    ),
}
_POLARITIES = ("", "dark", "bright")
_EXTENTS = ("", "small", "medium sized", "large")
_COUNTS = ("", "one", "two", "three")
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
_PLACES = ("", *(f"at the {row} {column}" for row in _ROWS for column in _COLUMNS))

Requirement = frozenset[int]


@dataclass(frozen=True, slots=True)
class Phrase:
    """A text and the values that it allows of some attributes; others do not matter."""

    text: str
    allows: dict[Attribute, Requirement]


def state_phrase(state: str, template: str) -> str:
    """Fill a template; states such as "with a defect" go behind the noun."""
    if state.startswith("with"):
        template = re.sub(r"\{\} (\w+)", r"\1 {}", template)
    return template.format(state)


def draw_states(rng: random.Random, count: int, *, anomalous: bool) -> list[str]:
    """Random phrases that say normal or anomalous and nothing else."""
    states = _STATES[anomalous]
    return [state_phrase(rng.choice(states), rng.choice(TEMPLATES)) for _ in range(count)]


def draw_phrases(rng: random.Random, attributes_PA: Tensor, count: int) -> list[Phrase]:
    """Random phrases; two thirds of them are true of a random picture of the batch."""
    rows: list[list[int]] = attributes_PA.tolist()
    phrases: list[Phrase] = []
    while len(phrases) < count:
        row = rng.choice(rows)
        if rng.random() < 1 / 3:
            row = [column[rng.randrange(len(rows))] for column in zip(*rows, strict=True)]
        phrases.append(rng.choice(_PATTERNS)(rng, row))
    return phrases


def holds(phrases: Sequence[Phrase], attributes_XA: Tensor) -> Tensor:
    """(X, K) bool: which phrases are true of which rows of an attribute table (X, A)."""
    largest = int(attributes_XA.amax()) + 1
    allowed = torch.ones(len(Attribute), len(phrases), largest, dtype=torch.bool)
    for k, phrase in enumerate(phrases):
        for attribute, values in phrase.allows.items():
            allowed[attribute, k] = False
            allowed[attribute, k, [value for value in values if value < largest]] = True
    allowed = allowed.to(attributes_XA.device)
    result = torch.ones(len(attributes_XA), len(phrases), dtype=torch.bool, device=allowed.device)
    for attribute in Attribute:
        result &= allowed[attribute].T[attributes_XA[:, attribute]]
    return result


class Vocabulary:
    """Turns phrases into token ids, word by word, remembering the words."""

    def __init__(self, encode: Callable[[str], list[int]], start: int, end: int) -> None:
        self._encode = encode
        self._start, self._end = start, end
        self._words: dict[str, list[int]] = {}

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """(K, L) int64 token ids, as long as the longest phrase and zero behind the others."""
        rows = [[self._start, *self._ids(text), self._end] for text in texts]
        tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def all_ids(self) -> list[int]:
        """The ids of every word that a caption can have, with start and end."""
        parts = [state_phrase(s, t) for group in _STATES for s in group for t in TEMPLATES]
        parts += [word for words in _SURFACE_WORDS.values() for word in words]
        parts += [word for words in _DEFECT_WORDS.values() for word in words]
        parts += [*_SHAPES, *COLOURS, *_POLARITIES, *_EXTENTS, *_COUNTS, *_PLACES, *_NOUNS]
        parts += ["a no without on defect defects with"]
        return sorted({id_ for text in parts for id_ in self._ids(text)} | {self._start, self._end})

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in text.split():
            if word not in self._words:
                self._words[word] = self._encode(word)
            ids += self._words[word]
        return ids


def _exactly(value: int) -> Requirement:
    return frozenset((value,))


def _surface(rng: random.Random, row: list[int]) -> tuple[str, dict[Attribute, Requirement]]:
    value = row[Attribute.SURFACE]
    words = _SURFACE_WORDS.get(SURFACE_NAMES[value], ("",))
    return rng.choice(words), {Attribute.SURFACE: _exactly(value)}


def _defect(rng: random.Random, row: list[int]) -> tuple[str, dict[Attribute, Requirement]]:
    """A defect by name, by shape, or just as a defect; where the row has none, any name."""
    value = row[Attribute.DEFECT] or 1 + rng.randrange(len(_DEFECT_WORDS))
    name = DEFECT_NAMES[value - 1]
    how = rng.random()
    if how < 0.15 or name not in _DEFECT_WORDS:
        return "defect", {Attribute.STATE: _exactly(1)}
    shapes = [shape for shape, names in _SHAPES.items() if name in names]
    if how < 0.35 and shapes:
        shape = rng.choice(shapes)
        allowed = frozenset(1 + DEFECT_NAMES.index(other) for other in _SHAPES[shape])
        return shape, {Attribute.DEFECT: allowed}
    return rng.choice(_DEFECT_WORDS[name]), {Attribute.DEFECT: _exactly(value)}


def _described_defect(
    rng: random.Random, row: list[int]
) -> tuple[str, dict[Attribute, Requirement]]:
    """A defect with up to two adjectives."""
    text, allows = _defect(rng, row)
    for attribute, words in ((Attribute.POLARITY, _POLARITIES), (Attribute.EXTENT, _EXTENTS)):
        value = row[attribute]
        if value and rng.random() < 0.5:
            text, allows = f"{words[value]} {text}", {**allows, attribute: _exactly(value)}
    return text, allows


def _say_state(rng: random.Random, row: list[int]) -> Phrase:
    value = row[Attribute.STATE]
    text = state_phrase(rng.choice(_STATES[value]), rng.choice(TEMPLATES))
    return Phrase(text, {Attribute.STATE: _exactly(value)})


def _say_surface(rng: random.Random, row: list[int]) -> Phrase:
    words, allows = _surface(rng, row)
    if rng.random() < 0.4:
        value = row[Attribute.COLOUR]
        words, allows = f"{COLOURS[value]} {words}", {**allows, Attribute.COLOUR: _exactly(value)}
    return Phrase(f"a {words} {rng.choice(_NOUNS)}", allows)


def _say_colour(rng: random.Random, row: list[int]) -> Phrase:
    value = row[Attribute.COLOUR]
    return Phrase(f"a {COLOURS[value]} {rng.choice(_NOUNS)}", {Attribute.COLOUR: _exactly(value)})


def _say_surface_state(rng: random.Random, row: list[int]) -> Phrase:
    value = row[Attribute.STATE]
    words, allows = _surface(rng, row)
    template = f"a {{}} {words.replace(' ', '-')} {rng.choice(_NOUNS)}"
    text = state_phrase(rng.choice(_STATES[value]), template).replace("-", " ")
    return Phrase(text, {**allows, Attribute.STATE: _exactly(value)})


def _say_defect(rng: random.Random, row: list[int]) -> Phrase:
    text, allows = _described_defect(rng, row)
    return Phrase(f"a {text}", allows)


def _say_defect_on_surface(rng: random.Random, row: list[int]) -> Phrase:
    words, surface = _surface(rng, row)
    text, allows = _described_defect(rng, row)
    return Phrase(f"a {text} on a {words} {rng.choice(_NOUNS)}", {**surface, **allows})


def _say_absence(rng: random.Random, row: list[int]) -> Phrase:
    name = rng.choice(tuple(_DEFECT_WORDS))
    value = 1 + DEFECT_NAMES.index(name)
    others = frozenset(range(1 + len(DEFECT_NAMES))) - {value}
    word, noun = rng.choice(_DEFECT_WORDS[name]), rng.choice(_NOUNS)
    text = rng.choice((f"no {word}", f"without {word}", f"a {noun} without {word}"))
    return Phrase(text, {Attribute.DEFECT: others})


def _say_count(rng: random.Random, row: list[int]) -> Phrase:
    value = row[Attribute.COUNT] or 1
    text, allows = _defect(rng, row)
    return Phrase(f"{_COUNTS[value]} {text}", {**allows, Attribute.COUNT: _exactly(value)})


def _say_place(rng: random.Random, row: list[int]) -> Phrase:
    value = row[Attribute.PLACE] or 5
    text, allows = _described_defect(rng, row)
    return Phrase(f"a {text} {_PLACES[value]}", {**allows, Attribute.PLACE: _exactly(value)})


_PATTERNS: tuple[Callable[[random.Random, list[int]], Phrase], ...] = (
    _say_state,
    _say_state,
    _say_surface,
    _say_colour,
    _say_surface_state,
    _say_surface_state,
    _say_defect,
    _say_defect,
    _say_defect_on_surface,
    _say_absence,
    _say_count,
    _say_place,
)
