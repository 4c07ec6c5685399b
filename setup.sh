#!/usr/bin/env bash
# ./setup.sh        make an environment in .venv and install what running needs
# ./setup.sh demo   install, then train a LoRA on the tiny SDXL and show what it learned
# ./setup.sh test   install what testing needs, then run every check
# On Colab it installs into the running environment. Running it twice is harmless.
set -euo pipefail
cd "$(dirname "$0")"

on_colab() { env | grep -q '^COLAB_'; }

make_environment() {
    on_colab && return
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}

# Without a GPU, take a build of torch that does not bring gigabytes of CUDA along: the one that TORCH_INDEX_URL
# (the CPU index on PyTorch's "Get started" page) serves, or 2.13.0, which some package indexes hold as a CPU build.
install_torch() {
    python -c 'import torch' 2>/dev/null && return
    if [ "$(uname)" != Linux ] || command -v nvidia-smi >/dev/null; then
        python -m pip install -q 'torch>=2.6'
    elif [ -n "${TORCH_INDEX_URL:-}" ]; then
        python -m pip install -q 'torch>=2.6' --index-url "$TORCH_INDEX_URL"
    else
        python -m pip install -q 'torch==2.13.0'
    fi
}

# HEIC and JPEG XL: the extra formats, as ready-made builds. Where a platform has none, such files are refused by name.
install_formats() { # $@: more options of pip
    python - <<'PYTHON' | while read -r package; do
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["formats"], sep="\n")
PYTHON
        python -m pip install -q --only-binary :all: "$@" "$package" </dev/null 2>/dev/null ||
            echo "without $package, which has no build for this platform"
    done
}

install() { # $1: what to install
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if on_colab; then
        # What the running kernel has imported must stay as it is on disk.
        python - >/tmp/constraints.txt <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version
for package in ("torch", "torchvision", "numpy", "pillow", "ipywidgets"):
    try:
        print(f"{package}=={version(package)}")
    except PackageNotFoundError:
        pass
PYTHON
        python -m pip install -q -r requirements.txt -c /tmp/constraints.txt
        install_formats -c /tmp/constraints.txt
        # Colab's torchao is too old for peft, which then refuses every LoRA; nothing here needs it.
        python -m pip uninstall -q -y torchao 2>/dev/null || true
    else
        install_torch
        python -m pip install -q -e "$1"
        install_formats
    fi
}

demo() {
    local run=runs/demo
    rm -rf "$run"
    python -m lora_utils.tiny.demo_data --output_dir data/demo_64px
    python -m lora_utils check --config tiny --output_dir "$run" | sed -n 1,7p
    python -m lora_utils precompute --config tiny --output_dir "$run"
    python -m lora_utils train --config tiny --output_dir "$run"
    python -m lora_utils compare --config tiny --output_dir "$run"
    python -m lora_utils.tiny.evaluate --lora_path "$run"
    echo "base above, LoRA below: $run/compare/sheet.png"
}

run_tests() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" LORA_PRESET=ci
    ruff check .
    ruff format --check .
    pyright
    python tools/notebooks.py check notebooks/*.ipynb
    python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
    python -m pytest -n 2 --dist worksteal -p tests.pretended_card.plugin tests/pretended_card
    python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 -x notebooks
}

make_environment
case "${1:-}" in
    "") install . && echo "ready: ${VIRTUAL_ENV:-.venv}; try ./setup.sh demo" ;;
    demo) install . && demo ;;
    test) install '.[test]' && run_tests ;;
    *) echo "usage: ./setup.sh [demo|test]" >&2 && exit 2 ;;
esac
