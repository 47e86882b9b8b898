#!/usr/bin/env bash
# One prompt after the other: scripts/run_prompts.sh prompts.txt FOLDER [flags of main.py]
# A line of the file is a prompt; empty lines and lines that begin with # are left out. Every prompt has a folder in FOLDER. What is finished is left
# alone, what was stopped goes on: the same command again. A prompt that fails is said, and the others go on; the status is then 1.
# FOLDER/index.html shows all results. On several GPUs or machines at once: scripts/batch.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ $# -lt 2 || $1 == -* || $2 == -* ]]; then
    sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
list=$1 folder=${2%/}
shift 2
if [[ ! -r $list ]]; then
    printf 'error: %s: no such file\n' "$list" >&2
    exit 2
fi
"$root/scripts/setup.sh"

failed=()
count=0
# The list is read through a descriptor of its own: nothing that runs below can swallow a line of it.
while IFS= read -r prompt <&3 || [[ -n $prompt ]]; do
    prompt=$(sed 's/^[[:space:]]*//; s/[[:space:]]*$//' <<<"$prompt")
    if [[ -z $prompt || $prompt == \#* ]]; then continue; fi
    count=$((count + 1))
    # words joined by _, and a checksum, so that prompts which differ have folders which differ
    name=$(tr -cs 'A-Za-z0-9' '_' <<<"$prompt" | cut -c1-60 | sed 's/^_//; s/_$//')_$(cksum <<<"$prompt" | cut -d' ' -f1)
    workspace=$folder/$name
    final=$(compgen -G "$workspace/checkpoints/step_*_final.pt" | tail -n 1 || true)
    if [[ -n $final && $workspace/report.html -nt $final ]]; then # the report is the last thing that a run writes
        printf 'somnium: "%s": finished already in %s\n' "$prompt" "$workspace" >&2
        continue
    fi
    printf 'somnium: "%s" in %s\n' "$prompt" "$workspace" >&2
    status=0
    "$root/.venv/bin/python" "$root/main.py" --text "$prompt" --workspace "$workspace" "$@" || status=$?
    if [[ $status -eq 130 || $status -eq 143 ]]; then exit "$status"; fi # stopped by hand: all of it
    if [[ $status -ne 0 ]]; then failed+=("$prompt"); fi
done 3<"$list"

# one page of all results
if [[ -f $root/scripts/batch.py && -d $folder ]]; then
    "$root/.venv/bin/python" "$root/scripts/batch.py" --index "$folder" || true
fi
printf 'somnium: %d prompts, %d failed\n' "$count" "${#failed[@]}" >&2
for prompt in "${failed[@]+"${failed[@]}"}"; do printf 'somnium: failed: %s\n' "$prompt" >&2; done
[[ ${#failed[@]} -eq 0 ]]
