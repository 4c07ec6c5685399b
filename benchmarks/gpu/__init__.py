"""A step and all other stages on a CUDA card, in processes of their own, on random weights; and short checks.

gpu        main: ``python -m benchmarks gpu``, the program; docs/gpu.md says how it is used
modes      cases, smoke, micro, caps: what one call does, each result kept before the next begins
timetable  Clock, show, in_time: what fits the minutes, by what was measured before
book       Book: the records so far, on disk after each
bars       bars: what the figures of steps and stages have to show
workers    Workers: the processes that measure, so that a crash is a result
jobs       answer: what such a process does
cases      Case, Stage: steps and stages, by importance; RATE_SECONDS, the rates
smoke      Check, CHECKS: short checks of what only a card can answer, by importance
device     Settings, measure: memory capped, another card's kernels chosen; milliseconds and memory of a step
forecasts  forecast: what is expected of a case
peers      our_step, peer_step: training steps, ours and what others' scripts do
stages     vae_encode, captions and others: what a run does besides training
checks     check_gradients, check_losses, sdxl_step: whether the card computes what it should
nodes      errors: the lean step's nodes against fp64 and torch's own
trainings  training, resumed, full_card and others: the product on the tiny SDXL
runs       whole_run: 50 steps of the product on a base of SDXL's size, with its own telemetry
bench      Bench: a kernel timed again and again
micro      RATES: of products, convolutions, attention, unpacking, launches
kernels    products in 8 bits and others' kernels for Turing, which the step does not use yet
"""
