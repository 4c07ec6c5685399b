"""The package as it is installed: the wheel holds everything that the stages need, wherever they are called
from.
"""

import os
import shutil
import subprocess
import sys
import venv

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of a bare venv with the wheel; the packages of this environment are visible, its code is
    not.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = folder / "source"
    shutil.copytree(
        ROOT / "lora_utils", source / "lora_utils"
    )  # a copy: no build folder of before may help along
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheels = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(wheels, check=True)
    [wheel] = folder.glob("lora_utils-*.whl")

    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("-packages")]
    (site / "environment.pth").write_text(
        "\n".join(ours) + "\n"
    )  # plain paths: .pth files in them are not read
    return python.parent


def run(installed, folder, *command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [installed / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_package_checks_and_trains_in_an_empty_folder(installed, tmp_path):
    where = run(installed, tmp_path, "python", "-c", "import lora_utils; print(lora_utils.__file__)")
    assert str(installed.parent) in where
    run(installed, tmp_path, "python", "-m", "lora_utils.tiny.demo_data", "--output_dir", "pictures")
    settings = ["--config", "tiny", "--train_data_dir", "pictures", "--output_dir", "run"]

    assert "captioned images" in run(installed, tmp_path, "lora-utils", "check", *settings)
    assert not (tmp_path / "run").exists()

    said = run(installed, tmp_path, "lora-utils", "train", *settings, "--max_train_steps", "2")
    assert "the LoRA is in run/" in said
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").stat().st_size > 0


def test_the_entry_point_and_the_module_are_the_same_command(installed, tmp_path):
    as_script = run(installed, tmp_path, "lora-utils", "--help")
    assert as_script == run(installed, tmp_path, "python", "-m", "lora_utils", "--help")
