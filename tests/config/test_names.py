"""Names of other trainers are answered with ours, all at once, in flags, files and overrides alike."""

import re

import pytest

from lora_utils.cli import main
from lora_utils.config.foreign_names import NOT_NEEDED, RENAMED, answer_to
from lora_utils.config.loading import ConfigError, all_settings, load_config
from lora_utils.config.schema import RunConfig

# What people bring, and what they shall read.
ANSWERS = {
    "network_dim": "rank", "network_alpha": "lora_alpha", "lora_rank": "rank",
    "conv_dim": "conv_rank", "conv_alpha": "lora_alpha", "network_args": "target_modules=full",
    "lr": "learning_rate", "unet_lr": "learning_rate", "text_encoder_lr": "U-Net alone",
    "epochs": "num_train_epochs", "epoch": "num_train_epochs", "max_train_epochs": "num_train_epochs",
    "steps": "max_train_steps", "batch_size": "train_batch_size", "grad_accum": "gradient_accumulation_steps",
    "vae": "pretrained_vae_model_name_or_path", "no_half_vae": "vae_precision=fp32",
    "base_model": "pretrained_model_name_or_path", "pretrained_model": "pretrained_model_name_or_path",
    "flip_aug": "random_flip", "color_aug": "colours", "cache_latents": "leave it out",
    "cache_latents_to_disk": "leave it out", "xformers": "attention", "sdpa": "attention",
    "num_generations": "seeds", "num_validation_images": "seeds", "validation_prompt": "prompt",
    "logging_dir": "metrics.jsonl", "report_to": "metrics.jsonl", "log_with": "metrics.jsonl",
    "output_name": "run_name", "save_model_as": "safetensors", "save_precision": "fp32",
    "save_every_n_epochs": "checkpointing_steps", "save_every_n_steps": "checkpointing_steps",
    "instance_data_dir": "train_data_dir", "image_dir": "train_data_dir", "reg_data_dir": "train_data_dir",
    "class_prompt": "train_data_dir", "with_prior_preservation": "train_data_dir",
    "caption_ext": "caption_extension", "shuffle_tags": "shuffle_caption", "min_snr_gamma": "snr_gamma",
    "optimizer_type": "optimizer", "optimizer_args": "adam_beta1", "lr_scheduler_num_cycles": "lr_num_cycles",
    "max_data_loader_n_workers": "dataloader_num_workers", "clip_skip": "text encoders",
    "train_text_encoder": "U-Net",
    "network_module": "LoRA", "network_train_unet_only": "U-Net alone", "fp8_base": "base_precision",
    "full_fp16": "mixed_precision", "lowram": "by itself", "zero_terminal_snr": "rescale_betas_zero_snr",
    "v_parameterization": "scheduler", "ip_noise_gamma": "input_perturbation", "repeats": "num_repeats",
    "center_crop": "random_crop", "allow_tf32": "TF32", "scale_lr": "as it is given",
    "push_to_hub": "uploaded",
    "lora_scale": "adapter_scale", "cfg_scale": "guidance_scale", "sample_steps": "num_inference_steps",
    "resume": "resume_from_checkpoint", "save_state": "always holds", "trigger": "trigger_word",
    "seed_": "'seed'",
    "cond_dropout": "caption_dropout_rate", "flip_p": "random_flip", "weight_decay": "adam_weight_decay",
    "masked_loss": "mask_data_dir", "aspect_ratio_bucketing": "enable_bucket", "lora_decompose": "use_dora",
    "model": "pretrained_model_name_or_path", "name_or_path": "pretrained_model_name_or_path",
    "concept_file_name": "train_data_dir", "datasets": "train_data_dir", "max_train_samples": "dataset_split",
    "adam_weight_decay_text_encoder": "U-Net alone", "do_edm_style_training": "scheduler",
    "disable_sampling": "compare draws", "highvram": "by itself", "prompt_file": "prompt",
    "width": "resolution", "lora_model_name": "run_name", "amp_dtype": "mixed_precision",
}  # fmt: skip


def test_the_table_speaks_of_our_settings_and_of_no_name_twice():
    theirs = " ".join((RENAMED | NOT_NEEDED).values()).split()
    assert len(theirs) == len(set(theirs)) > 400
    assert not set(theirs) & set(all_settings()), "a setting of ours needs no answer"
    assert all(re.match(r"\w+", ours)[0] in all_settings() for ours in RENAMED)
    assert all(name == name.lower() and "-" not in name for name in theirs)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_name_of_another_trainer_is_answered_in_every_form(name, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: 1\n")
    for load in (lambda: load_config(None, {name: 1}), lambda: load_config(file)):
        with pytest.raises(ConfigError) as error:
            load()
        assert ANSWERS[name] in str(error.value)
        assert f"'{name}'" in str(error.value)
    for words in ([f"--{name}=1"], [f"--{name.replace('_', '-')}", "1"], [f"--{name}"]):
        assert main(["train", *words]) == 2
        assert ANSWERS[name] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Network_Dim", "network-dim", "NETWORK_DIM"])
def test_case_and_dashes_hide_no_name(name):
    assert answer_to(name) == "here it is called rank"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("lerning_rate", "learning_rate"),
        ("Rank", "rank"),
        ("keep_token", "keep_tokens"),
        ("max_train_step", "max_train_steps"),
        ("train-batch-size", "train_batch_size"),
        ("resolutoin", "resolution"),
        ("num_train_epoch_", "num_train_epochs"),
    ],
)
def test_a_mistyped_name_is_recognised(name, near):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        load_config(None, {name: 1})


@pytest.mark.parametrize(
    "name", ["zebra", "numbers", "data_sett", "cache", "x", "", "banana_rate", "train_banana"]
)
def test_what_resembles_nothing_gets_no_guess(name):
    with pytest.raises(ConfigError) as error:
        load_config(None, {name: 1})
    assert "did you mean" not in str(error.value)
    assert "docs/settings.md" in str(error.value)


@pytest.mark.parametrize("name", ["no_random_flip", "no-use-dora", "no_lean_step"])
def test_a_switch_is_switched_off_by_false(name):
    with pytest.raises(ConfigError, match="=false switches it off"):
        load_config(None, {name: ""})


def test_all_unknown_names_are_told_at_once(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("network_dim: 8\ntrain:\n  lr: 1\n  rank_: 3\nnetwork:\n  type: lora\n  linear: 16\n")
    command = ["train", "--config", str(file), "--epochs", "3", "--flip_aug", "--zebra=a", "--rank", "8"]
    assert main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "8 names" not in lines[0]
    told = {line.split(": ")[-2].strip() for line in lines[1:]}
    assert told == {"network_dim", "lr", "rank_", "network", "type", "linear", "epochs", "flip_aug", "zebra"}
    assert "9 names" in lines[0]
    assert f"{file}: lr: here it is called learning_rate" in lines[2]


def test_a_whole_command_of_another_trainer_gets_one_readable_answer(capsys):
    names = [name for name in ANSWERS if name not in RunConfig.model_fields]
    assert main(["train", *[f"--{name}=1" for name in names], "--learning_rate", "1e-4"]) == 2
    error = capsys.readouterr().err
    assert len(names) > 60
    assert len(error.splitlines()) == 62
    assert f"and {len(names) - 60} more" in error


@pytest.mark.parametrize(
    "section",
    [name for name in RunConfig.model_fields if name != "data"],  # --data is a switch of check
)
def test_a_section_is_no_flag(section, capsys):
    assert main(["train", f"--{section}", "x"]) == 2
    assert f"'{section}' is a section" in capsys.readouterr().err


def test_a_setting_at_the_top_and_in_its_section_is_not_guessed(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\nlora:\n  rank: 8\n")
    with pytest.raises(ConfigError, match="'rank' is there twice"):
        load_config(file)
    file.write_text("rank: 8\nlora:\n  rank: 8\n")
    assert load_config(file).lora.rank == 8
