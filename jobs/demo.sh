#!/usr/bin/env bash
# The whole path on real images, on one machine with two cores: slides -> token files (2 MPI ranks) -> four models
# trained for the same time (2 ranks, FSDP) -> table, plots, one page. Run it as `make demo`; after Ctrl-C or a kill,
# run it again and it goes on where it was.
#   DEMO_DIR      where everything goes (demo)
#   DEMO_SECONDS  training seconds of each model (130)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${DEMO_DIR:-demo}
seconds=${DEMO_SECONDS:-130}
data=data_prep/sample_data/glomeruli24
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}

step() { printf '\n[demo %3ds] %s\n' "$SECONDS" "$*"; }
build() {  # folder name, an experiment that reads it
    mpiexec -n 2 python -m launch prep "$2" --slides "$data/images" --masks "$data/masks" data.dir="$out/tokens/$1" |
        tail -n 1   # of the table of all slides, the sum; progress, warnings and failures come by the other stream
}
train() {  # experiment name, folder of its token files
    mpiexec -n 2 python -m launch train "$1" engine.name=fsdp run_root="$out/runs" data.dir="$out/tokens/$2" \
        train.max_seconds="$seconds"
    [ -z "$stopped" ] || exit 130   # Ctrl-C in a run's last seconds lets that run end, not the next one begin
}
stopped='' rc=0
trap 'stopped=1' INT
mkdir -p "$out"
if [ -s "$out/seconds" ] && [ "$(<"$out/seconds")" != "$seconds" ]; then
    echo "demo: $out holds a demo of $(<"$out/seconds") s a model, not $seconds s: 'make clean', or set DEMO_DIR or DEMO_SECONDS" >&2
    exit 64
fi
echo "$seconds" >"$out/seconds"
trap 'rc=$?; [ $rc = 0 ] || printf "\n[demo] stopped (exit code %s); the same command goes on from here\n" $rc >&2' EXIT

step "1/3 token files: adaptive (p=16, L=256), and uniform at the same smallest patch, at the same token count, and as tiles"
build apf demo_apf
build uniform16 demo_uniform_patch
build uniform64 demo_uniform_tokens
build tiles256 demo_tiled_unet
python -m data_prep inspect "$data/images/10063.jpg" --masks "$data/masks" --resolution 1024 --patch 16 --length 256 --out "$out/inspect.png"

step "2/3 training: four models, $seconds s each, 2 ranks"
train demo_apf apf
train demo_uniform_tokens uniform64
train demo_uniform_patch uniform16
train demo_tiled_unet tiles256

step "3/3 tables, plots, page"
python -m analysis plots "$out/runs" --out "$out/report/plots"
python -m analysis report "$out/runs" --out "$out/report"
python -m analysis tables "$out/runs" --out "$out/report/tables"
step "done. The page: $out/report/index.html"
