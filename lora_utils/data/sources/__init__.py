"""One module for each kind of data; ``data.dataset`` chooses among them.

folders      pictures with captions beside them, or in metadata files; masks
metadata     what metadata.csv, .jsonl and .parquet say about the pictures of a folder
file_tree    what lies in a folder, and which paths lead out of it
tables       datasets with columns of pictures and captions, of the Hub or of this disk
hub          opens such a dataset, and says what to do when that fails
columns      which column holds the pictures, which the captions
python_file  a Python file of the user's own
"""
