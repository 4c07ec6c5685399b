"""Programs that measure, and the page of what they measured. Imports nothing of tests; tests import it.

``python -m benchmarks`` lists the programs: every file here, two levels down, that has a function ``main``.

record       save, read: figures with the machine, the date and the commit that they belong to
faults/      what a run survives: the fault-injection library that tests use too, and its campaigns
training/    the step, checkpoints, precisions, whole runs; a loop around accelerate to compare with
precompute/  how fast precompute is, and how the cache grows
memory/      how good the forecast is, and what loading takes
gpu/         the step and all other stages on a CUDA card
targets/     which layers a LoRA should adapt, and how it should be trained
report/      docs/benchmarks.md, docs/recipes.md and their pictures, from results/
results/     what was measured, a JSON file for each program
"""
