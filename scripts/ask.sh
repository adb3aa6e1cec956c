#!/usr/bin/env bash
# Continue a prompt with all memories that scripts/remember.sh has made: bash scripts/ask.sh "prompt" [flags]
#
# One memory has the lambda that was best on its held-out documents; of several each has its gate. Further flags go to
# `python -m demo.generation_example`. Environment variables:
#   OUTPUT   folder of all memories                          (default: results/memories)
#   ONLY     names of some of them, with blanks between      (default: all)
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# -ge 1 ] || { sed -n '2p' "${BASH_SOURCE[0]}" >&2 && exit 2; }
find_python

OUTPUT="${OUTPUT:-results/memories}" memories=() model="" lambda=""
for results in "$OUTPUT"/*/results.json; do
    name="$(basename "$(dirname "$results")")"
    case " ${ONLY:-$name} " in *" $name "*) ;; *) continue ;; esac
    [ -f "$results" ] || continue
    found="$("$PYTHON" -c 'import json, sys
results = json.load(open(sys.argv[1])); print(results["model"], results["memory"], results["lambda"], sep="\n")' "$results")"
    mapfile -t parts <<<"$found"
    model="${parts[0]}" lambda="${parts[2]}" memories+=("${parts[1]}")
done
[ "${#memories[@]}" -gt 0 ] || { echo "error: $OUTPUT: holds no memory; make one with scripts/remember.sh" >&2 && exit 2; }
[ "${#memories[@]}" -eq 1 ] || lambda=adaptive
exec "$PYTHON" -m demo.generation_example --model_name_or_path "$model" \
    --knn_generator_path "${memories[@]}" --lmbda "$lambda" --prompt "$1" "${@:2}"
