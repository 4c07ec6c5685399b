"""A token in the environment and in errors: not one byte that the program writes or prints holds it."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from lora_utils import UserError, stages
from lora_utils.cli import main
from lora_utils.config.loading import ConfigError, load_config
from lora_utils.config.schema import ModelConfig, RunConfig
from tests.conftest import ROOT

TOKEN = "hf_" + "CANARYcanary0123456789CANARYcanary"
KEY = "canarykey" + "0123456789abcdef" * 2  # of no known form: a secret by the name of its variable alone
SECRETS = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": KEY,
    "HF_HUB_OFFLINE": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
HALVES = [
    f"'{secret[:9]}' + '{secret[9:]}'" for secret in (TOKEN, KEY)
]  # no secret stands in the cell itself
RAISES = [
    f"raise RuntimeError('could not log in with ' + {HALVES[0]})",
    f"raise KeyError({HALVES[1]})",
    "import os\nraise OSError(f\"401 Client Error: Bearer {os.environ['HF_TOKEN']}\")",
    f"notebook.configure(preset, revision={HALVES[0]})",
    f"import warnings, logging\nwarnings.warn({HALVES[0]})\n"
    f"logging.error('%s', {HALVES[1]})\nint({HALVES[1]})",
]


class Run:
    """Everything that the stages, commands and notebooks of this module write and print."""

    def __init__(self, folder: Path, data_dir: Path):
        self.folder, self.printed = folder, []
        self.trained = self.failed = ""  # the notebooks
        self.settings = {
            "train_data_dir": data_dir,
            "output_dir": folder / "run",
            "mirror_dir": folder / "mirror",
        }
        self.settings |= {"max_train_steps": 2, "checkpointing_steps": 1, "num_inference_steps": 2}
        (folder / "mirror").mkdir()

    def stage(self, name, **settings):
        """The exit code of a stage on the preset of the tests, in this process."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(self._arguments(name, settings))
        self.printed.append(output.getvalue().encode())
        return code

    def command(self, name, **settings):
        """The same in a terminal."""
        command = [sys.executable, "-m", "lora_utils", *self._arguments(name, settings)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        self.printed += [done.stdout, done.stderr]
        return done.returncode

    def notebook(self, source, parameters):
        """Run a notebook by papermill with these parameters; what stops it is printed."""
        output = io.StringIO()
        target = self.folder / f"{Path(source).stem}_done.ipynb"
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                options = {"kernel_name": "python3", "cwd": ROOT, "log_output": True}
                papermill.execute_notebook(source, target, parameters, **options)
            except papermill.PapermillExecutionError as error:
                print(error)
        self.printed.append(output.getvalue().encode())
        return target.read_text()

    def everything(self):
        """Contents by where they are."""
        files = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        return files | {f"output {number}": text for number, text in enumerate(self.printed)}

    def _arguments(self, name, settings):
        flags = [
            str(part) for item in (self.settings | settings).items() for part in (f"--{item[0]}", item[1])
        ]
        return [name, "--config", str(ROOT / "lora_utils" / "presets" / "ci.yaml"), *flags]


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    """One run of all there is, some of which must fail."""
    run = Run(tmp_path_factory.mktemp("canary"), data_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        codes = [run.stage("check"), run.stage("precompute"), run.command("train"), run.stage("compare")]
        codes += [run.stage("train", max_train_steps=3)]
        assert codes == [0] * 5, run.printed
        wrong = [{"lora_path": "absent.safetensors"}, {"revision": TOKEN}, {"prompt": f"a key {KEY}"}]
        assert [run.stage("compare", **one) for one in [*wrong, {"hub_token": TOKEN}]] == [2] * 4
        fields = {
            "preset": "ci",
            "train_data_dir": str(data_dir),
            "output_dir": str(run.folder / "papermill"),
        }
        run.trained = run.notebook("notebooks/03_train.ipynb", fields | {"overrides": {"max_train_steps": 2}})
        run.failed = run.notebook(failing_notebook(run.folder), {"preset": "ci"})
    return run


def failing_notebook(folder):
    """Its form, our set-up, cells that raise what holds a secret; at the last of them it stops."""
    first = "from lora_utils import notebook, stages\nconfig = notebook.configure(preset)"
    cells = [nbformat.v4.new_code_cell(cell) for cell in ("preset = 'auto'", first, *RAISES, RAISES[0])]
    cells[0].metadata["tags"] = ["parameters"]
    for cell in cells[2:-1]:
        cell.metadata["tags"] = ["raises-exception"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "failing.ipynb"
    )
    return str(folder / "failing.ipynb")


@pytest.mark.parametrize("secret", [TOKEN, KEY], ids=["a token", "a key"])
def test_no_byte_that_is_written_or_printed_holds_a_secret(run, secret):
    found = run.everything()
    assert [place for place, content in found.items() if secret.encode() in content] == []
    assert sum(b"***" in content for content in found.values()) >= 3  # it was there to be leaked


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "versions.json", "metrics.jsonl", "summary.json", "data_report.csv"),
        *("pytorch_lora_weights.safetensors", "checkpoints/step-000000003/state.json"),
        "compare/earlier-1/sheet.png",  # of the LoRA before the third step
    ],
)
def test_what_was_searched_is_all_that_a_run_writes(run, name):
    assert (run.folder / "run" / name).stat().st_size
    mirrored = {path.name for path in (run.folder / "mirror").rglob("*")}
    assert {"state.json", "pytorch_lora_weights.safetensors"} <= mirrored


def test_the_notebooks_that_were_searched_show_their_errors(run):
    assert run.failed.count("could not log in with ***") >= 2
    for kind in ("RuntimeError", "KeyError", "OSError", "ConfigError", "ValueError"):
        assert kind in run.failed
    assert b"could not log in with ***" in run.printed[-1]
    assert "held-out loss" in run.trained


@pytest.mark.parametrize(
    "setting", ["pretrained_model_name_or_path", "revision", "output_dir", "prompt", "optimizer"]
)
def test_a_token_given_as_a_setting_is_refused_and_not_repeated(setting):
    with pytest.raises(ConfigError) as error:
        load_config(None, {setting: TOKEN})
    assert TOKEN not in str(error.value)
    assert setting in str(error.value)
    assert "HF_TOKEN" in str(error.value)


def test_a_run_that_was_configured_by_hand_writes_no_token_either(make_config, monkeypatch, tmp_path):
    config = make_config(output_dir=tmp_path / "run")
    model = ModelConfig(
        pretrained_model_name_or_path=config.model.pretrained_model_name_or_path, revision=TOKEN
    )
    list(stages.train(RunConfig(**{**dict(config), "model": model})))
    with pytest.raises(UserError):
        stages.compare(
            RunConfig(**{**dict(config), "model": ModelConfig(pretrained_model_name_or_path=TOKEN)})
        )
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)
