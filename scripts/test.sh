#!/usr/bin/env bash
# Install what the tests need and run them all: bash scripts/test.sh [pytest options]
# A part of them: `bash scripts/test.sh -m unit` (no processes, no training; under a minute), `-m slow` (minutes each).
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install dev,demo,eval,serve,compare
run "lint" ruff check .
run "format" ruff format --check .
mapfile -t scripts < <(git ls-files '*.sh' 2>/dev/null || find scripts downstream -name '*.sh')
run "shell scripts" shellcheck -x "${scripts[@]}"
run "tests" python -m pytest -q -m "not slow" "$@"
