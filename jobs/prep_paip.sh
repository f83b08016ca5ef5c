#!/usr/bin/env bash
# Slides of PAIP to the token files of an experiment (EXPERIMENT=paip_16k), over MPI ranks.
# Made by `python -m launch render`; numbers come from the experiments and jobs/sites/generic-cuda.yaml: edit those.
#   sbatch jobs/prep_paip.sh --slides FOLDER [--masks FOLDER] [key=value ...]: as `python -m launch prep` takes them
#   sbatch -N2 --time=1:00:00 jobs/prep_paip.sh ...: sbatch's own options win over those below
#   bash jobs/prep_paip.sh ...: without SLURM, on this machine
#SBATCH --job-name=prep_paip
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --gpus-per-node=8
#SBATCH --exclusive

# shellcheck disable=SC2016,SC2034,SC2089  # jobs/body.sh reads them, tasks expand TASK_ENV
{
JOB=prep_paip KIND=prep APF=paip_64k UNIFORM=paip_64k_uniform
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
