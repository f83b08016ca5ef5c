#!/usr/bin/env bash
# APF against uniform patches and convolutional rivals on open data, for the same training time: token files, then every
# model of `python -m launch experiments` that begins with open_, seed by seed, then tables and one page.
# Run it as `make experiments`; after Ctrl-C or a kill, run it again and it goes on where it was.
#   DATA      folder of the sets: glomeruli24, monuseg_train, hrf, each with images/ and masks/; those that are not
#             there are left out (default: data_prep/sample_data, which has the first)
#   SETS      sets to run (glomeruli nuclei vessels vessels_2k)
#   ROWS      rows to run (all; their names stand in launch/experiments_open.py)
#   SEEDS     seeds of every row (0 1 2)
#   RUN_SECONDS  training seconds of every run (150)
#   OPEN_DIR  where everything goes (runs/open)
set -euo pipefail
cd "$(dirname "$0")/.."
data=${DATA:-data_prep/sample_data}
sets=${SETS:-glomeruli nuclei vessels vessels_2k}
rows=${ROWS:-apf uniform_tokens unet apf_token apf_geometric apf_raster apf_still apf_strip uniform_patch unetr swin_unetr transunet}
seeds=${SEEDS:-0 1 2}
seconds=${RUN_SECONDS:-150}
out=${OPEN_DIR:-runs/open}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
declare -A folder=([glomeruli]=glomeruli24 [nuclei]=monuseg_train [vessels]=hrf [vessels_2k]=hrf)

step() { printf '\n[experiments %ds] %s\n' "$SECONDS" "$*"; }
stopped=
trap 'stopped=1' INT
ended() {
    local rc=$?
    [ $rc = 0 ] || printf '\n[experiments] stopped (exit code %s); the same command goes on from here\n' $rc >&2
}
trap ended EXIT

there=()
for set in $sets; do
    [ -n "${folder[$set]:-}" ] || { echo "experiments: SETS: $set is none of ${!folder[*]}" >&2; exit 64; }
    if [ -d "$data/${folder[$set]}/images" ]; then there+=("$set"); else
        echo "experiments: $set is left out: no $data/${folder[$set]}/images (DATA names the folder of the sets)" >&2
    fi
done
[ ${#there[@]} -gt 0 ] || { echo "experiments: none of the sets is in $data: set DATA" >&2; exit 1; }

declare -A tokens=()    # folder of each experiment's token files
step "1/3 token files of ${there[*]}"
for set in "${there[@]}"; do
    declare -A built=()
    for row in $rows; do
        name=open_${set}_$row
        dir=$(python -m launch show "$name" | sed -n 's/^  dir: *\([^ ]*\).*/\1/p')
        dir=$out/tokens/${dir#runs/open/tokens/}
        tokens[$name]=$dir
        [ -z "${built[$dir]:-}" ] || continue
        built[$dir]=1
        more=()
        [ "$row" != apf_strip ] || more=(--packing strip)
        python -m launch prep "$name" --slides "$data/${folder[$set]}/images" --masks "$data/${folder[$set]}/masks" \
            --jobs "$(nproc)" data.dir="$dir" "${more[@]}" | tail -n 1
    done
    unset built
done

step "2/3 training, $seconds s each"
for seed in $seeds; do
    for set in "${there[@]}"; do
        for row in $rows; do
            name=open_${set}_$row
            code=0
            python -m launch train "$name" run_root="$out/runs" data.dir="${tokens[$name]}" \
                train.max_seconds="$seconds" train.seed="$seed" || code=$?
            [ -z "$stopped" ] && [ $code != 75 ] && [ $code != 130 ] || exit 130
            [ $code = 0 ] || echo "experiments: $name, seed $seed, ended with $code; its record says why" >&2
        done
    done
done

step "3/3 tables, gains, page"
python -m analysis tables "$out/runs" --out "$out/tables"
python -m analysis gains "$out/runs" --out "$out/tables" || [ $? = 1 ]     # 1: there is no rival of apf among the rows
python -m analysis report "$out/runs" --out "$out/report"
step "done. The page: $out/report/index.html"
