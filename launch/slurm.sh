#!/usr/bin/env bash
# SLURM: submit from the repository's root, with options of launch/train.py behind it:
#   sbatch --nodes 4 launch/slurm.sh --model qwen3-8b --data fineweb --config amcs_zero3 --steps 1000
# One task per node starts DeepSpeed's launcher there, which starts one rank per GPU. The job goes back into the queue
# when it is preempted, when a node fails and before its time is over, and then resumes from its newest checkpoint.
# `scancel` ends it for good.
#SBATCH --job-name=leanstate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
set -euo pipefail

# A job that comes back has the number that it had, and so finds what it has saved.
[[ " $* " == *" --run-dir"[\ =]* ]] || set -- "$@" --run-dir "runs/slurm-$SLURM_JOB_ID"

mkdir -p runs
hostfile=runs/hostfile-$SLURM_JOB_ID # on the file system that the nodes share
# SLURM_GPUS_ON_NODE counts what the nodes were given, whichever option asked for it.
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$SLURM_GPUS_ON_NODE/" > "$hostfile"
master_addr=$(head -n 1 "$hostfile" | cut -d ' ' -f 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node must differ

cancelled=
trap 'cancelled=yes' TERM # what scancel sends; bash hears of it once srun has ended

# SLURM_NODEID is the node's own only inside the task, hence the inner shell. Two minutes before the time limit every
# process there gets SIGUSR1: ranks save and stop, and the launchers, which would die of it, must ignore it. With
# PreemptParameters=send_user_signal SLURM sends it before a preemption too; else the run resumes from an older checkpoint.
status=0
# shellcheck disable=SC2016 # the inner shell expands these
srun --kill-on-bad-exit=1 bash -c \
    'trap "" USR1; hostfile=$1 master_addr=$2; shift 2; exec launch/multinode.sh "$hostfile" "$SLURM_NODEID" "$master_addr" "$@"' \
    task "$hostfile" "$master_addr" "$@" || status=$?

# 130: ranks were asked to stop, and saved.
if [[ $status -eq 130 && -z $cancelled ]]; then
    echo "stopped before the end; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
