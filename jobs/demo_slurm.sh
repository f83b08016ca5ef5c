#!/usr/bin/env bash
# The path of a cluster on one machine: a real SLURM of four namespaced nodes is started, slides become token files on
# 2 nodes x 2 MPI ranks, the committed 64K job script trains a tiny setting on 2 nodes, and tables are made of it.
# Run it as `make demo-slurm` (root, Debian's slurm-wlm and munge; the cluster is tests/helpers/cluster.py).
#   DEMO_DIR   where everything goes (demo/slurm)
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${DEMO_DIR:-demo/slurm}")
data=data_prep/sample_data/glomeruli24
if [ -z "${SLURM_CONF:-}" ] || ! sinfo >/dev/null 2>&1; then
    exec python -m tests.helpers.cluster 4 bash "$0"
fi
export OMP_NUM_THREADS=1 PREFLIGHT=0   # the nodes are not what a site's file expects
mkdir -p "$out"
tiny=(data.dir="$out/tokens" data.split="$data/split.json" data.resolution=1024 data.patch=16 data.length=64
    data.cache_gib=0.1 model.width=64 model.depth=2 model.heads=2 model.mlp_dim=128 model.decoder=token
    train.batch=2 train.max_steps=120 train.schedule=cosine train.lr=2e-3 train.precision=fp32
    train.log_every=10 eval.every_steps=null engine.threads=1 run_root="$out/runs" run_id=tiny)
step() { printf '\n[demo-slurm %3ds] %s\n' "$SECONDS" "$*"; }
job() {  # name of a script, ranks on each of two nodes, words: submit it, wait, show how it ended
    local log=$out/$1.out number state
    rm -f "$log"
    number=$(sbatch --parsable -N2 --ntasks-per-node="$2" --output="$log" "jobs/$1.sh" "${@:3}")
    echo "job $number: sbatch -N2 --ntasks-per-node=$2 jobs/$1.sh ... -> $log"
    while [ -n "$(squeue --noheader --jobs="$number")" ]; do sleep 1; done   # sbatch --wait looks every half minute
    state=$(scontrol --oneliner show job "$number" | sed 's/.* JobState=\([A-Z_]*\).*/\1/')
    if [ "$state" = COMPLETED ]; then tail -n 1 "$log"; else tail -n 20 "$log" >&2; exit 1; fi
}
step "1/3 slides to token files, over MPI"
job prep_paip 2 --slides "$data/images" --masks "$data/masks" "${tiny[@]:0:5}"
step "2/3 training"
job paip_64k 1 "${tiny[@]}"
step "3/3 tables"
python -m analysis tables "$out/runs" --out "$out/tables"
step "done: $out"
