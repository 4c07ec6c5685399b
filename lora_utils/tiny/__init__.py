"""The tiny SDXL that notebooks and tests run on: its world, how it was made, how well it draws.

May use: no other room.

world         Scene, draw_plain, draw_styled, STYLES: coloured shapes in the base style, in ink, as blueprint
drawing       Size, Placement, shape_mask, stripes: the masks that pictures are painted through
demo_data     draw_demo_data, demo_scenes, unseen_scenes: data sets of the two styles and of the subject
lessons       random_lesson, Lesson: what the base model is shown, with its time ids
architecture  build_vae, build_unet, build_text_encoders, build_tokenizers: every part of SDXL, very small
recipe        train_vae, train_unet, fit: trains it from nothing
judge         colour_of, background_of, shape_of, in_style: what a picture shows, without any learned model
evaluate      judge_base, judge_lora, judge_content, draw: how well it draws what it is told, and with a LoRA
"""
