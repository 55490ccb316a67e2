"""Draws the body of a phantom: simple shapes in the order of painting, from the tables of `phantom_anatomy`.

Sizes, places and what is missing vary from body to body. What hangs together in a body does so here: adrenal glands
sit on kidneys, ureters lead to the bladder, vessels follow the spine, and all that lies below the diaphragm moves with
the breath. All is in the patient's frame, in mm: z superior, y anterior, x right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation

from segvol_pl.packing.phantom_anatomy import CYST, LESIONS, LUMBAR, MISSING, ORGANS
from segvol_pl.packing.phantom_draws import Draws


@dataclass(frozen=True, eq=False)
class Solid:
    """An ellipsoid (`power` 2) or a rounded block (`power` 4): centre and radii in mm, order (z, y, x).

    turn: rows are the solid's own axes. rough: share of the radius by which a smooth random field moves the surface.
    """

    centre: np.ndarray
    radii: np.ndarray
    turn: np.ndarray = field(default_factory=lambda: np.eye(3))
    rough: float = 0.0
    power: int = 2

    def shrunk(self, by: float | Sequence[float] | np.ndarray) -> Solid:
        """Return the solid with its radii shorter by `by` mm."""
        return replace(self, radii=self.radii - np.asarray(by))

    def at(self, place: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the point at `place`, in radii along the solid's own axes."""
        return np.asarray(self.centre + (np.asarray(place) * self.radii) @ self.turn)


@dataclass(frozen=True, eq=False)
class Tube:
    """A tube: points of its centre line (N,3) and the radius at each (N,), in mm."""

    points_N3: np.ndarray
    radii_N: np.ndarray


@dataclass(frozen=True, eq=False)
class Part:
    """One shape to paint.

    tissue: as in `draw_tissues`. label: of `STRUCTURES`, or empty. within: paint only in the "cavity" or where this
    label is; empty: everywhere. pattern: paint only where this texture is ("ribs", "loops", "gas", "vessels").
    """

    shape: Solid | Tube
    tissue: str
    label: str = ""
    within: str = ""
    pattern: str = ""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts in the order of painting, and the cavity inside the body wall."""

    cavity: Solid
    parts: list[Part]


def moved(point: np.ndarray, z: float, y: float, x: float) -> np.ndarray:
    """Return the point, moved by these mm."""
    return np.asarray(point + np.array((z, y, x)))


def draw_anatomy(rng: Draws) -> Anatomy:
    """Draw a body: the parts in the order of painting, later ones over earlier ones."""
    return _Body(rng).anatomy()


class _Body:
    """One body while it is drawn. Sides are -1 (left) and 1 (right), as x is."""

    def __init__(self, rng: Draws) -> None:
        self.rng = rng
        self.breath = float(rng.uniform(-16, 16))
        self.parts: list[Part] = []
        levels = np.linspace(-260, 240, 9)
        lean = np.stack([rng.uniform(-5, 5, 9), rng.uniform(-7, 7, 9)], axis=1)
        curve = np.interp(levels, (-260, -170, -100, 0, 100, 240), (-14, 2, 6, 0, -8, -2))
        lean[:, 0] += -56 + curve
        self.spine = CubicSpline(levels, lean)
        """z -> y, x of the middle of the vertebral bodies."""

    def anatomy(self) -> Anatomy:
        cavity = self._wall()
        self._spine()
        self._chest()
        self._pelvis()
        self._bowel()
        self._abdomen()
        self._vessels()
        return Anatomy(cavity, self.parts)

    def add(
        self, shape: Solid | Tube, tissue: str, label: str = "", within: str = "cavity", pattern: str = ""
    ) -> Solid | Tube:
        self.parts.append(Part(shape, tissue, label, within, pattern))
        return shape

    def solid(self, name: str, side: float = -1.0, rough: float = 0.08, near: np.ndarray | None = None) -> Solid:
        """Draw the organ; of a pair the one on `side`; moved by `near`, if given, with what it hangs on."""
        organ = ORGANS[name]
        centre = np.array(organ.centre) + self.rng.uniform(-1, 1, 3) * organ.shift
        centre[0] += self.breath * organ.breath
        if near is not None:
            centre += near
        growth = self.rng.uniform(1 - organ.size, 1 + organ.size) * self.rng.uniform(0.92, 1.08, 3)
        angles = np.array(organ.tilt) + self.rng.uniform(-12, 12, 3)
        if side > 0:
            angles *= (-1, -1, 1)
        turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        return Solid(centre * (1, 1, -side), np.array(organ.radii) * growth, turn, rough)

    def tube(self, points: Sequence[Sequence[float] | np.ndarray], radii: Sequence[float], sway: float = 6.0) -> Tube:
        """Draw a smooth tube through the points: those between its ends are moved by up to `sway` mm."""
        knots_K3 = np.array([np.asarray(point, dtype=float) for point in points])
        knots_K3[1:-1] += self.rng.uniform(-sway, sway, (len(knots_K3) - 2, 3))
        along_K = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(knots_K3, axis=0), axis=1))])
        thick_K = np.array(radii) * self.rng.uniform(0.82, 1.2)
        count = int(along_K[-1] / max(8.0, 1.5 * float(thick_K.min()))) + 2
        at_N = np.linspace(0, along_K[-1], count)
        return Tube(CubicSpline(along_K, knots_K3)(at_N), np.interp(at_N, along_K, thick_K))

    def beside_spine(self, z: float, forward: float, right: float) -> np.ndarray:
        """Return a point at this height, in front of the vertebral bodies."""
        y, x = self.spine(z)
        return np.array((z, y + forward, x + right))

    def _wall(self) -> Solid:
        """Add skin, fat, muscle and ribs. Return the cavity inside them, which is filled with fat."""
        rng = self.rng
        cavity = Solid(np.array((0.0, 4, 0)), np.array((1e4, rng.uniform(68, 80), rng.uniform(108, 122))), rough=0.02)
        muscle = replace(cavity, centre=np.array((0.0, -4, 0)), radii=moved(cavity.radii, 0, 18, rng.uniform(9, 14)))
        fat = muscle.shrunk(-rng.uniform(3, 26) * np.array((0, 1, 0.8)))
        for shape, tissue in ((fat.shrunk((0, -3, -3)), "skin"), (fat, "fat"), (muscle, "muscle")):
            self.add(shape, tissue, within="")
        self.add(muscle.shrunk((0, 3, 2)), "cortical bone", within="", pattern="ribs")
        self.add(cavity.shrunk((0, -4, -2)), "muscle", within="")
        self.add(cavity, "inner fat", within="")
        return cavity

    def _spine(self) -> None:
        """Add discs, vertebrae with a dense shell around softer marrow, and the canal; perhaps a bone lesion."""
        size, bottom = self.rng.uniform(0.88, 1.12), -168 + self.rng.uniform(-8, 8)
        heights = np.concatenate([np.full(5, 28.0), np.linspace(23, 16, 12)]) * self.rng.uniform(0.94, 1.06)
        middles = bottom + np.cumsum(heights) - heights / 2
        every = np.linspace(middles[0] - 20, middles[-1] + 30, 12)
        discs, canal = ([self.beside_spine(z, forward, 0) for z in every] for forward in (0.0, -22 * size))
        self.add(self.tube(discs, [14 * size] * len(discs), sway=0), "disc", within="")
        bodies: list[Solid] = []
        for level, (z, height) in enumerate(zip(middles, heights, strict=True)):
            label = LUMBAR[4 - level] if level < 5 else "thoracic spine"
            bodies.append(self._vertebra(float(z), float(height), size * min(1.0, 1.12 - 0.03 * level), label))
        self.add(self.tube(canal, [8 * size] * len(canal), sway=0), "cord", within="")
        if self.rng.present(LESIONS["bone lesion"]):
            tissue = "nodule" if self.rng.present(0.6) else "cortical bone"
            self._lesion(bodies[int(self.rng.integers(5, 15))], (6, 11), tissue, "bone lesion", "thoracic spine")

    def _vertebra(self, z: float, height: float, size: float, label: str) -> Solid:
        """Add arch, transverse and spinous processes, and the body. Return the body."""
        place = self.beside_spine(z, 0, 0)
        processes = (
            ((0, -22, 0), (0.33 * height, 13, 16)),
            ((0, -22, 0), (4, 5, 33 if label in LUMBAR else 26)),
            ((-0.2 * height, -36, 0), (0.27 * height, 11, 4)),
        )
        for offset, radii in processes:
            solid = Solid(place + np.array(offset) * (1, size, size), np.array(radii) * (1, size, size))
            self.add(solid, "cortical bone", label, within="")
        body = Solid(place, np.array((0.41 * height, 17 * size, 22 * size)), power=4)
        self.add(body, "cortical bone", label, within="")
        self.add(body.shrunk(3), "marrow", label, within="")
        return body

    def _lesion(self, host: Solid, radius: tuple[float, float], tissue: str, label: str, within: str) -> None:
        """Add a lump of a radius from this range, somewhere in the host's inner part."""
        direction = self.rng.standard_normal(3)
        place = direction / np.linalg.norm(direction) * self.rng.uniform(0.1, 0.6)
        radii = self.rng.uniform(*radius) * self.rng.uniform(0.85, 1.15, 3)
        self.add(Solid(host.at(place), radii, rough=0.1), tissue, label, within)

    def _chest(self) -> None:
        """Add mediastinum, lungs with vessels and nodules, airway, oesophagus and heart."""
        rng = self.rng
        self.add(Solid(np.array((165.0, -4, 0)), np.array((130.0, 88, 50))), "inner fat")
        growth = rng.uniform(0.88, 1.1, 3)
        lungs = {}
        for side, end in ((-1.0, "left"), (1.0, "right")):
            centre = np.array((112 + self.breath / 2, rng.uniform(-3, 5), side * rng.uniform(60, 68)))
            radii = np.array((94 - self.breath / 2, 70, 49 + 3 * side)) * growth * rng.uniform(0.95, 1.05, 3)
            lung = Solid(centre, radii, rough=0.06)
            self.add(lung, "lung", f"lung {end}")
            self.add(lung, "lung vessel", f"lung {end}", f"lung {end}", "vessels")
            lungs[end] = lung
        heart = self.solid("heart")
        self.add(heart, "heart wall", "heart")
        self.add(heart.shrunk(rng.uniform(8, 12)), "heart blood", "heart")
        for end, lung in lungs.items():
            if self.rng.present(LESIONS["lung nodule"] / 2):
                self._lesion(lung, (6, 14), "nodule", f"nodule {end}", f"lung {end}")

    def _airway(self, cardia: np.ndarray) -> None:
        """Add the oesophagus, which ends at the stomach's cardia, and the trachea with the main bronchi before it."""
        gullet = [self.beside_spine(z, 27, -2) for z in (250.0, 200, 150, 100, 60)]
        oesophagus = self.tube([*gullet, moved(cardia, 14, -6, 10), cardia], [6.5] * 7, sway=5)
        self.add(oesophagus, "gut wall", "oesophagus")
        if self.rng.present(0.4):
            self.add(replace(oesophagus, radii_N=oesophagus.radii_N * 0.4), "gas", "oesophagus")
        carina = self.beside_spine(128 + self.rng.uniform(-10, 10), 42, 3)
        top = self.beside_spine(250, 42, 0)
        tubes = [self.tube([top, (top + carina) / 2, carina], [8.5] * 3, sway=6)]
        for side in (-1.0, 1.0):
            end = moved(carina, -24 - 4 * side, -6, side * 32)
            tubes.append(self.tube([carina, (carina + end) / 2, end], [6.5, 6, 5], sway=3))
        for tube in tubes:
            self.add(replace(tube, radii_N=tube.radii_N + 1.5), "gut wall")
        for tube in tubes:
            self.add(tube, "gas", "trachea")

    def _pelvis(self) -> None:
        """Add bones and muscles of the pelvis."""
        sacrum = self.solid("sacrum")
        self.add(sacrum, "cortical bone", within="")
        self.add(sacrum.shrunk(4), "marrow", within="")
        for side in (-1.0, 1.0):
            self.add(self.solid("psoas", side), "muscle")
            for name, shell in (("ilium", 3), ("femoral head", 4)):
                bone = self.solid(name, side, rough=0.04)
                self.add(bone, "cortical bone", within="")
                self.add(bone.shrunk(shell), "marrow", within="")

    def _bowel(self) -> None:
        """Add small bowel, colon and rectum, which have no label."""
        loops = Solid(np.array((-125.0, 34, 0)), np.array((90.0, 66, 110)))
        self.add(loops, "gut wall", pattern="loops")
        self.add(loops, "gas", pattern="gas")
        low = self.breath / 2
        courses = (
            [(-175, 6, 70), (-120, 6, 86), (-66 + low, 10, 84)],
            [(-66 + low, 10, 84), (-78 + low, 50, 40), (-88 + low, 58, -10), (-34 + low, 36, -76)],
            [(-34 + low, 6, -88), (-110, -6, -88), (-170, 2, -72), (-190, 12, -34), (-205, -30, -8)],
            [(-205, -30, -8), (-225, -38, 0), (-255, -36, 0)],
        )
        for points in courses:
            tube = self.tube(points, [self.rng.uniform(11, 17)] * len(points), sway=10)
            self.add(tube, "gut wall")
            inner = "gas" if self.rng.present(0.4) else "stool"
            self.add(replace(tube, radii_N=tube.radii_N - 3), inner)

    def _abdomen(self) -> None:
        """Add the organs below the diaphragm and what hangs on them."""
        stomach = self.solid("stomach", rough=0.12)
        self.add(stomach, "gut wall", "stomach")
        self.add(stomach.shrunk(4), str(self.rng.choice(("fluid", "stool", "gut wall"))), "stomach")
        if self.rng.present(0.6):
            bubble = replace(stomach, centre=moved(stomach.centre, 2, 8, 0), radii=stomach.radii * 0.5)
            self.add(bubble, "gas", "stomach", "stomach")
        self._airway(stomach.at((0.5, -0.3, 0.6)))
        if not self.rng.unusual(MISSING["spleen"]):
            self.add(self.solid("spleen", rough=0.1), "spleen", "spleen")
        liver = self.solid("liver", rough=0.1)
        self.add(self.solid("left lobe", rough=0.1), "liver", "liver")
        self.add(liver, "liver", "liver")
        bladder = self.solid("bladder")
        self.add(self.solid("pelvic organ"), "gut wall")
        self.add(bladder.shrunk(-2.5), "gut wall")
        self.add(bladder, "urine", "bladder")
        for side, end in ((-1.0, "left"), (1.0, "right")):
            self._kidney(side, end, bladder)
        if self.rng.present(LESIONS["liver tumour"]):
            for _ in range(int(self.rng.integers(1, 4))):
                self._lesion(liver, (8, 20), "liver tumour", "liver tumour", "liver")
        pushed = liver.centre - np.array(ORGANS["liver"].centre) - (self.breath, 0, 0)
        if not self.rng.unusual(MISSING["gallbladder"]):
            self.add(self.solid("gallbladder", near=pushed), "bile", "gallbladder")
        self._portal(self._pancreas(), liver)

    def _kidney(self, side: float, end: str, bladder: Solid) -> None:
        """Add a kidney, its ureter and the adrenal gland above it. Without a kidney the gland is there all the same."""
        kidney, inward = self.solid("kidney", side, near=np.array((-8.0 * (side > 0), 0, 0))), np.array((0, 0, -side))
        name = f"kidney {end}"
        apex = kidney.centre + inward * 16 + (kidney.radii[0] * 0.95, 10, 0)
        if not self.rng.unusual(MISSING[name]):
            self.add(kidney, "cortex", name)
            self.add(kidney.shrunk(kidney.radii * 0.38), "medulla", name)
            if self.rng.present(CYST):
                self._lesion(kidney, (5, 10), "bile", name, name)
            if self.rng.present(LESIONS["kidney tumour"] / 2):
                self._lesion(kidney, (8, 15), "kidney tumour", f"kidney tumour {end}", name)
            hilum = kidney.centre + inward * kidney.radii[2] * 0.75 + (0, 3, 0)
            self.add(Solid(hilum, np.array((11.0, 5, 7))), "urine")
            self.add(self._ureter(hilum + inward * 5, bladder, side), "urine", f"ureter {end}")
        for limb in (-5.0, 7.0):
            tip = moved(apex, -16, -15, side * limb)
            gland = self.tube([apex, (apex + tip) / 2, tip], [3.8, 3.6, 3.0], sway=2)
            self.add(gland, "adrenal", f"adrenal gland {end}")

    def _ureter(self, start: np.ndarray, bladder: Solid, side: float) -> Tube:
        """Draw the tube from the kidney over the psoas and the iliac vessels into the back of the bladder."""
        course = ((-105, 26, 34), (-135, 34, 32), (-168, 36, 36), (-192, 30, 44))
        below = [self.beside_spine(z, forward, side * out) for z, forward, out in course if z < start[0] - 12]
        points = [start, *below, bladder.at((-0.3, -0.75, side * 0.55))]
        return self.tube(points, [3.2] * len(points), sway=6)

    def _pancreas(self) -> np.ndarray:
        """Add the pancreas, a bent tube, and return the place of its neck."""
        shift = self.rng.uniform(-1, 1, 3) * (14, 8, 10) + (0.7 * self.breath, 0, 0)
        course = ((-72, 6, 34), (-54, 10, 24), (-42, 18, 0), (-30, 4, -34), (-18, -14, -66))
        points = [np.array(point) + shift for point in course]
        self.add(self.tube(points, [10, 11, 7.5, 8, 6.5]), "pancreas", "pancreas")
        return np.asarray(points[2])

    def _portal(self, neck: np.ndarray, liver: Solid) -> None:
        """Add the portal vein: from behind the pancreas into both lobes of the liver."""
        start, hilum = moved(neck, -4, -12, 6), liver.at((-0.25, 0, -0.5))
        trunk = self.tube([start, (start + hilum) / 2, hilum], [6.5, 6.5, 6], sway=5)
        right = self.tube([hilum, liver.at((-0.1, 0, -0.1)), liver.at((0.1, 0.1, 0.35))], [6, 5, 3.5], sway=4)
        left = self.tube([hilum, moved(hilum, 14, 14, -14), moved(hilum, 22, 30, -24)], [5.5, 4.5, 3.5], sway=4)
        for tube in (trunk, right, left):
            self.add(tube, "portal vein", "portal vein")

    def _vessels(self) -> None:
        """Add the vena cava, the aorta from the heart to its bifurcation, and the vessels of the pelvis."""
        split = -136 + float(self.rng.uniform(-16, 16))
        fork = self.beside_spine(split, 27, -3)
        confluence = self.beside_spine(split - 10, 24, 12)
        heights = np.linspace(40 + self.breath / 2, split + 22, 5)
        cava = [np.array((62 + self.breath / 2, 8, 20)), *(self.beside_spine(z, 27, 20) for z in heights), confluence]
        self.add(self.tube(cava, [11, 11, 11, 10, 10, 9, 8.5], sway=5), "vein", "inferior vena cava")
        for side in (-1.0, 1.0):
            course = [moved(fork, -34, 0, side * 24), np.array((-206, 2, side * 48)), np.array((-258, 30, side * 56))]
            vein = [
                moved(confluence, -30, -8, side * 20),
                np.array((-208, -12, side * 44)),
                np.array((-258, 20, side * 46)),
            ]
            self.add(self.tube([confluence, *vein], [7, 6.5, 6, 5.5], sway=5), "vein")
            self.add(self.tube([fork, *course], [6, 5.5, 5, 4.5], sway=6), "aorta", "iliac arteries")
        heights = np.linspace(95, split + 25, 6)
        arch = [
            np.array((84, 14, 2)),
            np.array((122, 16, 6)),
            self.beside_spine(154, 42, -6),
            self.beside_spine(132, 28, -14),
        ]
        descent = [
            self.beside_spine(z, 28, -12 + 8 * share) for z, share in zip(heights, np.linspace(0, 1, 6), strict=True)
        ]
        radii = [13, 13, 12, 11.5, *np.linspace(11.5, 9, 6), 8.5]
        self.add(self.tube([*arch, *descent, fork], radii, sway=6), "aorta", "aorta")
