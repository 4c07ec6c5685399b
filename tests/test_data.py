"""Images, captions and the cache."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_utils import cache
from lora_utils.config import DataConfig
from lora_utils.dataset import DataError, find_examples
from lora_utils.images import ImageError, frame, open_image


def save(folder, name, caption="a dog", size=(80, 64)):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, "red").save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_bytes(caption.encode("utf-8-sig"))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        save(tmp_path, name, f"picture {name} ü")
    examples = find_examples(DataConfig(train_data_dir=tmp_path))
    assert [example.path.name for example in examples] == ["a.JPG", "b.png", "c.webp"]
    assert examples[0].caption == "picture a.JPG ü"


def test_every_image_without_caption_is_named(tmp_path):
    save(tmp_path, "good.png")
    save(tmp_path, "none.png", None)
    save(tmp_path, "empty.png", "  \n")
    save(tmp_path, "latin.png", None)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="3 of 4") as error:
        find_examples(DataConfig(train_data_dir=tmp_path))
    assert all(name in str(error.value) for name in ("none.txt", "empty.txt", "latin.txt"))


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(ImageError, match="no folder"):
        find_examples(DataConfig(train_data_dir=tmp_path / "absent"))
    with pytest.raises(ImageError, match="no image"):
        find_examples(DataConfig(train_data_dir=tmp_path))
    with pytest.raises(DataError, match="train_data_dir is not set"):
        find_examples(DataConfig())


def test_framing_keeps_the_middle_and_tells_the_true_sizes():
    columns = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    framed = frame(Image.fromarray(np.stack([columns] * 3, axis=-1)), 50)
    assert framed.pixels.shape == (3, 50, 50)
    assert framed.time_ids.tolist() == [100, 200, 0, 25, 50, 50]
    middle = (framed.pixels.mean(dim=(0, 1)) + 1) * 127.5
    np.testing.assert_allclose(middle, np.arange(50.5, 150, 2), atol=1.5)


def test_an_image_smaller_than_the_resolution_is_enlarged():
    assert frame(Image.new("RGB", (10, 7)), 64).pixels.shape == (3, 64, 64)


def test_exif_orientation_is_obeyed(tmp_path):
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.mark.parametrize("share", [0, 0.1, 0.7])
def test_a_damaged_file_is_named(tmp_path, share):
    save(tmp_path, "x.png")
    path = tmp_path / "x.png"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ImageError, match=r"x\.png"):
        open_image(path)


def test_a_record_that_is_not_finite_is_refused_by_name(tmp_path):
    tensors = {"moments": torch.tensor([1.0, float("nan")]), "time_ids": torch.zeros(6)}
    with pytest.raises(cache.CacheError, match=r"cat\.png: moments"):
        cache.write_record(tmp_path, "k", tensors, "cat.png")
    assert list(tmp_path.iterdir()) == []


def test_an_example_reads_back_as_it_was_written(tmp_path):
    image = {"moments": torch.randn(8, 2, 2), "time_ids": torch.arange(6.0)}
    text = {"prompt_embeds": torch.randn(77, 4), "pooled_prompt_embeds": torch.randn(4)}
    cache.write_record(tmp_path, "i", image, "")
    cache.write_record(tmp_path, "t", text, "")
    entry = cache.Entry("i", "t", "a.png", "a dog", False)
    cache.write_index(tmp_path, [entry])
    assert cache.read_index(tmp_path) == [entry]
    for name, tensor in cache.read_example(tmp_path, entry).items():
        assert torch.equal(tensor, (image | text)[name])


def test_a_damaged_cache_is_an_error_not_data(tmp_path):
    entry = cache.Entry("i", "t", "a.png", "a dog", False)
    with pytest.raises(cache.CacheError, match="run the precompute stage"):
        cache.read_index(tmp_path)
    (tmp_path / "index.json").write_text('{"entries": [')
    with pytest.raises(cache.CacheError, match="damaged"):
        cache.read_index(tmp_path)
    (tmp_path / "i.safetensors").write_bytes(b"junk")
    with pytest.raises(cache.CacheError, match="delete it"):
        cache.read_example(tmp_path, entry)


def test_every_ingredient_changes_the_name_of_a_record():
    ingredients = {"image": "h", "resolution_px": 64, "vae": "v"}
    keys = {cache.record_key(**ingredients)} | {cache.record_key(**ingredients | {name: "x"}) for name in ingredients}
    assert len(keys) == 4
