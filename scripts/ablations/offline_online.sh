#!/usr/bin/env bash
# Hidden states from a datastore on disk (offline), or from the frozen base while the memory trains (online).
#   bash scripts/ablations/offline_online.sh
# Settings: scripts/ablations/common.sh.
ABLATION=offline_online
# shellcheck source=scripts/ablations/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

memory offline offline
memory online online
report "hidden states"
echo "Offline training reads $(du -sh "$(dstore train)" | cut -f 1) of hidden states, which took" \
    "$(cat "$DONE/datastore train, block $LAYER_POSITION.seconds") s to save; online training needs none of them."
