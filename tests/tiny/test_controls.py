"""Controls: figures that must get worse when the data are wrong. Apart, to run beside test_learning."""

import shutil

from lora_utils import stages
from lora_utils.config.loading import find_config, load_config
from tests.tiny.test_learning import learn


def test_captions_that_lie_cost_more_than_the_spread_over_seeds(demo_folder, precompute_dir, tmp_path):
    """The control: a loop that paid no attention to captions would not notice."""
    lying = tmp_path / "lying"
    shutil.copytree(demo_folder, lying)
    config = load_config(
        find_config("tiny"), {"train_data_dir": demo_folder, "precompute_dir": precompute_dir}
    )
    names = [entry.source for entry in stages.precompute(config).entries if not entry.held_out]

    # Each picture gets the caption of the seventh after it: true of another picture, false of this one.
    captions = [(demo_folder / name).with_suffix(".txt") for name in names]
    texts = [path.read_text() for path in captions]
    for path, text in zip(captions, [*texts[7:], *texts[:7]], strict=True):
        (lying / path.name).write_text(text)

    # What is held out keeps its captions in both, so that the losses are of the same thing.
    # What it tells is the loop, not the recipe: on attention alone few steps are enough to tell them apart.
    quick = {"max_train_steps": 60, "validation_steps": 60, "lr_warmup_steps": 50, "target_modules": "attn"}
    true, false = (
        [
            learn(folder, tmp_path / f"{name}{seed}", precompute_dir, seed=seed, **quick)["held_out_loss"]
            for seed in range(3)
        ]
        for name, folder in (("true", demo_folder), ("false", lying))
    )
    assert len(set(true)) == 3
    assert min(false) - max(true) > max(true) - min(true), (true, false)
