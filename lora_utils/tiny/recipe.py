"""Trains the tiny SDXL from nothing: ``python -m lora_utils.tiny.recipe``.

First the VAE on drawings of every kind, then the U-Net together with both text encoders on captioned pictures
of the base style, of several sizes, with what their time ids say. Everything is a function of (SEED, stage,
step), so a run that was cut off goes on from its last saved state and ends the same.
"""

import argparse
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lora_utils import UserError
from lora_utils.tiny import architecture, lessons, world
from lora_utils.tiny.drawing import Size

FOLDER = Path(__file__).parent
SEED = 0
VAE_STEPS = 2400
VAE_BATCH = 16
VAE_LEARNING_RATE = 3e-3
VAE_PICTURES = 8000
UNET_STEPS = 6000
UNET_BATCH = 32
"""Of squares; of larger pictures as many as have as many pixels."""
UNET_LEARNING_RATE = 1.5e-3
UNET_PICTURES = 16000
CAPTIONS = 3000
"""From which the tokenizers learn their merges."""
KL_WEIGHT = 1e-3
"""Enough to keep latents in a range that noise can be mixed into, and too little to blur what is decoded."""
NO_CAPTION_SHARE = 0.1
"""Of examples without a caption, for classifier-free guidance (Ho and Salimans, 2022)."""
LARGEST_WEIGHT = 10
"""Of an example in the U-Net's loss."""
WARM_UP_SHARE = 0.05
SAVE_EVERY_STEPS = 250
ANEW = "give another --state_dir, or delete the file to begin anew"


class StateError(UserError):
    """Training cannot go on from the state that is there."""


def main() -> None:
    """Train what is not yet trained and write the pipeline folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="pipeline folder to write")
    parser.add_argument("--state_dir", type=Path, default=Path("runs/tiny"), help="resumable training state")
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS)
    parser.add_argument("--unet_steps", type=int, default=UNET_STEPS)
    parser.add_argument("--num_threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    options.state_dir.mkdir(parents=True, exist_ok=True)

    # Initial weights are the one thing that torch draws from its global state.
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        vae = architecture.build_vae().to(memory_format=torch.channels_last)  # quicker on a CPU
        pipeline = _new_pipeline(vae, options.state_dir)

    train_vae(vae, options.vae_steps, options.state_dir)
    train_unet(pipeline, options.unet_steps, options.state_dir)
    _save(pipeline, options.output_dir, options.state_dir / "tokenizer")


def train_vae(vae: AutoencoderKL, steps: int, state_dir: Path) -> None:
    """Reconstruct plain pictures and doodles, half and half: L1 + L2 + a little KL.

    Args:
        vae: Trained in place, fp32, channels last.
        steps: Optimiser updates.
        state_dir: Where its training state is kept, and found again.
    """
    # Doodles hold what the base style never shows, hatching above all: a LoRA has to learn the ink style
    # with this VAE, which nobody trains again.
    random = _generator("draw vae")
    half = VAE_PICTURES // 2
    plain = [world.draw_plain(world.random_scene(random), random) for _ in range(half)]
    pictures = _to_tensor(plain + [world.draw_doodle(random) for _ in range(half)])

    def loss_at(step: int) -> Tensor:
        random = _generator("vae", step)
        batch = pictures[random.integers(0, len(pictures), VAE_BATCH)].float() / 127.5 - 1
        batch = batch.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(_torch_generator(random))).sample
        # From a standard normal (Kingma and Welling, 2014, appendix B), but a mean over latents, not a sum.
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        # L1 keeps edges sharp, L2 punishes a wrong colour.
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + KL_WEIGHT * kl

    fit("vae", vae, loss_at, steps, VAE_LEARNING_RATE, state_dir)


def train_unet(pipeline: StableDiffusionXLPipeline, steps: int, state_dir: Path) -> None:
    """Predict noise from noisy latents and captions, text encoders too (Ho et al., 2020, equation 14).

    Args:
        pipeline: With a trained VAE; its U-Net and text encoders are trained in place, fp32, and the VAE's
            scaling factor is set.
        steps: Optimiser updates.
        state_dir: Where their training state is kept, and found again.
    """
    pipeline.vae.half().float()  # the files hold fp16, and the latents should be theirs
    lessons_of = {
        size: _encode_lessons(pipeline, size, round(UNET_PICTURES * share))
        for size, share in lessons.SIZE_SHARES.items()
    }
    # Latents of unit variance, as the noise schedule expects them (Rombach et al., 2022, appendix G).
    moments = lessons_of[world.SQUARE].moments
    scale = 1 / moments[:2000].chunk(2, dim=1)[0].float().std().item()
    pipeline.vae.register_to_config(scaling_factor=round(scale, 5))
    alphas = pipeline.scheduler.alphas_cumprod
    models = nn.ModuleDict(
        {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    ).train()

    def loss_at(step: int) -> Tensor:
        random = _generator("unet", step)
        size = list(lessons_of)[random.choice(len(lessons_of), p=list(lessons.SIZE_SHARES.values()))]
        learned = lessons_of[size]
        batch = UNET_BATCH * world.SQUARE.pixels // size.pixels
        chosen = random.integers(0, len(learned.moments), batch)
        generator = _torch_generator(random)

        mean, logvar = learned.moments[chosen].float().chunk(2, dim=1)
        latents = scale * (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.from_numpy(random.integers(0, len(alphas), batch))
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy_latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

        # Zeros in place of embeddings: what SDXL's pipelines take for an empty negative prompt.
        keep = torch.from_numpy(random.random(batch) >= NO_CAPTION_SHARE).float()
        prompt_embeds, pooled = _embed(models, learned.tokens[chosen])
        prediction = pipeline.unet(
            noisy_latents.contiguous(memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=prompt_embeds * keep.view(-1, 1, 1),
            added_cond_kwargs={
                "text_embeds": pooled * keep.view(-1, 1),
                "time_ids": learned.time_ids[chosen],
            },
        ).sample

        # Colours and shapes are decided where SNR is small, and there the plain loss hardly sees them.
        # 1 / alpha makes it v-prediction's (Salimans and Ho, 2022, section 4); capped, or it would see
        # the noisiest timesteps alone.
        error = (prediction - noise).square().mean(dim=(1, 2, 3))
        weight = (1 / alpha.flatten().clamp(min=1e-4)).clamp(max=LARGEST_WEIGHT)
        return (error * weight).mean()

    fit("unet", models, loss_at, steps, UNET_LEARNING_RATE, state_dir)


def fit(
    name: str,
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    state_dir: Path,
) -> None:
    """AdamW with warm-up and cosine decay to zero; the state is saved and found again in ``state_dir``.

    Args:
        name: Of the state's file.
        model: Trained in place.
        loss_at: The loss of a step, a scalar; a function of the step's number alone, apart from the weights.
        steps: Optimiser updates in all, those of earlier starts included.
        learning_rate: The highest.
        state_dir: A folder that exists.

    Raises:
        StateError: The state there is of another model, of another number of steps, or of another rate.
    """
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=1e-4)
    path = state_dir / f"{name}.safetensors"
    schedule = f"{steps} steps, learning rate {learning_rate:g}"
    start = _load_state(path, parameters, optimizer, schedule)
    begun = time.monotonic()
    losses = []

    for step in range(start, steps):
        # Computed from the step and not stepped along, so that a start in the middle needs no history.
        warmup = min(1.0, (step + 1) / (WARM_UP_SHARE * steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))

        loss = loss_at(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

        if (step + 1) % SAVE_EVERY_STEPS == 0 or step + 1 == steps:
            _save_state(path, parameters, optimizer, schedule, step + 1)
            seconds = (time.monotonic() - begun) / len(losses)
            recent = np.mean(losses[-SAVE_EVERY_STEPS:])
            print(f"{name} step {step + 1}/{steps}: loss {recent:.4f}, {seconds:.3f} s/step", flush=True)


def _save_state(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: str,
    step: int,
) -> None:
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach()
        # The first text encoder's last layer is never read, so it has no gradient and no state.
        if state := optimizer.state.get(parameter):
            tensors |= {f"mean.{name}": state["exp_avg"], f"variance.{name}": state["exp_avg_sq"]}

    # Renamed when it is whole: a cut in the middle leaves the state before.
    partial = path.with_suffix(".partial")
    metadata = {"step": str(step), "schedule": schedule}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def _load_state(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, schedule: str
) -> int:
    """Steps that the state has behind it; 0 without one."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        saved = set(file.keys())
        # Decay is planned from the first step on: what another plan began cannot end as this one would.
        theirs = file.metadata().get("schedule")
        if theirs != schedule:
            raise StateError(f"{path} is of {theirs}, not of {schedule}; {ANEW}")
        shapes = {f"weight.{name}": list(parameter.shape) for name, parameter in parameters.items()}
        if shapes != {key: file.get_slice(key).get_shape() for key in saved if key.startswith("weight.")}:
            raise StateError(f"{path} is of another model; {ANEW}")
        step = int(file.metadata()["step"])
        for name, parameter in parameters.items():
            parameter.data.copy_(file.get_tensor(f"weight.{name}"))
            if f"mean.{name}" not in saved:
                continue
            # Laid out in memory as the parameter is, which a file forgets, and as AdamW makes them.
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.empty_like(parameter.data).copy_(file.get_tensor(f"mean.{name}")),
                "exp_avg_sq": torch.empty_like(parameter.data).copy_(file.get_tensor(f"variance.{name}")),
            }
    return step


def _new_pipeline(vae: AutoencoderKL, state_dir: Path) -> StableDiffusionXLPipeline:
    random = _generator("corpus")
    corpus = [world.random_scene(random).caption for _ in range(CAPTIONS)]
    tokenizer, tokenizer_2 = architecture.build_tokenizers(corpus, state_dir / "tokenizer")
    text_encoder, text_encoder_2 = architecture.build_text_encoders(len(tokenizer))
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=architecture.build_unet().to(memory_format=torch.channels_last),  # quicker on a CPU
        scheduler=architecture.build_scheduler(),
        add_watermarker=False,
    )


@dataclass(frozen=True)
class EncodedLessons:
    """Pictures of one size, encoded once for all steps."""

    moments: Tensor
    """(N, 8, H / 4, W / 4), fp16."""
    tokens: Tensor
    """Of both encoders, (N, 2, 77)."""
    time_ids: Tensor
    """(N, 6), fp32."""


def _encode_lessons(pipeline: StableDiffusionXLPipeline, size: Size, count: int) -> EncodedLessons:
    random = _generator(f"draw unet {size.height_px}x{size.width_px}")
    drawn = [lessons.random_lesson(random, size) for _ in range(count)]
    pictures = _to_tensor([lesson.picture for lesson in drawn])
    with torch.no_grad():
        moments = [
            pipeline.vae.encode(batch.float() / 127.5 - 1).latent_dist.parameters
            for batch in pictures.split(64)
        ]
    captions = [lesson.caption for lesson in drawn]
    first, second = (
        tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
    )
    time_ids = torch.tensor([lesson.time_ids for lesson in drawn], dtype=torch.float32)
    return EncodedLessons(torch.cat(moments).half(), torch.stack([first, second], dim=1), time_ids)


def _embed(models: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """prompt_embeds, (B, 77, 2 * TEXT_WIDTH), and pooled_prompt_embeds, (B, TEXT_WIDTH), as in SDXL."""
    first = models["text_encoder"](tokens[:, 0], output_hidden_states=True)
    second = models["text_encoder_2"](tokens[:, 1], output_hidden_states=True)
    # The last but one of the hidden states; the pooled embedding alone has seen the second's last layer.
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def _to_tensor(pictures: list[Image.Image]) -> Tensor:
    """RGB, (B, 3, H, W), uint8: a quarter of the memory of fp32, for thousands of pictures."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _generator(purpose: str, step: int = 0) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((SEED, step, *purpose.encode())))


def _torch_generator(random: np.random.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(random.integers(2**63)))


def _save(pipeline: StableDiffusionXLPipeline, folder: Path, tokenizer_files: Path) -> None:
    # fp16 halves what git has to keep. Written beside the old model, which a cut leaves as it was.
    staged = folder / ".staged"
    pipeline.to(torch.float16).save_pretrained(staged)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        for path in tokenizer_files.iterdir():  # transformers 5 writes tokenizer.json alone
            shutil.copy(path, staged / tokenizer)
    _restore_prefix(staged / "text_encoder" / "model.safetensors")

    # Entry by entry: the folder holds this file, too.
    for path in staged.iterdir():
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        path.rename(target)
    staged.rmdir()


def _restore_prefix(file: Path) -> None:
    """Name tensors as SDXL's own files do.

    transformers 5 leaves out a prefix without which transformers 4 finds no weights.
    """
    tensors = {
        f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})  # transformers refuses files that do not say their format


if __name__ == "__main__":
    main()
