"""Which layers a LoRA should adapt, and how to train it: measured on the tiny SDXL, forecast for SDXL.

targets   the program: tunes every way equally, trains and judges it, resumable, two processes at a time
ways      WAYS, Way: sets of layers, and the controls among them
trials    Trial, carry_out: one training run with its judgement
plan      phases, tuned, success: which trials there are to be, given what earlier ones found
kept      finished, keep, stands_on: trials in the result file that still hold
sdxl      forecast_of: memory, work and T4 seconds of each way on SDXL
"""
