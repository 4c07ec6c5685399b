"""Pictures of the base model and of the LoRA, on equal seeds. What judges pictures goes here too.

May use: model, storage, config, system.

sampling    draw_pairs, draw_latents, Shot, Picture, SamplingSettings: from prompts to images
comparison  write, ComparisonPlan, Comparison: all of it as files, each picture as it comes
album       require_writable, set_aside: a folder of pictures, tried first, and never a mixture
png         save_image, save_sheet, was_drawn_here: a picture that carries its settings
sheet       contact_sheet: one picture of all
labels      drawable, wrapped, write_line: texts of any script, drawn by fonts that have their letters
"""
