"""Precompute as a stage: what is encoded, what is reused, what is left out, what comes out."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils import stages
from lora_utils.data.examples import DataError
from lora_utils.model import vae
from lora_utils.precompute import cache, fill, plan
from lora_utils.precompute.examples import CachedExamples


def encoded(config):
    found = stages.precompute(config)
    return found.encoded_images, found.encoded_captions


def one_pixel(folder, **_):
    image = Image.open(folder / "ink_03.png")
    image.putpixel((5, 5), (255, 0, 255))
    image.save(folder / "ink_03.png")


def test_what_is_kept_is_what_the_pipeline_would_compute(make_config, tiny_pipeline):
    found = stages.precompute(make_config())
    assert len(found.entries) == 10
    example = CachedExamples(found.cache, found.entries).read(0)
    embeds, _, pooled, _ = tiny_pipeline.encode_prompt(
        found.entries[0].captions[0], do_classifier_free_guidance=False
    )
    torch.testing.assert_close(example["prompt_embeds"], embeds[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(example["pooled_prompt_embeds"], pooled[0], rtol=1e-5, atol=1e-5)
    assert example["time_ids"].tolist() == [64, 64, 0, 0, 64, 64]


def test_moments_are_those_of_the_cropped_pixels(make_config, pictures, tiny_pipeline):
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 256, (96, 64, 3), dtype=np.uint8)).save(
            pictures / f"tall{number}.png"
        )
        (pictures / f"tall{number}.txt").write_text("noise")
    found = stages.precompute(make_config(train_data_dir=pictures))
    number = next(n for n, entry in enumerate(found.entries) if entry.source == "tall1.png")
    pixels = np.asarray(Image.open(pictures / "tall1.png"))[16:80]
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = tiny_pipeline.vae.encode(tensor).latent_dist.parameters[0]
    example = CachedExamples(found.cache, found.entries).read(number)
    torch.testing.assert_close(example["moments"], expected, rtol=1e-4, atol=1e-4)
    assert example["time_ids"].tolist() == [96, 64, 16, 0, 64, 64]


def test_a_damaged_image_is_left_out_by_name_and_the_rest_goes_on(make_config, pictures):
    for name in ("ink_01.png", "ink_02.jpg"):
        content = (pictures / name).read_bytes()
        (pictures / name).write_bytes(content[: len(content) // 2])
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    for _ in range(2):  # the second time from the cache
        found = stages.precompute(config)
        assert len(found.entries) == 8
        refused = {finding.source for finding in found.findings if finding.kind == "refused"}
        assert refused == {"ink_01.png", "ink_02.jpg"}
        assert "ink_01.png" in str(found)
    assert found.encoded_images == 0
    report = (config.paths.output_dir / "data_report.csv").read_text(encoding="utf-8-sig")
    assert "ink_01.png,refused" in report


def test_training_tells_what_it_leaves_out(make_config, pictures, caplog):
    (pictures / "ink_01.png").write_bytes(b"no image")
    next(stages.train(make_config(train_data_dir=pictures)))
    assert "1 examples are left out" in caplog.text
    assert "ink_01.png" in caplog.text


def test_what_was_fixed_is_told_again_from_the_cache(make_config, pictures):
    Image.new("RGBA", (64, 64), (255, 0, 0, 100)).save(pictures / "clear.png")
    (pictures / "clear.txt").write_text("a see-through square")
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    first, second = stages.precompute(config), stages.precompute(config)
    assert any(finding.source == "clear.png" and "white" in finding.action for finding in first.findings)
    assert second.findings == first.findings


def test_nothing_usable_is_an_error_that_names_all(make_config, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(b"no image")
        (folder / f"{number}.txt").write_text("a caption")
    with pytest.raises(DataError, match=r"1\.png"):
        stages.precompute(make_config(train_data_dir=folder))


def test_damaged_records_are_encoded_anew_and_told(make_config, pictures):
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    found = stages.precompute(config)
    before = {
        key: found.cache.read(key) for entry in found.entries for key in (*entry.image_keys, *entry.text_keys)
    }
    for path in found.folder.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 0x40
        path.write_bytes(content)
    again = stages.precompute(config)
    assert again.encoded_images > 0
    assert again.encoded_captions > 0
    assert any(finding.problem == "damaged in the cache" for finding in again.findings)
    for key, record in before.items():
        for name, tensor in again.cache.read(key).items():
            assert torch.equal(tensor, record[name])


def test_a_vae_that_overflows_is_named_with_its_cure(make_config, pictures, monkeypatch):
    from lora_utils import stages
    from lora_utils.precompute import encoding

    def overflow(vae, pixels):
        moments = torch.zeros(len(pixels), 8, 16, 16)
        moments[pixels[:, 0, 5, 5] > 0] = float("nan")
        return moments

    monkeypatch.setattr(encoding, "encode_images", overflow)
    found = stages.precompute(make_config(train_data_dir=pictures, precompute_dir=None))
    refused = [finding for finding in found.findings if finding.kind == "refused"]
    assert refused
    assert len(refused) + len(found.entries) == 10
    assert all("sdxl-vae-fp16-fix" in finding.action and finding.source for finding in refused)


def test_held_out_images_stay_held_out_when_captions_change(make_config, pictures):
    config = make_config(train_data_dir=pictures, validation_split=0.3)
    before = [entry.source for entry in stages.precompute(config).entries if entry.held_out]
    for path in pictures.glob("*.txt"):
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


def test_a_large_cache_is_checked_when_training_reads_it(make_config, pictures, monkeypatch):
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    found = stages.precompute(config)
    for path in found.folder.glob("images-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-600] + bytes(600))
    monkeypatch.setattr(fill, "VERIFIED_BYTES", 0)
    with pytest.raises(cache.CacheError, match="run the same command again"):
        list(stages.train(config))
    reports = list(stages.train(config))  # the same command
    assert len(reports) == 3
    assert json.loads((config.paths.output_dir / "summary.json").read_text())["status"] == "done"


def test_a_file_that_changes_while_it_is_encoded_is_not_kept_under_its_old_name(
    make_config, pictures, monkeypatch
):
    inspect = plan.inspect_examples

    def inspect_then_change(*arguments):
        result = inspect(*arguments)
        one_pixel(pictures)
        return result

    monkeypatch.setattr(plan, "inspect_examples", inspect_then_change)
    config = make_config(train_data_dir=pictures, precompute_dir=None)
    found = stages.precompute(config)
    assert len(found.entries) == 9
    assert any(finding.source == "ink_03.png" and "changed" in finding.problem for finding in found.findings)
    monkeypatch.undo()
    assert encoded(config) == (1, 0)


def test_images_that_are_too_large_for_the_card_go_through_the_vae_in_tiles(
    make_config, tmp_path, tiny_pipeline, monkeypatch
):
    monkeypatch.setattr(vae, "_device_gib", lambda: vae.SPARE_GIB + vae.VAE_GIB + 0.01)
    monkeypatch.setattr(vae, "TILES_PX", (128, 64))
    (tmp_path / "large").mkdir()
    steps = np.random.default_rng(0).normal(0, 2, (128, 128, 3))
    pixels = (128 + steps.cumsum(axis=0).cumsum(axis=1) / 8).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large" / "a.png")
    (tmp_path / "large" / "a.txt").write_text("a large picture")
    found = stages.precompute(
        make_config(train_data_dir=tmp_path / "large", resolution=128, precompute_dir=None)
    )
    moments = CachedExamples(found.cache, found.entries).read(0)["moments"]
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        whole = tiny_pipeline.vae.encode(tensor).latent_dist.parameters[0]
    assert moments.shape == whole.shape
    assert not torch.equal(moments, whole)
    mean, expected = moments[:4], whole[:4]
    assert float((mean - expected).abs().mean()) < 0.1 * float(expected.std())


def test_when_memory_is_short_the_batch_is_halved_until_it_fits(make_config, pictures, monkeypatch):
    from lora_utils.precompute import encoding

    encode, sizes = encoding.encode_images, []

    def encode_two_at_most(vae, pixels):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(vae, pixels)

    monkeypatch.setattr(encoding, "encode_images", encode_two_at_most)
    config = make_config(train_data_dir=pictures, precompute_dir=None, vae_batch_size=8)
    assert encoded(config) == (10, 10)
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert encoded(config) == (0, 0)


def test_a_complete_cache_may_be_read_only(make_config, pictures, monkeypatch):
    from lora_utils import stages
    from lora_utils.system import files as files_module

    config = make_config(train_data_dir=pictures, precompute_dir=None)
    folder = stages.precompute(config).folder
    commit = files_module.commit_file

    def read_only(path, write):
        if path.parent == folder:
            raise OSError(30, "Read-only file system")
        commit(path, write)

    monkeypatch.setattr(files_module, "commit_file", read_only)
    assert encoded(config) == (0, 0)


def test_an_output_dir_that_is_a_file_is_refused_before_the_work(make_config, pictures, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="is a file"):
        stages.precompute(make_config(train_data_dir=pictures, output_dir=tmp_path / "taken"))


def test_names_that_are_no_text_are_shown_escaped(make_config, pictures, tmp_path):
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/odd\xff"))
    pictures.rename(odd)
    other = tmp_path / "other"
    shutil.copytree(odd, other)
    found = stages.precompute(make_config(train_data_dir=[odd, other]))
    assert len(found.entries) == 20
    assert all(entry.source.isprintable() for entry in found.entries)
