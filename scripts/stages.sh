#!/usr/bin/env bash
# What the scripts of the systems with several stages share; they read it, it does nothing by itself.
#
#   begin "what it is" "$@"          reads: "PROMPT" FOLDER [flags of main.py, for every stage]; sets prompt, folder, flags, and image with
#   takes=IMAGE                      before it: IMAGE FOLDER; takes="IMAGE PROMPT", takes="IMAGE [PROMPT]": IMAGE "PROMPT" FOLDER
#   stage NAME [flags]               one run in FOLDER/NAME with configs/systems/NAME.yaml, unless it is finished; goes on where one was stopped
#
# Each stage's flags stand before those of the user, which win.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

complain() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

takes=PROMPT image='' prompt=''

# How the script is called.
call() {
    local words=${takes/PROMPT/\"PROMPT\"}
    printf '%s %s FOLDER [flags]' "$(basename "$0")" "$words"
}

usage() {
    cat <<TEXT
$1

usage: $(call)

Every stage has a folder in FOLDER. Flags are main.py's and go to every stage, for instance
    --sd_version embedded     the small model that comes with this program, in place of the published one
    -O --vram_O               fast; with less GPU memory
    --seed 1                  another result
Stages that are finished are left alone, one that was stopped goes on: the same command again.
TEXT
    [[ $takes != IMAGE* ]] || printf 'IMAGE is a picture, a .csv of several (--image_config), or a folder of photographs (--photos); see docs/photos.md.\n'
}

begin() {
    local about=$1
    shift
    case "${1-}" in
        -h | --help)
            usage "$about"
            exit 0
            ;;
    esac
    local words=() chosen='--text --workspace --init_with --config --ckpt'
    while [[ $# -gt 0 && $1 != -* ]]; do
        words+=("$1")
        shift
    done
    flags=("$@")
    case "$takes ${#words[@]}" in
        'PROMPT 2') prompt=${words[0]} of=(--text "${words[0]}") ;;
        'IMAGE 2' | 'IMAGE [PROMPT] 2') show "${words[0]}" ;;
        'IMAGE PROMPT 3' | 'IMAGE [PROMPT] 3') show "${words[0]}" && prompt=${words[1]} && of+=(--text "$prompt") ;;
        *) complain "$(call); --help tells more" ;;
    esac
    [[ -z $image ]] || chosen+=' --image --image_config --photos'
    folder=${words[${#words[@]} - 1]%/} subject=$image${image:+${prompt:+: }}$prompt
    local flag
    for flag in "${flags[@]+"${flags[@]}"}"; do
        [[ " $chosen " != *" ${flag%%=*} "* ]] || complain "$flag: is chosen for each stage by this script"
    done
    if [[ -f $folder/prompt.txt && $(<"$folder/prompt.txt") != "$subject" ]]; then
        complain "$folder is of \"$(<"$folder/prompt.txt")\": choose another folder"
    fi
}

# Takes a picture, a list of pictures or a folder of photographs for what every stage is shown.
show() {
    image=$1
    [[ -e $image ]] || complain "$image: no such picture, list (.csv) or folder"
    case "$image" in
        *.csv) of=(--image_config "$image") ;;
        *) if [[ -d $image ]]; then of=(--photos "$image"); else of=(--image "$image"); fi ;;
    esac
}

# The checkpoint that the training of a stage ended with.
trained() {
    compgen -G "$folder/$1/checkpoints/step_*_final.pt" | tail -n 1
}

stage() {
    local name=$1 final
    shift
    final=$(trained "$name" || true)
    if [[ -n $final && $folder/$name/report.html -nt $final ]]; then # the report is the last thing that a run writes
        printf 'somnium: %s: finished already\n' "$folder/$name" >&2
        return
    fi
    "$root/scripts/setup.sh"
    mkdir -p "$folder" || complain "$folder: cannot be made"
    printf '%s\n' "$subject" >"$folder/prompt.txt"
    printf 'somnium: %s\n' "$folder/$name" >&2
    "$root/.venv/bin/python" "$root/main.py" "${of[@]}" --workspace "$folder/$name" \
        --config "configs/systems/$name.yaml" "$@" "${flags[@]+"${flags[@]}"}"
    if [[ -z $(trained "$name" || true) ]]; then
        printf 'somnium: %s was stopped; the same command goes on\n' "$folder/$name" >&2
        exit 130
    fi
}
