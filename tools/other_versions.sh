#!/usr/bin/env bash
# tools/other_versions.sh [FOLDER]   rehearse the card's benchmarks with the versions of a usual GPU image
#
# Makes an environment of its own in FOLDER (.venv-other when not given; a second call takes it as it is), with
# the torch and transformers that a card was measured with last, and rehearses there what must not be tried
# for the first time on a card: a few minutes, and some gigabytes, for this torch brings CUDA's libraries along.
# TORCH and TRANSFORMERS name other versions.
set -euo pipefail
cd "$(dirname "$0")/.."

folder="${1:-.venv-other}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

if [ ! -x "$folder/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$folder"
fi
python="$folder/bin/python"
"$python" -m pip install -q -r requirements.txt "torch==${TORCH:-2.11.0}" "transformers==${TRANSFORMERS:-5.17.0}"
"$python" -c '
from lora_utils.system.versions import versions
print(", ".join(f"{name} {version}" for name, version in versions().items()))'

for mode in --smoke --quick --micro; do
    echo "== gpu --rehearse $mode"
    "$python" -m benchmarks gpu --rehearse "$mode"
done
