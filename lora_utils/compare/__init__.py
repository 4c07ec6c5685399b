"""Pictures of the base model and of the LoRA, on equal seeds. What judges pictures goes here too.

May use: model, storage, config, system.

sampling    draw_pairs, draw_latents, Shot, SamplingSettings: from prompts to images
comparison  write, Comparison: all of it as files
png         save_image: a picture that carries its settings
sheet       contact_sheet: one picture of all
"""
