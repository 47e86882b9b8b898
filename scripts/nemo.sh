#!/usr/bin/env bash
# NeMo's DreamFusion and DMTet. scripts/nemo.sh "a hamburger" hamburger --sd_version embedded
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
begin "NeMo's DreamFusion (configs/systems/nemo-dreamfusion.yaml), then DreamFusion-DMTet (nemo-dmtet.yaml) with a mesh at the end." "$@"

stage nemo-dreamfusion
stage nemo-dmtet --init_with "$folder/nemo-dreamfusion" --save_mesh
