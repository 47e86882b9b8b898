"""Vehicles: name -> (default main colour, parts). Free units, front +z, own left +x; `objects.py` normalises them."""

from toybox.primitives import Main, Part, Vec3, pair

GLASS: Vec3 = (0.45, 0.75, 0.95)
TYRE: Vec3 = (0.10, 0.10, 0.11)
STEEL: Vec3 = (0.55, 0.57, 0.60)
LIGHT: Vec3 = (1.00, 0.95, 0.55)
TAIL: Vec3 = (0.80, 0.05, 0.05)
WHITE: Vec3 = (0.93, 0.93, 0.93)
SIDEWAYS: Vec3 = (0.0, 0.0, 90.0)  # axis y -> x
FORWARD: Vec3 = (90.0, 0.0, 0.0)  # axis y -> z


def wheels(radius: float, x: float, y: float, *positions: float) -> list[Part]:
    """Pairs of tyres with hubs at the given z."""
    parts: list[Part] = []
    for z in positions:
        parts += pair(Part("cylinder", (radius, 0.10, 0.03), (x - 0.01, y, z), SIDEWAYS, TYRE))
        parts += pair(Part("ellipsoid", (0.09, radius * 0.5, radius * 0.5), (x + 0.04, y, z), color=STEEL))
    return parts


VEHICLES: dict[str, tuple[Vec3, list[Part]]] = {
    "car": (
        (0.80, 0.12, 0.10),
        [
            Part("box", (0.42, 0.19, 0.90, 0.10), (0, 0.0, 0)),
            Part("box", (0.36, 0.22, 0.44, 0.12), (0, 0.30, -0.14)),
            Part("box", (0.30, 0.13, 0.07, 0.04), (0, 0.32, 0.26), color=GLASS, face=True),
            Part("box", (0.30, 0.11, 0.07, 0.04), (0, 0.32, -0.54), color=(0.15, 0.20, 0.28)),
            *pair(Part("box", (0.07, 0.11, 0.32, 0.04), (0.315, 0.32, -0.14), color=(0.15, 0.20, 0.28))),
            *pair(Part("ellipsoid", (0.11, 0.09, 0.08), (0.26, 0.05, 0.87), color=LIGHT, face=True)),
            Part("box", (0.20, 0.07, 0.07, 0.02), (0, -0.08, 0.86), color=TYRE, face=True),
            *pair(Part("box", (0.09, 0.07, 0.07, 0.02), (0.27, 0.04, -0.86), color=TAIL)),
            *wheels(0.20, 0.38, -0.18, 0.52, -0.52),
        ],
    ),
    "truck": (
        (0.15, 0.45, 0.80),
        [
            Part("box", (0.36, 0.08, 0.95, 0.03), (0, -0.28, 0), color=(0.25, 0.25, 0.27)),
            Part("box", (0.42, 0.42, 0.58, 0.03), (0, 0.24, -0.36)),
            *pair(Part("box", (0.08, 0.08, 0.59, 0.01), (0.35, 0.24, -0.36), color=WHITE)),
            Part("box", (0.36, 0.08, 0.08, 0.01), (0, 0.24, -0.88), color=WHITE),
            Part("box", (0.38, 0.30, 0.26, 0.08), (0, 0.06, 0.62), color=Main(0.8)),
            Part("box", (0.31, 0.11, 0.08, 0.03), (0, 0.18, 0.82), color=GLASS, face=True),
            *pair(Part("box", (0.08, 0.10, 0.12, 0.03), (0.32, 0.18, 0.68), color=(0.15, 0.20, 0.28))),
            Part("box", (0.16, 0.08, 0.08, 0.02), (0, -0.12, 0.83), color=TYRE, face=True),
            *pair(Part("ellipsoid", (0.10, 0.10, 0.09), (0.27, -0.11, 0.84), color=LIGHT, face=True)),
            *wheels(0.19, 0.36, -0.36, 0.60, -0.28, -0.70),
        ],
    ),
    "train": (
        (0.10, 0.40, 0.22),
        [
            Part("box", (0.34, 0.09, 0.95, 0.03), (0, -0.24, 0), color=TYRE),
            Part("cylinder", (0.30, 0.60, 0.04), (0, 0.12, 0.28), FORWARD),
            Part("cylinder", (0.24, 0.09, 0.03), (0, 0.12, 0.85), FORWARD, STEEL, face=True),
            Part("ellipsoid", (0.12, 0.12, 0.10), (0, 0.14, 0.92), color=LIGHT, face=True),
            Part("cylinder", (0.32, 0.09, 0.02), (0, 0.12, 0.32), FORWARD, (0.85, 0.68, 0.20)),
            Part("cone", (0.09, 0.17, 0.20), (0, 0.55, 0.62), color=TYRE),
            Part("ellipsoid", (0.14, 0.16, 0.14), (0, 0.42, 0.10), color=(0.85, 0.68, 0.20)),
            Part("box", (0.38, 0.42, 0.30, 0.03), (0, 0.22, -0.55)),
            Part("box", (0.46, 0.09, 0.40, 0.05), (0, 0.68, -0.55), color=Main(0.55)),
            *pair(Part("box", (0.09, 0.13, 0.16, 0.02), (0.31, 0.38, -0.55), color=GLASS)),
            Part("prism", (0.30, 0.14, 0.14), (0, -0.34, 0.92), color=(0.75, 0.15, 0.10), face=True),
            *wheels(0.20, 0.34, -0.34, 0.55, 0.08, -0.45),
        ],
    ),
    "airplane": (
        (0.75, 0.80, 0.86),
        [
            Part("ellipsoid", (0.25, 0.25, 0.95), (0, 0, 0)),
            Part("box", (0.88, 0.08, 0.25, 0.06), (0, -0.05, 0.12)),
            *pair(Part("ellipsoid", (0.13, 0.13, 0.24), (0.47, -0.15, 0.24), color=(0.85, 0.15, 0.12))),
            Part("box", (0.38, 0.075, 0.15, 0.06), (0, 0.08, -0.80)),
            Part("box", (0.075, 0.26, 0.17, 0.06), (0, 0.28, -0.80), (-20, 0, 0), (0.85, 0.15, 0.12)),
            Part("ellipsoid", (0.17, 0.15, 0.22), (0, 0.15, 0.54), color=(0.10, 0.15, 0.28)),
            Part("ellipsoid", (0.13, 0.13, 0.13), (0, 0, 0.88), color=(0.85, 0.15, 0.12)),
        ],
    ),
    "boat": (
        (0.15, 0.42, 0.62),
        [
            Part("ellipsoid", (0.40, 0.40, 0.95), (0, -0.34, 0)),
            Part("box", (0.34, 0.14, 0.62, 0.10), (0, -0.20, -0.20)),
            Part("prism", (0.30, 0.30, 0.17), (0, -0.14, 0.62), (90, 0, 0)),
            Part("box", (0.27, 0.08, 0.55, 0.05), (0, -0.09, -0.20), color=(0.82, 0.64, 0.40)),
            Part("box", (0.24, 0.20, 0.36, 0.04), (0, 0.16, -0.10), color=WHITE),
            *pair(Part("box", (0.08, 0.07, 0.10, 0.02), (0.18, 0.20, 0.04), color=GLASS)),
            *pair(Part("box", (0.08, 0.07, 0.10, 0.02), (0.18, 0.20, -0.26), color=GLASS)),
            Part("box", (0.18, 0.075, 0.08, 0.02), (0, 0.20, 0.21), color=(0.10, 0.15, 0.28), face=True),
            Part("cylinder", (0.14, 0.22, 0.0), (0, 0.54, -0.18), color=(0.85, 0.20, 0.12)),
            Part("cylinder", (0.15, 0.08, 0.0), (0, 0.73, -0.18), color=TYRE),
        ],
    ),
    "rocket": (
        (0.85, 0.86, 0.90),
        [
            Part("ellipsoid", (0.30, 0.78, 0.30), (0, 0.05, 0)),
            Part("cylinder", (0.27, 0.30, 0.05), (0, -0.30, 0)),
            Part("cone", (0.22, 0.02, 0.22), (0, 0.74, 0), color=(0.85, 0.12, 0.10)),
            *pair(Part("box", (0.18, 0.20, 0.08, 0.04), (0.34, -0.50, 0), (0, 0, 25), (0.85, 0.12, 0.10))),
            Part("box", (0.08, 0.20, 0.18, 0.04), (0, -0.50, -0.34), (25, 0, 0), (0.85, 0.12, 0.10)),
            Part("cone", (0.22, 0.14, 0.09), (0, -0.68, 0), color=(0.20, 0.20, 0.22)),
            Part("torus", (0.14, 0.065), (0, 0.26, 0.235), (80, 0, 0), (0.25, 0.26, 0.30), face=True),
            Part("ellipsoid", (0.12, 0.12, 0.07), (0, 0.26, 0.26), color=(0.20, 0.60, 0.95), face=True),
        ],
    ),
}
