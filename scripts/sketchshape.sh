#!/usr/bin/env bash
# Sketch-Shape: Latent-NeRF inside a rough shape. scripts/sketchshape.sh "a teddy in a tuxedo" teddy --guide_shape teddy.obj
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
begin "Sketch-Shape: a field of the prior's latents that fills a rough shape (configs/systems/sketchshape.yaml), then of colors
(sketchshape-refine.yaml) with a mesh at the end. The shape is a mesh file: --guide_shape FILE." "$@"

[[ " ${flags[*]-} " == *" --guide_shape"[\ =]* ]] || complain "--guide_shape is missing: name the mesh file of the rough shape"
stage sketchshape
stage sketchshape-refine --init_with "$folder/sketchshape" --save_mesh
