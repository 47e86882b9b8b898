#!/usr/bin/env bash
# Fantasia3D: a surface by its normals, then its material. scripts/fantasia3d.sh "a red chair" chair --shape_init "ellipsoid 0.3 0.6 0.3"
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
begin "Fantasia3D: a surface from --shape_init (configs/systems/fantasia3d.yaml), then its physically based material (fantasia3d-texture.yaml)
with a mesh at the end." "$@"

stage fantasia3d
stage fantasia3d-texture --init_with "$folder/fantasia3d" --save_mesh
