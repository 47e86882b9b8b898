#!/usr/bin/env bash
# Latent-NeRF: a field of latents, then of colors. scripts/latentnerf.sh "a red chair" chair --sd_version embedded
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
begin "Latent-NeRF: a field of the prior's latents (configs/systems/latentnerf.yaml), then of colors (latentnerf-refine.yaml) with a mesh at the end." "$@"

stage latentnerf
stage latentnerf-refine --init_with "$folder/latentnerf" --save_mesh
