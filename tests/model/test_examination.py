"""What a base model is: one sentence for whatever else was given, the same in every stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from benchmarks.faults.malicious import message_of, spoil
from lora_utils import stages
from lora_utils.cli import main
from lora_utils.config.schema import ModelConfig
from lora_utils.model.base import PretrainedSdxl
from lora_utils.model.examination import ModelError, UnreachableError, examine, locate
from tests.conftest import TINY
from tests.model.malicious_models import PASSED_OVER, REFUSED, UNET, base_model

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with a whole base, its copy with a name of its own, and files that are none."""
    monkeypatch.chdir(tmp_path)
    base_model(tmp_path / "whole")
    (tmp_path / "two words, ümlaut 絵").symlink_to("whole")
    for name in ("pony.safetensors", "old.ckpt", "notes.txt", "models/deep.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


NAMES = {
    # what is given: words of the sentence
    "": ["no base model is named", SDXL],
    "  ": ["no base model is named"],
    "pony.safetensors": ["single file", "from_single_file('pony.safetensors')", "folder pony"],
    "./pony.safetensors": ["single file", "convert it once"],
    "models/deep.safetensors": ["models/deep.safetensors in {here}", "single file"],
    "{here}/old.ckpt": ["single file", "{here}/old.ckpt"],
    "notes.txt": ["is a file, and no model"],
    "whole/model_index.json": ["part of a model", "{here}/whole"],
    f"whole/{UNET}": ["part of a model", "{here}/whole"],
    "missing.safetensors": ["no file missing.safetensors in {here}"],
    "/models/pony.safetensors": ["no file /models/pony.safetensors;"],
    "./missing": ["no folder ./missing in {here}"],
    "../missing": ["no folder ../missing in {here}"],
    "/no/such/folder": ["no folder /no/such/folder;"],
    "~/no/such/sdxl": [f"no folder {Path.home()}/no/such/sdxl;"],
    "models/sdxl/base": ["no folder models/sdxl/base in {here}"],
    "models/": ["holds no model_index.json"],
    "missing/": ["no folder missing/ in {here}"],
    "two words": ["no folder two words in {here}", "no Hub id is written like that"],
    "мой/sdxl": ["no folder мой/sdxl in {here}", "no Hub id"],
    "owner/na..me": ["no folder owner/na..me", "no Hub id"],
    "x" * 5000: ["no folder xxx", "no Hub id"],
    "a\0b": ["no folder a"],
    r"C:\models\pony.safetensors": [r"no file C:\models\pony.safetensors"],
    r"C:\models\sdxl": [r"no folder C:\models\sdxl"],
    "D:/models/sdxl": ["no folder D:/models/sdxl"],
    r"\\server\share\sdxl": ["no folder"],
    f"https://huggingface.co/{SDXL}": ["is an address", f"Hub id in it, {SDXL}"],
    f"huggingface.co/{SDXL}": ["is an address", f"Hub id in it, {SDXL}"],
    f"http://hf.co/{SDXL}/": [f"Hub id in it, {SDXL}"],
    f"hf://{SDXL}": [f"Hub id in it, {SDXL}"],
    f"https://huggingface.co/{SDXL}/tree/main?x=1": [f"Hub id in it, {SDXL}"],
    f"https://huggingface.co/{SDXL}/tree/fp16": [f"Hub id in it, {SDXL}, and revision=fp16"],
    f"https://huggingface.co/{SDXL}/blob/main/a.safetensors": [f"Hub id in it, {SDXL}"],
    "https://huggingface.co/datasets/a/b": ["address of no model"],
    "https://huggingface.co/": ["address of no model"],
    "https://example.org/models/12345": ["is an address; download what is there"],
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:60] or "empty")
def test_whatever_is_no_base_gets_a_sentence_that_says_what_was_looked_for(here, name):
    given = name.format(here=here)
    with pytest.raises(ModelError) as refused:
        examine(ModelConfig(pretrained_model_name_or_path=given or " "), None)
    for words in NAMES[name]:
        assert words.format(here=here) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not isinstance(refused.value, UnreachableError)


@pytest.mark.parametrize(
    "name", ["whole", "./whole", "whole/", "{here}/whole", "two words, ümlaut 絵", "tiny"]
)
def test_folders_are_bases_however_they_are_written(here, name):
    config = ModelConfig(pretrained_model_name_or_path=name.format(here=here))
    examine(config, None)
    assert locate(config.base) is not None


def change(folder, file, **settings):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def only(folder, part):
    """Of the base its one part, as a model of its own."""
    shutil.move(folder, folder.with_name("all"))
    shutil.move(folder.with_name("all") / part, folder)
    shutil.rmtree(folder.with_name("all"))


def renamed(folder, ending):
    (folder / UNET).rename((folder / UNET).with_name(f"diffusion_pytorch_model.{ending}"))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 10\n"


def cut(file, length):
    file.write_bytes(file.read_bytes()[:length])


def in_shards(folder, absent):
    """The U-Net's weights as the first of two shards."""
    (folder / UNET).rename((folder / UNET).with_name("a.safetensors"))
    index = {"weight_map": {"x": "a.safetensors", "y": absent}}
    (folder / UNET).with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


FOLDERS = {
    "SD 1.5": (lambda f: change(f, "model_index.json", _class_name="StableDiffusionPipeline"), "not SDXL"),
    "SD 3": (lambda f: change(f, "model_index.json", _class_name="StableDiffusion3Pipeline"), "not SDXL"),
    "Flux": (lambda f: change(f, "model_index.json", _class_name="FluxPipeline"), "not SDXL"),
    "an index of nothing": (lambda f: (f / "model_index.json").write_text("[]"), "holds no settings"),
    "an index that is cut": (lambda f: (f / "model_index.json").write_text('{"_class'), "as JSON"),
    "a U-Net of SD 1.5": (
        lambda f: change(f, "unet/config.json", addition_embed_type=None),
        "addition_embed",
    ),
    "inpainting": (lambda f: change(f, "unet/config.json", in_channels=9), "inpainting"),
    "quantised": (lambda f: change(f, "unet/config.json", quantization_config={}), "choose the plain model"),
    "a VAE that shifts": (lambda f: change(f, "vae/config.json", latents_mean=[0.0]), "latents_mean"),
    "a sampler of flows": (
        lambda f: change(f, "scheduler/scheduler_config.json", prediction_type="flow"),
        "predicts 'flow'",
    ),
    "no index": (lambda f: (f / "model_index.json").unlink(), "holds no model_index.json"),
    "an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "holds no model_index.json"),
    "a U-Net alone": (lambda f: only(f, "unet"), "such as a U-Net"),
    "single files in a folder": (
        lambda f: (shutil.rmtree(f), f.mkdir(), (f / "pony.safetensors").touch()),
        "single files, such as pony.safetensors",
    ),
    **{
        f"without {part}": (lambda f, part=part: shutil.rmtree(f / part), f"lacks {part}/")
        for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    },
    "no weights": (lambda f: (f / UNET).unlink(), "no unet/diffusion_pytorch_model.safetensors"),
    "pickled weights": (lambda f: renamed(f, "bin"), "can run code"),
    "weights cut short": (lambda f: cut(f / UNET, -10), "cut short, to "),
    "a header cut short": (lambda f: cut(f / UNET, 100), "cut short, to 100 bytes"),
    "empty weights": (lambda f: cut(f / "vae/diffusion_pytorch_model.safetensors", 0), "short, to 0 bytes"),
    "a page instead of weights": (
        lambda f: (f / "text_encoder/model.safetensors").write_text("<!DOCTYPE html>"),
        "is no safetensors file",
    ),
    "a pointer instead of weights": (
        lambda f: (f / "text_encoder_2/model.safetensors").write_text(POINTER),
        "run git lfs pull",
    ),
    "a header of something else": (
        lambda f: (f / UNET).write_bytes((2).to_bytes(8, "little") + b"[]"),
        "damaged header",
    ),
    "a shard that is not there": (lambda f: in_shards(f, "b.safetensors"), "names b.safetensors, which"),
    "an index of shards that is damaged": (lambda f: in_shards(f, None), "index.json is damaged"),
    "another variant": (lambda f: renamed(f, "fp16.safetensors"), "set variant=fp16"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each of ``FOLDERS``, made once."""
    made = {}
    for number, (name, (damage, _)) in enumerate(FOLDERS.items()):
        made[name] = base_model(tmp_path_factory.mktemp("bases") / f"base{number}")
        damage(made[name])
    return made


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_no_whole_sdxl_are_named(folders, name):
    with pytest.raises(ModelError) as refused:
        examine(ModelConfig(pretrained_model_name_or_path=str(folders[name])), None)
    assert FOLDERS[name][1] in str(refused.value)
    assert folders[name].name in str(refused.value)


def test_a_vae_of_its_own_is_examined_too(here):
    vae = here / "whole"
    only(vae, "vae")
    config = ModelConfig(pretrained_model_name_or_path="tiny", pretrained_vae_model_name_or_path=str(vae))
    examine(config, None)
    cut(vae / "diffusion_pytorch_model.safetensors", -1)
    with pytest.raises(ModelError, match="cut short"):
        examine(config, None)


@pytest.mark.parametrize(
    "name", ["SD 1.5", "without tokenizer_2", "no weights", "inpainting", "weights cut short"]
)
def test_every_stage_refuses_a_base_in_the_same_words(make_config, folders, name):
    config = make_config(pretrained_model_name_or_path=str(folders[name]))
    (config.paths.run_folder).mkdir()
    save_file({"x": torch.zeros(1)}, config.paths.run_folder / "pytorch_lora_weights.safetensors")
    said = set()
    for stage in (stages.check, stages.check_data, stages.precompute, stages.compare, train):
        with pytest.raises(ModelError) as refused:
            stage(config)
        said.add(str(refused.value))
    assert len(said) == 1


def train(config):
    return list(stages.train(config))


@pytest.mark.parametrize("options", [[], ["--data"], ["--card", "t4"]], ids=str)
@pytest.mark.parametrize(
    "name", ["/models/pony.safetensors", "./missing", r"C:\models\x", f"https://hf.co/{SDXL}"]
)
def test_check_refuses_in_one_line(data_dir, capsys, options, name):
    settings = [
        "--train_data_dir",
        str(data_dir),
        "--resolution",
        "64",
        "--pretrained_model_name_or_path",
        name,
    ]
    assert main(["check", *options, *settings]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ModelError: ")
    assert error.count("\n") == 1


def test_a_variant_that_is_not_there_is_named_with_what_is(here):
    with pytest.raises(ModelError, match="leave variant out"):
        examine(ModelConfig(pretrained_model_name_or_path="whole", variant="fp16"), None)


@pytest.mark.parametrize(
    ("own_vae", "words"),
    [
        ("./absent", "no folder ./absent"),
        ("whole", "no diffusion_pytorch_model.safetensors"),
        ("pony.safetensors", "file"),
    ],
)
def test_a_vae_of_its_own_is_looked_for_as_well(here, own_vae, words):
    settings = {"pretrained_model_name_or_path": "whole", "pretrained_vae_model_name_or_path": own_vae}
    with pytest.raises(ModelError, match=words):
        examine(ModelConfig(**settings), None)
    examine(ModelConfig(**settings | {"pretrained_vae_model_name_or_path": "whole/vae"}), None)


@pytest.fixture
def hub_cache(tmp_path):
    """A cache of downloads in which the tiny SDXL is owner/tiny."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    base_model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return tmp_path / "hub"


def test_what_was_downloaded_is_a_base_without_the_hub(hub_cache, make_config):
    config = make_config(pretrained_model_name_or_path="owner/tiny", cache_dir=hub_cache, precompute_dir=None)
    examine(config.model, hub_cache)
    assert "already downloaded" in str(stages.check(config))
    assert len(train(config)) == 3


def test_what_is_neither_here_nor_to_be_asked_for_says_both(
    hub_cache, tmp_path, monkeypatch, capsys, data_dir
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreachableError, match=f"no folder owner/other in {tmp_path}.*HF_HUB_OFFLINE"):
        examine(ModelConfig(pretrained_model_name_or_path="owner/other"), hub_cache)
    # The rest of the check is worth knowing offline: it is told, and the check fails.
    settings = ["--train_data_dir", str(data_dir), "--resolution", "64", "--cache_dir", str(hub_cache)]
    assert main(["check", "--pretrained_model_name_or_path", "owner/other", *settings]) == 1
    assert "FAIL  owner/other is not on this machine" in capsys.readouterr().out
    assert main(["check", "--data", "--pretrained_model_name_or_path", "owner/other", *settings]) == 0


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(UnreachableError, match="Hub cannot be reached"):
        examine(ModelConfig(pretrained_model_name_or_path="owner/other"), tmp_path)
    assert slept == []


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_is_judged_by_what_it_encodes(tmp_path, part):
    """Of 40 words, one of them special: works everywhere, and so here."""
    folder = base_model(tmp_path / "base") / part
    for file in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / file).unlink(missing_ok=True)
    letters = [*"abcdefghijklmnopqrs", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrs")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    base = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "base")))
    assert base.find_tokenizers() is not None
    assert base.load_text_pipeline(torch.float32) is not None

    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words[:2])}))
    assert base.find_tokenizers() is None
    with pytest.raises(ModelError, match="without words"):
        base.load_text_pipeline(torch.float32)


def test_there_are_bases_to_refuse():
    assert len(NAMES) + len(FOLDERS) > 50
    assert Path(TINY, "model_index.json").is_file()


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return tmp_path_factory.mktemp("counted")


CONFIGS = {name: changes for name, changes in (REFUSED | PASSED_OVER).items() if "json" in "".join(changes)}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_check_forecasts_a_base_or_refuses_it_whatever_its_json_says(make_config, tmp_path, counted, changes):
    folder = base_model(tmp_path / "base")
    spoil(folder, changes, tmp_path / "canary")
    config = make_config(pretrained_model_name_or_path=str(folder), cache_dir=counted)
    said = message_of(lambda: stages.check(config, "t4"))  # whatever is no UserError comes through
    assert said == "" or str(folder) in said
    if changes in (REFUSED["a number that is text"], REFUSED["no channels"]):
        assert said
    assert not (tmp_path / "canary").exists()


WRONG = {
    "unet/config.json": [
        {"layers_per_block": "all"}, {"block_out_channels": 3}, {"block_out_channels": []},
        {"block_out_channels": [0, 0, 0]}, {"down_block_types": [1, 2, 3]}, {"cross_attention_dim": "wide"},
        {"transformer_layers_per_block": [[1, "x"]]}, {"norm_num_groups": 0},
    ],
    "vae/config.json": [{"block_out_channels": None}, {"latent_channels": [4, "4"]}, {"scaling_factor": "x"}],
    "text_encoder_2/config.json": [{"hidden_size": "x"}, {"num_hidden_layers": [None]}, {"hidden_act": 3}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "settings"), [(file, settings) for file, many in WRONG.items() for settings in many], ids=str
)
def test_a_shape_of_another_type_is_named(tmp_path, file, settings):
    folder = base_model(tmp_path / "base")
    change(folder, file, **settings)
    with pytest.raises(ModelError, match=f"{next(iter(settings))} in {file} is "):
        examine(ModelConfig(pretrained_model_name_or_path=str(folder)), None)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("unet/config.json", {"layers_per_block": [1, 1, 1]}),
        ("unet/config.json", {"transformer_layers_per_block": [0, [1, 2], 2]}),
        ("unet/config.json", {"attention_head_dim": 8, "sample_size": None}),
        ("vae/config.json", {"scaling_factor": 1}),
        ("text_encoder/config.json", {"projection_dim": None}),
    ],
    ids=str,
)
def test_shapes_that_diffusers_would_build_are_left_to_it(tmp_path, file, settings):
    folder = base_model(tmp_path / "base")
    change(folder, file, **settings)
    examine(ModelConfig(pretrained_model_name_or_path=str(folder)), None)
