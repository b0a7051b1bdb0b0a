#!/usr/bin/env bash
# The SOAM run of its paper: as launch/qwen3_134m.sh, with SOAM's batch and rate. Further options as there.
set -euo pipefail

export CONFIG=${CONFIG:-soam_zero2}
export GLOBAL_BATCH=${GLOBAL_BATCH:-512}
export LR=${LR:-8e-3} # attention and the rest; the feed-forward layers take 1.5e-2

exec "$(dirname "${BASH_SOURCE[0]}")/qwen3_134m.sh" "$@"
