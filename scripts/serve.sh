#!/usr/bin/env bash
# A memory behind an OpenAI-compatible API, for this machine only: bash scripts/serve.sh
#
# Base and memory are written into one folder (python -m models.export), and transformers' own server opens it. It needs
# pip install ".[serve]". Relative paths count from the repository's root. Every setting is an environment variable:
#   OUTPUT           the quickstart's folder                        (default: results/quickstart)
#   MODEL KNN_PATH   another base and its memories: folders or hub names, with blanks between  (default: the quickstart's)
#   LAMBDA MEMORY_TEMP  weight and temperature of the memory           (default: the quickstart's best; 0.25 and 1)
#   FOLDER           the folder to write, and the model's name in requests  (default: OUTPUT/served)
#   PORT             of 127.0.0.1                                   (default: 8000)
# Further flags go to `transformers serve`.
# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python

PORT="${PORT:-8000}" OUTPUT="${OUTPUT:-results/quickstart}"
FOLDER="${FOLDER:-$OUTPUT/served}"
# oneDNN keeps code for every shape of a product; prompts have many.
export ONEDNN_PRIMITIVE_CACHE_CAPACITY=128
if (: >"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
    echo "error: PORT=$PORT: something listens there already; stop it, or set PORT to another number" >&2
    exit 2
fi
if [ -z "${MODEL:-}" ] || [ -z "${KNN_PATH:-}" ]; then
    found="$("$PYTHON" -m demo.pair "$OUTPUT")"
    mapfile -t pair <<<"$found"
    MODEL="${MODEL:-${pair[0]}}" KNN_PATH="${KNN_PATH:-${pair[1]}}" LAMBDA="${LAMBDA:-${pair[2]}}" MEMORY_TEMP="${MEMORY_TEMP:-${pair[3]}}"
fi
if [ -e "$KNN_PATH" ]; then memories=("$KNN_PATH"); else read -ra memories <<<"$KNN_PATH"; fi
run "export" "$PYTHON" -m models.export "$MODEL" "${memories[@]}" "$FOLDER" --lmbda "${LAMBDA:-0.25}" --memory_temp "${MEMORY_TEMP:-1}"
run "serve" "$PYTHON" -m transformers.cli.transformers serve "$FOLDER" --trust-remote-code --host 127.0.0.1 --port "$PORT" "$@"
