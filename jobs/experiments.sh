#!/usr/bin/env bash
# APF against uniform patches and convolutional rivals on open data, for the same training time: token files, then every
# model of `python -m launch experiments` that begins with open_, seed by seed, then tables and one page.
# Run it as `make experiments`; after Ctrl-C or a kill, run it again and it goes on where it was.
#   DATA      folder of the sets: glomeruli24, monuseg_train, hrf, each with images/ and masks/, hrf with fov/ as well;
#             those that are not there are left out (default: data_prep/sample_data, which has the first)
#   SETS      sets to run (glomeruli nuclei vessels vessels_2k); vessels_4k only when named, as scoring takes long
#   ROWS      rows to run (all; their names and what they are stand in launch/experiments/open_data.py)
#   SEEDS     seeds of every row (0 1 2)
#   RUN_SECONDS  training seconds of every run (150)
#   JOBS      runs at once, each on its share of the cores (1); compare only what ran with the same number
#   OPEN_DIR  where everything goes (runs/open)
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATA:-data_prep/sample_data}
sets=${SETS:-glomeruli nuclei vessels vessels_2k}
rows=${ROWS:-apf unet apf_std unet_std uniform_tokens uniform_leaf_unet uniform_leaf_unet_std unetr uniform_patch
    transunet swin_unetr apf_alone apf_whole apf_blind apf_variance apf_entropy apf_fixed apf_jittered apf_cubic
    apf_half apf_double apf_deep apf_unturned apf_drop apf_leaf apf_token apf_token_still apf_token_placed
    apf_token_blind apf_token_strip apf_geometric apf_raster apf_still apf_strip}
seeds=${SEEDS:-0 1 2}
seconds=${RUN_SECONDS:-150}
out=${OPEN_DIR:-runs/open}
at_once=${JOBS:-1}
[[ $at_once =~ ^[1-9][0-9]*$ ]] || { echo "experiments: JOBS: $at_once is no number of runs" >&2; exit 64; }
cores=$(env -u OMP_NUM_THREADS nproc)
threads=$((cores / at_once))
[ "$threads" -gt 0 ] || { echo "experiments: JOBS: $at_once runs at once on $cores cores" >&2; exit 64; }
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
declare -A folder=([glomeruli]=glomeruli24 [nuclei]=monuseg_train [vessels]=hrf [vessels_2k]=hrf [vessels_4k]=hrf)
declare -A needs=([vessels]=fov [vessels_2k]=fov [vessels_4k]=fov)    # besides images and masks
# Of apf_drop: edge pixels above which a square is split; trees of training slides then have about L leaves.
declare -A split_value=([glomeruli]=700 [nuclei]=225 [vessels]=3 [vessels_2k]=3 [vessels_4k]=235)

step() { printf '\n[experiments %ds] %s\n' "$SECONDS" "$*"; }
stopped=
# Ctrl-C reaches the script alone (`train` ignores it); SIGTERM lets the runs save.
trap 'stopped=130; kill -TERM $(jobs -p) 2>/dev/null || true' INT TERM
ended() {
    local rc=$? on='; the same command goes on from here'
    [ $rc != 64 ] || on=    # what was refused would be again
    [ $rc = 0 ] || printf '\n[experiments] stopped (exit code %s)%s\n' $rc "$on" >&2
}
trap ended EXIT

there=()
for set in $sets; do
    [ -n "${folder[$set]:-}" ] || { echo "experiments: SETS: $set is none of ${!folder[*]}" >&2; exit 64; }
    lacks=
    for part in images masks ${needs[$set]:-}; do [ -d "$data/${folder[$set]}/$part" ] || lacks=${lacks:-$part}; done
    if [ -z "$lacks" ]; then there+=("$set"); else
        echo "experiments: $set is left out: no $data/${folder[$set]}/$lacks (DATA names the folder of the sets)" >&2
    fi
done
[ ${#there[@]} -gt 0 ] || { echo "experiments: none of the sets is in $data: set DATA" >&2; exit 64; }

declare -A tokens=()    # folder of each experiment's token files
declare -A variants=()  # of those that draw from more: data.variants=[FOLDER, ...]
prep() {    # EXPERIMENT SET FOLDER [OPTION...]: token files of a set, once
    [ -z "$stopped" ] || exit 130
    [ -z "${built[$3]:-}" ] || return 0
    built[$3]=1
    python -m launch prep "$1" --slides "$data/${folder[$2]}/images" --masks "$data/${folder[$2]}/masks" \
        --jobs "$cores" data.dir="$3" "${@:4}" | tail -n 1
}
step "1/3 token files of ${there[*]}"
known=$(python -m launch experiments open data)
for set in "${there[@]}"; do
    declare -A built=()
    for row in $rows; do
        name=open_${set}_$row
        [ -z "$stopped" ] || exit 130
        if ! grep -q "^$name " <<< "$known" && grep -q "^open_[a-z0-9_]*_$row " <<< "$known"; then
            why="it takes whole frames"
            [ "$row" != apf_double ] || why="it would be the whole grid, or apf again"
            [ "$row" != uniform_patch ] || why="it would be open_${set}_uniform_tokens again"
            echo "experiments: $name is left out: $why" >&2
            continue
        fi
        shown=$(python -m launch show "$name")
        dir=$(sed -n 's/^  dir: *\([^ ]*\).*/\1/p' <<< "$shown")
        dir=$out/tokens/${dir#runs/open/tokens/}
        tokens[$name]=$dir
        more=()
        [ "$row" != apf_drop ] || more=(--fit drop --split-value "${split_value[$set]}")
        ! grep -q '^  fov: true' <<< "$shown" || more+=(--fov "$data/${folder[$set]}/fov")
        prep "$name" "$set" "$dir" "${more[@]}"
        drawn=
        for other in $(sed -n 's/^  variants: *\[\([^]]*\)\].*/\1/p' <<< "$shown" | tr -d ,); do
            other=$out/tokens/${other#runs/open/tokens/}
            prep "$name" "$set" "$other" "${more[@]}" --auto-quantile "0.${other##*_q}"    # apf_q80: quantile 0.80
            # shellcheck disable=SC2089    # the quotes are YAML's
            printf -v drawn '%s"%s"' "${drawn:+$drawn, }" "$other"
        done
        [ -z "$drawn" ] || variants[$name]="data.variants=[$drawn]"
    done
    unset built
done

[ ${#tokens[@]} -gt 0 ] || { echo "experiments: no row is left to run" >&2; exit 64; }
step "2/3 training, $seconds s each, $at_once at once on $threads cores each"
train() {    # EXPERIMENT SEED
    local code=0 run=
    trap '' INT
    trap '[ -z "$run" ] || kill -TERM $run 2>/dev/null; gone=1' TERM
    # shellcheck disable=SC2090
    python -m launch train "$1" run_root="$out/runs" data.dir="${tokens[$1]}" engine.threads="$threads" \
        ${variants[$1]:+"${variants[$1]}"} train.max_seconds="$seconds" train.seed="$2" &
    run=$!
    [ -z "${gone:-}" ] || kill -TERM $run 2>/dev/null || true
    wait $run || code=$?
    while kill -0 $run 2>/dev/null; do code=0; wait $run || code=$?; done    # the signal ended the wait, not the run
    [ $code != 75 ] && [ $code != 130 ] || return $code
    if [ $code = 64 ]; then    # as a run of other settings in its place: what is there must not be mixed with the rest
        echo "experiments: $1, seed $2, was refused: if $out holds runs of other settings, choose another OPEN_DIR" >&2
        return 64
    fi
    [ $code = 0 ] || echo "experiments: $1, seed $2, ended with $code; its record says why" >&2
}
ended_one() {    # wait for a run; 1: there is none
    local code=0
    wait -n || code=$?
    [ $code != 127 ] || return 1
    [ $code = 0 ] || { [ $code = 64 ] && stopped=64 || stopped=130; }
}
for seed in $seeds; do
    for set in "${there[@]}"; do
        for row in $rows; do
            [ -n "${tokens[open_${set}_$row]:-}" ] || continue
            while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do ended_one || true; done
            [ -z "$stopped" ] || break 3
            train "open_${set}_$row" "$seed" &
        done
    done
done
while ended_one; do :; done
[ -z "$stopped" ] || exit "$stopped"

step "3/3 tables, gains, page"
python -m analysis tables "$out/runs" --out "$out/tables"
python -m analysis gains "$out/runs" --out "$out/tables" || {
    [ $? = 66 ]    # nothing to compare
    echo "experiments: no gains: they hold apf against other rows, and those that ran have no such pair" >&2
}
python -m analysis report "$out/runs" --out "$out/report"
step "done. The page: $out/report/index.html"
