"""Training steps that really run: ours, and what others' scripts do, on an SDXL-shaped, random U-Net.

The others are models, built of diffusers' modules with each one's adapter, autocast and checkpointing, as
``peer_graphs`` counts them. All ways share the loss scaler, the clipping and the optimiser; masters are fp32.
"""

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.gpu.cases import Case
from benchmarks.memory import peer_graphs
from lora_utils.config.training import LoraConfig, TrainConfig
from lora_utils.memory.gradient_checkpointing import BLOCK, Plan, apply_plan
from lora_utils.model import architectures, lora
from lora_utils.model.base import NoiseSchedule
from lora_utils.model.lean import make_lean
from lora_utils.model.quantisation import frozen_parameter, quantise_linears
from lora_utils.training import diffusion
from lora_utils.training.objective import Batch, training_losses
from lora_utils.training.optimizers import new_optimizer

SCALE = 8  # pixels to a latent
TOKENS = 77
Step = Callable[[], Tensor]
Base = Literal["fp16", "int8", "nf4"]


@dataclass(frozen=True)
class Peer:
    """How others do a step."""

    recompute: str
    """Nothing; full (diffusers' flag); reentrant."""
    adapter: str = "peft"
    """peft, or plain: base and update as separate operators."""
    resident: bool = False
    """VAE, fp32, and text encoders stay on the card."""
    encodes: bool = False
    """The VAE encodes the pictures again in every step."""


PEERS = {
    "script": Peer("full", resident=True, encodes=True),
    "script, cached": Peer("full", resident=True),
    "script, no recomputation": Peer("", resident=True),
    "sd-scripts": Peer("reentrant", "plain"),
    "OneTrainer": Peer("full", "plain"),
}


def our_step(case: Case, plan: Plan, device: torch.device) -> Step:
    """The project's own step, recomputing what the plan says."""
    is_lean = "peft" not in case.options
    unet = random_unet(case.base, torch.float16, device)
    if "channels_last" in case.options:
        unet.to(memory_format=torch.channels_last)
    lora.add_lora(unet, LoraConfig(rank=case.rank, target_modules=[case.targets]), seed=0)
    if is_lean:
        make_lean(unet)
    apply_plan(unet, plan)
    if "compile" in case.options:
        blocks = [module for module in unet.modules() if type(module).__name__ == BLOCK]
        for block in blocks if device.type == "cuda" else blocks[:1]:
            block.compile(backend="inductor" if device.type == "cuda" else "eager")
    config = TrainConfig(optimizer=case.optimizer)
    batch = random_batch(case.batch, case.side_px, device)
    schedule = noise_schedule().to(device)

    def loss() -> Tensor:
        with nullcontext() if is_lean else torch.autocast(device.type, torch.float16):
            return training_losses(unet, batch, schedule, config).mean()

    if "graph" in case.options and device.type == "cuda":
        return graphed(unet, loss, config, device)
    return updating(unet, loss, config, device)


def peer_step(case: Case, device: torch.device) -> Step:
    """A step as others do it, under autocast."""
    peer = PEERS[case.way]
    config = TrainConfig(optimizer=case.optimizer)
    unet = random_unet(case.base, torch.float16, device)
    if peer.adapter == "peft":
        lora.add_lora(unet, LoraConfig(rank=case.rank, target_modules=[case.targets]), seed=0)
    else:
        _add_plain_lora(unet, case, device)
    if peer.recompute == "full":
        unet.enable_gradient_checkpointing()
    elif peer.recompute == "reentrant":
        unet.enable_gradient_checkpointing(
            lambda module, *args: checkpoint(module, *args, use_reentrant=True)
        )
    encoders = (
        [*text_encoders(torch.float16, device), random_vae(torch.float32, device)] if peer.resident else []
    )
    batch = random_batch(case.batch, case.side_px, device)
    pixels = torch.randn(case.batch, 3, case.side_px, case.side_px, device=device).clamp(-1, 1)
    alphas_cumprod = noise_schedule().alphas_cumprod.to(device)

    def loss() -> Tensor:
        latents = _encoded(encoders[-1], pixels) if peer.encodes else batch.latents
        noisy = diffusion.add_noise(latents, batch.noise, batch.timesteps, alphas_cumprod).half()
        noisy.requires_grad_(peer.recompute == "reentrant")  # else nothing of a reentrant checkpoint learns
        added = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.time_ids}
        conditioning = {"encoder_hidden_states": batch.prompt_embeds, "added_cond_kwargs": added}
        with torch.autocast(device.type, torch.float16):
            prediction = unet(noisy, batch.timesteps, **conditioning).sample
        return functional.mse_loss(prediction.float(), batch.noise)

    return updating(unet, loss, config, device)


def updating(unet: nn.Module, loss: Step, config: TrainConfig, device: torch.device) -> Step:
    """Forward, backward and update, as ``training.state`` does them."""
    update = _Update(unet, config, device)

    def step() -> Tensor:
        value = loss()
        update.scaler.scale(value).backward()
        update()
        update.optimizer.zero_grad()
        return value.detach()

    return step


def graphed(unet: nn.Module, loss: Step, config: TrainConfig, device: torch.device) -> Step:
    """The same with forward and backward as one CUDA graph: thousands of launches cost the host but one.

    Raises:
        RuntimeError: Something in them cannot be captured, such as a wait for the card.
    """
    update = _Update(unet, config, device)

    # As torch's notes on graphs ask: once on another stream, so that libraries make their handles and
    # workspaces outside of the graph.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        update.scaler.scale(loss()).backward()
    torch.cuda.current_stream().wait_stream(stream)

    update.optimizer.zero_grad()  # the gradients are made in the graph, which then writes over them each time
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss()
        update.scaler.scale(value).backward()

    def step() -> Tensor:
        graph.replay()
        update()
        return value.detach()

    return step


class _Update:
    """An update, of gradients that are there."""

    def __init__(self, unet: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self._parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self._norm = config.max_grad_norm
        self.optimizer = new_optimizer(unet, config)
        # Low enough that no step is skipped.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)

    def __call__(self) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self._parameters, self._norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@torch.no_grad()
def _encoded(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent_dist.sample() * architectures.VAE["scaling_factor"]


def _add_plain_lora(unet: UNet2DConditionModel, case: Case, device: torch.device) -> None:
    unet.requires_grad_(False)
    pattern = peer_graphs.ALL if case.targets == "attn+ff" else peer_graphs.ATTENTION
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and re.search(pattern, name):
            with device:
                adapted = peer_graphs.PlainLora(module, case.rank)
            nn.init.normal_(adapted.A, std=1 / case.rank)
            nn.init.zeros_(adapted.B)
            unet.set_submodule(name, adapted)


def random_unet(base: Base, dtype: torch.dtype, device: torch.device, seed: int = 0) -> UNet2DConditionModel:
    """SDXL's U-Net, made on the device; its values are initialised as torch does: fp16 stays finite."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architectures.UNET)
    if base != "fp16":
        linears = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
        quantise_linears(unet, [name for name in linears if ".attentions." in name], base, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, old in list(unet.named_parameters()):
        path, _, leaf = name.rpartition(".")
        module = unet.get_submodule(path)
        tensor = torch.zeros(old.shape, dtype=dtype, device=device)
        if old.ndim > 1:
            bound = 1 / math.sqrt(math.prod(old.shape[1:]))
            tensor.uniform_(-bound, bound, generator=generator)
        elif leaf == "weight":
            tensor.fill_(1)
        module.register_parameter(leaf, frozen_parameter(module, leaf, tensor))
    return unet.train()


def random_vae(dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """SDXL's VAE, likewise."""
    return _made(lambda: AutoencoderKL.from_config(architectures.VAE), dtype, device)


def text_encoders(dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
    """Both of SDXL's, likewise."""
    first, second = (
        CLIPTextConfig(**shape) for shape in (architectures.TEXT_ENCODER, architectures.TEXT_ENCODER_2)
    )
    builders = (partial(CLIPTextModel, first), partial(CLIPTextModelWithProjection, second))
    return [_made(build, dtype, device) for build in builders]


def _made(make: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_batch(batch: int, side_px: int, device: torch.device, seed: int = 0) -> Batch:
    """Examples as the cache gives them, of one shape, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    side = side_px // SCALE
    config = architectures.UNET
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    noise = draw(4, side, side)
    return Batch(
        latents=draw(4, side, side),
        noise=noise,
        input_noise=noise,
        timesteps=torch.randint(1000, (batch,), generator=generator),
        prompt_embeds=draw(TOKENS, config["cross_attention_dim"]).half(),
        pooled_prompt_embeds=draw(pooled).half(),
        time_ids=torch.tensor([[side_px, side_px, 0, 0, side_px, side_px]] * batch, dtype=torch.float32),
        loss_mask=torch.ones(batch, 1, side, side),
    ).to(device)


def noise_schedule() -> NoiseSchedule:
    """SDXL's."""
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return NoiseSchedule(scheduler.alphas_cumprod.float(), "epsilon", architectures.VAE["scaling_factor"])
