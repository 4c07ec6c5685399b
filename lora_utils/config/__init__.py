"""What can be set: one frozen schema, one loader. Knows no torch.

May use: system.

schema       RunConfig, PathsConfig, ModelConfig, CompareConfig: every setting, once
data         DataConfig: where pictures and captions come from, how they are framed
training     LoraConfig, TrainConfig, CheckpointConfig: adapter, loop and optimiser names, what is kept
section      Section, Size: what every group of settings shares
loading      load_config, find_config, dump_config: defaults, then a file, then overrides
run_name     default_run_name: what a run is called when nobody names it
strict_yaml  read_yaml, write_yaml: YAML 1.2, and whatever could mislead is an error
"""
