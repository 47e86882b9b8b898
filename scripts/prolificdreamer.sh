#!/usr/bin/env bash
# ProlificDreamer: a field, its surface, its colors. scripts/prolificdreamer.sh "a red chair" chair --sd_version embedded
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
begin "ProlificDreamer: a field (configs/systems/prolificdreamer.yaml), its surface (prolificdreamer-geometry.yaml), the surface's colors
(prolificdreamer-texture.yaml) with a mesh at the end." "$@"

stage prolificdreamer
stage prolificdreamer-geometry --init_with "$folder/prolificdreamer"
stage prolificdreamer-texture --init_with "$folder/prolificdreamer-geometry" --save_mesh
