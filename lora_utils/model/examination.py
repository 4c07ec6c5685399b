"""What a base model is, and whether it is one for training: the one answer for all stages.

A base is a folder in diffusers' layout, or a model on the Hub. It is judged by the names of its files and by
its JSON, a folder by the headers of its weights too, before anything is loaded; no weight is read and nothing
is downloaded. Knows no torch.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    HTTPError,  # of the library that the Hub's client is built on, which changes with its versions
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lora_utils import UserError
from lora_utils.config.schema import ModelConfig
from lora_utils.model.architectures import TEXT_ENCODER, TEXT_ENCODER_2, UNET, VAE
from lora_utils.model.wholeness import what_is_wrong
from lora_utils.system.locations import looked_for, looks_like_path, why_unwritable

INDEX = "model_index.json"
CHOICE = "give a folder in diffusers' layout, or a Hub id such as stabilityai/stable-diffusion-xl-base-1.0"
PLAIN = "choose a plain SDXL base model"
WEIGHT_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")
HUB_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://")
DIFFUSERS_STEM = "diffusion_pytorch_model"
STEMS = {"unet": DIFFUSERS_STEM, "vae": DIFFUSERS_STEM, "text_encoder": "model", "text_encoder_2": "model"}
"""Of the weight files of each part that has weights."""
MOST_LAYERS = 32  # SDXL's second text encoder has as many
MOST_ENTRIES = 16  # of a list, such as a U-Net's blocks
GREATEST_NUMBER = 2**20
SHAPES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER_2}
LISTS = ("block_out_channels", "down_block_types", "up_block_types")
POSITIVE = ("block_out_channels", "norm_num_groups", "hidden_size", "num_attention_heads")
HUB_SECONDS = 10  # to wait for an answer


class ModelError(UserError):
    """A base model cannot be found, read or used."""


class UnreachableError(ModelError):
    """The model is not here, and the Hub cannot be asked for it now; nothing else is known to be wrong."""


def locate(name: str) -> Path | None:
    """The folder that a model's name means; None where it is a Hub id.

    Raises:
        ModelError: It is neither; says what was looked for.
    """
    if not name.strip():
        raise ModelError(f"no base model is named; {CHOICE}")
    path = Path(name)
    # os.path and not Path: that raises for names that are too long, and such a name is no folder either.
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise ModelError(_of_file(path))
    if HUB_ADDRESS.match(name) or "://" in name:
        raise ModelError(_of_address(name))

    is_file_name = name.lower().endswith(WEIGHT_FILES)
    if is_file_name or looks_like_path(name):
        absent = "file" if is_file_name else "folder"
        raise ModelError(f"there is no {absent} {looked_for(name)}; {CHOICE}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelError(
            f"there is no folder {looked_for(name)}, and no Hub id is written like that; {CHOICE}"
        ) from None
    return None


def examine(config: ModelConfig, cache_dir: Path | None) -> None:
    """Refuse a base model that no stage could use, as far as names and JSON tell.

    Raises:
        ModelError: It is none, not whole, or not SDXL.
        UnreachableError: It is not here, and the Hub cannot be asked.
    """
    name = config.base
    own_vae = config.pretrained_vae_model_name_or_path
    stems = {part: stem for part, stem in STEMS.items() if part != "vae" or not own_vae}
    folder = _files_here(name, INDEX, config.revision, cache_dir)
    # What was downloaded may lack parts that are still on the Hub: the names of all files are not known then.
    names = None
    if locate(name):
        names = _names_in(Path(name))
    elif folder is None:
        names = _names_on_hub(name, config.revision, cache_dir)

    if names is not None and INDEX not in names:
        raise ModelError(_without_index(name, names))
    if folder is not None:
        refuse_other_pipeline(name, read_config(name, folder / INDEX))
    if names is not None:
        _require_whole(name, names, stems, config.variant)
    if names is not None and locate(name):
        for part, stem in stems.items():
            _require_whole_weights(name, f"{part}/{stem}", config.variant)
    if folder is not None:
        _require_sdxl(name, folder, stems)
    if own_vae:
        _examine_vae(own_vae, cache_dir)


def _examine_vae(name: str, cache_dir: Path | None) -> None:
    """A VAE of its own is a model of one part, without the base model's variant and revision."""
    folder = _files_here(name, "config.json", None, cache_dir)
    if locate(name):
        _require_weights(name, _names_in(Path(name)), DIFFUSERS_STEM, None)
        _require_whole_weights(name, DIFFUSERS_STEM, None)
    elif folder is None:
        _require_weights(name, _names_on_hub(name, None, cache_dir), DIFFUSERS_STEM, None)
    if folder is not None:
        refuse_other_vae(name, read_config(name, folder / "config.json"))


def refuse_other_pipeline(name: str, index: Any) -> None:
    """Raise ModelError unless a model_index.json is that of an SDXL pipeline."""
    class_name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(class_name, str) or not class_name.startswith("StableDiffusionXL"):
        raise ModelError(f"{name} is {class_name!s:.60} to its {INDEX}, not SDXL; choose an SDXL base model")


def refuse_other_unet(name: str, config: dict[str, Any]) -> None:
    """Raise ModelError unless a U-Net's config.json is of plain SDXL."""
    if "quantization_config" in config:  # its tensors would be codes, taken for weights
        raise ModelError(f"{name} holds quantised weights; choose the plain model and base_precision=nf4")
    conditioning = config.get("addition_embed_type")
    if conditioning != "text_time":
        raise ModelError(
            f"the U-Net of {name} is not SDXL's: its addition_embed_type is {conditioning!s:.40}, not "
            f"text_time; {PLAIN}"
        )
    inputs = config.get("in_channels", 4)
    outputs = config.get("out_channels", 4)
    if inputs != outputs:
        raise ModelError(
            f"the U-Net of {name} takes {inputs!s:.40} channels and gives {outputs!s:.40}: it is for "
            f"inpainting or editing; {PLAIN}"
        )


def refuse_other_vae(name: str, config: dict[str, Any]) -> None:
    """Raise ModelError where a VAE normalises latents in a way that SDXL's pipelines train without."""
    if config.get("latents_mean") is not None:
        raise ModelError(f"the VAE of {name} shifts its latents (latents_mean); choose a VAE without")


def refuse_other_prediction(name: str, prediction_type: Any) -> None:
    """Raise ModelError where the base predicts something that SDXL's LoRA training does not cover."""
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"{name} predicts '{prediction_type!s:.40}'; choose a base that predicts epsilon or v_prediction"
        )


def plausible(config: Any, model: str) -> dict[str, Any]:
    """A configuration that builds in a moment: a number can ask for more memory than there is."""
    if not isinstance(config, dict):
        raise ModelError(f"cannot load {model}: a configuration of it holds no settings; choose another")
    for name, setting in config.items():
        most = MOST_LAYERS if "layers" in name else GREATEST_NUMBER
        unchecked = [setting]
        while unchecked:  # a loop, not a recursion: lists can be nested as deep as the file is long
            value = unchecked.pop()
            if isinstance(value, list) and (len(value) <= MOST_ENTRIES or name == "trained_betas"):
                unchecked += value  # of betas there are as many as timesteps
            elif isinstance(value, list) or (isinstance(value, int) and abs(value) > most):
                raise ModelError(
                    f"cannot load {model}: its {name} is larger than SDXL's can be; choose another"
                )
    return config


def read_config(name: str, file: Path) -> dict[str, Any]:
    """A model's JSON file.

    Raises:
        ModelError: It is absent or damaged, or asks for more than SDXL can be.
    """
    if not file.is_file():  # a pipe would wait for ever
        raise ModelError(f"cannot load {name}: there is no file {looked_for(file)}; {CHOICE}")
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"cannot load {name}: {file} cannot be read as JSON ({error!s:.100}); fetch the model anew"
        ) from error
    return plausible(config, name)


def _of_file(path: Path) -> str:
    """What to do about a base model that is one file."""
    whole = next((folder for folder in path.absolute().parents[:2] if (folder / INDEX).is_file()), None)
    if whole:
        return f"{looked_for(path)} is a part of a model; give the whole folder, {whole}"
    if path.suffix.lower() not in WEIGHT_FILES:
        return f"{looked_for(path)} is a file, and no model; {CHOICE}"
    command = (
        'python -c "from diffusers import StableDiffusionXLPipeline as P; '
        f"P.from_single_file('{path}').save_pretrained('{path.stem}')\""
    )
    return (
        f"{looked_for(path)} is a model in a single file, which is not supported; convert it once, "
        f"{command}, and give the folder {path.stem}"
    )


def _of_address(name: str) -> str:
    """What to do about a base model that is an address."""
    if not HUB_ADDRESS.match(name):
        return f"{name} is an address; download what is there, and {CHOICE}"
    parts = re.split(r"[?#]", HUB_ADDRESS.sub("", name, count=1))[0].strip("/").split("/")
    if len(parts) < 2 or parts[0] in ("datasets", "spaces"):
        return f"{name} is the address of no model; {CHOICE}"
    revision = parts[3] if parts[2:3] in (["tree"], ["blob"], ["resolve"]) and len(parts) > 3 else "main"
    also = f", and revision={revision}" if revision != "main" else ""
    return f"{name} is an address; give the Hub id in it, {parts[0]}/{parts[1]}{also}"


def _files_here(name: str, file: str, revision: str | None, cache_dir: Path | None) -> Path | None:
    """The folder of a model's files: its own, or what was downloaded before; None where nothing is here."""
    folder = locate(name)
    if folder is not None:
        return folder
    cached = try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None  # else None, or a mark that it is absent


def _names_in(folder: Path) -> set[str]:
    """Files of a folder and of the folders in it, with slashes."""
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def _names_on_hub(name: str, revision: str | None, cache_dir: Path | None) -> set[str]:
    """Files of a model that is not on this machine yet; asked once, where a download would try for 23 s."""
    absent = f"{name} is not on this machine (there is no folder {looked_for(name)})"
    try:
        siblings = HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).siblings
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision}; leave revision out for its main one") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{absent}, and the Hub shows no model of this name; {CHOICE}; a private one needs your HF_TOKEN"
        ) from None
    except OfflineModeIsEnabled:
        raise UnreachableError(
            f"{absent}, and HF_HUB_OFFLINE keeps it from being downloaded; unset that, or give a folder"
        ) from None
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UnreachableError(
            f"{absent}, and the Hub cannot be reached ({reason}); connect to the internet, or give a folder"
        ) from error

    cache = cache_dir or Path(constants.HF_HUB_CACHE)
    if problem := why_unwritable(cache):
        raise ModelError(
            f"{name} would be downloaded to {cache}, and {problem}; "
            "set cache_dir or HF_HOME to another folder"
        )
    return {sibling.rfilename for sibling in siblings or []}


def _require_whole(name: str, names: Collection[str], stems: dict[str, str], variant: str | None) -> None:
    """Every file that some stage will open."""
    needed = ["scheduler/scheduler_config.json", *(f"{part}/config.json" for part in stems)]
    for part in ("tokenizer", "tokenizer_2"):
        # Either the fast tokenizer's one file, or the two that it can be made of.
        if f"{part}/tokenizer.json" not in names:
            needed += [f"{part}/vocab.json", f"{part}/merges.txt"]
    lacking = [file for file in needed if file not in names]
    if lacking:
        raise ModelError(
            f"{name} is not a whole SDXL: it lacks {', '.join(lacking[:3])}; give a folder in diffusers' "
            "layout, as save_pretrained writes it, or a Hub id"
        )
    for part, stem in stems.items():
        _require_weights(name, names, f"{part}/{stem}", variant)


def _without_index(name: str, names: Collection[str]) -> str:
    path = Path(name).absolute()
    if "config.json" in names and (path.parent / INDEX).is_file():
        return f"{name} is a part of a model; give the whole folder, {path.parent}"
    files = [file for file in names if "/" not in file and file.endswith((".safetensors", ".ckpt"))]
    part = ""
    if "config.json" in names:
        part = " (a part of a model alone, such as a U-Net)"
    elif files:
        part = f" (it holds single files, such as {min(files)}, which are not supported)"
    return f"{name} holds no {INDEX}{part}; {CHOICE}"


def _require_weights(name: str, names: Collection[str], stem: str, variant: str | None) -> None:
    """Weights of one part, whole or in shards, in safetensors and in the variant that is asked for."""
    infix = f".{variant}" if variant else ""
    file = f"{stem}{infix}.safetensors"
    if file in names or f"{stem}.safetensors.index{infix}.json" in names:
        return
    cure = f"{CHOICE}, all files downloaded"
    others = set()
    for other in names:
        match = re.fullmatch(rf"{re.escape(stem)}(?:\.(\w+))?\.safetensors", other)
        match = match or re.fullmatch(rf"{re.escape(stem)}\.safetensors\.index(?:\.(\w+))?\.json", other)
        if match:
            others.add(match[1])
    if None in others:
        cure = "it has no such variant: leave variant out"
    elif others:
        cure = f"set variant={min(others)}, which it has"
    elif any(other.startswith(stem) and other.endswith((".bin", ".pt")) for other in names):
        cure = "its .bin files can run code and are not read: choose a model with safetensors"
    raise ModelError(f"cannot load {name}: there is no {file} in it; {cure}")


def _require_whole_weights(name: str, stem: str, variant: str | None) -> None:
    """Each weight file of a part, in a folder: training would find a damaged one after all was encoded."""
    infix = f".{variant}" if variant else ""
    index = Path(name, f"{stem}.safetensors.index{infix}.json")
    files = [Path(name, f"{stem}{infix}.safetensors")]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            # Of names that lead elsewhere or to a pickle, whoever loads the part says what they are.
            files = [index.parent / name for name in map(Path, shards) if name.name == str(name)]
            files = [file for file in files if file.suffix == ".safetensors"]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ModelError(f"cannot load {name}: {index} is damaged; fetch the model anew") from error
    for file in files:
        if not file.is_file():
            raise ModelError(f"cannot load {name}: {index} names {file.name}, which is not there; {CHOICE}")
        if problem := what_is_wrong(file):
            raise ModelError(f"cannot load {name}: {file} {problem}")


def _require_shape(name: str, file: str, config: dict[str, Any], sdxl: dict[str, Any]) -> None:
    """Numbers where SDXL has numbers, and so on: a forecast builds the part before anything is loaded."""
    for key, example in sdxl.items():
        value = config.get(key)
        if value is None and key not in LISTS:
            continue  # then it has its default
        leaves: list[Any] = [value]
        while any(isinstance(leaf, list) for leaf in leaves):  # of layers, lists may be in lists
            leaves = [inner for leaf in leaves for inner in (leaf if isinstance(leaf, list) else [leaf])]
        numbers = (int, float) if isinstance(example, float) else int
        expected = example[0] if isinstance(example, list) else example
        is_right = all(isinstance(leaf, str if isinstance(expected, str) else numbers) for leaf in leaves)
        is_list = isinstance(value, list) and len(value) > 0
        if not is_right or (key in LISTS and not is_list) or (key in POSITIVE and min(leaves) <= 0):
            raise ModelError(
                f"cannot load {name}: {key} in {file} is {value!r:.40}, not such as {example!r:.40}; "
                "fetch the model anew"
            )


def _require_sdxl(name: str, folder: Path, stems: dict[str, str]) -> None:
    """By the JSON that is here; of a model on the Hub some may not have been downloaded yet."""
    configs = {}
    for part in stems:
        file = folder / part / "config.json"
        if locate(name) or file.is_file():
            configs[part] = read_config(name, file)
            _require_shape(name, f"{part}/config.json", configs[part], SHAPES[part])
    if "unet" in configs:
        refuse_other_unet(name, configs["unet"])
    if "vae" in configs:
        refuse_other_vae(name, configs["vae"])
    schedule = folder / "scheduler" / "scheduler_config.json"
    if schedule.is_file():
        refuse_other_prediction(name, read_config(name, schedule).get("prediction_type", "epsilon"))
