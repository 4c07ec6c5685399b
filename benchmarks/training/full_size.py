"""Every stage on a model of SDXL's own size, on a CPU.

``python -m benchmarks full_size [--small]`` writes a base model with random weights in diffusers' layout,
fp16, the U-Net in shards (7 GB; --small: a toy of the same layout), draws two pictures, and runs check,
precompute, two steps of training, one more from their checkpoint, and compare, each as a process of its own.
Prints seconds and peak memory of each (anonymous, and with the pages of mapped files), and fails if two of
{VAE, text encoders, U-Net} are ever in memory together. Take --resolution 256 on a slow machine.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.precompute.precompute import draw
from benchmarks.record import ROOT, save
from lora_utils import cli, stages
from lora_utils.model import architectures, lora
from lora_utils.model.base import PretrainedSdxl
from lora_utils.storage.checkpoint import newest, step_of
from lora_utils.system.units import GIB

TINY = Path(stages.__file__).parent / "tiny"
SMALL_UNET = {
    "block_out_channels": [32, 64, 64],
    "transformer_layers_per_block": 1,
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 128,  # both text encoders' widths, one beside the other
    "projection_class_embeddings_input_dim": 6 * 256 + 64,  # six time ids, and the pooled embedding
}
SMALL_VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1}
SMALL_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 64,
    "vocab_size": 595,  # the tiny model's tokenizers'
}
COMPONENTS = {  # method that loads a component of the base model, its name in a pipeline
    "load_vae": "vae",
    "load_text_pipeline": "text_encoder",
    "load_unet_pipeline": "unet",
    "load_unet": "unet",
}
STAGES = {
    "check": ["check"],
    "precompute": ["precompute"],
    "train": ["train"],
    "one step more from the checkpoint": [
        "train",
        "--max_train_steps",
        "3",
        "--resume_from_checkpoint",
        "latest",
    ],
    "compare": ["compare"],
}


def main() -> None:
    """Write the model, run the stages, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--small", action="store_true", help="a toy of the same layout, at 64 pixels; nothing is kept"
    )
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--base_precision", default="auto")
    parser.add_argument(
        "--work", type=Path, help="where the model and the run go; a temporary folder when not given"
    )
    parser.add_argument("--stage", nargs=argparse.REMAINDER, help="used by the program itself")
    options = parser.parse_args()
    if options.stage:
        raise SystemExit(run_watched(options.stage))
    with tempfile.TemporaryDirectory() as name:
        work = options.work or Path(name)
        side_px = 64 if options.small else options.resolution

        started = time.perf_counter()
        size_gib = write_base(work / "base", options.small)
        written_seconds = time.perf_counter() - started
        if not (work / "pictures").exists():
            draw(work / "pictures", 2, side_px)

        flags = flags_of(work, side_px, options.base_precision)
        figures = {
            "base_gib": round(size_gib, 2),
            "write_seconds": round(written_seconds),
            "resolution_px": side_px,
        }
        for stage, command in STAGES.items():
            figures[stage] = measure([command[0], *flags, *command[1:]])
            print(stage, figures[stage], flush=True)

        # All three steps happened, the third from a checkpoint, and the LoRA was drawn with.
        assert [step_of(path.name) for path in newest(work / "run" / "checkpoints", step_of)] == [3, 2]
        assert (work / "run" / lora.WEIGHTS_NAME).is_file()
        assert len(list((work / "run" / "compare").glob("finetuned_*.png"))) == 1
    if not options.small:
        save("full_size", figures)


def write_base(folder: Path, small: bool) -> float:
    """A pipeline with random weights, initialised as the libraries do, so that nothing overflows.

    Returns:
        The size of its weights, GiB.
    """
    if not folder.exists():
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.float16)  # fp32 would take twice the memory on the way
        try:
            _write_parts(folder, small)
        finally:
            torch.set_default_dtype(previous)
        for name in ("model_index.json", "tokenizer", "tokenizer_2", "scheduler"):
            (folder / name).symlink_to(TINY / name)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / GIB


def _write_parts(folder: Path, small: bool) -> None:
    unet = UNet2DConditionModel(**architectures.UNET | (SMALL_UNET if small else {}))
    unet.save_pretrained(folder / "unet", max_shard_size="1MB" if small else "1GB")
    del unet  # 5 GB, before the next part is made
    AutoencoderKL(**architectures.VAE | (SMALL_VAE if small else {})).save_pretrained(folder / "vae")
    tokens = {"bos_token_id": 593, "eos_token_id": 594}  # the tiny model's tokenizers
    for name, encoder_class, shape in (
        ("text_encoder", CLIPTextModel, architectures.TEXT_ENCODER),
        ("text_encoder_2", CLIPTextModelWithProjection, architectures.TEXT_ENCODER_2),
    ):
        config = CLIPTextConfig(**shape | tokens | (SMALL_TEXT if small else {}))
        encoder_class(config).save_pretrained(folder / name)


def flags_of(work: Path, side_px: int, base_precision: str) -> list[str]:
    """The run, as the command line takes it."""
    settings = {
        "pretrained_model_name_or_path": work / "base",
        "base_precision": base_precision,
        "train_data_dir": work / "pictures",
        "output_dir": work / "run",
        "resolution": side_px,
        "dataloader_num_workers": 0,
        "max_train_steps": 2,
        "gradient_accumulation_steps": 1,
        "rank": 8,
        "prompt": "a red star",
        "num_inference_steps": 2,
        "guidance_scale": 1,
    }
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run one stage in a process of its own; seconds, peak memory, and which components it loaded."""
    command = [sys.executable, "-m", "benchmarks", "full_size", "--stage", *arguments]
    started = time.perf_counter()
    peaks = {"RssAnon": 0, "VmRSS": 0}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        # Looked at from outside: the kernel keeps a peak of VmRSS, but none of RssAnon.
        while process.poll() is None:
            for name, size in resident_bytes(process.pid).items():
                peaks[name] = max(peaks[name], size)
            time.sleep(0.02)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"{arguments[0]} failed\n{text}")
    watched = json.loads(text.splitlines()[-1])
    assert not watched["together"], f"{arguments[0]} had two components in memory: {watched['together']}"
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_anonymous_gib": round(peaks["RssAnon"] / GIB, 2),
        "peak_resident_gib": round(peaks["VmRSS"] / GIB, 2),
        "loaded": watched["loaded"],
    }


def resident_bytes(pid: int) -> dict[str, int]:
    """RssAnon and VmRSS of a process, as the kernel counts them; nothing when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {
        name: int(size) * 1024
        for name, size in re.findall(r"^(RssAnon|VmRSS):\s+(\d+)", status, re.MULTILINE)
    }


def run_watched(arguments: list[str]) -> int:
    """One stage by the command line; the last line tells which components were loaded, and which together."""
    loaded: list[str] = []
    alive: list[tuple[str, weakref.ref[Any]]] = []
    together: list[tuple[str, str]] = []

    def watch(method: str, component: str) -> None:
        load = getattr(PretrainedSdxl, method)

        def watched(self: PretrainedSdxl, *values: Any, **options: Any) -> Any:
            gc.collect()  # what is garbage in a cycle will not be in memory for long
            for other, reference in alive:
                if reference() is not None and other != component:
                    together.append((component, other))

            result = load(self, *values, **options)
            loaded.append(component)
            # A pipeline may live on without its component, and the module is what takes memory.
            module = getattr(result, component) if isinstance(result, StableDiffusionXLPipeline) else result
            alive.append((component, weakref.ref(module)))
            return result

        setattr(PretrainedSdxl, method, watched)

    for method, component in COMPONENTS.items():
        watch(method, component)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    code = cli.main(arguments)
    print("\n" + json.dumps({"loaded": loaded, "together": together}))
    return code
