#!/usr/bin/env bash
# How large the memory is: its layers.
#   bash scripts/ablations/layers.sh
# LAYER_COUNTS: the values (default: 1 2 4 8; the paper's memory of GPT2-large: 54). Everything else:
# scripts/ablations/common.sh.
ABLATION=layers
# shellcheck source=scripts/ablations/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for LAYERS in ${LAYER_COUNTS:-1 2 4 8}; do memory "$LAYERS" offline; done
report "layers of the memory"
