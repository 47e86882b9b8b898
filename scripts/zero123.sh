#!/usr/bin/env bash
# Zero-1-to-3 from one picture: a field, its surface. scripts/zero123.sh mug_rgba.png mug --sd_version embedded
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
takes=IMAGE
begin "Zero-1-to-3: a field (configs/systems/zero123.yaml), then its surface (zero123-geometry.yaml) with a mesh at the end.
PRIOR=stable begins with Stable-Zero123 (stable-zero123.yaml)." "$@"

case "${PRIOR-}" in
    '') first=zero123 ;;
    stable) first=stable-zero123 ;;
    *) complain "PRIOR=$PRIOR: must be stable, or not set" ;;
esac
stage "$first"
stage zero123-geometry --init_with "$folder/$first" --save_mesh
