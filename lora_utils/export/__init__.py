"""For others: the LoRA in the formats of other programs. Empty until its first file.

May use: model, storage, config, system.
"""
