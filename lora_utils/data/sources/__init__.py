"""One module for each kind of data, and what they share; `lora_utils.data.dataset` chooses among them.

folders      images with captions beside them, in text files or in metadata files
tables       datasets of the Hub and of the disk: a column of images, a column of captions
python_file  the user's own load_examples(data_dir)
metadata     metadata.csv, .jsonl and .parquet of folders, and other tables where captions lack
masks        masks in a folder of their own, or beside their images
sidecars     what other programs put beside images
text_tables  CSV files of a dataset, and which tables beside images are about them
row_files    rows of CSV in its dialects, JSON lines, parquet
names        names that look the same
file_tree    what lies in a folder, and which paths lead out of it
own_output   folders that this program has written, to be left out
hub          opening datasets with the library datasets, and the cure where that fails
arrow_types  what Arrow holds in a column, and what datasets refuses of it, in plain types
columns      which column holds the images and which the captions
"""
