"""The stages together: the parts of the base model come one at a time, and go."""

from diffusers import StableDiffusionXLPipeline

from lora_utils import stages


def test_never_two_of_the_three_parts_are_loaded(make_config, monkeypatch, tmp_path):
    """Counts the parts alive whenever another one is loaded."""
    import gc
    import weakref

    from lora_utils.model.base import PretrainedSdxl

    alive: list[tuple[str, weakref.ref]] = []
    together: list[tuple[str, str]] = []

    def watched(name, kind, load):
        def wrapper(self, *arguments, **named):
            gc.collect()
            together.extend((kind, other) for other, ref in alive if ref() is not None and other != kind)
            part = load(self, *arguments, **named)
            whole = isinstance(part, StableDiffusionXLPipeline)
            alive.append((kind, weakref.ref(getattr(part, kind) if whole else part)))
            return part

        monkeypatch.setattr(PretrainedSdxl, name, wrapper)

    watched("load_vae", "vae", PretrainedSdxl.load_vae)
    watched("load_text_pipeline", "text_encoder", PretrainedSdxl.load_text_pipeline)
    watched("load_unet", "unet", PretrainedSdxl.load_unet)  # the pipeline's U-Net comes through here too
    config = make_config(precompute_dir=tmp_path / "cache")
    for _ in stages.train(config):
        pass
    stages.compare(config)
    assert [kind for kind, _ in alive] == ["text_encoder", "vae", "unet", "text_encoder", "unet", "vae"]
    assert together == []
