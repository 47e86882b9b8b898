#!/usr/bin/env bash
# What the scripts of the systems with several stages share; they read it, it does nothing by itself.
#
#   begin "what it is" "$@"          reads: "PROMPT" FOLDER [flags of main.py, for every stage]; sets prompt, folder, flags
#   stage NAME [flags]               one run in FOLDER/NAME with configs/systems/NAME.yaml, unless it is finished; goes on where one was stopped
#
# Each stage's flags stand before those of the user, which win.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

complain() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

usage() {
    cat <<TEXT
$1

usage: $(basename "$0") "PROMPT" FOLDER [flags]

Every stage has a folder in FOLDER. Flags are main.py's and go to every stage, for instance
    --sd_version embedded     the small model that comes with this program, in place of the published one
    -O --vram_O               fast; with less GPU memory
    --seed 1                  another result
Stages that are finished are left alone, one that was stopped goes on: the same command again.
TEXT
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
    [[ $# -ge 2 && $1 != -* && $2 != -* ]] || complain "$(basename "$0") \"PROMPT\" FOLDER [flags]; --help tells more"
    prompt=$1 folder=${2%/}
    shift 2
    flags=("$@")
    local flag
    for flag in "${flags[@]+"${flags[@]}"}"; do
        case "${flag%%=*}" in
            --text | --workspace | --init_with | --config | --ckpt) complain "$flag: is chosen for each stage by this script" ;;
        esac
    done
    if [[ -f $folder/prompt.txt && $(<"$folder/prompt.txt") != "$prompt" ]]; then
        complain "$folder is of \"$(<"$folder/prompt.txt")\": choose another folder"
    fi
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
    printf '%s\n' "$prompt" >"$folder/prompt.txt"
    printf 'somnium: %s\n' "$folder/$name" >&2
    "$root/.venv/bin/python" "$root/main.py" --text "$prompt" --workspace "$folder/$name" \
        --config "configs/systems/$name.yaml" "$@" "${flags[@]+"${flags[@]}"}"
    if [[ -z $(trained "$name" || true) ]]; then
        printf 'somnium: %s was stopped; the same command goes on\n' "$folder/$name" >&2
        exit 130
    fi
}
