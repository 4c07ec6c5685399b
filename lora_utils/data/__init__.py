"""What is learned from: found, read, inspected, framed, named when wrong. Knows no torch.

May use: config, system.

dataset     find_examples, look_for_examples, describe_data: the front door
examples    Example, FoundExamples, DataError: what it hands over
sources/    one module for each kind of data
captions    Captioner, caption_variants, clean_caption: text, decoded and cleaned
findings    Finding, Remarks, table, as_csv: what is wrong with a file, and what was done
inspection  inspect_examples, InspectedExample: each file hashed, its shape and crops chosen
crops       Crop, choose_size, plan_crops: from an image to a training example's frame
images      decode, read_header, read_bytes: any picture as pixels, or why not
decoding    decode_all, new_job, Picture: many pictures, in worker processes
duplicates  near_duplicates, perceptual_hash: pictures that are nearly the same
"""
