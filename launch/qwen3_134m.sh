#!/usr/bin/env bash
# The AMCS run of its paper: Qwen3-134M on FineWeb. Every number can be set from outside:
#   STEPS=5 DATA='fineweb/*.parquet' GPUS=2 launch/qwen3_134m.sh --run-dir runs/short
# GPUS is the number of ranks (all GPUs without it); further options go to launch/train.py.
set -euo pipefail

MODEL=${MODEL:-qwen3-134m}
CONFIG=${CONFIG:-amcs_zero2}
DATA=${DATA:-fineweb}
STEPS=${STEPS:-640}
GLOBAL_BATCH=${GLOBAL_BATCH:-128}
MICRO_BATCH=${MICRO_BATCH:-8}
SEQ_LEN=${SEQ_LEN:-1024} # the paper does not say
WARMUP=${WARMUP:-0.1}    # share of the steps, linear
LR=${LR:-6e-4}
CLIP=${CLIP:-1.0} # global gradient norm

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -d $here/../.venv/bin ]] && PATH=$here/../.venv/bin:$PATH

exec deepspeed ${GPUS:+--num_gpus "$GPUS"} "$here/train.py" --model "$MODEL" --config "$CONFIG" --data "$DATA" \
    --steps "$STEPS" --global-batch "$GLOBAL_BATCH" --micro-batch "$MICRO_BATCH" --seq-len "$SEQ_LEN" \
    --warmup "$WARMUP" --lr "$LR" --set gradient_clipping="$CLIP" "$@"
