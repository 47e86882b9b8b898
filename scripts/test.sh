#!/usr/bin/env bash
# Style and tests. Arguments go to pytest: scripts/test.sh -k mesh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/scripts/setup.sh" --tests
cd "$root"
python=$root/.venv/bin/python
"$python" -m ruff format --check .
"$python" -m ruff check .
# Two processes with one thread each: the tests are many and small.
OMP_NUM_THREADS=1 exec "$python" -m pytest -q -n 2 "$@"
