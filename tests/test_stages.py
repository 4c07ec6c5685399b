"""Precompute as a stage: what is encoded, what is reused, what comes out."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from lora_utils import cache, stages
from lora_utils.dataset import DataError


def test_only_what_is_new_is_encoded(make_config, data_dir, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(data_dir, folder)
    config = make_config(train_data_dir=folder, precompute_dir=None)

    def encoded():
        found = stages.precompute(config)
        return found.encoded_images, found.encoded_captions

    assert encoded() == (10, 10)
    assert encoded() == (0, 0)
    (folder / "ink_03.txt").write_text("a new caption")
    assert encoded() == (0, 1)
    shutil.copy(folder / "ink_01.png", folder / "ink_05.png")
    assert encoded() == (0, 0)  # those bytes are in the cache
    (folder / "ink_02.jpg").rename(folder / "renamed.jpg")
    (folder / "ink_02.txt").rename(folder / "renamed.txt")
    assert encoded() == (0, 0)
    config = make_config(train_data_dir=folder, precompute_dir=config.paths.output_dir / "precomputed", resolution=32)
    assert encoded() == (9, 0)


def test_what_is_kept_is_what_the_pipeline_would_compute(make_config, data_dir, tiny_pipeline):
    config = make_config()
    found = stages.precompute(config)
    assert len(found.entries) == 10
    example = cache.read_example(found.folder, found.entries[0])
    embeds, _, pooled, _ = tiny_pipeline.encode_prompt(found.entries[0].caption, do_classifier_free_guidance=False)
    torch.testing.assert_close(example["prompt_embeds"], embeds[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(example["pooled_prompt_embeds"], pooled[0], rtol=1e-5, atol=1e-5)
    assert example["moments"].shape == (8, 16, 16)
    assert example["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]


def test_held_out_images_stay_held_out_when_captions_change(make_config, data_dir, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(data_dir, folder)
    config = make_config(train_data_dir=folder, validation_split=0.3)
    before = [entry.source for entry in stages.precompute(config).entries if entry.held_out]
    for path in folder.glob("*.txt"):
        path.write_text("something else")
    after = [entry.source for entry in stages.precompute(config).entries if entry.held_out]
    assert len(before) == 3
    assert after == before


def test_holding_everything_out_is_refused(make_config, data_dir, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("ink_01.png", "ink_01.txt"):
        shutil.copy(data_dir / name, folder)
    with pytest.raises(DataError, match="no image to train on"):
        stages.precompute(make_config(train_data_dir=folder, validation_split=0.1))


def test_never_two_of_the_three_parts_are_loaded(make_config, monkeypatch, tmp_path):
    """Counts the parts alive whenever another one is loaded."""
    import gc
    import weakref

    from lora_utils.sdxl import BaseModel

    alive: list[tuple[str, weakref.ref]] = []
    together: list[tuple[str, str]] = []

    def watched(name, kind, load):
        def wrapper(self, *arguments):
            gc.collect()
            together.extend((kind, other) for other, ref in alive if ref() is not None and other != kind)
            part = load(self, *arguments)
            whole = isinstance(part, StableDiffusionXLPipeline)
            alive.append((kind, weakref.ref(getattr(part, kind) if whole else part)))
            return part

        monkeypatch.setattr(BaseModel, name, wrapper)

    watched("load_vae", "vae", BaseModel.load_vae)
    watched("load_text_pipeline", "text_encoder", BaseModel.load_text_pipeline)
    watched("load_unet_pipeline", "unet", BaseModel.load_unet_pipeline)
    watched("load_unet", "unet", BaseModel.load_unet)
    config = make_config(precompute_dir=tmp_path / "cache")
    for _ in stages.train(config):
        pass
    stages.compare(config)
    assert [kind for kind, _ in alive] == ["text_encoder", "vae", "unet", "text_encoder", "unet", "vae"]
    assert together == []
