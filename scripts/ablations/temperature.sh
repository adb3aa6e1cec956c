#!/usr/bin/env bash
# How flat the kNN distributions are that the memory learns: one search, targets at each temperature.
#   bash scripts/ablations/temperature.sh
# TEMPERATURES: the values (default: 1 2 4 16). Everything else: scripts/ablations/common.sh.
ABLATION=temperature
# shellcheck source=scripts/ablations/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for KNN_TEMP in ${TEMPERATURES:-1 2 4 16}; do memory "$KNN_TEMP" offline; done
report "kNN temperature"
