#!/usr/bin/env bash
# Train methods on one data set and print the table: what flickr.sh, coco.sh and nuswide.sh do.
#
#   bash flickr.sh [--demo] [--protocol common|own] [RECIPE ...] [key=value ...]
#
# RECIPE is a file in configs/ (vh_abl_clip, hiamh_clip, pghmh, cmcl ...); without one, every method
# is trained. key=value goes to training. SEEDS="0 1 2" trains several seeds, by default the recipes' own.
# --demo takes the data set that is shipped with the project instead, and builds an index of it.
# --protocol common trains our recipes on one split, so that their rows compare; own trains the
# published recipes (configs/<method>_published.yaml), each on the split of its publication, where
# it has one.
set -euo pipefail
cd "$(dirname "$0")/.."

data=$1
shift
protocol=common
recipes=() shared=() own=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --demo) data=emoji ;;
        --protocol)
            protocol=${2:-}
            if [[ $protocol != common && $protocol != own ]]; then
                echo "error: --protocol is '$protocol', but must be common or own" >&2
                exit 2
            fi
            shift
            ;;
        -h | --help)
            sed -n '2,/^[^#]/ s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        data.*=* | bits=*) shared+=("$1") ;;
        *=*) own+=("$1") ;;
        *)
            if [[ ! -f configs/$1.yaml || $1 == published ]]; then
                known=$(basename --suffix .yaml -a configs/*.yaml | grep -vx published | tr '\n' ' ')
                echo "error: $1: no such recipe. Choose among $known" >&2
                exit 2
            fi
            recipes+=("$1")
            ;;
    esac
    shift
done
if [[ ${#recipes[@]} -eq 0 ]]; then
    if [[ $protocol == own ]]; then
        recipes=(hiamh_published vh_abl_published pghmh_published cmcl_published hq_published)
    elif [[ $data == emoji ]]; then
        recipes=(nested_mlp hiamh vh_abl hq vh_abl_clip pghmh cmcl)
    else
        recipes=(hiamh_clip vh_abl_clip pghmh cmcl hq_alexnet)
    fi
fi

bash scripts/setup.sh
source .venv/bin/activate
trained=() folders=()
for seed in ${SEEDS:-recipe}; do
    seed_key=()
    [[ $seed == recipe ]] || seed_key=("seed=$seed")
    for recipe in "${recipes[@]}"; do
        printed=$(mktemp)
        python -m vhabl.train --no-table --config "configs/$recipe.yaml" "protocol=$protocol" \
            "data=$data" "${seed_key[@]}" "${shared[@]}" "${own[@]}" | tee "$printed"
        trained+=("$(sed -n 's/^run folder: //p' "$printed")")
        rm "$printed"
    done
    # Reference rows for each split that was used.
    for used in $(printf '%s\n' "${trained[@]}" | cut -d / -f 2 | sort -u); do
        if [[ -f configs/data/$used.yaml ]]; then
            python -m vhabl.studies.baselines --quiet "data=$used" "${seed_key[@]}" "${shared[@]}"
            folders+=("checkpoint/$used/baselines/${seed/recipe/0}")
        fi
    done
done
python -m vhabl.report "${folders[@]}" "${trained[@]}" --out "checkpoint/$data/report"

# What was trained, to be used: an index of the shipped pairs. A selection of recipes may have none
# that serves a text or an image alone; then there is no index.
if [[ $data == emoji ]] && best=$(python scripts/best_run.py "${trained[@]}"); then
    index=checkpoint/$data/index
    rm -rf "$index" # it is made of a run, and made again
    python -m vhabl.search build --quiet --checkpoint "$best" --out "$index"
    echo "search it in a browser: .venv/bin/python -m vhabl.search serve $index"
fi
