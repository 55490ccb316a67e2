"""What a phantom is made of, as tables: structures and categories, tissues in contrast phases, organs, and shares.

`STRUCTURES` gives each structure a label value, and `CATEGORIES` are sets of them. `draw_tissues` draws a contrast
phase and from it the Hounsfield units of all tissues together. `phantom_body` draws bodies from the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from segvol_pl.packing.phantom_draws import Draws

LUMBAR = ("vertebra L1", "vertebra L2", "vertebra L3", "vertebra L4", "vertebra L5")

STRUCTURES = (
    *("lung left", "lung right", "spleen", "kidney left", "liver", "kidney right", "thoracic spine", "aorta"),
    *("liver tumour", "heart", "stomach", "bladder", "gallbladder", "pancreas", "oesophagus", "trachea"),
    *("inferior vena cava", "portal vein", "adrenal gland left", "adrenal gland right", "ureter left", "ureter right"),
    *("iliac arteries", "nodule left", "nodule right", "kidney tumour left", "kidney tumour right", "bone lesion"),
    *LUMBAR,
)
"""The label values 1, 2, ... in order."""

VALUE = {name: value for value, name in enumerate(STRUCTURES, 1)}

_SETS = {
    "lung left": ("lung left", "nodule left"),
    "lung right": ("lung right", "nodule right"),
    "liver": ("liver", "liver tumour"),
    "kidney left": ("kidney left", "kidney tumour left"),
    "kidney right": ("kidney right", "kidney tumour right"),
    "spine": ("thoracic spine", *LUMBAR, "bone lesion"),
    "lung nodule": ("nodule left", "nodule right"),
    "kidney tumour": ("kidney tumour left", "kidney tumour right"),
}

_NAMES = (
    *("lung left", "lung right", "liver", "spleen", "kidney left", "kidney right", "spine", "aorta", "liver tumour"),
    *("heart", "stomach", "bladder", "gallbladder", "pancreas", "oesophagus", "trachea", "inferior vena cava"),
    *("portal vein", "adrenal gland left", "adrenal gland right", "ureter left", "ureter right", "iliac arteries"),
    *("lung nodule", "kidney tumour", "bone lesion", *LUMBAR),
)

CATEGORIES: dict[str, list[int]] = {name: [VALUE[part] for part in _SETS.get(name, (name,))] for name in _NAMES}
"""Category -> label values; an organ holds its tumour, the spine its vertebrae."""

MISSING = {"spleen": 0.06, "kidney left": 0.05, "kidney right": 0.05, "gallbladder": 0.2}
"""Share of phantoms without the organ."""

LESIONS = {"liver tumour": 0.7, "lung nodule": 0.55, "kidney tumour": 0.4, "bone lesion": 0.4}
"""Share of phantoms with the lesion, if its organ is there."""

CYST = 0.3
"""Share of kidneys with a cyst, which is part of the kidney."""

PHASES = {"native": 0.2, "arterial": 0.2, "portal venous": 0.45, "late": 0.15}
"""Contrast phase -> share of phantoms."""

_ENHANCED = {
    "aorta": (42, 320, 165, 120),
    "vein": (40, 70, 150, 118),
    "portal vein": (40, 95, 178, 122),
    "heart wall": (42, 110, 100, 90),
    "heart blood": (42, 260, 155, 118),
    "liver": (58, 68, 106, 92),
    "liver tumour": (34, 42, 62, 62),
    "spleen": (48, 128, 122, 98),
    "cortex": (34, 175, 190, 160),
    "medulla": (30, 75, 165, 170),
    "kidney tumour": (36, 105, 85, 70),
    "pancreas": (42, 108, 95, 80),
    "adrenal": (28, 65, 80, 62),
    "gut wall": (40, 72, 82, 70),
    "urine": (4, 4, 6, 330),
    "muscle": (52, 56, 60, 60),
}
"""Tissue -> Hounsfield units in each phase."""

_PLAIN = {
    "skin": (10, 30),
    "fat": (-112, -95),
    "inner fat": (-105, -88),
    "lung": (-880, -810),
    "lung vessel": (-200, -100),
    "gas": (-1000, -950),
    "fluid": (-5, 35),
    "stool": (20, 70),
    "bile": (2, 18),
    "nodule": (20, 60),
    "cord": (25, 40),
    "disc": (70, 110),
    "cortical bone": (450, 700),
    "marrow": (130, 320),
    "metal": (3000, 3000),
}
"""Tissue without contrast -> range of Hounsfield units."""


@dataclass(frozen=True)
class Organ:
    """The mean of an organ and how far it varies: `shift` in mm along z, y, x; `size` as a share of the radii."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    tilt: tuple[float, float, float] = (0, 0, 0)
    shift: tuple[float, float, float] = (6, 6, 6)
    size: float = 0.2
    breath: float = 0.0
    """Share of the diaphragm's movement that the organ follows."""
    tissue: str = ""


# Of a pair the left one: `phantom_body` mirrors it. Tilts in degrees around z, y, x.
ORGANS = {
    "heart": Organ((66, 20, -18), (42, 38, 46), (-25, 15, 0), (9, 8, 8), 0.2, 0.4, "heart wall"),
    "liver": Organ((-4, 4, 66), (60, 64, 52), (0, 10, 0), (8, 7, 8), 0.18, 1.0, "liver"),
    "left lobe": Organ((10, 36, 14), (27, 30, 56), (15, 10, 0), (8, 8, 14), 0.25, 1.0, "liver"),
    "spleen": Organ((2, -30, -90), (38, 34, 22), (20, 15, 0), (15, 12, 7), 0.3, 0.9, "spleen"),
    "stomach": Organ((2, 26, -56), (30, 25, 42), (0, -25, 0), (16, 14, 14), 0.3, 0.7, "gut wall"),
    "kidney": Organ((-58, -40, -56), (42, 20, 24), (20, 15, 10), (20, 6, 7), 0.22, 0.6, "cortex"),
    "bladder": Organ((-205, 14, 0), (21, 23, 29), (0, 0, 0), (10, 8, 9), 0.35, 0.0, "urine"),
    "gallbladder": Organ((-44, 36, 46), (20, 11, 11), (0, 15, 30), (14, 9, 13), 0.3, 1.0, "bile"),
    "psoas": Organ((-120, -40, -38), (78, 15, 15), (0, 8, -5), (5, 4, 4), 0.2, 0.0, "muscle"),
    "ilium": Organ((-182, -26, -80), (50, 46, 9), (25, 30, 0), (5, 5, 5), 0.1, 0.0, "cortical bone"),
    "femoral head": Organ((-238, 2, -84), (23, 22, 22), (0, 0, 0), (4, 4, 4), 0.1, 0.0, "cortical bone"),
    "sacrum": Organ((-197, -60, 0), (36, 15, 42), (0, 0, -20), (4, 3, 3), 0.1, 0.0, "cortical bone"),
    "pelvic organ": Organ((-222, -16, 0), (22, 18, 24), (0, 0, 0), (8, 6, 6), 0.3, 0.0, "gut wall"),
    "sternum": Organ((110, 70, 0), (75, 6, 15), (0, 0, 0), (5, 3, 3), 0.1, 0.0, "cortical bone"),
}


def draw_tissues(rng: Draws) -> dict[str, float]:
    """Draw a contrast phase and return the Hounsfield units of each tissue in it."""
    phase = int(rng.choice(range(len(PHASES)), list(PHASES.values())))
    strength = rng.uniform(0.8, 1.2)
    tissues = {}
    for name, levels in _ENHANCED.items():
        tissues[name] = levels[0] + strength * (levels[phase] - levels[0]) + rng.uniform(-6, 6)
    if rng.unusual(0.15):  # a fatty liver
        tissues["liver"] -= rng.uniform(15, 45)
    return tissues | {name: float(rng.uniform(low, high)) for name, (low, high) in _PLAIN.items()}
