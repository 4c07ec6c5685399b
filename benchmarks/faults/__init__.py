"""What a run survives: an engine that injects faults, what they are injected into, campaigns and programs.

Tests import from here; nothing here imports from tests. First the engine:

operations         watching, operations, crash, failing: records changes of files, injects faults into them
power              Disk: what a power cut can leave of those changes
fake_drive         FakeDrive, PowerCut: a mount that fails, is late and loses files, as Google Drive's does
children           start, kill, succeeds: processes that work, forked or fresh
campaigns          Contender, cut_at, run_under_kills: stops or kills any trainer that can be described

What the faults meet, small enough for thousands of rounds:

small_checkpoints  state_at, save, newest_step: checkpoints of a few hundred numbers, compared bit by bit
small_cache        encode, all_sound: a cache of small random records
mirrored_run       Place, MortalMirror: a run, its cache and its mirror on the fake drive
contenders         Ours: the package's own training as a contender; accelerate's is in benchmarks/training

What is done to it, and what must hold afterwards:

crash_scenarios    Scenario, crash_everywhere, cut_power_everywhere: what a run writes, cut off anywhere
disk_errors        survive_all, small_disk: a disk that fails while a checkpoint is saved
damage             DAMAGES, corrupt: checkpoints that go bad on the disk
drive_campaign     Campaign: a mirrored run that loses its machine again and again
precompute_kills   precompute_under_kills: precompute, killed until it gets through
notebook_cells     kill_in_cell, run_all: notebooks whose kernel is killed
yaml_inputs        inputs, outcome: files that a config could be
malicious          payload, spoil, HEADERS: files that attack whoever trusts them

Programs of ``python -m benchmarks``:

faults             main: all that a whole run survives, in the parts of the next two files
files              crashes, power_cuts, errors, damage: figures of faults at single operations on files
runs               kills, cuts, accelerate: figures of whole runs that are stopped or killed
drive              main: the campaign on the fake drive
kills              main: precompute under kills
notebook_kills     main: every cell of every notebook under kills
fuzz_yaml          main: strange config files, by the hundred thousand
"""
