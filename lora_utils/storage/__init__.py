"""What a run leaves on disk: log, checkpoints, mirror. Nothing half-written, nothing lost by a kill.

May use: precompute, config, system.

log             RunLog, read_summary: the one way of every figure to disk; trackers go behind it
store           CheckpointStore: which checkpoint to make, to keep, to go on from
checkpoint      write_checkpoint, read_checkpoint, flatten_state: one folder, and what may be wrong with it
run_folder      choose_folder, require_same_data, set_aside_run: which folder a run goes into
run_note        RunNote, read_note, is_whole: run.json, what makes the weights beside it this run's
identity        run_identity, data_digest, changes: what makes a run this run
mirror          Mirror: the thread that copies while training goes on
mirror_folder   open_mirror, steps_in, set_aside, prune_copies: the mirror's names, and what is kept in it
mirror_note     choose_folder, read_standing, Owner: whose a folder of the mirror is, and who writes there
mirror_copy     copy_folder, copy_file, write_content, CacheCopy: into a mount that may lie
mirror_restore  restore_if_wanted, restore: a run from its mirror, on a new machine
"""
