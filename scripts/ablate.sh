#!/usr/bin/env bash
# Switch off each part of a method, one at a time, and print the table.
#
#   bash scripts/ablate.sh METHOD data=NAME [data.path=FILE] [key=value ...] [--validation]
#
# SEEDS="0 1 2" are the seeds of every variant.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
    exit 0
fi
if [[ $# -eq 0 || ! -f configs/$1.yaml || $1 == published ]]; then
    echo "error: ${1:-METHOD}: no such method. Name a recipe in configs/" >&2
    exit 2
fi
method=$1
shift
bash scripts/setup.sh
source .venv/bin/activate
read -ra seeds <<<"${SEEDS:-0 1 2}"
exec python -m vhabl.studies.ablation --config "configs/$method.yaml" "$@" --seeds "${seeds[@]}"
