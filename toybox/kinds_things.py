"""Furniture, buildings and household things: name -> (default main colour, parts). Free units, front +z, own left +x."""

from toybox.primitives import Main, Part, Vec3, pair

DARK: Vec3 = (0.18, 0.18, 0.20)
WHITE: Vec3 = (0.94, 0.94, 0.94)
CREAM: Vec3 = (0.95, 0.88, 0.72)
WOOD: Vec3 = (0.42, 0.26, 0.14)
GLASS: Vec3 = (0.45, 0.75, 0.95)
ROOF: Vec3 = (0.62, 0.20, 0.14)
GOLD: Vec3 = (0.88, 0.68, 0.18)


def legs(x: float, z: float, y: float, half: float, radius: float, color: Vec3 | Main) -> list[Part]:
    """Four vertical legs."""
    return [p for dz in (z, -z) for p in pair(Part("cylinder", (radius, half, 0.02), (x, y, dz), color=color))]


THINGS: dict[str, tuple[Vec3, list[Part]]] = {
    "chair": (
        (0.72, 0.46, 0.22),
        [
            Part("box", (0.42, 0.08, 0.40, 0.03), (0, -0.08, 0)),
            Part("box", (0.36, 0.07, 0.32, 0.05), (0, 0.01, 0.04), color=CREAM),
            Part("box", (0.42, 0.44, 0.08, 0.04), (0, 0.40, -0.34)),
            *legs(0.34, 0.32, -0.48, 0.36, 0.08, Main(0.75)),
        ],
    ),
    "table": (
        (0.60, 0.36, 0.16),
        [
            Part("box", (0.80, 0.08, 0.52, 0.03), (0, 0.30, 0)),
            Part("box", (0.66, 0.08, 0.40, 0.01), (0, 0.18, 0), color=Main(0.8)),
            *legs(0.66, 0.38, -0.20, 0.46, 0.09, Main(0.7)),
        ],
    ),
    "sofa": (
        (0.55, 0.20, 0.28),
        [
            Part("box", (0.78, 0.16, 0.38, 0.04), (0, -0.20, 0), color=Main(0.85)),
            Part("box", (0.72, 0.34, 0.14, 0.08), (0, 0.16, -0.30)),
            *pair(Part("box", (0.14, 0.26, 0.40, 0.08), (0.76, -0.06, 0.02))),
            *pair(Part("box", (0.30, 0.09, 0.28, 0.06), (0.31, 0.02, 0.10))),
            *pair(Part("box", (0.17, 0.17, 0.08, 0.05), (0.38, 0.24, -0.10), (-18, 0, 0), CREAM)),
            *legs(0.70, 0.26, -0.38, 0.09, 0.08, WOOD),
        ],
    ),
    "bed": (
        (0.20, 0.40, 0.75),
        [
            Part("box", (0.50, 0.12, 0.82, 0.03), (0, -0.22, 0), color=Main(0.6)),
            Part("box", (0.46, 0.12, 0.78, 0.06), (0, -0.06, 0), color=WHITE),
            Part("box", (0.51, 0.13, 0.52, 0.06), (0, -0.05, 0.28)),
            Part("box", (0.54, 0.42, 0.08, 0.05), (0, 0.04, -0.84), color=Main(0.6)),
            Part("box", (0.54, 0.20, 0.08, 0.05), (0, -0.17, 0.84), color=Main(0.6)),
            Part("ellipsoid", (0.34, 0.11, 0.18), (0, 0.10, -0.56), color=WHITE),
            *legs(0.44, 0.80, -0.38, 0.10, 0.08, Main(0.6)),
        ],
    ),
    "lamp": (
        (0.98, 0.82, 0.35),
        [
            Part("cylinder", (0.38, 0.07, 0.03), (0, -0.74, 0), color=DARK),
            Part("cylinder", (0.09, 0.46, 0.0), (0, -0.30, 0), color=DARK),
            Part("ellipsoid", (0.15, 0.12, 0.15), (0, -0.42, 0), color=GOLD),
            Part("cone", (0.54, 0.28, 0.32), (0, 0.40, 0)),
            Part("cylinder", (0.30, 0.06, 0.02), (0, 0.71, 0), color=Main(0.7)),
            Part("ellipsoid", (0.07, 0.09, 0.07), (0, 0.82, 0), color=GOLD),
        ],
    ),
    "mug": (
        (0.20, 0.45, 0.75),
        [
            Part("cylinder", (0.46, 0.52, 0.05), (0, 0, 0)),
            Part("torus", (0.42, 0.07), (0, 0.49, 0)),
            Part("cylinder", (0.39, 0.06, 0.01), (0, 0.49, 0), color=(0.25, 0.13, 0.07)),
            Part("torus", (0.26, 0.09), (0.50, 0.0, 0), (90, 0, 0), Main(0.85)),
        ],
    ),
    "teapot": (
        (0.30, 0.62, 0.60),
        [
            Part("ellipsoid", (0.50, 0.42, 0.50), (0, -0.08, 0)),
            Part("cylinder", (0.30, 0.07, 0.02), (0, -0.46, 0), color=Main(0.75)),
            Part("cone", (0.15, 0.08, 0.28), (0.62, 0.08, 0), (0, 0, -48), Main(0.9)),
            Part("torus", (0.24, 0.08), (-0.54, 0.0, 0), (90, 0, 0), Main(0.75)),
            Part("ellipsoid", (0.32, 0.12, 0.32), (0, 0.28, 0), color=WHITE),
            Part("ellipsoid", (0.10, 0.10, 0.10), (0, 0.44, 0), color=Main(0.75)),
        ],
    ),
    "bottle": (
        (0.12, 0.48, 0.22),
        [
            Part("cylinder", (0.32, 0.44, 0.06), (0, -0.38, 0)),
            Part("cone", (0.31, 0.12, 0.17), (0, 0.20, 0)),
            Part("cylinder", (0.12, 0.26, 0.0), (0, 0.52, 0)),
            Part("cylinder", (0.15, 0.10, 0.02), (0, 0.78, 0), color=(0.80, 0.20, 0.15)),
            Part("cylinder", (0.335, 0.22, 0.01), (0, -0.40, 0), color=CREAM),
            Part("ellipsoid", (0.14, 0.14, 0.06), (0, -0.40, 0.31), color=(0.80, 0.20, 0.15), face=True),
        ],
    ),
    "hat": (
        (0.16, 0.15, 0.18),
        [
            Part("cylinder", (0.72, 0.07, 0.05), (0, -0.40, 0)),
            Part("cone", (0.42, 0.46, 0.42), (0, 0.02, 0)),
            Part("cylinder", (0.45, 0.11, 0.01), (0, -0.24, 0), color=(0.80, 0.12, 0.15)),
        ],
    ),
    "guitar": (
        (0.85, 0.50, 0.18),
        [
            Part("ellipsoid", (0.40, 0.36, 0.15), (0, -0.58, 0)),
            Part("ellipsoid", (0.30, 0.28, 0.14), (0, -0.18, 0)),
            Part("cylinder", (0.13, 0.07, 0.01), (0, -0.32, 0.10), (90, 0, 0), DARK, face=True),
            Part("box", (0.18, 0.06, 0.07, 0.02), (0, -0.68, 0.12), color=DARK, face=True),
            Part("box", (0.09, 0.36, 0.08, 0.02), (0, 0.24, 0.06), color=WOOD),
            Part("box", (0.15, 0.15, 0.08, 0.03), (0, 0.66, 0.03), color=Main(0.6)),
            *pair(Part("ellipsoid", (0.08, 0.065, 0.065), (0.16, 0.73, 0.03), color=WHITE)),
            *pair(Part("ellipsoid", (0.08, 0.065, 0.065), (0.16, 0.58, 0.03), color=WHITE)),
        ],
    ),
    "house": (
        (0.93, 0.83, 0.60),
        [
            Part("box", (0.58, 0.42, 0.48, 0.01), (0, -0.24, 0)),
            Part("prism", (0.56, 0.24, 0.66), (0, 0.40, 0), (0, 90, 0), ROOF),
            Part("box", (0.10, 0.26, 0.10, 0.01), (0.34, 0.56, -0.16), color=(0.45, 0.42, 0.42)),
            Part("box", (0.13, 0.23, 0.08, 0.01), (0, -0.43, 0.43), color=WOOD, face=True),
            *pair(Part("box", (0.12, 0.12, 0.08, 0.01), (0.36, -0.16, 0.43), color=GLASS, face=True)),
            *pair(Part("box", (0.08, 0.12, 0.14, 0.01), (0.53, -0.16, 0), color=GLASS)),
        ],
    ),
    "castle": (
        (0.62, 0.62, 0.66),
        [
            Part("box", (0.46, 0.30, 0.46, 0.01), (0, -0.30, 0)),
            Part("box", (0.32, 0.44, 0.32, 0.01), (0, 0.04, -0.05), color=Main(0.85)),
            *(
                part
                for z in (0.46, -0.46)
                for part in (
                    *pair(Part("cylinder", (0.17, 0.42, 0.0), (0.46, -0.18, z), color=Main(0.92))),
                    *pair(Part("cone", (0.23, 0.01, 0.20), (0.46, 0.42, z), color=(0.20, 0.30, 0.62))),
                )
            ),
            Part("cone", (0.40, 0.01, 0.24), (0, 0.72, -0.05), color=(0.20, 0.30, 0.62)),
            Part("box", (0.15, 0.20, 0.09, 0.02), (0, -0.40, 0.40), color=(0.28, 0.16, 0.09), face=True),
        ],
    ),
}
