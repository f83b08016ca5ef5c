# shellcheck shell=bash
# What every job script does after its directives; sourced by them, in the repository's root.
# The script sets: JOB KIND(train prep scaling bench) APF UNIFORM SITE SITE_* site_env site_env_multi_node TASK_ENV.
# The user sets, in the environment (sbatch hands it on) or before `bash jobs/X.sh`:
#   MODE          of scaling.sh: strong (default) or weak
#   PATCHING      apf (default) or uniform: the same job with equal patches
#   EXPERIMENT    another named experiment with this job's directives
#   PYTHON        interpreter (default: .venv/bin/python where there is one, else python)
#   PREFLIGHT     0: do not measure the nodes first
#   MAX_RESTARTS  lives of a job after its first (default 20)
#   ENV_ARCHIVE   tar of a Python environment, unpacked to the nodes' own disks where the site has them
#   RANKS         without SLURM: processes on this machine (default 1)
# Exit codes: 0 done, 64 bad settings, 65 preflight failed, 75 saved, run me again, else crash.
set -euo pipefail

life=${SLURM_RESTART_COUNT:-0}
# As scontrol wants it: the number of an array means all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} job=${job:-${SLURM_JOB_ID:-}}
step_pid='' usr1='' run_dir='' again='sbatch it again'

say() { printf '[%s %s.%s] %s\n' "$JOB" "${SLURM_JOB_ID:-local}" "$life" "$*" >&2; }
die() { printf 'error: %s\n' "${*:2}" >&2; exit "$1"; }

choose_experiment() {
    case ${PATCHING:-apf} in
    apf) EXPERIMENT=${EXPERIMENT:-$APF} ;;
    uniform) EXPERIMENT=${EXPERIMENT:-$UNIFORM} ;;
    *) die 64 "PATCHING=$PATCHING: must be apf or uniform" ;;
    esac
    [ -n "$EXPERIMENT" ] || die 64 "$JOB has no uniform variant: leave PATCHING out"
}

choose_python() {
    [ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python; } || PYTHON=python
    command -v "$PYTHON" >/dev/null || die 64 "PYTHON=$PYTHON: no such program; make setup, or activate an environment"
    export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-FALSE}
}

check_variables() {
    case ${MODE:-strong} in strong | weak) ;; *) die 64 "MODE=$MODE: must be strong or weak" ;; esac
    local name
    for name in RANKS MAX_RESTARTS; do
        case ${!name:-1} in *[!0-9]*) die 64 "$name=${!name}: must be a number" ;; esac
    done
    [ -z "${ENV_ARCHIVE:-}" ] || [ -f "$ENV_ARCHIVE" ] || die 64 "ENV_ARCHIVE=$ENV_ARCHIVE: no such file"
    [ "${RANKS:-1}" -gt 0 ] || die 64 "RANKS=$RANKS: must be at least 1"
}

# -- under SLURM ---------------------------------------------------------------------------------------------------

enter_site() {
    local module
    [ "$SITE_ACCOUNT" = 0 ] || [ -n "${SLURM_JOB_ACCOUNT:-}" ] || die 64 "$SITE needs an account: sbatch -A PROJECT ..."
    set +u   # the module command of some sites reads variables that are not set
    for module in ${SITE_MODULES[@]+"${SITE_MODULES[@]}"}; do
        module load "$module" || die 65 "$SITE: module load $module failed"
    done
    set -u
    site_env
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then site_env_multi_node; fi
    unset SLURM_EXPORT_ENV   # after sbatch --export=NONE steps would start without any environment
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # since 22.05 steps do not inherit -c
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
}

meet() {  # where the ranks find each other
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || hosts=''
    MASTER_ADDR=${hosts%%$'\n'*}
    # Never localhost instead: then every node would be a world of its own, and hang.
    [ -n "$MASTER_ADDR" ] || die 65 "scontrol show hostnames $SLURM_JOB_NODELIST names no host"
    # Below the ephemeral ports; another one in each life, since the last one's may linger.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + life) % 12000))
    tasks_per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_TASKS_PER_NODE%%[!0-9]*}}
    WORLD_SIZE=$((SLURM_JOB_NUM_NODES * tasks_per_node)) LOCAL_WORLD_SIZE=$tasks_per_node
    [ "${SLURM_NTASKS:-$WORLD_SIZE}" = "$WORLD_SIZE" ] ||
        die 64 "$SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes: give --nodes and --ntasks-per-node, not --ntasks"
    export MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_WORLD_SIZE
}

capture() {  # what a later reader wants to know of this life; names are chosen, since environments hold secrets
    mkdir -p "$run_dir/slurm"
    cp "$0" "$run_dir/.job.sh.$$.$(hostname)"   # whole or not at all, whoever else starts in this folder
    mv -f "$run_dir/.job.sh.$$.$(hostname)" "$run_dir/job.sh"
    {
        scontrol show job "$job" || true
        git log -1 --format='commit %H' 2>/dev/null || true
        env | grep -E '^(SLURM|NCCL|RCCL|TORCH|FI|MIOPEN|OMP|MASTER|WORLD|CUDA|ROCR|HIP|LOADEDMODULES)' | sort
    } >"$run_dir/slurm/$SLURM_JOB_ID.$life.txt"
    # The flight recorder: when a collective of NCCL hangs, each rank writes what it waited for.
    export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_FR_DUMP_TEMP_FILE=$run_dir/slurm/flight_rank_
}

unpack_environment() {  # 128 ranks that import torch from a parallel file system take minutes
    if [ -z "${ENV_ARCHIVE:-}" ] || [ -z "$SITE_NODE_LOCAL" ]; then return 0; fi
    if [ "$SLURM_JOB_NUM_NODES" -lt "$SITE_NODE_LOCAL_FROM" ]; then return 0; fi
    local here=$SITE_NODE_LOCAL/env-$SLURM_JOB_ID one_each=(--ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES")
    # shellcheck disable=SC2016,SC2086  # the nodes expand it; several options in one text
    if sbcast $SITE_SBCAST "$ENV_ARCHIVE" "$here.tar" &&
        srun "${one_each[@]}" bash -c \
            'mkdir -p "$1" && tar -xf "$1.tar" -C "$1" &&
            if [ -f "$1/bin/conda-unpack" ]; then "$1/bin/python" "$1/bin/conda-unpack"; fi' unpack "$here"; then
        PYTHON=$here/bin/python
    else
        say "the environment could not be put on the nodes; using $PYTHON"
        srun "${one_each[@]}" rm -rf "$here" "$here.tar" || true
    fi
}

preflight() {
    [ "${PREFLIGHT:-1}" = 1 ] || return 0
    local rc=0 state bad=$run_dir/slurm/$SLURM_JOB_ID.$life.bad_nodes
    ranks "$SLURM_JOB_NUM_NODES" "$tasks_per_node" -m launch preflight --site "$SITE" --bad-nodes "$bad" \
        --folder "$run_dir" || rc=$?
    [ "$rc" != 0 ] || return 0
    local why="preflight failed with exit code $rc; PREFLIGHT=0 skips it"
    [ ! -s "$bad" ] || why="preflight: bad nodes; submit again with --exclude=$(paste -sd, "$bad")"
    state=$(job_state)
    ended "$state" 65 --reason "$why"
    [ "$state" = RUNNING ] || exit "$rc"   # scancel, a lost node: no fault of the nodes that are left
    die 65 "$why"
}

# What each task does: the five variables of its rank, then Python. Ends that all ranks reach together (64, 65, 75) are
# told by a file, not by the exit code alone: with --kill-on-bad-exit srun kills the ranks that are a moment behind, and
# reports their death instead; a save in 75 is not to be disturbed at all. Rank 0 alone prints why it ends with 64 or
# 65, so the others wait to be killed by its end. USR1 is ignored until Python takes it over: during its imports it
# would kill.
# shellcheck disable=SC2016  # each task expands it
TASK='trap "" USR1; trap : TERM
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS
eval "$TASK_ENV"
[ -z "${MIOPEN_USER_DB_PATH:-}" ] || mkdir -p "$MIOPEN_USER_DB_PATH" "${MIOPEN_CUSTOM_CACHE_DIR:-$MIOPEN_USER_DB_PATH}"
rc=0; "$PYTHON" "$@" || rc=$?
case $rc in 64 | 65 | 75) echo "$rc" >"$ENDED" ;; esac
case $rc in 64 | 65) [ "$RANK" = 0 ] || sleep 20 ;; 75) rc=0 ;; esac
exit "$rc"'

ranks() {  # nodes, tasks on each, then words for Python
    export TASK_ENV PYTHON ENDED=$run_dir/slurm/$SLURM_JOB_ID.$life.ended
    rm -f "$ENDED"
    srun --nodes="$1" --ntasks-per-node="$2" --ntasks=$(($1 * $2)) --kill-on-bad-exit=1 --wait=60 --unbuffered \
        ${SITE_SRUN[@]+"${SITE_SRUN[@]}"} bash -c "$TASK" task "${@:3}" &
    step_pid=$!
    local rc=0
    wait "$step_pid" || rc=$?
    while kill -0 "$step_pid" 2>/dev/null; do   # a signal that we trap ends `wait`, not the step
        # Again and again: the ranks may not have been listening yet. Later ones do nothing.
        if [ -n "$usr1" ]; then kill -USR1 "$step_pid" 2>/dev/null || true; sleep 5 & wait -n || true; fi
        rc=0; wait "$step_pid" || rc=$?
    done
    step_pid=''
    if [ -s "$ENDED" ]; then read -r rc <"$ENDED"; fi
    rm -f "$ENDED"
    return "$rc"
}

job_state() {  # RUNNING, UNKNOWN, or why SLURM is ending the job: while it does, it calls every case COMPLETING
    local shown restarts tries=0
    trap '' TERM   # of this subshell: the answer is still wanted when the job is being ended
    until shown=$(scontrol --oneliner show job "$job" 2>/dev/null); do   # slurmctld may be busy, or changing hosts
        [ $((tries += 1)) -lt 6 ] || { echo UNKNOWN; return; }
        sleep 5
    done
    case $shown in
    *' JobState=COMPLETING '*)
        restarts=${shown#* Restarts=} restarts=${restarts%% *}
        if [ "$restarts" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
            echo REQUEUED   # a lost node, preemption, scontrol requeue
        else
            case $shown in
            *' Reason=TimeLimit '*) echo TIMEOUT ;;
            *' Reason=NodeDown '*) echo NODE_FAIL ;;   # of a job that may not be requeued
            *) echo CANCELLED ;;
            esac
        fi ;;
    *) shown=${shown#* JobState=}; echo "${shown%% *}" ;;
    esac
}

ended() {  # state, exit code: what the ranks could not write into the run's record themselves
    "$PYTHON" -m launch ended "$run_dir" --job "$job" --state "$1" --code "$2" "${@:3}" \
        --log "$(readlink /proc/$$/fd/1)" || true
}

finish() {  # exit code of the training: go on in another life, or leave a record that says how it ended
    local rc=$1 most=${MAX_RESTARTS:-20} state
    state=$(job_state)
    if [ "$rc" = 75 ] && grep -qs '"reason": "file STOP' "$run_dir/record.json"; then
        say "saved; the file STOP asked for the end, so it is not requeued: $again to go on"
        cancel_chain
    elif [ "$rc" = 75 ] && [[ $state = RUNNING || $state = UNKNOWN ]] && [ "$SITE_REQUEUE" = 1 ]; then
        if [ "$life" -ge "$most" ]; then
            say "saved, but this was life $((life + 1)) of at most $((most + 1)): $again to go on"
        elif scontrol requeue "$SLURM_JOB_ID"; then
            say "saved; requeued as life $((life + 2))"
            sleep 60   # SLURM ends this shell
        else
            say "saved, but scontrol requeue is refused: $again, or set requeue: false in the site file"
        fi
    elif [ "$rc" != 0 ]; then
        ended "$state" "$rc"
    fi
    # The rest of a chain is there for what was saved, and for a lost node: what requeue does elsewhere.
    [ "$rc" = 75 ] || [ "$state" = NODE_FAIL ] || cancel_chain
    exit "$rc"
}

cancel_chain() {
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || [ "$SITE_REQUEUE" = 1 ] || scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" || true
}

train() {
    local rc=0
    run_dir=$("$PYTHON" -m launch where "$EXPERIMENT" --ranks "$WORLD_SIZE" "$@") || exit $?
    capture
    unpack_environment
    preflight
    say "$EXPERIMENT on $SLURM_JOB_NUM_NODES x $tasks_per_node ranks, meeting at $MASTER_ADDR:$MASTER_PORT -> $run_dir"
    ranks "$SLURM_JOB_NUM_NODES" "$tasks_per_node" -m launch train "$EXPERIMENT" "$@" || rc=$?
    finish "$rc"
}

prepare() {  # MPI: the ranks share the slides, and large slides among them
    local rc=0
    # shellcheck disable=SC2016  # each task expands it; as in TASK, the line of bad settings is rank 0's
    srun --mpi="$SITE_MPI" --kill-on-bad-exit=1 --unbuffered bash -c \
        'rc=0; "$@" || rc=$?; [ "$rc" != 64 ] || [ "$SLURM_PROCID" = 0 ] || sleep 20; exit "$rc"' task \
        "$PYTHON" -m launch prep "$EXPERIMENT" "$@" &
    step_pid=$!
    wait "$step_pid" || rc=$?
    while kill -0 "$step_pid" 2>/dev/null; do rc=0; wait "$step_pid" || rc=$?; done
    if [ -n "$usr1" ] && [ "$rc" != 0 ]; then   # out of time: what is done stays done, and another life does the rest
        if [ "$SITE_REQUEUE" = 1 ] && [ "$life" -lt "${MAX_RESTARTS:-20}" ] && scontrol requeue "$SLURM_JOB_ID"; then
            say "out of time; requeued as life $((life + 2))"
            sleep 60
        fi
        say "out of time: sbatch it again to go on; finished slides are not made again"
    fi
    exit "$rc"
}

sizes() {  # nodes, ranks on each: the sizes of a scaling study, each of which divides the last
    local n
    for ((n = 1; n <= $2; n++)); do (($2 % n)) || echo "$n"; done
    for ((n = 2; n <= $1; n *= 2)); do echo $((n * $2)); done
}

point() {  # ranks, words: settings and run directory of one size of a study (variables of the caller)
    local text
    text=$("$PYTHON" -m launch where "$EXPERIMENT" --scaling "${MODE:-strong}" --ranks "$1" --of "$largest" "${@:2}") ||
        exit $?
    mapfile -t settings <<<"$text"
    run_dir=${settings[0]}
}

scaling() {  # the whole study in one allocation: 1, 2, 4, ... ranks up to all of it
    local n largest list settings rc=0 worst=0
    list=$(sizes "$SLURM_JOB_NUM_NODES" "$tasks_per_node") largest=${list##*$'\n'}
    [ "$largest" = "$WORLD_SIZE" ] || say "sizes up to $largest of the $WORLD_SIZE ranks: nodes are doubled each time"
    for n in $list; do point "$n" "$@"; done   # a study that cannot run to its end does not begin
    capture   # into the folder of the largest size, the last of the list
    unpack_environment
    preflight
    for n in $list; do
        point "$n" "$@"
        capture
        local per_node=$((n < tasks_per_node ? n : tasks_per_node)); rc=0
        say "$EXPERIMENT, ${MODE:-strong} scaling, $n ranks -> $run_dir"
        ranks $((n / per_node)) "$per_node" -m launch train "$EXPERIMENT" "${settings[@]:1}" || rc=$?
        [ "$rc" != 75 ] || finish 75
        [ "$rc" = 0 ] || { worst=$rc; ended RUNNING "$rc"; }
    done
    exit "$worst"
}

on_exit() {  # what cannot run in this task of a chain cannot in the next
    case $? in 64 | 65) cancel_chain ;; esac
}

on_usr1() {  # the time limit is near, or somebody sent it
    usr1=1
    case $KIND in
    train | scaling) say "USR1: all ranks save together at the next step" ;;
    *) say "USR1: ending the step" ;;
    esac
    [ -z "$step_pid" ] || kill -USR1 "$step_pid" 2>/dev/null || true
}

under_slurm() {
    # What has begun anew would begin anew again.
    case " $*" in *' force='*) again='sbatch it again with force=false' ;; esac
    # A chain of array tasks is lives of one run too.
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ "$SITE_REQUEUE" = 0 ]; then
        # shellcheck disable=SC2153  # SLURM sets it
        life=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN)); export SLURM_RESTART_COUNT=$life
    fi
    trap on_exit EXIT
    trap on_usr1 USR1
    trap : TERM   # scancel: the ranks save; this shell stays to write how it ended
    enter_site
    meet
    case $KIND in
    train) train "$@" ;;
    prep) prepare "$@" ;;
    scaling) scaling "$@" ;;
    bench) srun --nodes=1 --ntasks=1 ${SITE_SRUN[@]+"${SITE_SRUN[@]}"} "$PYTHON" -m launch bench "$@" ;;
    esac
}

# -- without SLURM: the same on this machine -------------------------------------------------------------------------

on_this_machine() {
    local n settings largest=${RANKS:-1} start=("$PYTHON")
    if [ "$largest" -gt 1 ]; then
        start=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$largest")
    fi
    case $KIND in
    train) exec "${start[@]}" -m launch train "$EXPERIMENT" "$@" ;;
    prep) exec "$PYTHON" -m launch prep "$EXPERIMENT" --jobs "$largest" "$@" ;;
    bench) exec "$PYTHON" -m launch bench "$@" ;;
    scaling)
        for n in $(sizes 1 "$largest"); do
            point "$n" "$@"
            "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$n" \
                -m launch train "$EXPERIMENT" "${settings[@]:1}"
        done ;;
    esac
}

choose_experiment
check_variables
choose_python
if [ -n "${SLURM_JOB_ID:-}" ]; then under_slurm "$@"; else on_this_machine "$@"; fi
