"""The frozen base and what is added to it: the only door to model files.

May use: config, system.

architectures  Architecture, find_architecture, UNET, VAE: SDXL's shapes, known before anything is downloaded
examination    examine, locate, ModelError: what a base is, and whether it is one; all stages ask here first
wholeness      what_is_wrong: a weight file's size against what its header promises
files          Part, load, explained, stream_weights: files read with suspicion, and streamed
quantisation   quantise_linears, left_in_full, dequantised_weight: weights in 8 or 4 bits, and back
pipelines      PipelineFiles: SDXL pipelines put together by hand, of the parts that a stage needs
base           PretrainedSdxl, NoiseSchedule: where the base model's parts come from, one at a time
text           encode_captions, encode_negative, cut_text, TextEmbeddings: captions to embeddings
vae            plan_encoding, encode_images, decode_latents: its dtype, tiles, batch; to latents and back
lora           add_lora, save_lora, find_lora, read_lora, load_lora: the adapter, from its birth to its file
lora_reader    read_updates: any program's LoRA file, all of it used, told or refused
lora_names     parse_name, layer_table, other_part, PREFIXES: what programs call a layer's tensors
lora_update    LayerUpdate, read_update, LoraFile, LoraError: the tensors of a layer, made one update
lora_strength  Strength, read_strength: peft's settings, where no tensor holds the strength
lora_foreign   foreign_content, likely_base: what a file is instead, and for which base
lean_ops       lora_linear, frozen_linear, frozen_conv2d, geglu, group_norm_silu: nodes that keep little
lean           make_lean: a U-Net whose forward passes are those nodes
"""
