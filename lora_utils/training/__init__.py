"""The loop and its parts. Read ``loop`` first: ``train`` from top to bottom.

May use: memory, model, precompute, storage, compare, config, system.

loop        train, StepReport: every step, whole, and each figure of it that is logged
state       TrainingState: what a step changes, and so what a checkpoint holds
recording   recording, Recorder: when something is logged or kept; the files are storage's
stopping    Stopping: a signal, or the time is over
start       plan_run, PlannedRun, describe_run, plan_doubts: which run this is, its folder, what to doubt
folders     find_run, completed_run, stamp_inputs: which run folder settings stand for
run         TrainingRun, prepare: examples, base, adapter, precision, put together
unet        PlannedUnet: loaded, adapted, planned for the card
feed        Feed, MicroBatch: on its way to the device before it is asked for
batches     micro_batches, read_batch: which examples, in which order
objective   Batch, draw_visit, training_losses: from an example to its loss, by diffusion's formulas
diffusion   add_noise, training_target, min_snr_weights: the mathematics; a new loss starts here
optimizers  new_optimizer, new_lr_scheduler, load_states: by name, from the libraries that keep them
average     WeightAverage, averaged_weights: the weights that are saved and measured
validation  HeldOutLoss: the loss on held-out examples; other metrics of training go here
seeds       visit_generator, data_order: all randomness, as functions of seed and counts
"""
