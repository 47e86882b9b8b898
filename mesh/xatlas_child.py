"""Run by `mesh.unwrap` as a process of its own, because xatlas can crash: xatlas_child.py INPUT.npz OUTPUT.npz

INPUT: vertices [V 3] float32, faces [F 3], part [F] (which piece a face belongs to), resolution, padding (texels). OUTPUT: uvs [T 2] in
[0, 1], uv_faces [F 3]. Exit status 3: xatlas is not installed.
"""

import sys

import numpy as np


def main(source: str, target: str) -> int:
    try:
        import xatlas
    except ImportError:
        return 3
    given = np.load(source)
    vertices, faces, part = given["vertices"], given["faces"], given["part"]
    atlas = xatlas.Atlas()
    pieces = [np.flatnonzero(part == i) for i in range(part.max() + 1)]
    for piece in pieces:
        used, corners = np.unique(faces[piece], return_inverse=True)
        atlas.add_mesh(vertices[used], corners.reshape(-1, 3).astype(np.uint32))
    options = xatlas.PackOptions()
    options.resolution, options.padding = int(given["resolution"]), int(given["padding"])
    atlas.generate(pack_options=options)
    if atlas.atlas_count != 1:
        return 4
    uvs, uv_faces, count = [], np.zeros(faces.shape, np.int64), 0
    for i, piece in enumerate(pieces):
        _, corners, places = atlas.get_mesh(i)
        uv_faces[piece] = corners.astype(np.int64) + count
        uvs.append(places)
        count += len(places)
    np.savez(target, uvs=np.concatenate(uvs), uv_faces=uv_faces)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
