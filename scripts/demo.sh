#!/usr/bin/env bash
# From a fresh clone to "a hamburger" in 3-D. Further flags are passed on: scripts/demo.sh --text "a red chair" --workspace chair
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh"
# main.py ends by saying where the results are.
exec "$root/.venv/bin/python" "$root/main.py" --text "a hamburger" --workspace trial -O --save_mesh "$@"
