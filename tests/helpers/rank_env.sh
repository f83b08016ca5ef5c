#!/usr/bin/env bash
# Stands where Python would, for tests of what the job scripts do around it: notes what each task was given, and then
# does what RANK_DOES says instead of training.
case "$*" in
*" where "*) echo "$RANK_ENV_DIR" ;;
*" prep "*)
    echo "prep on $(hostname)"
    eval "${RANK_DOES:-}" ;;
*" train "*)
    echo "$(hostname) RANK=$RANK WORLD_SIZE=$WORLD_SIZE LOCAL_RANK=$LOCAL_RANK LOCAL_WORLD_SIZE=$LOCAL_WORLD_SIZE" \
        "MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT SLURM_PROCID=$SLURM_PROCID" \
        "SLURM_STEP_NUM_TASKS=$SLURM_STEP_NUM_TASKS GPUS=$CUDA_VISIBLE_DEVICES"
    eval "${RANK_DOES:-}" ;;
esac
