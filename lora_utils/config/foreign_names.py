"""What settings are called in other trainers, and why some of theirs are not needed here.

The names are those of diffusers' scripts, sd-scripts and the interfaces around it, OneTrainer, ai-toolkit,
SimpleTuner and EveryDream, in lower case with underscores.
"""

from functools import cache

# Ours, or one of ours with its value, to theirs.
RENAMED = {
    "rank": "network_dim network_rank lora_rank lora_r lora_dim linear dim r unet_lora_rank",
    "lora_alpha": "network_alpha alpha linear_alpha unet_lora_alpha lora_network_alpha",
    "lora_dropout": "network_dropout dropout rank_dropout module_dropout",
    "target_modules": "lora_target lora_target_modules unet_target_modules layer_filter lora_layers "
    "peft_lora_target_modules only_if_contains lora_unet_blocks layer_filter_preset",
    "conv_rank": "conv_dim conv conv_lora_dim network_conv_dim",
    "lora_alpha, for convolutions too": "conv_alpha",
    "target_modules=full": "network_args",
    "use_dora": "lora_decompose dora dora_wd",
    "use_rslora": "rslora",
    "learning_rate": "lr unet_lr learning_rate_unet max_lr unet_learning_rate base_lr lr_unet",
    "lr_scheduler": "lr_schedule scheduler_type learning_rate_scheduler lr_scheduler_type scheduler",
    "lr_warmup_steps": "warmup_steps num_warmup_steps learning_rate_warmup_steps warmup",
    "lr_warmup_steps, in steps": "lr_warmup warmup_ratio lr_warmup_ratio",
    "lr_num_cycles": "lr_scheduler_num_cycles num_cycles learning_rate_cycles",
    "lr_power": "lr_scheduler_power",
    "num_train_epochs": "epochs epoch max_train_epochs max_epochs num_epochs n_epochs train_epochs "
    "num_train_epoch",
    "max_train_steps": "steps max_steps train_steps num_steps total_steps training_steps num_train_steps "
    "iterations max_iterations max_iters n_steps num_iterations",
    "train_batch_size": "batch_size batch per_device_train_batch_size bs micro_batch_size mini_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accum_steps accumulation_steps "
    "accumulate_grad_batches gradient_accumulate grad_accumulation_steps grad_acc_steps",
    "gradient_checkpointing": "grad_checkpointing grad_ckpt activation_checkpointing "
    "use_gradient_checkpointing enable_gradient_checkpointing",
    "optimizer": "optimizer_type optimizer_name optim optimiser optimizer_class",
    "adam_beta1, adam_weight_decay and so on": "optimizer_args optimizer_kwargs optim_args optimizer_params",
    "use_8bit_adam": "use_8bit use_8bit_adamw adam8bit",
    "adam_weight_decay": "weight_decay wd",
    "adam_beta1": "beta1 beta_1",
    "adam_beta2": "beta2 beta_2",
    "adam_epsilon": "eps epsilon adam_eps",
    "max_grad_norm": "clip_grad_norm gradient_clip grad_clip clip_grad gradient_clipping gradient_clip_val",
    "snr_gamma": "min_snr_gamma min_snr snr min_snr_weighting loss_weight_fn",
    "debiased_estimation_loss": "debiased_estimation debias_estimation_loss",
    "noise_offset": "offset_noise offset_noise_weight noise_offset_strength offset_noise_strength",
    "input_perturbation": "ip_noise_gamma perturbation_noise_weight perturbation",
    "rescale_betas_zero_snr": "zero_terminal_snr rescale_noise_scheduler_to_zero_terminal_snr ztsnr "
    "force_zero_terminal_snr enable_zero_terminal_snr",
    "timestep_sampling": "timestep_distribution timestep_bias_strategy timestep_bias_portion "
    "weighting_scheme timestep_type content_or_style",
    "min_timestep": "min_noising_strength timestep_bias_begin min_denoising_steps min_t",
    "max_timestep": "max_noising_strength timestep_bias_end max_denoising_steps max_t",
    "loss_type": "loss loss_fn loss_function",
    "huber_c": "huber_delta huber_scale",
    "loraplus_lr_ratio": "loraplus_unet_lr_ratio lora_plus_ratio loraplus_ratio",
    "use_ema": "ema ema_config use_ema_weights",
    "ema_decay": "ema_rate ema_beta ema_max_decay",
    "seed": "random_seed training_seed manual_seed",
    "torch_compile": "compile use_torch_compile compile_unet",
    "vram_gib": "vram gpu_memory max_vram vram_limit",
    "pretrained_model_name_or_path": "base_model model_name base_model_name model_path model_name_or_path "
    "pretrained_model sd_model base_model_path pretrained_model_path model_id checkpoint_path "
    "base_model_name_or_path name_or_path ckpt resume_ckpt pretrained base_checkpoint model",
    "pretrained_vae_model_name_or_path": "vae vae_path vae_name vae_model vae_name_or_path vae_model_name",
    "variant": "weight_variant model_variant",
    "vae_precision=fp32": "no_half_vae",
    "vae_precision": "vae_dtype vae_weight_dtype vae_mixed_precision",
    "mixed_precision": "precision dtype train_dtype amp fp16 bf16 full_fp16 full_bf16 weight_dtype "
    "mixed_precision_dtype no_mixed_precision use_fp16 use_bf16 torch_dtype amp_dtype half",
    "base_precision": "base_model_precision quantize fp8_base fp8_base_unet unet_weight_dtype load_in_4bit "
    "load_in_8bit quantization qtype quantize_base base_quant",
    "train_data_dir": "instance_data_dir instance_data_root image_dir images_dir data_dir dataset_dir "
    "image_folder data_root folder_path dataset_path train_dir img_dir image_path input_dir data_path images "
    "training_folder concept_file_name train_data_path instance_images_dir dataset_folder instance_dir "
    "concepts datasets data_backend_config",
    "dataset_name": "dataset hf_dataset dataset_id hub_dataset dataset_repo",
    "dataset_config_name": "dataset_config dataset_subset",
    "dataset_split": "split train_split",
    "dataset_split, such as train[:500]": "max_train_samples max_samples num_train_samples",
    "num_repeats": "repeats repeat dataset_repeats balancing multiply",
    "caption_extension": "caption_ext caption_extention text_extension",
    "caption_column": "text_column caption_field prompt_column caption_key",
    "image_column": "image_field image_key img_column",
    "instance_prompt": "class_tokens default_caption only_instance_prompt",
    "trigger_word": "trigger trigger_words token_string activation_tag activation_tags placeholder_token "
    "concept_token caption_prefix activation_text activation_word keyword",
    "shuffle_caption": "shuffle_tags shuffle_tokens enable_tag_shuffling tag_shuffle",
    "keep_tokens": "keep_tags keep_n_tokens keep_tags_count tag_keep_first",
    "caption_dropout_rate": "caption_dropout cond_dropout proportion_empty_prompts "
    "caption_dropout_probability unconditional_prob dropout_probability conditioning_dropout_prob ucg_rate",
    "max_token_length": "max_length_multiplier tokenizer_max_length max_tokens max_caption_length",
    "resolution": "size image_size img_size train_resolution training_resolution target_resolution "
    "resolution_px pixel_size target_size width height",
    "random_crop": "crop_style",
    "random_flip": "flip_aug flip_x flip_p horizontal_flip hflip flip random_flip_prob enable_random_flip "
    "flip_augmentation use_flip",
    "enable_bucket": "buckets aspect_ratio_bucketing bucket aspect_ratio bucketing enable_buckets "
    "multi_aspect aspect_bucketing use_bucket use_buckets crop_aspect",
    "bucket_no_upscale": "no_upscale bucket_no_upscaling",
    "bucket_reso_steps": "bucket_step bucket_steps bucket_resolution_steps aspect_bucket_alignment",
    "min_bucket_reso": "min_bucket_resolution min_bucket_size",
    "max_bucket_reso": "max_bucket_resolution max_bucket_size",
    "mask_data_dir": "mask_path mask_dir masks masked_loss masked_training conditioning_data_dir mask_folder",
    "vae_batch_size": "latent_batch_size cache_batch_size vae_batch",
    "dataloader_num_workers": "max_data_loader_n_workers num_workers dataloader_threads n_workers workers "
    "data_loader_workers",
    "validation_split": "val_split validation_ratio validation_split_ratio val_ratio val_fraction "
    "validation_percentage",
    "validation_steps": "validate_every_n_steps eval_steps validation_step_interval val_every eval_every",
    "validation_steps, in steps": "validation_epochs validate_every_n_epochs eval_epochs",
    "output_dir": "output_path output output_folder save_dir save_path workspace_dir save_to "
    "output_model_destination outdir",
    "run_name": "output_name project_name lora_name job_name training_folder_name experiment_name "
    "lora_model_name save_filename_prefix",
    "cache_dir": "hf_cache_dir download_dir hub_cache model_cache_dir",
    "precompute_dir": "latent_cache_dir cache_path vae_cache_dir cache_dir_vae latents_dir",
    "checkpointing_steps": "save_every save_steps save_every_n_steps save_interval "
    "checkpoint_steps checkpoint_every save_freq checkpointing_interval save_last_n_steps",
    "checkpointing_steps, in steps": "save_every_n_epochs checkpointing_epochs save_n_epoch_ratio",
    "checkpointing_minutes": "ckpt_every_n_minutes save_every_n_minutes",
    "checkpoints_total_limit": "save_total_limit max_step_saves_to_keep max_checkpoints keep_checkpoints "
    "keep_last_n rolling_backup_count checkpoint_limit save_last_n_epochs save_last_n_steps_state",
    "resume_from_checkpoint": "resume resume_from network_weights continue_last_backup resume_state "
    "resume_path initial_weights resume_training ckpt_path load_from auto_resume",
    "max_train_minutes": "max_train_time time_limit max_hours max_time",
    "mirror_dir": "backup_dir drive_dir gdrive_path save_to_drive",
    "lora_path": "lora lora_file lora_model lora_weights lora_model_path adapter_path lora_name_or_path "
    "adapter",
    "prompt": "validation_prompt validation_prompts sample_prompts prompts sample_prompt test_prompt "
    "positive_prompt sample_definition_file_name from_file prompt_file",
    "negative_prompt": "neg_prompt neg validation_negative_prompt sample_negative_prompt n_prompt",
    "seeds": "num_validation_images num_images validation_seed num_generations n_samples num_samples "
    "num_images_per_prompt images_per_prompt sample_seed validation_seeds n_iter num_images_per_seed",
    "adapter_scale": "lora_scale lora_weight lora_strength network_mul network_multiplier "
    "cross_attention_kwargs lora_multiplier validation_adapter_strength adapter_strength",
    "num_inference_steps": "sample_steps inference_steps sampling_steps validation_num_inference_steps "
    "ddim_steps num_sampling_steps denoising_steps",
    "guidance_scale": "cfg cfg_scale validation_guidance validation_guidance_scale guidance",
    "infer_path": "sample_dir samples_dir image_output_dir inference_dir results_dir",
}  # fmt: skip

# Why a setting of theirs is none here, to theirs.
NOT_NEEDED = {
    "latents and captions are always encoded once and kept; leave it out": "cache_latents "
    "cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk latent_caching "
    "cache_text_embeddings cache_to_disk skip_cache_check only_cache pre_cache_latents cache_embeddings "
    "disk_cache",
    "the run's figures are always in metrics.jsonl and summary.json of output_dir; leave it out":
    "logging_dir report_to log_with tracker_project_name tracker_run_name wandb wandb_project wandb_run_name "
    "tensorboard log_prefix log_dir log_tracker_name log_config tracker_name log_every logging_steps "
    "log_tracker_config use_wandb wandb_entity",
    "torch's own attention is always used and saves as much; leave it out":
    "xformers sdpa mem_eff_attn enable_xformers_memory_efficient_attention enable_xformers use_xformers "
    "attention attention_mechanism disable_xformers flash_attn flash_attention use_flash_attention "
    "sdp_attention attn_mode attention_slicing enable_attention_slicing",
    "memory is planned by itself (gradient_checkpointing=auto, base_precision); leave it out":
    "lowram highvram low_vram medvram lowvram low_memory offload offload_fraction layer_offloading "
    "blocks_to_swap block_swap cpu_offload enable_model_cpu_offload cpu_offload_checkpointing "
    "disable_mmap_load_safetensors fused_backward_pass fused_optimizer_groups activation_offload "
    "set_grads_to_none enable_cpu_offload enable_sequential_cpu_offload gradient_checkpointing_interval "
    "unload_text_encoder",
    "the U-Net alone is trained; leave it out": "train_text_encoder text_encoder_lr te_lr text_encoder_lr1 "
    "text_encoder_lr2 learning_rate_te1 learning_rate_te2 network_train_unet_only train_text_encoder_ti "
    "network_train_text_encoder_only train_unet_only stop_text_encoder_training train_unet "
    "text_encoder_learning_rate lr_text_encoder train_text_encoder_frac train_text_encoder_ti_frac "
    "adam_weight_decay_text_encoder token_abstraction num_new_tokens_per_abstraction te_learning_rate "
    "block_lr train_text_encoder_1 train_text_encoder_2 cache_text_encoder text_encoder",
    "a checkpoint always holds all that a run needs to go on; leave it out": "save_state "
    "save_state_on_train_end save_optimizer_state",
    "a LoRA is always what is trained; leave it out": "network_module network_type training_method job "
    "model_type lora_type algo adapter_type peft_type lora_module use_lora train_lora network lora_algo "
    "task_type use_lycoris lycoris_config",
    "results are always safetensors; leave it out": "save_model_as use_safetensors save_safetensors "
    "save_format safe_serialization output_model_format no_metadata",
    "the adapter is always trained and kept in fp32; leave it out": "save_precision save_dtype "
    "lora_weight_dtype output_dtype upcast_attention",
    "SDXL's own layer of its text encoders is always used; leave it out": "clip_skip "
    "text_encoder_layer_skip te_layer_skip text_encoder_hidden_layer",
    "the base model's own scheduler says so; leave it out": "prediction_type v_parameterization v_pred "
    "is_v_pred v2 noise_scheduler sampler sample_sampler scale_v_pred_loss_like_noise_pred sdxl is_xl "
    "do_edm_style_training force_v_prediction custom_model_is_vpred validation_noise_scheduler "
    "training_scheduler",
    "here images of a class are a further train_data_dir with num_repeats of its own; leave it out":
    "reg_data_dir class_data_dir class_prompt with_prior_preservation prior_loss_weight num_class_images "
    "is_reg prior_reg is_regularisation_data regularization_images class_data_root",
    "images are cropped in the middle unless random_crop is set; leave it out": "center_crop "
    "resize_mode crop_type crop random_resized_crop square_crop",
    "compare draws with base and LoRA after training; leave it out": "sample_every_n_steps "
    "sample_every_n_epochs sample_every sample_at_first save_sample_every validation_disable "
    "skip_final_inference disable_sampling skip_first_sample walk_seed run_validation",
    "nothing is uploaded by itself; leave it out": "push_to_hub hub_model_id huggingface_repo_id "
    "push_checkpoints_to_hub hub_private_repo private_repo hub_strategy push_to_huggingface",
    "TF32 and cuDNN are left as torch sets them; leave it out": "allow_tf32 tf32 cudnn_benchmark "
    "allow_tf32_matmul",
    "the learning rate is taken as it is given; leave it out": "scale_lr lr_find auto_lr lr_scale",
    "the processes that decode end with precompute; leave it out": "persistent_data_loader_workers "
    "persistent_workers pin_memory prefetch_factor dataloader_prefetch",
    "colours stay as they are, since their change would be learned; leave it out": "color_aug color_jitter "
    "random_brightness face_crop_aug_range random_hue",
    "noise is one strength over all frequencies here; noise_offset is near to it":
    "multires_noise_iterations multires_noise_discount adaptive_noise_scale pyramid_noise "
    "pyramid_noise_discount multires_noise",
    "accelerate launch starts several processes; leave it out": "local_rank num_processes multi_gpu gpu_ids "
    "gpus deepspeed ddp num_gpus num_cpu_threads_per_process device gpu",
    "--config NAME or FILE says which settings are read": "config_file preset config_path "
    "user_config conf dataset_toml",
}  # fmt: skip


def answer_to(name: str) -> str | None:
    """What to write instead of another trainer's name, as the end of a sentence; None for other names."""
    return _answers().get(name.lower().replace("-", "_"))


@cache
def _answers() -> dict[str, str]:
    answers = {}
    for ours, theirs in RENAMED.items():
        answers |= dict.fromkeys(theirs.split(), f"here it is called {ours}")
    for reason, theirs in NOT_NEEDED.items():
        answers |= dict.fromkeys(theirs.split(), reason)
    return answers
