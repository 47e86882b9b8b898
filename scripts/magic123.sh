#!/usr/bin/env bash
# Magic123 from one picture and words: a field, its surface. scripts/magic123.sh mug_rgba.png "a blue mug" mug --sd_version embedded
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
takes="IMAGE PROMPT"
begin "Magic123: a field (configs/systems/magic123-coarse.yaml), then its surface (magic123-refine.yaml) with a mesh at the end." "$@"

stage magic123-coarse
stage magic123-refine --init_with "$folder/magic123-coarse" --save_mesh
