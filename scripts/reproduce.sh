#!/usr/bin/env bash
# Train methods on one data set and print the table: what flickr.sh, coco.sh and nuswide.sh do.
#
#   bash scripts/reproduce.sh DATA [--demo] [METHOD ...] [key=value ...]
#
# METHOD is a recipe's name (vh_abl, hiamh); without one, all of them. key=value goes to training.
# SEEDS="0 1 2" trains several seeds. --demo takes the data set that is shipped with the project.
set -euo pipefail
cd "$(dirname "$0")/.."

data=$1
shift
methods=() overrides=()
for argument in "$@"; do
    case $argument in
        --demo) data=emoji ;;
        -h | --help)
            echo "usage: bash flickr.sh [--demo] [METHOD ...] [key=value ...]"
            sed -n '2,8s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *=*) overrides+=("$argument") ;;
        *)
            if [[ $argument == -* || ! -f configs/$argument.yaml ]]; then
                known=$(cd configs && ls ./*.yaml | sed 's#\./##; s#\.yaml##' | tr '\n' ' ')
                echo "error: argument $argument: found no such method; expected some of: $known" >&2
                exit 2
            fi
            methods+=("$argument")
            ;;
    esac
done
if [[ ${#methods[@]} -eq 0 ]]; then
    methods=(nested_mlp hiamh vh_abl)
fi

bash scripts/setup.sh
source .venv/bin/activate
folders=()
for seed in ${SEEDS:-0}; do
    python -m vhabl.baselines "data=$data" "seed=$seed" --quiet $(printf '%s\n' "${overrides[@]:-}" | grep -E '^(data\.|bits=)' || true)
    folders+=("checkpoint/$data/baselines/$seed")
    for method in "${methods[@]}"; do
        python -m vhabl.train --config "configs/$method.yaml" "data=$data" "seed=$seed" --quiet-table "${overrides[@]}"
        folders+=("checkpoint/$data/$method/$seed")
    done
done
python -m vhabl.report "${folders[@]}"
