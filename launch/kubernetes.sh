#!/usr/bin/env bash
# Kubernetes: what each pod of launch/kubernetes.yaml runs, with options of launch/train.py behind it. The operator says
# which pod this is in RANK, of how many in WORLD_SIZE, and where the first one is in MASTER_ADDR and MASTER_PORT.
#   GPUS=8 launch/kubernetes.sh --model qwen3-8b ...
# GPUS is the number of ranks in each pod, the same in all (all GPUs of the pod without it).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -d $here/../.venv/bin ]] && PATH=$here/../.venv/bin:$PATH

if [[ -z ${GPUS:-} ]] && ! command -v nvidia-smi > /dev/null; then
    echo "error: GPUS is not set, and there is no nvidia-smi, which would count them; set GPUS to the ranks of a pod" >&2
    exit 2
fi
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
hostfile=$(mktemp)
# Nobody looks these names up: every pod starts its own ranks.
for ((pod = 0; pod < WORLD_SIZE; pod++)); do echo "pod-$pod slots=$gpus"; done > "$hostfile"

place=$RANK
unset RANK WORLD_SIZE # of pods; ranks get their own

# `toolkit train` passes SIGTERM, which a pod that has to go is sent, on to the ranks: they save and stop.
exec toolkit train --hostfile "$hostfile" --no_ssh --node_rank "$place" --master_addr "$MASTER_ADDR" \
    --master_port "$MASTER_PORT" "$@"
