"""What others made is data: nothing in a file runs, and what cannot be used is refused by name."""

import ast
import pickle
import sys
from typing import Any

import pytest
import torch

from benchmarks.faults.malicious import CODE, FORMS, HEADERS, PIPE, assert_refused, message_of, payload, spoil
from lora_utils import stages
from lora_utils.config.schema import ModelConfig
from lora_utils.config.training import CheckpointConfig
from lora_utils.model import lora
from lora_utils.model.base import PretrainedSdxl
from lora_utils.storage.checkpoint import FOREIGN, read_checkpoint
from lora_utils.storage.store import CheckpointStore
from lora_utils.system.files import MANIFEST
from tests.conftest import ROOT, TINY
from tests.model import malicious_models as models
from tests.storage.malicious_checkpoints import (
    NAMES,
    STATES,
    checkpoint,
    checkpoint_with_manifest,
    state_json,
)

LORAS = ["lora.bin", "lora.pt", "lora.ckpt", "lora.pkl", "lora.safetensors", lora.WEIGHTS_NAME]
FOREIGNERS = [*FOREIGN, "custom_checkpoint_0.pkl", "pytorch_model.bin", "training_state.pt"]
OWN = ["adapter.safetensors", "optimizer.safetensors", "state.json", MANIFEST]
SPOILT = models.REFUSED | models.PASSED_OVER
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "imp"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system", "os.popen"}
UNSAFE_METHODS = {"unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)  # where payload_module lies
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "the payload ran"
    assert "payload_module" not in sys.modules


@pytest.fixture(scope="module")
def pipeline():
    return PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(TINY))).load_unet_pipeline(
        torch.float32
    )


def load_lora(pipeline, file):
    lora.load_lora(pipeline, lora.read_lora(pipeline, file))
    pipeline.unload_lora_weights()


def load_all(folder):
    base = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(folder)))
    for use in (base.find_tokenizers, base.vae_scale_factor, base.load_noise_schedule, base.load_vae):
        use()
    for use in (base.load_text_pipeline, base.load_unet_pipeline, base.load_unet):
        use(torch.float32)
    for use in (base.text_identity, base.unet_identity, base.vae_identity):
        use()


def resume(folder):
    """A run's own way to a checkpoint."""
    config = CheckpointConfig(resume_from_checkpoint=str(folder))
    nobody: Any = None  # nothing is resumed
    identity = {"fixed": {}, "free": {}}
    CheckpointStore(config, folder.parent / "run", identity, None, is_main=False).resume(nobody)


def test_there_are_many_payloads():
    counted = [len(FORMS) * len(names) for names in (LORAS, FOREIGNERS, OWN)]
    counted += [
        sum(
            bool({CODE, *FORMS} & {str(change) for change in changes.values()}) for changes in SPOILT.values()
        )
    ]
    assert sum(counted) >= 40
    assert len(HEADERS) >= 17


@pytest.mark.parametrize("form", FORMS)
def test_the_payloads_would_run(tmp_path, form):
    content = payload(tmp_path / "canary", form)
    (tmp_path / "file").write_bytes(content)
    if form == "pickle":
        pickle.loads(content)
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LORAS)
def test_no_adapter_runs(make_config, tmp_path, canary, name, form):
    spoil(tmp_path, {f"folder/{name}": form}, canary)
    for path in (tmp_path / "folder" / name, tmp_path / "folder"):
        assert_refused(lambda path=path: stages.compare(make_config(lora_path=path)), path, "; ")


@pytest.mark.parametrize("settings", models.SETTINGS.values(), ids=models.SETTINGS)
def test_no_setting_in_an_adapters_file_runs_or_hangs(tmp_path, canary, pipeline, settings):
    spoil(tmp_path, {"payload_module.py": CODE}, canary)
    file = models.adapter_file(tmp_path / "x.safetensors", models.peft_metadata(**settings))
    message = message_of(lambda: load_lora(pipeline, file))
    assert ("x.safetensors" in message) == ("alpha" in str(settings))  # all others are passed over


@pytest.mark.parametrize("tensors", models.TENSORS.values(), ids=models.TENSORS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path, pipeline, tensors):
    file = models.adapter_file(tmp_path / "x.safetensors", **tensors)
    assert_refused(lambda: load_lora(pipeline, file), file, "; ")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "{", '{"unet.r": 2}'])
def test_settings_that_are_none_are_refused_by_name(tmp_path, pipeline, text):
    file = models.adapter_file(tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
    assert_refused(lambda: load_lora(pipeline, file), file, "; ")


@pytest.mark.parametrize("changes", SPOILT.values(), ids=SPOILT)
def test_no_base_model_runs(tmp_path, canary, changes):
    folder = models.base_model(tmp_path / "base")
    spoil(folder, changes, canary)
    if changes in models.REFUSED.values():
        assert_refused(lambda: load_all(folder), folder)
    else:
        assert message_of(lambda: load_all(folder)) == ""


def test_the_base_model_is_refused_before_anything_is_drawn_or_trained(make_config, tmp_path, canary):
    folder = models.base_model(tmp_path / "base")
    spoil(folder, {"own.py": CODE, "model_index.json": {"_class_name": ["own", "P"]}}, canary)
    config = make_config(pretrained_model_name_or_path=str(folder), precompute_dir=None)
    for stage in (stages.precompute, lambda config: list(stages.train(config)), stages.check_data):
        message_of(lambda stage=stage: stage(config))
    assert not (config.paths.output_dir / lora.WEIGHTS_NAME).exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FOREIGNERS)
def test_no_checkpoint_of_another_program_runs(tmp_path, canary, name, form):
    spoil(tmp_path / "foreign", {name: form}, canary)
    assert_refused(lambda: resume(tmp_path / "foreign"), tmp_path / "foreign")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OWN)
def test_no_checkpoint_of_this_program_runs(tmp_path, canary, name, form):
    folder = checkpoint(tmp_path / "step-000000001", {name: payload(canary, form)})
    assert_refused(lambda: resume(folder), folder, "; choose another, or latest")


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_state_that_was_made_by_hand_is_refused_by_name(tmp_path, state):
    folder = checkpoint(tmp_path / "step-000000001", {"state.json": state})
    assert_refused(lambda: resume(folder), folder, "; ")


def test_a_checkpoint_is_read_where_nothing_is_wrong_with_it(tmp_path):
    """So that those above and below are not refused for another reason."""
    assert read_checkpoint(checkpoint(tmp_path / "step-000000001", {"state.json": state_json()})).step == 1


@pytest.mark.parametrize("manifest", NAMES.values(), ids=NAMES)
def test_a_manifest_reaches_no_other_file(tmp_path, manifest):
    folder = checkpoint_with_manifest(tmp_path / "step-000000001", manifest)
    assert_refused(lambda: resume(folder), folder, "; choose another, or latest")


@pytest.mark.parametrize("name", OWN)
def test_links_and_pipes_in_a_checkpoint_are_not_opened(tmp_path, name):
    folder = checkpoint(tmp_path / "step-000000001", {})
    assert read_checkpoint(folder).step == 1
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert_refused(lambda: resume(folder), folder, f"{name} is missing")
    spoil(folder, {name: PIPE}, tmp_path)
    assert_refused(lambda: resume(folder), folder, f"{name} is missing")


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_file_that_lies_is_refused_by_name(tmp_path, pipeline, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert_refused(lambda: load_lora(pipeline, tmp_path / "x.safetensors"), tmp_path / "x.safetensors", "; ")
    folder = checkpoint(tmp_path / "step-000000001", {"adapter.safetensors": content})
    assert_refused(lambda: resume(folder), folder, "; choose another, or latest")
    base = models.base_model(tmp_path / "base")
    (base / models.UNET).write_bytes(content)
    assert_refused(lambda: load_all(base), base)


@pytest.mark.parametrize("path", sorted((ROOT / "lora_utils").rglob("*.py")), ids=lambda path: path.stem)
def test_the_program_has_nothing_that_runs_what_it_reads(path):
    unsafe_uses = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            if names == {"pickle", "UnpicklingError"}:  # an error to catch
                names = set()
            unsafe_uses += [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = called in UNSAFE_CALLS or called.split(".")[-1] in UNSAFE_METHODS
            unsafe |= keywords.get("weights_only", "True") != "True" or "shell" in keywords
            unsafe |= (
                keywords.get("trust_remote_code", "False") != "False"
                or keywords.get("allow_pickle") == "True"
            )
            unsafe_uses += [called] if unsafe else []
    # The user's own Python file is a program, and is named as one.
    assert unsafe_uses == (["exec"] if path.name == "python_file.py" else [])
