#!/usr/bin/env bash
# Magic3D: a field, then its surface at eight times the resolution. scripts/magic3d.sh "a red chair" chair --sd_version embedded
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
begin "Magic3D: a field (configs/systems/magic3d-coarse-sd.yaml), then its surface (magic3d-refine-sd.yaml) with a mesh at the end.
PRIOR=if begins with DeepFloyd IF (magic3d-coarse-if.yaml)." "$@"

case "${PRIOR-sd}" in
    sd | if) coarse=magic3d-coarse-${PRIOR-sd} ;;
    *) complain "PRIOR=$PRIOR: must be sd or if" ;;
esac
stage "$coarse"
stage magic3d-refine-sd --init_with "$folder/$coarse" --save_mesh
