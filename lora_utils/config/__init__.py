"""What can be set: one frozen schema, one loader. Knows no torch.

May use: system.

schema         RunConfig, PathsConfig, ModelConfig, CompareConfig, all_settings: every setting, once
data           DataConfig: where pictures and captions come from, how they are framed
training       LoraConfig, TrainConfig, CheckpointConfig: adapter, loop and optimiser names, what is kept
section        Section, Location, NameOrPath, Seed, expanded: what every group of settings shares
loading        load_config, find_config, dump_config: defaults, then a file, then overrides
run_name       default_run_name, plain_name: what a run is called when nobody names it
flags          read_flags: the settings among the words of a command line
names          refuse_unknown, unknown_names: names that are none, all at once
foreign_names  answer_to: what settings are called in other trainers
reference      settings_of, values_of: what --help and docs/settings.md show of a setting
trained        run_settings, as_trained: what a finished LoRA brings along
errors         ConfigError, explained: what is wrong, by name
doubts         doubts: what will run, and most likely is not meant
strict_yaml    read_yaml, write_yaml: YAML 1.2, and whatever could mislead is an error
"""
