#!/bin/sh
# Generate agentd/v1 from protos/ (the folder is the package, so no import needs rewriting).
#   scripts/generate.sh [OUTPUT]     default: the repository
set -eu
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
common=$("$python" -c 'import google.rpc, os; print(os.path.dirname(os.path.dirname(list(google.rpc.__path__)[0])))')
mkdir -p "$out"
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc -I protos -I "$common" \
    --python_out="$out" --mypy_out="quiet:$out" --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" protos/agentd/v1/*.proto
