"""The card is full, wherever: the run goes on with less, or ends in a sentence; nothing is lost."""

import pytest
import torch

from lora_utils import checking, cli, stages
from lora_utils.compare import sampling
from lora_utils.memory import workspaces
from lora_utils.model.base import PretrainedSdxl
from lora_utils.precompute import encoding
from lora_utils.storage.log import WEIGHTS_NAME
from lora_utils.storage.store import CheckpointStore
from lora_utils.system.device_memory import MemoryFullError
from lora_utils.training import loop, run
from lora_utils.training.state import TrainingState
from lora_utils.training.validation import HeldOutLoss
from tests.pretended_card.conftest import LIBRARY_BYTES

WORDS = {
    "torch": "",
    "CUDA": "CUDA error: out of memory",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
}
ENDS = {
    "while rates are measured": (run, "card_here"),
    "while workspaces are measured": (workspaces, "_workspace"),
    "while the U-Net is loaded": (PretrainedSdxl, "load_unet"),
    "in an update": (torch.optim.AdamW, "step"),
    "while a checkpoint is made": (CheckpointStore, "save"),
    "while captions are encoded": (encoding, "encode_captions"),
}
GOES_ON = {
    "in a forward pass": (loop, "training_losses"),
    "in a backward pass": (TrainingState, "backward"),
    "while the held-out loss is measured": (HeldOutLoss, "measure"),
    "while images are encoded": (encoding, "encode_images"),
}
DRAWING = {
    "while the U-Net is loaded": (PretrainedSdxl, "load_unet_pipeline"),
    "while a picture is drawn": (sampling, "draw_latents"),
    "while it is decoded": (sampling, "decode_latents"),
}


@pytest.fixture
def fill(card, monkeypatch):
    """The next allocation fails, once, after a function was entered for the first time."""

    def fill(place, message):
        owner, name = place
        real = getattr(owner, name)
        calls = []

        def failing(*given, **named):
            calls.append(name)
            if len(calls) == 1:
                card.fail_after(1, message)
            return real(*given, **named)

        monkeypatch.setattr(owner, name, failing)
        return calls

    return fill


RUN = {"validation_split": 0.1, "validation_steps": 2, "checkpointing_steps": 1, "vram_gib": 8.0}
RUN |= {"train_batch_size": 2, "gradient_accumulation_steps": 1}
UNTROUBLED = []


@pytest.fixture
def expected(on_card, tmp_path):
    """The bytes of the LoRA that an untroubled run ends in."""
    if not UNTROUBLED:
        config = on_card(output_dir=tmp_path / "untroubled", **RUN)
        list(stages.train(config))
        UNTROUBLED.append(weights(config))
    return UNTROUBLED[0]


def weights(config):
    return (config.paths.run_folder / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize(
    ("place", "words"),
    [(place, "torch") for place in GOES_ON] + [("in a backward pass", name) for name in WORDS],
)
def test_what_can_be_done_with_less_goes_on(place, words, on_card, fill, card, expected, tmp_path):
    config = on_card(precompute_dir=tmp_path / "cache", **RUN)
    called = fill(GOES_ON[place], WORDS[words])
    failures = card.failures()
    reports = list(stages.train(config))
    assert called
    assert card.failures() == failures + 1
    assert len(reports) == 3
    assert weights(config) == expected


@pytest.mark.parametrize("place", ENDS)
def test_what_cannot_ends_in_a_sentence_and_the_same_again_ends_well(
    place, on_card, fill, card, expected, tmp_path
):
    config = on_card(precompute_dir=tmp_path / "cache", resume_from_checkpoint="latest", **RUN)
    fill(ENDS[place], "")
    with pytest.raises(MemoryFullError, match=r"memory is full: of .* GiB this process has .*; .* set "):
        list(stages.train(config))
    assert card.allocated() <= LIBRARY_BYTES
    list(stages.train(config))
    assert weights(config) == expected


@pytest.mark.parametrize("place", DRAWING)
def test_a_comparison_ends_in_a_sentence_and_the_same_again_draws(place, on_card, fill, card):
    config = on_card(max_train_steps=1)
    list(stages.train(config))
    fill(DRAWING[place], "")
    with pytest.raises(MemoryFullError, match="lower resolution"):
        stages.compare(config)
    assert card.allocated() <= LIBRARY_BYTES
    assert len(stages.compare(config).shots) == 1


@pytest.mark.parametrize(
    "place", [(checking, "card_here"), (workspaces, "_workspace")], ids=["rates", "workspaces"]
)
def test_a_check_ends_in_a_sentence_and_the_same_again_tells(place, on_card, fill, card):
    fill(place, "")
    with pytest.raises(MemoryFullError, match="end other programs"):
        checking.check(on_card())
    assert card.allocated() <= LIBRARY_BYTES
    assert "Tesla T4" in str(checking.check(on_card()))


def test_the_command_line_says_it_in_a_line_and_exits_with_2(on_card, card, capsys, tmp_path, data_dir):
    card.set_limit(1 << 20)
    flags = [
        "--train_data_dir",
        str(data_dir),
        "--resolution",
        "64",
        "--pretrained_model_name_or_path",
        "tiny",
    ]
    assert cli.main(["precompute", *flags, "--output_dir", str(tmp_path / "full")]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("MemoryFullError: the GPU's memory is full")
    assert "Traceback" not in said


def test_a_card_that_is_full_from_the_start_is_told_before_the_first_step(on_card, card):
    stages.precompute(on_card())
    card.set_limit(2 << 20)
    with pytest.raises(MemoryFullError):
        list(stages.train(on_card()))
    assert card.allocated() <= LIBRARY_BYTES
