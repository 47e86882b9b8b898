#!/usr/bin/env bash
# stable-dreamfusion's way from pictures, with or without words. scripts/image.sh mug_rgba.png "a blue mug" mug --sd_version embedded
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
takes="IMAGE [PROMPT]"
begin "From pictures as stable-dreamfusion does: a field (configs/systems/image-text.yaml; without a prompt image.yaml), then its surface
(image-text-refine.yaml, image-refine.yaml) with a mesh at the end." "$@"

first=image${prompt:+-text}
stage "$first"
stage "$first-refine" --init_with "$folder/$first" --save_mesh
