"""Host memory that loading takes: ``python -m benchmarks loading``; every row in a process of its own.

Writes an SDXL-shaped U-Net of 436 M parameters and a text encoder of 300 M, fp32, with random weights. What
is counted is anonymous memory (RssAnon: what cannot be dropped, as the pages of a mapped file can), sampled
every 3 ms, less what the finished model itself keeps on the host. The device is the GPU where there is one;
else "meta", which takes tensors and keeps nothing, and for quantised weights the CPU.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lora_utils
from benchmarks import record
from lora_utils.config.schema import ModelConfig
from lora_utils.model import architectures
from lora_utils.model.base import PretrainedSdxl
from lora_utils.system.units import GIB

TINY = Path(lora_utils.__file__).parent / "tiny"
UNET = architectures.UNET | {"transformer_layers_per_block": [1, 1, 1], "layers_per_block": 1}
TEXT = architectures.TEXT_ENCODER_2 | {"num_hidden_layers": 12}
ROWS = [
    ("single", "diffusers", "auto"),
    ("single", "ours", "auto"),
    ("single", "ours", "int8"),
    ("single", "ours", "nf4"),
    ("shards", "diffusers", "auto"),
    ("shards", "ours", "auto"),
    ("shards", "ours", "nf4"),
    ("single", "text", "auto"),
]


def main() -> None:
    """Write, measure in fresh processes, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--row", nargs=4, help="used by the program itself: folder, files, loader, base_precision"
    )
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(Path(options.row[0]), *options.row[1:])))
        return
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        rows = []
        for row in ROWS:
            command = [sys.executable, "-m", "benchmarks", "loading", "--row", name, *row]
            output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
            rows.append(json.loads(output.splitlines()[-1]))
            print(rows[-1])
    record.save("loading", {"rows": rows})


def write_models(work: Path) -> None:
    """The U-Net in one file and in shards, and the text encoders."""
    unet = UNet2DConditionModel(**UNET)
    for files, size in (("single", "99GB"), ("shards", "300MB")):
        folder = work / files
        folder.mkdir()
        for part in ("model_index.json", "tokenizer", "tokenizer_2", "scheduler"):
            (folder / part).symlink_to(TINY / part)
        unet.save_pretrained(folder / "unet", max_shard_size=size)
    CLIPTextModel(CLIPTextConfig(**architectures.TEXT_ENCODER)).save_pretrained(
        work / "single" / "text_encoder"
    )
    CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)).save_pretrained(work / "single" / "text_encoder_2")


def measure(work: Path, files: str, loader: str, base_precision: str) -> dict[str, object]:
    """One row: load once to fp16, and tell what it took."""
    sink = torch.device("cuda" if torch.cuda.is_available() else "meta")
    device = torch.device("cpu") if base_precision != "auto" and sink.type == "meta" else sink
    base = PretrainedSdxl(ModelConfig(pretrained_model_name_or_path=str(work / files)))

    def load() -> list[nn.Module]:
        if loader == "text":
            pipeline = base.load_text_pipeline(torch.float16, device)
            return [pipeline.text_encoder, pipeline.text_encoder_2]
        if loader == "diffusers":  # as its own script does
            unet = UNet2DConditionModel.from_pretrained(
                work / files, subfolder="unet", torch_dtype=torch.float16
            )
            return [unet.to(device)]
        return [base.load_unet(torch.float16, device, base_precision)]

    started = time.perf_counter()
    models, peak = with_peak(load)
    kept = sum(kept_bytes(model) for model in models)
    parts = ["text_encoder", "text_encoder_2"] if loader == "text" else ["unet"]
    file = sum(path.stat().st_size for part in parts for path in (work / files / part).glob("*.safetensors"))
    return {
        "files": files,
        "loader": loader,
        "base_precision": base_precision,
        "device": device.type,
        "file_gib": round(file / GIB, 3),
        "host_peak_gib": round(max(0, peak - kept) / GIB, 3),
        "share_of_file": round(max(0, peak - kept) / file, 3),
        "seconds": round(time.perf_counter() - started, 1),
    }


def with_peak(work: Callable[[], list[nn.Module]]) -> tuple[list[nn.Module], int]:
    """The result of the work, and by how many bytes anonymous memory grew at most meanwhile."""
    before = anonymous_bytes()
    samples = [0]
    done = Event()

    def watch() -> None:
        while not done.wait(0.003):
            samples.append(anonymous_bytes())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = work()
        samples.append(anonymous_bytes())
    finally:
        done.set()
        watcher.join()
    return result, max(0, max(samples) - before)


def anonymous_bytes() -> int:
    """Of this process, as the kernel counts it."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def kept_bytes(model: nn.Module) -> int:
    """What the parameters take on the host."""
    tensors = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors += [parameter] if state is None else [parameter, state.absmax, state.state2.absmax]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == "cpu")
