"""What will fit: cards, a step counted without memory, what to recompute, advice.

May use: model, config, system.

machine                 describe, problems, unwritable, free_disk_gib: what is here, before any download
cards                   Card, find_card, card_here: what a card holds, and how fast it computes
rates                   measure_rates: how fast the device here is
forecast                forecast, forecasting, Forecast, replan: what every stage of a run needs
stage_forecasts         StageForecast, StageContext, workspace_bytes: what each stage needs
advice                  judge_run, judging, suggest, JudgedForecast: whether it fits, and what would help
planning                plan_step, step_shape, largest_batch: what a step recomputes to stay within a budget
gradient_checkpointing  Plan, Prices, choose, tighter, apply_plan: which modules to recompute, best first
footprint               Footprint, cached_on_disk: what running a model takes; of VAE and text encoders
step_shape              StepShape, HELD_OUT_TIMESTEPS: what decides what a step needs
unet_footprint          training_footprint, state_bytes: what the U-Net takes; optimisers' states
simulation              Simulation, imitated_autocast, on_meta, SimulationError: a model run without memory
workspaces              convolution_workspace: what cuDNN takes beside a convolution, on the card here
operators               Work, class_of, flops_of, bytes_of: torch's operators, as the simulation sees them
allocator               replay, least_limit: how much CUDA's allocator takes for what tensors ask
"""
