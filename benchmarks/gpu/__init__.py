"""A step and all other stages on a CUDA card, every case in a process of its own, on random weights.

gpu        main: ``python -m benchmarks gpu``, the program; keeps results after every case
cases      Case, Job: what is run, by importance, and the bars that figures have to pass
forecasts  what the forecast says of every case, before it is measured
workers    Workers: the processes that measure, so that a crash is a result
jobs       what such a process does
device     the card, its memory capped and another's kernels chosen; milliseconds and memory of a step
peers      training steps: ours and what others' scripts do
stages     what a run does besides training: encode, sample, decode, save and load
checks     whether the card computes what it should
micro      the rates of matrix products, convolutions, attention and launches
"""
