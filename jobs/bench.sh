#!/usr/bin/env bash
# Seconds per image of the paper's rows on one GPU: `python -m launch bench`.
# Made by `python -m launch render`; numbers come from the experiments and jobs/sites/generic-cuda.yaml: edit those.
#   sbatch jobs/bench.sh [--rows PATTERN] [key=value ...]: as `python -m launch bench` takes them
#   sbatch -N2 --time=1:00:00 jobs/bench.sh ...: sbatch's own options win over those below
#   bash jobs/bench.sh ...: without SLURM, on this machine
#SBATCH --job-name=bench
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --gpus-per-node=1

# shellcheck disable=SC2016,SC2034,SC2089  # jobs/body.sh reads them, tasks expand TASK_ENV
{
JOB=bench KIND=bench APF=smoke UNIFORM=
SITE=generic-cuda SITE_ACCOUNT=0 SITE_REQUEUE=1
SITE_MPI=pmi2
SITE_MODULES=()
SITE_SRUN=(--cpu-bind=cores)
SITE_NODE_LOCAL="" SITE_SBCAST='' SITE_NODE_LOCAL_FROM=0
site_env() {
    export MPIR_CVAR_CH4_NETMOD="${MPIR_CVAR_CH4_NETMOD-ofi}"
}
site_env_multi_node() { :; }
TASK_ENV=:
}
for root in "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.." "$(dirname "$0")/.."; do
    [ ! -f "$root/jobs/body.sh" ] || break
done
cd "$root" || exit 64
[ -f jobs/body.sh ] || { echo "error: $PWD has no jobs/body.sh: submit from the repository's folder" >&2; exit 64; }
# shellcheck source=jobs/body.sh
source jobs/body.sh
