"""DreamBooth: teaches a prior what one subject looks like, from a few photographs and a word that stands for it (Ruiz et al. 2023).

The denoising loss of the photographs under "a sks dog" plus, for prior preservation, that of the model's own pictures of "a dog" (equation 2
there). What is learnt is a low-rank adapter of the denoiser (LoRA, Hu et al. 2021), a few megabytes; on request of the text encoder too, or
the denoiser's own weights. Snapshots on the way serve DreamBooth3D: `partial` still knows the class from all sides, `full` knows the subject.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from errors import UserError, say
from files import atomic, make_folder
from guidance.adapters import RECORD, WEIGHTS, find_file, read, record_of
from guidance.lora import ATTENTION, CONVOLUTIONS, from_epsilon
from guidance.prior import Prior
from guidance.text import TextEncoder

KINDS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline")
# Where a UNet attends in its middle alone, or pools the text into its time embedding, more than attention has to learn.
MORE = (*CONVOLUTIONS, "time_emb_proj", "pool.q_proj", "pool.k_proj", "pool.v_proj", "add_embedding.proj")
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
CHECKPOINT = "training.pt"
_NAME = "subject"
_FORMAT = 1


@dataclass(frozen=True)
class Examples:
    """Pictures in [0, 1] and what each of them shows."""

    pictures: Float[Tensor, "N 3 k k"]
    texts: list[str]

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.texts):
            raise ValueError(f"{len(self.pictures)} pictures and {len(self.texts)} texts")


@dataclass(frozen=True)
class Recipe:
    """How to learn. Names and meanings as in diffusers' DreamBooth scripts; snapshots: name -> number of steps."""

    max_train_steps: int = 800
    snapshots: dict[str, int] = field(default_factory=lambda: {"partial": 150, "full": 800})
    learning_rate: float = 1e-4
    rank: int = 4
    lora_alpha: float = 0  # 0: the rank
    full: bool = False  # the denoiser's own weights instead of an adapter
    train_text_encoder: bool = False
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    prior_loss_weight: float = 1.0
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"  # of the computation, with `full`; an adapter's follows the prior's weights
    seed: int = 0
    checkpointing_steps: int = 100


def personalize(
    prior: Prior,
    encoder: TextEncoder,
    embed: Callable[[list[str]], Float[Tensor, "n L D"]],
    instance: Examples,
    of_class: Examples | None,
    recipe: Recipe,
    folder: Path,
    words: dict[str, str] | None = None,
    start: Path | None = None,
    tell: Callable[[int, str], None] = lambda done, text: None,
) -> dict[str, Path]:
    """Learns, and writes `folder`/NAME/pytorch_lora_weights.safetensors for each snapshot -> name -> folder.

    prior: fresh, without adapters; it is changed. encoder, embed: its text encoder, and embeddings that may come from a cache. of_class:
    pictures for prior preservation, None: without. words: those it learns and what stands for them (`adapters.Adapter`), noted in the
    files. start: an adapter to go on from. tell: called after each step with their number and a text.

    With `recipe.full` the snapshots are whole pipelines in diffusers' format. A run that was stopped goes on from its last checkpoint in
    `folder`, with the same result on a CPU; what is complete is not done again.

    Raises UserError if `folder` holds something that was learnt from other pictures, texts or settings.
    """
    key = _key(instance, of_class, recipe, start, prior.name)
    done = {name: folder / name for name in recipe.snapshots}
    there = {name: _key_of(path) for name, path in done.items()}
    if all(its == key for its in there.values()):
        return done
    for name, its in there.items():
        if its not in (None, key):
            raise _other(done[name])
    student = _Student(prior, encoder, embed, recipe, words, key, start)
    batches = _Batches(prior, student, instance, of_class, recipe)
    first = student.go_on(folder / CHECKPOINT, batches.generator)
    for step in range(first, recipe.max_train_steps):
        loss = student.step(batches)
        tell(step + 1, f"loss {loss:.4f}")
        for name, at in recipe.snapshots.items():
            if at == step + 1:
                student.write(done[name], step + 1)
        if (step + 1) % recipe.checkpointing_steps == 0 and step + 1 < recipe.max_train_steps:
            student.keep(folder / CHECKPOINT, step + 1, batches.generator)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return done


class _Batches:
    """Noisy latents to learn from, drawn with a generator of their own on the CPU: the same on every device."""

    def __init__(
        self, prior: Prior, student: "_Student", instance: Examples, of_class: Examples | None, recipe: Recipe
    ):
        self.prior, self.recipe = prior, recipe
        self.generator = torch.Generator().manual_seed(recipe.seed)
        sets = [instance] if of_class is None else [instance, of_class]
        self.sets = [(*posterior(prior, each.pictures), student.texts(each.texts)) for each in sets]

    def draw(self) -> tuple[Tensor, Tensor, list, Tensor, Tensor]:
        """(noisy latents, timesteps, the texts or their embeddings, the answer that is wanted, the weight of each sample)."""
        recipe, prior, rows = self.recipe, self.prior, []
        for (mean, spread, told), weight in zip(self.sets, (1.0, recipe.prior_loss_weight), strict=False):
            index = torch.randint(len(mean), (recipe.train_batch_size,), generator=self.generator)
            wobble = torch.randn(mean[index].shape, generator=self.generator)
            latents = mean[index] + spread[index] * wobble
            t = torch.randint(prior.num_timesteps, (len(index),), generator=self.generator)
            noise = torch.randn(latents.shape, generator=self.generator)
            weights = torch.full((len(index),), weight / len(index))
            rows.append((latents, t, noise, weights, [told[number] for number in index.tolist()]))
        latents, t, noise, weights = (
            torch.cat(column).to(prior.device) for column in list(zip(*rows, strict=True))[:4]
        )
        signal, sigma = (table[t][:, None, None, None] for table in (prior.signal, prior.sigma))
        wanted = from_epsilon(noise, latents, signal, sigma, prior.prediction_type)
        texts = [text for row in rows for text in row[4]]
        return signal * latents + sigma * noise, t, texts, wanted, weights


class _Student:
    """What learns: an adapter of the denoiser or its weights, and perhaps an adapter of the text encoder."""

    def __init__(
        self, prior, encoder, embed, recipe: Recipe, words: dict[str, str] | None, key: str, start: Path | None
    ):
        self.prior, self.encoder, self.embed, self.recipe = prior, encoder, embed, recipe
        self.words, self.key = words, key
        network = prior.denoiser
        if recipe.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.networks: dict[str, nn.Module] = {}
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(recipe.seed)
            if recipe.full:
                network.requires_grad_(True)
            else:
                network.add_adapter(_lora(recipe, _targets(network)), _NAME)
                self.networks["unet"] = network
            if recipe.train_text_encoder:
                text = encoder.open().text_encoder
                text.requires_grad_(False).add_adapter(_lora(recipe, list(TEXT_LAYERS)), _NAME)
                self.networks["text_encoder"] = text
        self.trained = {
            f"{part}.{name}": parameter
            for part, module in self.networks.items()
            for name, parameter in module.named_parameters()
            if f".{_NAME}." in name
        }
        if recipe.full:
            self.trained |= {f"unet.{name}": parameter for name, parameter in network.named_parameters()}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(prior.device, torch.float32)
        if start is not None:
            self._begin_from(start)
        parameters = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.adam_weight_decay)
        from diffusers.optimization import get_scheduler

        length = {"num_warmup_steps": recipe.lr_warmup_steps, "num_training_steps": recipe.max_train_steps}
        self.schedule = get_scheduler(recipe.lr_scheduler, self.optimizer, **length)

    def texts(self, texts: list[str]) -> list:
        """What `told` turns into embeddings: the embeddings themselves, unless the text encoder learns too. One text at a time: a batch
        of others would round differently."""
        if self.recipe.train_text_encoder:
            return texts
        known = {text: self.embed([text])[0].to(self.prior.device) for text in dict.fromkeys(texts)}
        return [known[text] for text in texts]

    def told(self, texts: list) -> Float[Tensor, "B L D"]:
        if self.recipe.train_text_encoder:
            return self.encoder.encode(self.encoder.open(), texts).float()
        return torch.stack(texts)

    @torch.enable_grad()
    def step(self, batches: _Batches) -> float:
        """One step of AdamW; the loss before it. A step whose gradient is not finite is not taken."""
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(self.recipe.gradient_accumulation_steps):
            noisy, t, texts, wanted, weights = batches.draw()
            with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.recipe.mixed_precision == "bf16"):
                output = self.prior.denoise(noisy, t, self.told(texts), {}).float()
            loss = weighted_loss(output, wanted, weights)
            scale = wanted[0].numel()  # gradients of about unit size survive in half precision
            (scale * loss).backward()
            total += loss.item() / self.recipe.gradient_accumulation_steps
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        torch._foreach_div_(gradients, scale * self.recipe.gradient_accumulation_steps)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.max_grad_norm)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        self.schedule.step()
        return total

    # -- files -----------------------------------------------------------------------------------------------------

    def write(self, folder: Path, steps: int) -> None:
        """A snapshot."""
        record = {"key": self.key, "words": self.words or {}, "steps": steps, "model": self.prior.name}
        if self.recipe.full:
            _write_pipeline(self.prior, self.encoder, folder, record)
            if not self.networks:
                return
        factor = (self.recipe.lora_alpha or self.recipe.rank) / self.recipe.rank
        state = {}
        for name, value in self.trained.items():
            if f".{_NAME}." in name:  # the strength goes into the matrices: then no reader has to be told of it
                value = value.detach() * (factor if "lora_B" in name else 1.0)
                state[name.replace(f".{_NAME}.", ".")] = value.cpu().contiguous()
        from safetensors.torch import save

        with atomic(folder / WEIGHTS) as beside:
            beside.write_bytes(save(state, {RECORD: json.dumps(record)}))  # one entry: several come in any order

    def keep(self, path: Path, step: int, generator: torch.Generator) -> None:
        """A checkpoint."""
        state = {
            "format": _FORMAT,
            "key": self.key,
            "step": step,
            "weights": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": generator.get_state(),
        }
        with atomic(path) as beside:
            torch.save(state, beside)

    def go_on(self, path: Path, generator: torch.Generator) -> int:
        """The step to go on from, with everything as it was then; 0 without a checkpoint."""
        if not path.is_file():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            known = state["format"] == _FORMAT
        except Exception:
            known = False
        if not known:
            say(f"{path}: a broken checkpoint; the personalisation begins anew")
            return 0
        if state["key"] != self.key:
            raise _other(path)
        for name, parameter in self.trained.items():
            parameter.data.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        return state["step"]

    def _begin_from(self, start: Path) -> None:
        """The matrices of an earlier adapter."""
        flag = f"--start {start}"
        file = find_file(Path(start), flag)
        state = read(file, flag, "StableDiffusionPipeline").state
        factor = (self.recipe.lora_alpha or self.recipe.rank) / self.recipe.rank
        for name, parameter in self.trained.items():
            plain = name.replace(f".{_NAME}.", ".")
            if plain not in state or state[plain].shape != parameter.shape:
                raise UserError(
                    f"{flag}: of another rank or another model ({plain}); give the --rank it was trained with"
                )
            parameter.data.copy_(state[plain] / (factor if "lora_B" in name else 1.0))


def weighted_loss(
    output: Float[Tensor, "B C h w"], wanted: Float[Tensor, "B C h w"], weights: Float[Tensor, "B"]
) -> Float[Tensor, ""]:
    """sum_i weight_i mean |output_i - wanted_i|^2; with 1 / b for each of b photographs and lambda / b for each of b class pictures it is
    DreamBooth's loss (Ruiz et al. 2023, equation 2)."""
    return (weights * (output - wanted).square().mean((1, 2, 3))).sum()


@torch.no_grad()
def posterior(
    prior: Prior, pictures: Float[Tensor, "N 3 k k"]
) -> tuple[Float[Tensor, "N C h w"], Float[Tensor, "N C h w"]]:
    """(mean, standard deviation) of each picture's latents as `Prior.encode` would draw them, on the CPU; one at a time, once: a
    training draws from them without the autoencoder. A deviation of 0 where the autoencoder has none."""
    means, spreads = [], []
    for picture in pictures[:, None].to(prior.device):
        if prior.autoencoder is None:
            mean, spread = 2 * picture - 1, torch.zeros_like(picture)
        else:
            encoded = prior.autoencoder.encode((2 * picture - 1).to(prior.autoencoder.dtype))
            drawn = getattr(encoded, "latent_dist", None)
            mean = ((encoded.latents if drawn is None else drawn.mean).float() - prior.shift) * prior.scaling
            spread = torch.zeros_like(mean) if drawn is None else drawn.std.float() * prior.scaling
        means.append(mean.cpu())
        spreads.append(spread.cpu())
    return torch.cat(means), torch.cat(spreads)


def _lora(recipe: Recipe, targets: list[str]) -> Any:
    from peft import LoraConfig

    alpha = recipe.lora_alpha or recipe.rank
    return LoraConfig(r=recipe.rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")


def _targets(network: nn.Module) -> list[str]:
    """The layers that learn, as full names: the attention's, as in diffusers' scripts; and `MORE` where those alone could do little."""
    names = [name for name, _ in network.named_modules()]
    attention = [name for name in names if name.endswith(ATTENTION)]
    middle = all(name.startswith("mid_block.") for name in attention)
    return attention + [name for name in names if name.endswith(MORE) and middle]


def _key(instance: Examples, of_class: Examples | None, recipe: Recipe, start: Path | None, model: str) -> str:
    """A text that changes with whatever the result depends on."""
    digest = hashlib.sha256(json.dumps([asdict(recipe) | {"checkpointing_steps": 0}, model]).encode())
    for each in (instance, of_class):
        if each is not None:
            digest.update(each.pictures.contiguous().numpy().tobytes())
            digest.update("\0".join(each.texts).encode())
    if start is not None:
        digest.update(find_file(Path(start), f"--start {start}").read_bytes())
    return digest.hexdigest()[:16]


def _key_of(folder: Path) -> str | None:
    """The key of the snapshot there, "" for a file of somebody else's, None if there is none."""
    for file in (folder / f"{RECORD}.json", folder / WEIGHTS):
        if file.is_file():
            record = json.loads(file.read_text()) if file.suffix == ".json" else record_of(file, str(file))
            return record.get("key", "")
    return None


def _other(path: Path) -> UserError:
    return UserError(
        f"--output_dir {path.parent}: {path.name} is of other pictures, texts or settings; choose another folder, or start over with "
        "--ckpt scratch"
    )


def _write_pipeline(prior: Prior, encoder: TextEncoder, folder: Path, record: dict[str, Any]) -> None:
    """The whole model with the denoiser as it is now."""
    from guidance.weights import load_pipeline, quiet

    pipe, _ = load_pipeline(encoder.kind, encoder.source, torch.float32, unet=prior.denoiser)
    make_folder(folder)
    with quiet():
        pipe.save_pretrained(folder)
    with atomic(folder / f"{RECORD}.json") as beside:  # last: what has it is whole
        beside.write_text(json.dumps(record))
