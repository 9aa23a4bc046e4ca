"""Frozen encoders of clips and prompts: CLIP, SigLIP, X-CLIP, VideoMAE and V-JEPA 2 checkpoints of transformers, as tokens for a small head.

    clip [B,T,3,H,W] in [0,1] -> Sampler -> Pixels -> network -> tokens [B,N,D]
    prompt                    -> tokenizer -> network         -> text [B,D]             (the first three)
    tokens, text              -> how well they agree: a cosine [B]                      (the first three)

| `model_type` | tokens of a clip | cosine |
| --- | --- | --- |
| clip, siglip | one embedding a frame | mean over the frames |
| siglip_vision_model | the same, of the vision tower alone | none |
| xclip | the video's embedding, then its patches averaged over time | the video and the text as the patches change it |
| videomae, vjepa2 | the last hidden state, averaged down to at most 4 x 2 x 2 places (time, height, width) | none: they read no text |

The family is read from the checkpoint's `config.json`; resize, crop and normalisation come from its preprocessor's file. Networks compute in float32, without gradients;
what they say is rounded to the encoder's `dtype` before anybody sees it, so what a cache keeps is what an encoder says.

Letters: B clips, T frames, F frames that the encoder sees, N tokens, D width of a token, P prompts.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.checkpoint import check_is_safetensors, check_runs_no_code, read_json
from base_model.errors import UserError

Dtype = Literal["float32", "float16"]
VERSION = 1
"""Of how clips become tokens here. One more wherever that changes: what caches and cards hold is then of another encoder."""
GRID = (4, 2, 2)
"""The most places (time, height, width) that are left of a video network's patches."""
FRAMES = {"clip": 8, "siglip": 8, "siglip_vision_model": 8, "vjepa2": 16}
"""Frames an encoder sees where its checkpoint fixes no number."""
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
"""What is read of a checkpoint."""


@dataclass(frozen=True)
class Sampler:
    """Which frames an encoder sees: `frames` of them, spread evenly from the first to the last of a clip with `fps` frames a second."""

    frames: int
    fps: float

    def rows(self, number: int) -> list[int]:
        """Which of a clip's frames; the middle one where one is asked for, repeated ones where the clip has fewer."""
        if self.frames == 1:
            return [(number - 1) // 2]
        steps = self.frames - 1
        return [(2 * i * (number - 1) + steps) // (2 * steps) for i in range(self.frames)]


@dataclass(frozen=True)
class Pixels:
    """How a checkpoint wants its frames: resized (a number is the shorter side), cut in the middle, normalised."""

    resize: int | tuple[int, int] | None
    bicubic: bool
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, frames: Tensor) -> Tensor:
        """[M,3,H,W] in [0,1] -> [M,3,h,w], as the library's own processor makes it but for its rounding to 8 bits."""
        size = self.resized(*frames.shape[-2:])
        if size != tuple(frames.shape[-2:]):
            frames = F.interpolate(frames, size, mode="bicubic" if self.bicubic else "bilinear", antialias=True).clamp(0, 1)
        if self.crop is not None:
            height, width = self.crop
            top, left = (size[0] - height) // 2, (size[1] - width) // 2
            frames = frames[..., top : top + height, left : left + width]
        mean, std = (frames.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        return (frames - mean) / std

    def resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = self.resize, self.resize * max(height, width) // min(height, width)
        return (short, long) if height <= width else (long, short)

    @property
    def output(self) -> tuple[int, int] | None:
        """Height and width of what comes out; None where it depends on the clip."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)


class Encoder(ABC):
    """A frozen checkpoint. `source` finds it again; `revision` is what it holds. Made by `load_encoder`."""

    motion = False
    """Whether its tokens tell of movement more than of looks."""
    reads_text = False

    def __init__(self, network: Any, source: str, revision: str, pixels: Pixels, sampler: Sampler, dtype: Dtype, tokenizer: Any = None) -> None:
        self.network: nn.Module = network.eval().requires_grad_(False)
        self.config: Any = network.config
        self.source, self.revision, self.pixels, self.sampler, self.dtype = source, revision, pixels, sampler, dtype
        self._tokenizer = tokenizer

    @property
    def family(self) -> str:
        return str(self.config.model_type)

    @property
    def identity(self) -> str:
        """Equal for encoders that say the same of the same frames."""
        return f"{self.family}@{self.revision}"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """N tokens a clip, each D wide."""

    @torch.no_grad()
    def clips(self, video: Tensor) -> Tensor:
        """video [B,T,3,H,W] in [0,1] -> tokens [B,N,D] in `dtype`."""
        seen = video[:, self.sampler.rows(video.shape[1])].float()  # [B,F,3,H,W]
        pixels = self.pixels(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])  # [B,F,3,h,w]
        if pixels.shape[-2:] != self.side:
            raise UserError(f"the encoder {self.source} takes frames of {self.side}, and its preprocessor makes {tuple(pixels.shape[-2:])} of this clip. Use clips of that size")
        self.network.to(video.device)
        return self.tokens(pixels).to(getattr(torch, self.dtype))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """P prompts -> [P,D] in `dtype`, each cut at the length that the checkpoint reads. Raises ValueError where it reads no text."""
        if not self.reads_text:
            raise ValueError(f"{self.family} reads no text")
        length = self.config.text_config.max_position_embeddings
        words = self._tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        device = next(self.network.parameters()).device
        return self.text({name: words[name].to(device) for name in self.words}).to(getattr(torch, self.dtype))

    @torch.no_grad()
    def cosines(self, tokens: Tensor, text: Tensor) -> Tensor:
        """What `clips` and `texts` gave for B clips, [B,N,D] and [B,D] -> how well they agree [B], float32 in [-1,1]."""
        return self.cosine(tokens.float(), text.float())

    # What a family says for itself

    @property
    def words(self) -> tuple[str, ...]:
        """What its text network is given of what the tokenizer returns. SigLIP was trained on padded texts without a mask."""
        return ("input_ids",) if self.family == "siglip" else ("input_ids", "attention_mask")

    @property
    def side(self) -> tuple[int, int]:
        """Height and width of the frames that the network takes."""
        size = self.config.vision_config.image_size
        return size, size

    @abstractmethod
    def tokens(self, pixels: Tensor) -> Tensor:
        """pixels [B,F,3,h,w] -> [B,N,D]."""

    def text(self, words: Mapping[str, Tensor]) -> Tensor:
        """Tokenizer's output [P,L] -> [P,D]. Families that read text say how."""
        raise ValueError(f"{self.family} reads no text")

    def cosine(self, tokens: Tensor, text: Tensor) -> Tensor:
        """[B,N,D], [B,D] -> [B]. Families that read text say how."""
        raise ValueError(f"{self.family} reads no text")


class FrameEncoder(Encoder):
    """CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343): one embedding a frame, in the space of the text's."""

    reads_text = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.sampler.frames, self.config.projection_dim if self.family == "clip" else self.config.vision_config.hidden_size

    def tokens(self, pixels: Tensor) -> Tensor:
        network: Any = self.network
        out: Tensor = network.get_image_features(pixel_values=pixels.flatten(0, 1)).pooler_output.unflatten(0, pixels.shape[:2])
        return out

    def text(self, words: Mapping[str, Tensor]) -> Tensor:
        network: Any = self.network
        out: Tensor = network.get_text_features(**words).pooler_output
        return out

    def cosine(self, tokens: Tensor, text: Tensor) -> Tensor:
        return F.cosine_similarity(tokens, text[:, None], dim=-1).mean(1)


class VisionEncoder(FrameEncoder):
    """The vision tower of SigLIP alone, with the same embedding a frame."""

    reads_text = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.sampler.frames, self.config.hidden_size

    @property
    def side(self) -> tuple[int, int]:
        return self.config.image_size, self.config.image_size

    def tokens(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.network(pixel_values=pixels.flatten(0, 1)).pooler_output.unflatten(0, pixels.shape[:2])
        return out


class XClipEncoder(Encoder):
    """X-CLIP (arXiv 2208.02816): frames that exchange messages, and a text that is changed by what the video shows before it is compared with it."""

    reads_text = True

    @property
    def shape(self) -> tuple[int, int]:
        vision = self.config.vision_config
        return 1 + (vision.image_size // vision.patch_size) ** 2, self.config.projection_dim

    def tokens(self, pixels: Tensor) -> Tensor:
        network: Any = self.network
        out = network.get_video_features(pixel_values=pixels)
        patches = network.prompts_visual_layernorm(out.last_hidden_state[:, 1:]) @ network.prompts_visual_projection  # [B F,N-1,D]
        return torch.cat([out.pooler_output[:, None], patches.unflatten(0, pixels.shape[:2]).mean(1)], dim=1)

    text = FrameEncoder.text

    def cosine(self, tokens: Tensor, text: Tensor) -> Tensor:
        network: Any = self.network.to(tokens.device)
        told = text[:, None] + network.prompts_generator(text[:, None], tokens[:, 1:])  # [B,1,D]
        return F.cosine_similarity(tokens[:, 0], told[:, 0], dim=-1)


class PatchEncoder(Encoder):
    """VideoMAE (arXiv 2203.12602) and V-JEPA 2 (arXiv 2506.09985): patches of a clip in space and time."""

    motion = True

    @property
    def side(self) -> tuple[int, int]:
        size = self.config.crop_size if self.family == "vjepa2" else self.config.image_size
        return size, size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches of a clip: time, height, width."""
        (height, width), patch = self.side, self.config.patch_size
        return self.sampler.frames // self.config.tubelet_size, height // patch, width // patch

    @property
    def places(self) -> tuple[int, int, int]:
        """How many of them are left."""
        t, h, w = (min(here, most) for here, most in zip(self.grid, GRID, strict=True))
        return t, h, w

    @property
    def shape(self) -> tuple[int, int]:
        t, h, w = self.places
        return t * h * w, self.config.hidden_size

    def tokens(self, pixels: Tensor) -> Tensor:
        network: Any = self.network
        out = network(pixel_values_videos=pixels, skip_predictor=True) if self.family == "vjepa2" else network(pixel_values=pixels)
        patches = out.last_hidden_state.transpose(1, 2).unflatten(2, self.grid)  # [B,D,t,h,w]
        return F.adaptive_avg_pool3d(patches, self.places).flatten(2).transpose(1, 2)  # [B,N,D]


# Files


def load_encoder(source: str | Path, *, fps: float, frames: int | None = None, dtype: Dtype = "float32") -> Encoder:
    """The checkpoint in a folder, or of a hub id as `owner/name` or `owner/name@revision`, for clips of `fps` frames a second, frozen.

    frames: how many of a clip's frames it sees; None takes what the checkpoint was made for. dtype: to which what it says is rounded.
    Raises UserError for a family that is not known, weights that are not safetensors or not whole, and values of the preprocessor that cannot be followed.
    """
    import transformers

    folder, source = checkpoint_folder(str(source))
    family = str(read_json(folder / "config.json", "the encoder's configuration").get("model_type"))
    families: dict[str, tuple[type[Encoder], Any]] = {
        "clip": (FrameEncoder, transformers.CLIPModel),
        "siglip": (FrameEncoder, transformers.SiglipModel),
        "xclip": (XClipEncoder, transformers.XCLIPModel),
        "videomae": (PatchEncoder, transformers.VideoMAEModel),
        "vjepa2": (PatchEncoder, transformers.VJEPA2Model),
        "siglip_vision_model": (VisionEncoder, transformers.SiglipVisionModel),
    }
    if family not in families:
        raise UserError(f"an encoder of the family {family!r} is not known, {folder}. Give one of {', '.join(families)}")
    if not (fps > 0 and fps < float("inf")):
        raise UserError(f"the frame rate of the clips is not known ({fps:g} frames a second), for the encoder {source}. Write it into the clips' rows")
    kind, network_class = families[family]
    network, pixels = load_network(network_class, folder), read_pixels(folder, family)
    sampler = Sampler(_frames(family, network.config, frames, folder), fps)
    tokenizer = _load_tokenizer(folder) if kind.reads_text else None
    encoder = kind(network, source, revision_of(folder), pixels, sampler, dtype, tokenizer)
    if pixels.output not in (None, encoder.side):
        raise UserError(f"the encoder takes frames of {encoder.side}, its preprocessor makes {pixels.output}, {folder}. Mend the preprocessor's file")
    return encoder


def checkpoint_folder(source: str, what: str = "encoder", files: Sequence[str] = FILES) -> tuple[Path, str]:
    """Where the files are, and the source as it finds exactly them again: a hub id gets its commit. files: patterns of those that are read."""
    if Path(source).is_dir():
        return Path(source), source
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"no {what} {source!r}: it is no folder, and the hub's cache has none ({reason}). Give a folder, or set HF_HUB_OFFLINE=0 to download it") from error
    return folder, f"{name}@{folder.name}"


def load_network(network_class: Any, folder: Path, what: str = "encoder") -> Any:
    """A network of transformers in float32. Raises UserError for a configuration that brings code of its own, and for weights that are not safetensors or not whole."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    read_json(folder / "config.json", f"the {what}'s configuration")  # transformers takes a missing one for the defaults of the class, billions of weights
    check_runs_no_code(folder)
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        check_is_safetensors(path)
    if not weights:
        raise UserError(f"no weights as safetensors, {folder}. Give a checkpoint that has them, or convert it where you trust its source")
    try:
        network, told = network_class.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the {what}, {folder}: {str(error).partition(chr(10))[0]}. Restore its files or download it again") from error
    if told["missing_keys"]:
        some = sorted(told["missing_keys"])[:3]
        raise UserError(f"the {what}'s weights are not whole, {folder}: {len(told['missing_keys'])} are missing, {', '.join(some)}. Download it again")
    return network


def _load_tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the encoder's tokenizer, {folder}: {str(error).partition(chr(10))[0]}. Restore its files or download it again") from error


def _frames(family: str, config: Any, asked: int | None, folder: Path) -> int:
    """How many frames are seen: as asked, where the checkpoint leaves it open."""
    fixed = {"xclip": lambda: config.vision_config.num_frames, "videomae": lambda: config.num_frames}
    if family in fixed:
        number = int(fixed[family]())
        if asked not in (None, number):
            raise UserError(f"the encoder takes {number} frames, not {asked}, {folder}. Leave the number out")
        return number
    number = FRAMES[family] if asked is None else asked
    if number < 1 or (family == "vjepa2" and number % config.tubelet_size):
        raise UserError(f"the encoder cannot take {number} frames, {folder}. Give a multiple of {config.tubelet_size if family == 'vjepa2' else 1}")
    return number


def read_pixels(folder: Path, family: str) -> Pixels:
    """The values of the preprocessor's file. Raises UserError where one is missing or asks for what is not done here."""
    path = next((folder / name for name in ("video_preprocessor_config.json", "preprocessor_config.json") if (folder / name).exists()), folder / "preprocessor_config.json")
    values = read_json(path, "how the encoder wants its frames")
    try:
        return _pixels(values, family)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"cannot follow the encoder's preprocessor, {path}: {reason}. Frames are resized (bilinear or bicubic), cut in the middle and normalised") from error


def _pixels(values: Mapping[str, Any], family: str) -> Pixels:
    crop = _size(values.get("crop_size", values.get("size"))) if values.get("do_center_crop") else None
    crop = (crop, crop) if isinstance(crop, int) else crop
    resize = _size(values["size"]) if values.get("do_resize", True) else None
    if family == "vjepa2" and crop is not None:
        resize = crop[0] * 256 // 224  # whatever its file says: its own processor does the same
    if crop is not None and resize is not None and max(crop) > (resize if isinstance(resize, int) else min(resize)):
        raise ValueError(f"a crop of {crop} from {resize}")
    resample, factor = values.get("resample", 2), values.get("rescale_factor", 1 / 255)
    if resample not in (2, 3):
        raise ValueError(f"resample is {resample}, neither 2 nor 3")
    if not values.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor is {factor}, not 1/255")
    if not values.get("do_normalize", True):
        return Pixels(resize, resample == 3, crop, (0.0,) * 3, (1.0,) * 3)
    (r, g, b), (r_std, g_std, b_std) = values["image_mean"], values["image_std"]
    return Pixels(resize, resample == 3, crop, (float(r), float(g), float(b)), (float(r_std), float(g_std), float(b_std)))


def _size(value: Any) -> int | tuple[int, int]:
    """The number of the shorter side, or height and width."""
    if isinstance(value, Mapping):
        return int(value["shortest_edge"]) if "shortest_edge" in value else (int(value["height"]), int(value["width"]))
    return int(value)


def revision_of(folder: Path, files: Sequence[str] = FILES) -> str:
    """sha256 over the names and contents of the files that are read, and over `VERSION`."""
    digest = hashlib.sha256(f"{VERSION} {GRID}".encode())
    for path in sorted({path for pattern in files for path in folder.glob(pattern)}):
        with open(path, "rb") as file:
            digest.update(f"\n{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()
