#!/usr/bin/env bash
# Make the isolated environment .venv with pinned versions. Does nothing where it is current.
#
#   PYTHON=python3.12 bash scripts/setup.sh    choose the interpreter (3.11 or 3.12)
#   VHABL_CUDA=1 bash scripts/setup.sh         accept torch's CUDA packages without an NVIDIA driver
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/vhabl-setup
torch_cpu_index=${VHABL_TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

fail() { echo "error: $1" >&2; exit 2; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.11 python3; do
        if [[ -n $candidate ]] && command -v "$candidate" >/dev/null \
            && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
            && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "python: no Python 3.11 or 3.12 with the venv module is on PATH. Install one (on Debian and Ubuntu: apt-get install python3-venv), or name it: PYTHON=/path/to/python"
}

has_nvidia_driver() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

index_answers() {
    "$venv/bin/python" - "$1" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=5).close()
PY
}

brings_cuda() {  # would pip fetch CUDA packages for the arguments?
    "$venv/bin/pip" install --quiet --dry-run --ignore-installed --report - "$@" \
        | "$venv/bin/python" -c '
import json, sys
names = [item["metadata"]["name"].lower() for item in json.load(sys.stdin)["install"]]
sys.exit(not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in names))'
}

install_torch() {
    local torch
    torch=$(grep '^torch==' scripts/constraints.txt)
    if has_nvidia_driver; then
        "$venv/bin/pip" install --quiet "$torch"
    elif [[ $(uname -s) == Linux ]] && index_answers "$torch_cpu_index/"; then
        "$venv/bin/pip" install --quiet --index-url "$torch_cpu_index" "$torch"
    elif [[ ${VHABL_CUDA:-} != 1 ]] && brings_cuda "$torch"; then
        fail "torch: there is no NVIDIA driver, torch's CPU index does not answer, and the default build brings gigabytes of CUDA packages. Name a CPU index that answers (VHABL_TORCH_CPU_INDEX), or set VHABL_CUDA=1 to install that build"
    else
        "$venv/bin/pip" install --quiet "$torch"
    fi
}

python=$(find_python)
wanted="$("$python" --version) $(cat setup.py scripts/constraints.txt scripts/setup.sh | cksum)"
if [[ -x $venv/bin/python && -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    exit 0
fi

echo "setting up $venv with $("$python" --version) (a minute or two) ..." >&2
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [[ ! -f $stamp ]]; then # half-made, or made by something else: begin anew
    "$python" -m venv --clear "$venv"
else
    rm -f "$stamp" # until this ends well the environment is not current
    "$python" -m venv --upgrade "$venv"
fi
install_torch
"$venv/bin/pip" install --quiet --constraint scripts/constraints.txt --editable '.[test]'
echo "$wanted" >"$stamp"
