"""What is learned from: found, read, inspected, cut, and named when it is wrong. Knows no torch.

May use: config, system.

dataset      find_examples, look_for_examples, describe_data: the front door, which picks the source
examples     Example, FoundExamples, DataError: what the front door hands over
findings     Finding, Remarks, table, as_csv: what is wrong with a file or row, and what was done
captions     Captioner, clean_caption, caption_variants: text decoded, cleaned, and its tags in several orders
images       read_bytes, read_header, decode, ImageError: a file's bytes in, upright sRGB out
formats      SUFFIXES, UNREADABLE_SUFFIXES, named, jxl_header: which images can be read here
crops        Crop, choose_size, plan_crops, bucket_sizes: an image's shape, and six numbers for SDXL
inspection   InspectedExample, inspect_examples, held_out_hashes: files hashed and measured, not yet decoded
decoding     Job, Picture, new_job, decode_all: images decoded and cut in worker processes
duplicates   perceptual_hash, near_duplicates: pictures that are nearly the same
sources/    one module for each kind of data
"""
