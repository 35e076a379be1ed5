#!/bin/sh
# Fail if anything generated is not what its source says: agentd/v1 and the compiled filters. Lint the protos
# with buf where it can be had (BUF=/path/to/buf, or on the PATH).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
PYTHON=$python scripts/generate.sh "$fresh"
for file in "$fresh"/agentd/v1/*_pb2*; do
    cmp -s "$file" "agentd/v1/$(basename "$file")" || { echo "agentd/v1/$(basename "$file") is stale: run scripts/generate.sh" >&2; exit 1; }
done
if "$python" -c 'import pyseccomp' 2>/dev/null; then
    (cd sandbox && "$OLDPWD/$python" -m agentd_sandbox.compile --check)
else
    echo "libseccomp is missing, so the compiled filters are not checked: sudo apt-get install libseccomp2" >&2
    exit 1
fi
buf=${BUF:-$(command -v buf || true)}
if [ -n "$buf" ]; then
    common=$("$python" -c 'import google.rpc, os; print(os.path.dirname(os.path.dirname(list(google.rpc.__path__)[0])))')
    "$python" -m grpc_tools.protoc -I protos -I "$common" --include_imports --include_source_info -o "$fresh/image.binpb" protos/agentd/v1/*.proto
    "$buf" lint "$fresh/image.binpb" --config buf.yaml
    echo "protos: linted with buf $("$buf" --version)"
else
    echo "buf is not here: protos are compiled but not linted"
fi
echo "generated files are current"
