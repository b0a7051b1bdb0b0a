#!/usr/bin/env bash
# Several machines without ssh between them: run the same line on every machine, each with its own node rank.
#   launch/multinode.sh HOSTFILE NODE_RANK MASTER_ADDR [options of toolkit train]
# HOSTFILE names the machines in the order of their node ranks, one a line: "worker-0 slots=8". MASTER_ADDR is
# the first machine's address. MASTER_PORT may be set; on machines with several networks so may
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. With --restarts N all start again when one of them is lost.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "error: usage: $0 HOSTFILE NODE_RANK MASTER_ADDR [options of toolkit train]" >&2
    exit 2
fi
hostfile=$1 node_rank=$2 master_addr=$3
shift 3

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -d $here/../.venv/bin ]] && PATH=$here/../.venv/bin:$PATH

exec toolkit train --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" --master_addr "$master_addr" \
    --master_port "${MASTER_PORT:-29500}" "$@"
