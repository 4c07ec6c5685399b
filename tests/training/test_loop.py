"""The loop: its loss against diffusers, its determinism, its learning rate."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file
from torch.nn import functional as F

from lora_utils import stages
from lora_utils.config.loading import load_config
from lora_utils.config.training import LoraConfig
from lora_utils.model import lora
from lora_utils.model.base import PretrainedSdxl
from lora_utils.precompute.examples import CachedExamples
from lora_utils.training import diffusion, objective, seeds
from tests.conftest import ROOT, TINY


def weights_of(config):
    return (config.paths.output_dir / lora.WEIGHTS_NAME).read_bytes()


def run(config):
    return list(stages.train(config))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_loss_of_a_batch_is_diffusers_loss(make_config, kind, snr_gamma):
    config = make_config()
    found = stages.precompute(config)
    base = PretrainedSdxl(config.model)
    schedule, unet = replace(base.load_noise_schedule(), prediction_type=kind), base.load_unet(torch.float32)
    lora.add_lora(unet, LoraConfig(rank=4), seed=0)
    examples = [CachedExamples(found.cache, found.entries).read(number) for number in range(4)]
    visits = [
        objective.draw_visit(one, seeds.visit_generator(0, n), schedule) for n, one in enumerate(examples)
    ]
    batch = objective.collate(visits)
    errors = objective.denoising_errors(unet, batch, schedule)
    if snr_gamma:
        snr = diffusion.signal_to_noise(batch.timesteps, schedule.alphas_cumprod)
        errors = errors * diffusion.min_snr_weights(snr, snr_gamma, kind)
    reference = reference_loss(unet, batch, kind, snr_gamma)
    torch.testing.assert_close(errors.mean(), reference, rtol=1e-5, atol=1e-5)


def reference_loss(unet, batch, kind, snr_gamma):
    """As diffusers' text-to-image LoRA script for SDXL computes it."""
    scheduler = DDPMScheduler.from_pretrained(TINY, subfolder="scheduler", prediction_type=kind)
    noisy_latents = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    added = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.time_ids}
    prediction = unet(noisy_latents, batch.timesteps, batch.prompt_embeds, added_cond_kwargs=added).sample
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    loss = F.mse_loss(prediction, batch.noise if kind == "epsilon" else velocity, reduction="none").mean(
        dim=(1, 2, 3)
    )
    if snr_gamma is None:
        return loss.mean()
    snr = compute_snr(scheduler, batch.timesteps)
    weights = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    return (loss * weights / (snr if kind == "epsilon" else snr + 1)).mean()


def test_the_seed_decides_everything(make_config, tmp_path):
    first = run(make_config(output_dir=tmp_path / "a", lora_dropout=0.1))
    torch.manual_seed(123)
    second = run(make_config(output_dir=tmp_path / "b", lora_dropout=0.1))
    assert first == second
    assert weights_of(make_config(output_dir=tmp_path / "a")) == weights_of(
        make_config(output_dir=tmp_path / "b")
    )
    assert run(make_config(seed=1)) != first


def test_a_batch_is_the_same_whether_it_is_cut_or_whole(make_config):
    whole = run(make_config(train_batch_size=4, gradient_accumulation_steps=1))
    cut = run(make_config(train_batch_size=2, gradient_accumulation_steps=2))
    assert [report.loss for report in cut] == pytest.approx([report.loss for report in whole], rel=1e-4)
    assert [report.grad_norm for report in cut] == pytest.approx(
        [report.grad_norm for report in whole], rel=1e-3
    )


def test_epochs_are_counted_when_no_steps_are_given(make_config):
    assert len(run(make_config(max_train_steps=None, num_train_epochs=2, train_batch_size=3))) == 7  # 20 / 3


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_the_learning_rate_follows_diffusers_curve_in_steps(make_config, name):
    config = make_config(
        lr_scheduler=name, lr_warmup_steps=2, max_train_steps=5, gradient_accumulation_steps=2
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.train.learning_rate)
    # diffusers' "constant" knows no warm-up; ours has it, under the name that diffusers gives to that.
    theirs = "constant_with_warmup" if name == "constant" else name
    curve = get_scheduler(theirs, optimizer, num_warmup_steps=2, num_training_steps=5)
    expected = []
    for _ in range(5):
        expected.append(curve.get_last_lr()[0])
        optimizer.step()
        curve.step()
    assert [report.learning_rate for report in run(config)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [{"use_8bit_adam": True, "rank": 64}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}],
)
def test_options_that_save_memory_train_alike(make_config, tmp_path, options):
    rank = {"rank": options.get("rank", 16)}
    plain = run(make_config(output_dir=tmp_path / "plain", **rank))
    saving = run(make_config(output_dir=tmp_path / "saving", **options))
    assert [report.loss for report in saving] == pytest.approx([report.loss for report in plain], rel=0.02)


def test_a_frozen_adapter_does_not_move_the_held_out_loss(make_config):
    config = make_config(learning_rate=0, validation_split=0.2, validation_steps=1)
    reports = run(config)
    before = json.loads((config.paths.output_dir / "summary.json").read_text())["held_out_loss_before"]
    assert {report.held_out_loss for report in reports} == {before}


def test_the_run_folder_tells_what_happened(make_config):
    config = make_config(validation_split=0.2, validation_steps=2)
    reports = run(config)
    folder = config.paths.output_dir
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [record["loss"] for record in records[1:]] == [report.loss for report in reports]
    assert [record["held_out_loss"] is None for record in records] == [False, True, False, False]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["held_out_examples"]) == ("done", 3, 2)
    assert "torch" in json.loads((folder / "versions.json").read_text())
    assert load_config(folder / "config.yaml") == config


def test_a_caller_that_stops_early_keeps_what_was_learned(make_config):
    config = make_config(max_train_steps=50)
    reports = stages.train(config)
    next(reports), next(reports)
    reports.close()
    assert json.loads((config.paths.output_dir / "summary.json").read_text())["status"] == "interrupted"
    assert any(
        tensor.abs().sum() > 0
        for name, tensor in load_file(config.paths.output_dir / lora.WEIGHTS_NAME).items()
        if "up" in name or "lora_B" in name
    )


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_keeps_what_was_learned(make_config, signal_number):
    config = make_config()
    options = flags(config, max_train_steps=5000)
    command = [sys.executable, "-m", "lora_utils", "train", *options]
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a background shell's children ignore SIGINT
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=heard)
    metrics, deadline = config.paths.output_dir / "metrics.jsonl", time.monotonic() + 120
    while (
        not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2) and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"stopped" in error
    assert (config.paths.output_dir / lora.WEIGHTS_NAME).exists()


def test_accelerate_launch_trains_the_same(make_config, tmp_path):
    here = run(make_config(output_dir=tmp_path / "here"))
    config = make_config(output_dir=tmp_path / "launched")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "-m",
        "lora_utils",
    ]
    subprocess.run(
        [*launch, "train", *flags(config)], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert losses(config) == [report.loss for report in here]


def test_two_processes_see_the_batches_of_one_and_keep_its_learning_rate_when_they_go_on(
    make_config, tmp_path
):
    schedule = {"lr_scheduler": "cosine", "lr_warmup_steps": 1}
    one = run(make_config(output_dir=tmp_path / "one", train_batch_size=4, **schedule))
    config = make_config(output_dir=tmp_path / "two", train_batch_size=2, **schedule)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lora_utils"]
    goes_on = {"resume_from_checkpoint": "latest"}
    for options in (
        flags(config, max_train_minutes=1e-6, **goes_on),
        flags(config, **goes_on),
    ):  # one step, the others
        subprocess.run(
            [*launch, "train", *options], cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    records = [
        json.loads(line) for line in (config.paths.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["learning_rate"] for record in records] == pytest.approx(
        [report.learning_rate for report in one]
    )
    assert [record["loss"] for record in records] == pytest.approx([report.loss for report in one], rel=1e-4)


def losses(config):
    lines = (config.paths.output_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def flags(config, **changes):
    file = config.paths.output_dir.parent / "flags.yaml"
    file.write_text(stages.dump_config(config))
    return ["--config", str(file), *(f"--{name}={value}" for name, value in changes.items())]


def test_dropped_captions_are_what_guidance_steers_away_from(make_config, tiny_pipeline):
    config = make_config(caption_dropout_rate=0.5)
    training = stages.prepare_training(config)
    _, embeds, _, pooled = tiny_pipeline.encode_prompt("x", negative_prompt=None)
    assert torch.equal(training.unconditional["prompt_embeds"], embeds[0])
    assert torch.equal(training.unconditional["pooled_prompt_embeds"], pooled[0])
    batch = objective.collate([visit_of(training, number) for number in range(400)])
    dropped = (batch.prompt_embeds == embeds).all(dim=(1, 2))
    assert 150 < dropped.sum() < 250
    assert torch.equal(dropped, (batch.pooled_prompt_embeds == pooled).all(dim=1))


def visit_of(training, number):
    from lora_utils.training.batches import draw_visit_number

    return draw_visit_number(training, number, number % len(training.examples))
