#!/usr/bin/env bash
# Which decoder block's MLP input the memory reads, and is searched for: datastore, index and targets for each.
#   bash scripts/ablations/layer_position.sh
# LAYER_POSITIONS: the values, -1 for the last block (default: -1 -6 -12 -20). Everything else:
# scripts/ablations/common.sh.
ABLATION=layer_position
# shellcheck source=scripts/ablations/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for LAYER_POSITION in ${LAYER_POSITIONS:--1 -6 -12 -20}; do memory "$LAYER_POSITION" offline; done
report "captured block"
