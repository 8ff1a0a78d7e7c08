#!/usr/bin/env bash
# Train methods on one data set and print the table: what flickr.sh, coco.sh and nuswide.sh do.
#
#   bash flickr.sh [--demo] [METHOD ...] [key=value ...]
#
# METHOD is a recipe in configs/ (vh_abl, hiamh, cmcl); without one, all of them are trained, and the
# plain nested MLP beside them. key=value goes to training. SEEDS="0 1 2" trains several seeds.
# --demo takes the data set that is shipped with the project instead.
set -euo pipefail
cd "$(dirname "$0")/.."

data=$1
shift
methods=() shared=() own=()
for argument in "$@"; do
    case $argument in
        --demo) data=emoji ;;
        -h | --help)
            sed -n 's/^# \{0,1\}//; 2,8p' "$0"
            exit 0
            ;;
        data.*=* | bits=*) shared+=("$argument") ;;
        *=*) own+=("$argument") ;;
        *)
            if [[ ! -f configs/$argument.yaml || $argument == published ]]; then
                known=$(basename --suffix .yaml -a configs/*.yaml | grep -v published | tr '\n' ' ')
                echo "error: argument $argument: found no such method; expected some of: $known" >&2
                exit 2
            fi
            methods+=("$argument")
            ;;
    esac
done
if [[ ${#methods[@]} -eq 0 ]]; then
    methods=(nested_mlp hiamh vh_abl cmcl)
fi

bash scripts/setup.sh
source .venv/bin/activate
folders=()
for seed in ${SEEDS:-0}; do
    python -m vhabl.baselines --quiet "data=$data" "seed=$seed" "${shared[@]}"
    folders+=("checkpoint/$data/baselines/$seed")
    for method in "${methods[@]}"; do
        python -m vhabl.train --no-table --config "configs/$method.yaml" \
            "data=$data" "seed=$seed" "${shared[@]}" "${own[@]}"
        folders+=("checkpoint/$data/$method/$seed")
    done
done
python -m vhabl.report "${folders[@]}" --out "checkpoint/$data/report"
