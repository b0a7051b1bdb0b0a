#!/usr/bin/env bash
# SLURM: submit from the repository's root, with options of toolkit train behind it:
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

# A job that comes back has the number that it had, and so finds what it has saved. Of two folders the later one counts:
# the one that was given, by whichever of its names.
set -- --run-dir "runs/slurm-$SLURM_JOB_ID" "$@"

mkdir -p runs
hostfile=runs/hostfile-$SLURM_JOB_ID # on the file system that the nodes share
# SLURM_GPUS_ON_NODE counts what the nodes were given, whichever option asked for it.
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots=$SLURM_GPUS_ON_NODE/" > "$hostfile"
master_addr=$(head -n 1 "$hostfile" | cut -d ' ' -f 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node must differ

cancelled=
trap 'cancelled=yes' TERM # what scancel sends; bash hears of it once srun has ended

# Two minutes before the time limit every process of the tasks gets SIGUSR1, with PreemptParameters=send_user_signal
# before a preemption too: ranks save and stop, which is status 130. To SLURM that must be no bad exit: it would end the
# other nodes' tasks on their way out, and the job's status would be that of a task that was killed. So they leave a mark.
# SLURM_NODEID is the node's own only inside the task, hence the inner shell.
stopped=runs/stopped-$SLURM_JOB_ID
rm -f "$stopped"
status=0
# shellcheck disable=SC2016 # the inner shell expands these
srun --kill-on-bad-exit=1 bash -c 'trap : USR1 TERM; stopped=$1 hostfile=$2 master_addr=$3; shift 3
    launch/multinode.sh "$hostfile" "$SLURM_NODEID" "$master_addr" "$@"
    status=$?; [[ $status -ne 130 ]] || { touch "$stopped"; status=0; }; exit "$status"' \
    task "$stopped" "$hostfile" "$master_addr" "$@" || status=$?

if [[ $status -eq 0 && -e $stopped ]]; then
    status=130
    if [[ -z $cancelled ]]; then
        echo "stopped before the end; back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
rm -f "$stopped"
exit "$status"
