"""Rendering a scene: polygons on a canvas of four times the size, which is then reduced by averaging.

Coordinates are rounded to whole pixels of the large canvas before drawing, and colours are integers. So a scene gives the same image on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from .scene import Scene

SIZE = 64
"""Width and height of an image in pixels."""
_SUPERSAMPLING = 4  # the canvas is 256 x 256

RGB = tuple[int, int, int]
Point = tuple[float, float]

_FUR: dict[str, RGB] = {
    "white": (240, 236, 228),
    "gray": (140, 140, 146),
    "black": (48, 46, 52),
    "brown": (126, 78, 44),
    "orange": (240, 142, 36),
    "blue": (70, 124, 214),
}
_SKY: dict[str, tuple[RGB, RGB]] = {  # top, horizon
    "grass": ((96, 170, 240), (190, 224, 250)),
    "sand": ((250, 190, 140), (254, 226, 180)),
    "snow": ((172, 188, 206), (212, 222, 232)),
    "night": ((14, 16, 52), (44, 44, 96)),
}
_GROUND: dict[str, tuple[RGB, RGB]] = {  # horizon, bottom
    "grass": ((112, 184, 84), (84, 156, 62)),
    "sand": ((230, 196, 120), (214, 174, 98)),
    "snow": ((232, 240, 248), (244, 248, 252)),
    "night": ((36, 54, 62), (26, 42, 50)),
}
_SUN: dict[str, RGB] = {"grass": (255, 240, 140), "sand": (255, 120, 70), "snow": (250, 246, 220), "night": (244, 240, 200)}


def _mix(a: RGB, b: RGB, amount: float) -> RGB:
    return tuple(round(p + (q - p) * amount) for p, q in zip(a, b, strict=True))  # pyright: ignore[reportReturnType]


def _darker(colour: RGB, amount: float) -> RGB:
    return _mix(colour, (0, 0, 0), amount)


def ellipse(x: float, y: float, rx: float, ry: float, degrees: float = 0.0) -> list[Point]:
    """The 28 corners of a rotated ellipse with centre ``(x, y)`` and radii ``rx`` and ``ry``."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    angles = (2 * math.pi * k / 28 for k in range(28))
    return [(x + rx * math.cos(a) * c - ry * math.sin(a) * s, y + rx * math.cos(a) * s + ry * math.sin(a) * c) for a in angles]


def limb(a: Point, b: Point, width: float, tip: float | None = None) -> list[Point]:
    """The outline of a limb with round ends, from ``a`` (width ``width``) to ``b`` (width ``tip``, by default the same)."""
    angle = math.atan2(b[1] - a[1], b[0] - a[0])
    points = []
    for centre, radius, start in ((a, width / 2, 0.5), (b, (tip or width) / 2, -0.5)):
        turns = (angle + math.pi * (start + k / 6) for k in range(7))
        points += [(centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in turns]
    return points


@dataclass
class Sketch:
    """The shapes of one animal in its own coordinates: feet at the origin, x forward, y up, in pixels at size 1.

    Args:
        fur: colour of the fur.
        line: colour of the outline.
        shapes: outlined polygons with their colours, in drawing order.
        details: polygons without an outline, drawn on top.
    """

    fur: RGB
    line: RGB
    shapes: list[tuple[list[Point], RGB]] = field(default_factory=list)
    details: list[tuple[list[Point], RGB]] = field(default_factory=list)

    @property
    def far(self) -> RGB:
        """Colour of the fur on the far side of the animal."""
        return _mix(self.fur, self.line, 0.35)

    def add(self, points: list[Point], colour: RGB | None = None) -> None:
        """Adds an outlined shape of the silhouette, in the colour of the fur by default."""
        self.shapes.append((points, colour or self.fur))

    def detail(self, points: list[Point], colour: RGB) -> None:
        """Adds a shape on top, without an outline."""
        self.details.append((points, colour))


@dataclass(frozen=True)
class Stance:
    """Positions of the body parts of an animal in one pose, in the coordinates of :class:`Sketch`."""

    body: tuple[float, float, float, float, float]  # x, y, rx, ry, degrees
    head: Point
    legs: tuple[tuple[Point, Point], ...]  # far hind, far front, near hind, near front
    tail: tuple[Point, Point]
    asleep: bool = False


_FOUR_LEGS: dict[str, Stance] = {
    "standing": Stance(
        (0, 15, 13, 7.5, 0),
        (13.5, 25),
        (((-7, 12), (-5.5, 2)), ((6, 12), (8, 2)), ((-9.5, 12), (-10, 2)), ((9, 12), (11.5, 2))),
        ((-12, 18), (-19, 25)),
    ),
    "sitting": Stance(
        (-2, 13.5, 12.5, 8, 62),
        (5, 29),
        (((-3, 4), (3, 2)), ((3, 14), (5, 2)), ((-5, 5), (1, 2)), ((5, 15), (8.5, 2))),
        ((-9, 4), (-18, 5)),
    ),
    "jumping": Stance(
        (0, 22, 13.5, 7, 24),
        (14, 33.5),
        (((-7, 17), (-14, 9)), ((9, 25), (18, 21)), ((-9, 18), (-18, 11)), ((9, 24), (19, 26))),
        ((-12, 18), (-20, 23)),
    ),
    "sleeping": Stance(
        (-4, 8, 14.5, 8, 0),
        (9.5, 8.5),
        (((-11, 3), (-5, 2)), ((2, 3), (7, 2)), ((-10, 3), (-3, 2)), ((3, 3), (11, 1.8))),
        ((-16, 4), (-21, 2)),
        asleep=True,
    ),
}
_BIRD: dict[str, Stance] = {
    "standing": Stance((-1, 17, 12, 8, 20), (9, 28), (((-1, 10), (-1, 1)), ((3, 10), (4, 1))), ((-11, 13), (-20, 11))),
    "sitting": Stance((-1, 12, 12, 9.5, 66), (4, 28), (((1, 1.5), (5, 1)), ((4, 1.5), (9, 1))), ((-6, 5), (-14, 1.5))),
    "jumping": Stance((0, 22, 12, 7.5, 28), (11, 32), (((-4, 16), (-9, 10)), ((-1, 16), (-5, 9))), ((-11, 16), (-20, 11))),
    "sleeping": Stance((-1, 8.5, 14, 8.5, 0), (10, 12), (), ((-13, 7), (-20, 4)), asleep=True),
}


def _ears(sketch: Sketch, animal: str, x: float, y: float, pose: str) -> None:
    if animal == "cat":
        for dx, colour in ((-6.0, sketch.far), (2.8, sketch.fur)):
            sketch.add([(x + dx - 1.0, y + 3), (x + dx + (0.4 if dx < 0 else 2.6), y + 11.5), (x + dx + 4, y + 4)], colour)
    elif animal == "rabbit":
        lean = {"jumping": 58.0, "sleeping": 64.0}.get(pose, 10.0)
        for turn, colour in ((lean - 12, sketch.far), (lean + 12, sketch.fur)):
            dx, dy = -math.sin(math.radians(turn)), math.cos(math.radians(turn))
            ear = (x - 1 + 11 * dx, y + 1 + 11 * dy, 7, 2.4, 90 + turn)
            sketch.add(ellipse(*ear), colour)
            sketch.detail(ellipse(ear[0], ear[1], 4.6, 1.1, ear[4]), (236, 160, 168))


def _head(sketch: Sketch, scene: Scene, stance: Stance) -> None:
    x, y = stance.head
    animal = scene.animal
    _ears(sketch, animal, x, y, scene.pose)
    if animal == "dog":
        sketch.add(limb((x + 2, y - 2), (x + 8.5, y - 2.5), 7, 5.5))
    if animal == "bird":
        sketch.add([(x + 4, y + 2.5), (x + 12, y - 1), (x + 4, y - 3.5)], (250, 170, 30))
    sketch.add(ellipse(x, y, 7.2, 6.8))
    nose = {"cat": (6.2, -0.8), "dog": (11, -1.2), "rabbit": (6.4, -0.6)}.get(animal)
    if nose:
        colour = (30, 26, 28) if animal == "dog" else (232, 120, 130)
        sketch.detail(ellipse(x + nose[0], y + nose[1], 1.7, 1.4), colour)
    if animal == "dog":
        sketch.add(ellipse(x - 4.2, y - 1.5, 2.7, 6.2, -12), sketch.far)
    if stance.asleep:
        sketch.detail(limb((x + 0.6, y + 0.6), (x + 4.4, y + 0.6), 1.3), sketch.line)
    else:
        sketch.detail(ellipse(x + 2.6, y + 1.6, 2.3, 2.5), (252, 252, 252))
        sketch.detail(ellipse(x + 3.2, y + 1.6, 1.4, 1.8), (16, 16, 20))
    if scene.thing == "hat":
        _hat(sketch, x, y + 6)


def _hat(sketch: Sketch, x: float, y: float) -> None:
    sketch.detail([(x - 4.8, y + 1.8), (x + 4.8, y + 1.8), (x + 4.8, y - 0.2), (x - 4.8, y - 0.2)], (176, 20, 60))
    sketch.detail([(x - 3.2, y + 8.8), (x + 3.2, y + 8.8), (x + 3.2, y + 1.5), (x - 3.2, y + 1.5)], (214, 30, 76))


def _spots(sketch: Sketch, scene: Scene, body: tuple[float, float, float, float, float]) -> None:
    x, y, rx, ry, degrees = body
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    light = scene.colour in ("black", "brown")
    colour = _mix(sketch.fur, (255, 255, 255), 0.45) if light else _darker(sketch.fur, 0.42)
    for u, v in ((-0.62, 0.15), (0.0, 0.42), (0.52, -0.05))[: scene.spots]:
        px, py = u * rx, v * ry
        sketch.detail(ellipse(x + px * c - py * s, y + px * s + py * c, 2.7, 2.3, degrees), colour)


def _tail(sketch: Sketch, animal: str, tail: tuple[Point, Point]) -> None:
    (ax, ay), (bx, by) = tail
    if animal == "cat":
        sketch.add(limb((ax, ay), (bx, by + 1), 3.4, 2.8))
    elif animal == "dog":
        sketch.add(limb((ax, ay), ((ax + bx) / 2 - 0.5, (ay + by) / 2 + 0.5), 4.2, 3.2))
    elif animal == "rabbit":
        sketch.add(ellipse(ax - 1, ay, 3.6, 3.6), (250, 248, 244))
    else:
        sketch.add([(ax + 2, ay + 2.5), (bx, by + 2.5), (bx + 1, by - 2), (ax + 3, ay - 2.5)], sketch.far)


def _wing(sketch: Sketch, scene: Scene, body: tuple[float, float, float, float, float]) -> None:
    x, y, rx, ry, degrees = body
    if scene.pose == "jumping":
        sketch.add([(x - 4, y + 3), (x - 12, y + 21), (x + 0, y + 15), (x + 5, y + 4)], sketch.far)
        return
    sketch.add(ellipse(x - 2, y, rx * 0.62, ry * 0.55, degrees), sketch.far)


def _sketch(scene: Scene) -> Sketch:
    base = _FUR[scene.colour]
    fur = _mix(base, (255, 255, 255) if scene.shade > 0 else (0, 0, 0), 0.13 * abs(scene.shade))
    line = (104, 102, 112) if scene.colour == "black" else _darker(fur, 0.62)
    sketch = Sketch(fur, line)
    bird = scene.animal == "bird"
    stance = (_BIRD if bird else _FOUR_LEGS)[scene.pose]
    _tail(sketch, scene.animal, stance.tail)
    half = len(stance.legs) // 2
    for k, (a, b) in enumerate(stance.legs):
        colour = (240, 150, 30) if bird else (sketch.far if k < half else fur)
        sketch.add(limb(a, b, 2.0 if bird else 4.6, 2.0 if bird else 4.0), colour)
    sketch.add(ellipse(*stance.body))
    if scene.pose == "sitting" and not bird:
        sketch.add(ellipse(-5, 7, 7, 6.6))
    if bird:
        _wing(sketch, scene, stance.body)
    elif scene.pose in ("standing", "jumping"):  # a neck
        x, y = stance.head
        sketch.add(limb((x - 6, y - 8), (x - 1, y - 2), 9, 8))
    _spots(sketch, scene, stance.body)
    _head(sketch, scene, stance)
    return sketch


def _background(scene: Scene) -> Image.Image:
    side = SIZE * _SUPERSAMPLING
    horizon = round(scene.horizon * _SUPERSAMPLING)
    column = Image.new("RGB", (1, side))
    for top, bottom, (a, b) in ((0, horizon, _SKY[scene.place]), (horizon, side, _GROUND[scene.place])):
        for row in range(top, bottom):
            column.putpixel((0, row), _mix(a, b, (row - top) / (bottom - top)))
    canvas = column.resize((side, side), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    x, y = 8 + 48 * scene.sun, 9.0
    draw.polygon(_canvas(ellipse(x, y, 5, 5)), fill=_SUN[scene.place])
    if scene.place == "night":  # a crescent
        draw.polygon(_canvas(ellipse(x + 2.4, y - 1.4, 4, 4)), fill=_SKY["night"][0])
    return canvas


def _canvas(points: Sequence[Point]) -> list[tuple[int, int]]:
    return [(round(x * _SUPERSAMPLING), round(y * _SUPERSAMPLING)) for x, y in points]


def _tinted(image: Image.Image, tint: float) -> Image.Image:
    gains = (1 + 0.07 * tint, 1.0, 1 - 0.07 * tint)
    table = [min(255, round(v * gain)) for gain in gains for v in range(256)]
    return image.point(table)


def backdrop(scene: Scene) -> Image.Image:
    """Renders the background of a scene, without the animal, its shadow and the thing: 64 x 64, RGB."""
    return _tinted(_background(scene).reduce(_SUPERSAMPLING), scene.tint)


def render(scene: Scene) -> Image.Image:
    """Renders a scene: 64 x 64, RGB. Equal scenes give equal pixels on every machine."""
    canvas = _background(scene)
    draw = ImageDraw.Draw(canvas)

    def place(points: Sequence[Point]) -> list[tuple[int, int]]:
        return _canvas([(scene.x + scene.facing * scene.size * px, scene.y - scene.size * py) for px, py in points])

    ground = _GROUND[scene.place][1]
    draw.polygon(place(ellipse(0, 0.5, 15, 2.6)), fill=_darker(ground, 0.24))
    sketch = _sketch(scene)
    for points, _ in sketch.shapes:
        outline = place(points)
        draw.polygon(outline, fill=sketch.line)
        draw.line([*outline, outline[0], outline[1]], fill=sketch.line, width=2 * _SUPERSAMPLING, joint="curve")
    for points, colour in (*sketch.shapes, *sketch.details):
        draw.polygon(place(points), fill=colour)
    if scene.thing == "ball":
        draw.polygon(place(ellipse(21, 5.2, 5.6, 5.6)), fill=(120, 16, 24))
        draw.polygon(place(ellipse(21, 5.2, 4.7, 4.7)), fill=(224, 44, 44))
        draw.polygon(place(ellipse(21, 5.2, 4.7, 1.4, 20)), fill=(252, 236, 220))
    return _tinted(canvas.reduce(_SUPERSAMPLING), scene.tint)
