#!/usr/bin/env bash
# Make .venv in the folder of this program and install what it needs: scripts/setup.sh [--tests]
# It does nothing when that has been done already. Environment:
#   PYTHON           the Python (3.11 or later) to make .venv with; default python3
#   TORCH_INDEX_URL  package index to take torch from, for instance PyTorch's own index of CPU builds
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python

say() { printf 'somnium: %s\n' "$*" >&2; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

lists=("$root/requirements.txt")
kind=run
modules=()
case "${1-}" in
    '') ;;
    --tests)
        lists+=("$root/requirements-test.txt")
        kind=tests
        # where there is npm: Khronos' judge of .glb files, and what steers a browser
        modules=(gltf-validator@2.0.0-dev.3.10 playwright-core@1.65.1)
        ;;
    *) fail "$1: setup.sh takes no argument but --tests" ;;
esac

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then gpu=yes; fi

# .venv, unless there is one that works.
if ! "$python" -c '' 2>/dev/null; then
    base=${PYTHON:-python3}
    command -v "$base" >/dev/null || fail "$base: not found; install Python 3.11 or later, or name it with PYTHON=..."
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$base is $("$base" -V 2>&1), but 3.11 or later is needed; name another one with PYTHON=..."
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments; install the module (Debian, Ubuntu: sudo apt install python3-venv)"
    say "making $venv"
    "$base" -m venv --clear "$venv"
fi

# One stamp per kind of set-up; it changes with the lists of packages, the Python and the presence of a GPU.
stamp=$venv/somnium-$kind
wanted=$({ cat "${lists[@]}"; "$python" -V; echo "gpu $gpu ${TORCH_INDEX_URL-} ${modules[*]-}"; } | cksum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then exit 0; fi

pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# torch first: the ordinary build, which carries CUDA on Linux, where there is a GPU, and the CPU build elsewhere.
torch=$(grep '^torch==' "$root/requirements.txt")
if ! "$python" - "$torch" "$gpu" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version

try:
    number, _, build = version("torch").partition("+")
except PackageNotFoundError:
    sys.exit(1)
sys.exit(f"torch=={number}" != sys.argv[1] or (sys.argv[2] == "yes" and build == "cpu"))
PYTHON
then
    say "installing ${torch/==/ } (a GPU: $gpu); this takes a minute or more"
    if [[ -n ${TORCH_INDEX_URL-} ]]; then
        pip install --quiet --index-url "$TORCH_INDEX_URL" "$torch"
    elif [[ $gpu == yes ]]; then
        pip uninstall --quiet --yes torch 2>/dev/null || true # a CPU build would count as the same version
        pip install --quiet "$torch"
    elif ! pip install --quiet "$torch+cpu" 2>/dev/null; then
        if [[ $(uname -sm) == "Linux x86_64" ]]; then
            say "no CPU build of torch in the configured package indexes: taking the one with CUDA, several GB." \
                "To avoid that, stop here and set TORCH_INDEX_URL to PyTorch's index of CPU builds"
        fi
        pip install --quiet "$torch"
    fi
fi

say "installing the other packages (about 1 GB on disk)"
arguments=()
for list in "${lists[@]}"; do arguments+=(--requirement "$list"); done
pip install --quiet "${arguments[@]}"
if [[ $kind == tests ]]; then
    # A screen that nobody sees, a hand that moves its mouse, and a browser: for the tests of the viewers.
    system=()
    command -v Xvfb >/dev/null || system+=(xvfb libgl1 libgl1-mesa-dri libglx-mesa0)
    command -v xdotool >/dev/null || system+=(xdotool)
    command -v chromium >/dev/null || command -v google-chrome >/dev/null || system+=(chromium)
    if [[ ${#system[@]} -gt 0 ]]; then
        install="apt-get install --yes --no-install-recommends ${system[*]}"
        if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
            say "installing ${system[*]}"
            { $install || { apt-get update && $install; }; } >/dev/null 2>&1 || true
        fi
        if ! command -v Xvfb >/dev/null || ! command -v xdotool >/dev/null; then
            say "the tests of the viewers will be skipped; on Debian or Ubuntu they need: $install"
        fi
    fi
    if ! npm install --silent --no-audit --no-fund --no-save --prefix "$venv/node" "${modules[@]}" 2>/dev/null; then
        say "npm is missing or could not install ${modules[*]}: the tests that need them will be skipped"
    fi
fi
printf '%s\n' "$wanted" >"$stamp"
say "the packages are installed in $venv"
