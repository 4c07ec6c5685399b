"""Training: a step's time, a checkpoint's cost, what is learned, and whether the bytes stay the same.

Each but accelerate_loop is a program of ``python -m benchmarks``, with its name:

step             our loop against the bare step and against peft's way
precisions       what the demo learns with its base in fp32, fp16, bf16, int8 and nf4
checkpoints      what a checkpoint costs beside the steps between two of them
full_size        every stage on a model of SDXL's own size, watched for parts that are in memory together
same_bytes       whether two commits make the same bytes
accelerate_loop  AccelerateLoop: the usual loop around save_state, as a contender of faults.campaigns
"""
