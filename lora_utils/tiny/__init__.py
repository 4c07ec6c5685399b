"""The tiny SDXL that notebooks and tests run on: its world, how it was made, how well it draws.

May use: no other room.

world         Scene, draw_plain, draw_ink, shape_mask: coloured shapes in the base style and in ink
demo_data     draw_demo_data, demo_scenes, unseen_scenes: the data set of the demo, in ink
architecture  build_vae, build_unet, build_text_encoders, build_tokenizers: every part of SDXL, very small
recipe        train_vae, train_unet, fit: trains it from nothing
judge         colour_of, background_of, shape_of, is_ink: what a picture shows, without any learned model
evaluate      judge_base, judge_lora, draw: how well it draws what it is told, without and with a LoRA
"""
