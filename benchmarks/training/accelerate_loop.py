"""A training loop around accelerate's ``save_state``, as the usual example scripts have it, for comparison.

Checkpoints are folders ``checkpoint-N`` that are written in place; the oldest is deleted before a new one is
made; to go on, the highest number is loaded and the epoch that it was in begins again. One process, CPU, the
tiny SDXL.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.faults.campaigns import Result

RUN = Path("run")
EXAMPLES = 10
BATCH = 1
RATE = 1e-3
SEED = 0
LIMIT = 2
"""Checkpoints that are kept."""


@dataclass(frozen=True)
class AccelerateLoop:
    """A contender of the campaigns."""

    base: Path
    """Folder of the tiny SDXL."""
    max_steps: int
    checkpointing_steps: int

    def steps(self) -> Iterator[int]:
        """Train, from the newest checkpoint where there is one."""
        set_seed(SEED)  # global state, which load_state puts back in a later start
        accelerator = Accelerator(cpu=True, project_dir=str(RUN))
        unet = UNet2DConditionModel.from_pretrained(self.base, subfolder="unet").requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        adapter = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(adapter, lr=RATE)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=self.max_steps)
        loader = DataLoader(_examples(unet), batch_size=BATCH, shuffle=True)
        unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
        noise_scheduler = DDPMScheduler.from_pretrained(self.base, subfolder="scheduler")

        # What the scripts know of where they were is a number in a folder's name.
        step = 0
        first_epoch = 0
        if checkpoints := self.checkpoints():
            accelerator.load_state(str(checkpoints[0]))
            step = _number(checkpoints[0])
            first_epoch = step // len(loader)

        # The epoch begins again at its first batch, so what was trained in it is trained twice. One epoch
        # more than there are, since the steps that are left may need it.
        for _ in range(first_epoch, math.ceil(self.max_steps / len(loader)) + 1):
            for batch in loader:
                if step == self.max_steps:
                    break
                loss = _loss(unet, batch, noise_scheduler)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(adapter, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                if step % self.checkpointing_steps == 0 or step == self.max_steps:
                    self._save(accelerator, step)
                yield step

        state = get_peft_model_state_dict(accelerator.unwrap_model(unet))
        save_file(state, RUN / "weights.safetensors")

    def checkpoints(self) -> list[Path]:
        """The highest number first, whatever is in it."""
        folders = [path for path in RUN.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(folders, key=_number, reverse=True)

    def result(self) -> Result:
        """Weights file, and the optimiser's tensors in the last checkpoint."""
        weights = hashlib.sha256((RUN / "weights.safetensors").read_bytes()).hexdigest()
        saved = torch.load(self.checkpoints()[0] / "optimizer.bin", weights_only=True)
        hasher = hashlib.sha256()
        for _, state in sorted(saved["state"].items()):
            for name in sorted(state):
                hasher.update(name.encode() + torch.as_tensor(state[name]).numpy().tobytes())
        return Result(weights, hasher.hexdigest(), ())  # it keeps no log

    def _save(self, accelerator: Accelerator, step: int) -> None:
        # Deleted first, as in the scripts: a kill now leaves one checkpoint less.
        for old in self.checkpoints()[LIMIT - 1 :]:
            shutil.rmtree(old)
        accelerator.save_state(str(RUN / f"checkpoint-{step}"))


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _examples(unet: UNet2DConditionModel) -> TensorDataset:
    """Latents and embeddings as a cache would hold them; numbers of no meaning do here."""
    generator = torch.Generator().manual_seed(SEED)
    width = unet.config["cross_attention_dim"]
    pooled = _pooled_size(unet)
    shapes = ((EXAMPLES, unet.config["in_channels"], 8, 8), (EXAMPLES, 77, width), (EXAMPLES, pooled))
    return TensorDataset(*(torch.randn(shape, generator=generator) for shape in shapes))


def _pooled_size(unet: UNet2DConditionModel) -> int:
    return unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]


def _loss(unet: UNet2DConditionModel, batch: list[Tensor], noise_scheduler: DDPMScheduler) -> Tensor:
    latents, prompt_embeds, pooled = batch
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, noise_scheduler.config["num_train_timesteps"], (len(latents),))
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(len(latents), 1)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return F.mse_loss(unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=added).sample, noise)
