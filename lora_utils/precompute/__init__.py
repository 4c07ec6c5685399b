"""Encoded once: captions and images, into a cache named by content.

May use: data, model, config, system.

plan         plan_data, DataPlan, Encoding: what is to be encoded, by name, before anything is
fill         fill_cache, Precomputed: what is missing, and what came of it; read this first
encoding     encode_texts, encode_image_tasks: the encoders at work, one kind after the other
cache        Cache, record_key: records by the hash of all that shaped them
packs        Pack, write_pack, Layout: many records in one file
examples     Entry, CachedExamples, write_index, read_index: the current data, and its tensors
data_report  report_on_data, DataReport: all of the data, before anything heavy is loaded
"""
