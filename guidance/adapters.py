"""Low-rank adapters (LoRA) that somebody trained, on a prior's own networks: `--lora PATH[:weight]`, several of them separated by commas.

Read are files in diffusers' format (pytorch_lora_weights.safetensors; other trainers' names where diffusers knows them) and folders that
peft wrote (adapter_model.safetensors, adapter_config.json). Each becomes a named, frozen adapter on the one resident denoiser, and on the
text encoder if it has a part for it: no second copy of a model, and `activate` changes which of them count, and how much, in no time.
What personalize.py writes also tells which words it taught: a small tokenizer may read "sks" as three letters, and then another word, that
nothing else uses, stands for it.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"  # diffusers' name of the file
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
RECORD = "somnium"  # what we say of a file of ours, in its header
_HEADER = "lora_adapter_metadata"  # diffusers' own entry there
_PEFT_PREFIX = "base_model.model."
_TEXT = ("text_model.", "encoder.layers.", "embeddings.")  # beginnings of the names of a text encoder's layers


@dataclass(frozen=True)
class Adapter:
    """A file and how much it counts. `words`: those it taught the model, each with the word of the tokenizer's that stands for it, None if
    the file does not tell."""

    path: Path
    weight: float
    flag: str
    words: dict[str, str] | None = field(default=None, compare=False)


def adapters_of(opt: Any) -> tuple[Adapter, ...]:
    """What `--lora` names. Raises UserError for a missing file, a file of another kind, or a weight that is no number."""
    text = opt.lora if hasattr(opt, "lora") else None  # who asks for a model alone has no such option
    if not text:
        return ()
    found = []
    for piece in str(text).split(","):
        path, weight = _split(piece.strip())
        if not path:
            raise UserError(f"--lora {text}: a path is missing; write PATH or PATH:weight, several separated by commas")
        flag = f"--lora {path}"
        if not math.isfinite(weight):
            raise UserError(f"--lora {piece.strip()}: the weight must be a finite number, such as 0.8")
        file = find_file(Path(path).expanduser(), flag)
        found.append(Adapter(file, weight, flag, record_of(file, flag).get("words")))
    return tuple(found)


def _split(piece: str) -> tuple[str, float]:
    path, colon, weight = piece.rpartition(":")
    try:
        return (path, float(weight)) if colon else (piece, 1.0)
    except ValueError:  # a colon of the path's own
        return piece, 1.0


def find_file(path: Path, flag: str) -> Path:
    """The weights in a folder, or the file itself. Raises UserError, beginning with `flag`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{flag}: no such file or folder; check the path")
    for name in (WEIGHTS, PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.safetensors"))
    if len(others) != 1:
        raise UserError(f"{flag}: there is no {WEIGHTS} and no {PEFT_WEIGHTS} in this folder; name the file itself")
    return others[0]


def record_of(file: Path, flag: str) -> dict[str, Any]:
    """What personalize.py wrote into the header of a file; {} if somebody else wrote it."""
    return json.loads(_header(file, flag).get(RECORD, "{}"))


def learned_words(adapters: tuple[Adapter, ...]) -> dict[str, str] | None:
    """The words that adapters add to a model's own, and what stands for each; None if one of them does not tell."""
    if any(adapter.words is None for adapter in adapters):
        return None
    return {word: token for adapter in adapters for word, token in (adapter.words or {}).items()}


def as_learned(text: str, adapters: tuple[Adapter, ...]) -> str:
    """A prompt as the tokenizer is to read it: a taught word gives way to the one that stands for it."""
    for adapter in adapters:
        for word, token in (adapter.words or {}).items():
            text = re.sub(rf"\b{re.escape(word)}\b", token, text, flags=re.IGNORECASE)
    return text


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """An adapter's tensors, names beginning with the part of the pipeline they belong to ("unet.", "text_encoder."), and what diffusers
    wants to know besides."""

    state: dict[str, Tensor]
    alphas: dict[str, float] | None
    config: dict[str, Any] | None

    def count(self, part: str) -> int:
        """How many matrices there are for a part of the pipeline."""
        return sum(name.startswith(f"{part}.") for name in self.state)


def read(file: Path, flag: str, kind: str, denoiser: str = "unet") -> Weights:
    """The tensors in a file for a diffusers pipeline of class `kind`, whose denoiser is its part `denoiser`. Raises UserError."""
    state, header = _tensors(file, flag), _header(file, flag)
    config = file.parent / PEFT_CONFIG
    if file.name == PEFT_WEIGHTS and config.is_file():
        return _of_peft(state, config, flag, denoiser)
    try:
        import diffusers

        from guidance.weights import quiet

        with quiet():
            converted = getattr(diffusers, kind).lora_state_dict(state)
    except Exception as error:
        raise UserError(f"{flag}: not a LoRA that diffusers can read ({_first_line(error)})") from None
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    state = {name: value for name, value in state.items() if "alpha" not in name.rpartition(".")[2]}
    if not any("lora" in name for name in state):
        raise UserError(f"{flag}: holds no LoRA; name a {WEIGHTS} or a folder that peft wrote")
    told = json.loads(header[_HEADER]) if _HEADER in header and not alphas else None
    return Weights(state, alphas, told)


def _of_peft(state: dict[str, Tensor], config: Path, flag: str, denoiser: str) -> Weights:
    from peft import LoraConfig

    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        if told.get("peft_type") != "LORA":
            raise ValueError(f"peft_type {told.get('peft_type')}")
        own = LoraConfig.from_pretrained(str(config.parent)).to_dict()
    except Exception as error:
        raise UserError(f"{flag}: {config.name} is not of a LoRA ({_first_line(error)})") from None
    state = {name.removeprefix(_PEFT_PREFIX): value for name, value in state.items()}
    part = "text_encoder" if all(name.startswith(_TEXT) for name in state) else denoiser
    meant = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    settings = {f"{part}.{name}": own[name] for name in meant if own.get(name) is not None}
    return Weights({f"{part}.{name}": value for name, value in state.items()}, None, settings)


def _tensors(file: Path, flag: str) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{flag}: {file.name} cannot be read as weights ({_first_line(error)})") from None


def _header(file: Path, flag: str) -> dict[str, str]:
    if file.suffix != ".safetensors":
        return {}
    from safetensors import safe_open

    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except Exception as error:
        raise UserError(f"{flag}: {file.name} cannot be read as weights ({_first_line(error)})") from None


# -- putting them on ----------------------------------------------------------------------------------------------------


def put_on_denoiser(network: nn.Module, adapters: tuple[Adapter, ...], kind: str, model: str) -> None:
    """The adapters' parts for a denoiser as `lora_0`, `lora_1`, ..., in its precision, frozen and active.

    kind: the diffusers pipeline's class; model: its name, for messages. Raises UserError if one was made for another model.
    """
    part = denoiser_part(network)
    weights = {}
    for number, adapter in enumerate(adapters):
        found, name = read(adapter.path, adapter.flag, kind, part), f"lora_{number}"
        if found.count(part):
            add_to_denoiser(network, found, name, adapter.flag, model)
            weights[name] = adapter.weight
        elif not any(key.startswith("text_encoder") for key in found.state):
            raise _wrong_model(adapter.flag, model, "nothing in it is for this model's denoiser")
    if weights:
        activate(network, weights)
        if network.dtype == torch.float32:  # in half precision the sum would lose what small matrices add
            for layer in tuner_layers(network):
                layer.merge(adapter_names=[name for name in weights if name in layer.scaling])


def separate(network: nn.Module) -> None:
    """Takes adapters out of the weights again that `put_on_denoiser` added them to, which spared a third of the time: now others may join them."""
    for layer in tuner_layers(network):
        if layer.merged:
            layer.unmerge()


def add_to_denoiser(network: nn.Module, weights: Weights, name: str, flag: str, model: str) -> None:
    """One adapter more, by this name; `activate` makes it count. Raises UserError if it was made for another model."""
    from guidance.weights import quiet

    part = denoiser_part(network)
    try:
        with quiet(), one_more(), torch.random.fork_rng([]):
            network.load_lora_adapter(
                weights.state, prefix=part, network_alphas=weights.alphas, adapter_name=name, metadata=weights.config
            )
    except Exception as error:  # diffusers and peft answer in many ways to names and shapes that do not fit
        raise _wrong_model(flag, model, _first_line(error)) from None
    _check_all_used(network, weights, part, name, flag, model)


def put_on_text_encoders(pipe: Any, adapters: tuple[Adapter, ...], kind: str, parts: tuple[str, ...]) -> None:
    """The adapters' parts for a pipeline's text encoders, likewise. Raises UserError if one was made for another model."""
    from guidance.weights import quiet

    weights: dict[str, dict[str, float]] = {part: {} for part in parts}
    for number, adapter in enumerate(adapters):
        found, name = read(adapter.path, adapter.flag, kind), f"lora_{number}"
        for part in parts:
            encoder = getattr(pipe, part)
            if encoder is None or not found.count(part):
                continue
            model = type(encoder).__name__
            try:
                with quiet(), one_more(), torch.random.fork_rng([]):
                    pipe.load_lora_into_text_encoder(
                        found.state, found.alphas, encoder, part, adapter_name=name, metadata=found.config
                    )
            except Exception as error:
                raise _wrong_model(adapter.flag, model, _first_line(error)) from None
            _check_all_used(encoder, found, part, name, adapter.flag, model)
            weights[part][name] = adapter.weight
    for part, its in weights.items():
        if its:
            activate(getattr(pipe, part), its)


def activate(network: nn.Module, weights: dict[str, float]) -> None:
    """From now on these adapters count, by name, and no others; frozen, in the network's precision and on its device."""
    dtype, device = network.dtype, network.device
    separate(network)
    for layer in tuner_layers(network):
        mine = [name for name in weights if name in layer.scaling]
        for name in mine:
            layer.set_scale(name, weights[name])
        switch(layer, mine)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(device, dtype)
    network.requires_grad_(False).eval()


@contextmanager
def one_more() -> Iterator[None]:
    """Silences peft's warning that a network has an adapter already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        yield


def tuner_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of a network that have an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def switch(layer: nn.Module, names: list[str]) -> None:
    """Which adapters of a layer count. Two attributes: peft's own functions would walk over all parameters, 10 ms for a large UNet, and
    change which of them are trained."""
    layer._active_adapter = list(names)
    layer._disable_adapters = not names


def denoiser_part(network: nn.Module) -> str:
    """What diffusers calls this denoiser in a pipeline."""
    return "transformer" if "Transformer" in type(network).__name__ else "unet"


def text_fingerprint(adapters: tuple[Adapter, ...]) -> str:
    """A text that changes with what adapters do to what text encoders answer; "" if they do nothing."""
    words = {word: token for word, token in (learned_words(adapters) or {}).items() if word != token}
    digest, touched = hashlib.sha256(json.dumps(words).encode()), bool(words)
    for adapter in adapters:
        names = _tensors(adapter.path, adapter.flag)
        if any(name.removeprefix(_PEFT_PREFIX).startswith(("text_encoder", "lora_te", *_TEXT)) for name in names):
            touched = True
            digest.update(adapter.path.read_bytes())
            digest.update(f"{adapter.weight!r}".encode())
    return digest.hexdigest()[:16] if touched else ""


def _check_all_used(network: nn.Module, weights: Weights, part: str, name: str, flag: str, model: str) -> None:
    """An adapter of another model may find some layers by chance."""
    used = sum(f".{name}." in key and "lora_" in key for key, _ in network.named_parameters())
    if used < weights.count(part):
        raise _wrong_model(
            flag, model, f"{weights.count(part) - used} of its {weights.count(part)} matrices fit nowhere"
        )


def _wrong_model(flag: str, model: str, reason: str) -> UserError:
    return UserError(
        f"{flag}: was made for another model than {model}: {reason[:160]}; name the model it was trained on"
    )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().split()) or type(error).__name__
