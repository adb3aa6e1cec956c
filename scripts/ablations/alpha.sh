#!/usr/bin/env bash
# What the kNN distributions bring: the weight of KL(kNN || memory) in the loss, beside the cross-entropy's 1 - alpha.
#   bash scripts/ablations/alpha.sh
# ALPHAS: the values (default: 0 0.25 0.5 0.75 1). Everything else: scripts/ablations/common.sh.
ABLATION=alpha
# shellcheck source=scripts/ablations/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

for ALPHA in ${ALPHAS:-0 0.25 0.5 0.75 1}; do memory "$ALPHA" offline; done
report alpha
