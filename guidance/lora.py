"""What a prior would think if it had seen nothing but the scene: VSD's phi, a low-rank adaptation of the prior's own denoiser.

There is no second copy of the network: the adaptation is switched on while it is asked or trained and off otherwise, so that the frozen
predictions stay what they were, bit for bit. It knows the camera: a small network turns the 4 x 4 camera matrix into a vector that is
added to the denoiser's time embedding. See Wang et al. 2023, ProlificDreamer, section 3.3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from errors import UserError
from guidance.adapters import one_more, separate, switch, tuner_layers
from guidance.prior import Hints, Prior
from ranks import average_gradients, mine

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the linear layers of every attention
CONVOLUTIONS = ("conv1", "conv2")  # of every residual block
DROPPED = 0.1  # share of the training samples that are learnt without their camera
WARM_UP = 500  # steps over which the learning rate rises; ProlificDreamer's, for runs of 25 000
_NAME = "scene"


class Adaptation:
    """Low-rank matrices on the attentions of `prior.denoiser` (in a UNet that attends in its middle alone, on the convolutions too: else
    little could change) and a camera embedding, in float32 whatever the denoiser's precision; both begin with an effect of 0.

    A sample's camera is `hints["c2w"]`; without it (pictures that no camera took) there is no embedding.
    Attributes: `steps` taken, `trained` (every parameter, by name).
    """

    def __init__(
        self, prior: Prior, rank: int, lr: float, generator: torch.Generator | None = None, warm_up: int = WARM_UP
    ):
        """rank: of the matrices; lr: AdamW's, reached after `warm_up` steps; generator: source of timesteps, noise and dropped cameras, on
        the prior's device; the initial weights follow from its seed. Build it before the denoiser is compiled or offloaded.

        Raises UserError if the denoiser has no attention or no time embedding.
        """
        from peft import LoraConfig

        self.prior, self.network, self.generator = prior, prior.denoiser, generator
        self.lr, self.warm_up, self.steps = lr, warm_up, 0
        time, targets = _time_embedding(self.network), _targets(self.network)
        if time is None or not targets:
            raise UserError(
                "--distill vsd: this model's denoiser has no attention or no time embedding to adapt; use another --distill"
            )
        separate(self.network)
        before = {layer: list(layer.active_adapters) for layer in tuner_layers(self.network)}  # `--lora`: stays on
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian")
        with torch.random.fork_rng([]):  # nobody else's random numbers move
            if generator is not None:
                torch.default_generator.manual_seed(generator.initial_seed())
            with one_more():
                self.network.add_adapter(config, _NAME)
            width = time.timestep_embedder if hasattr(time, "timestep_embedder") else time
            self.camera = _camera_embedding(width.linear_2.out_features).to(prior.device)
        self.trained = {name: p for name, p in self.network.named_parameters() if f".{_NAME}." in name}
        for parameter in self.trained.values():
            parameter.data = parameter.data.to(prior.device, torch.float32)
        self.trained |= {f"camera.{name}": p for name, p in self.camera.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr, betas=(0.9, 0.999), weight_decay=0.01)
        self._embedding: Tensor | None = None  # what the hook adds: [samples of the call, width]
        time.register_forward_hook(self._add_camera)
        self._layers, self._others = tuner_layers(self.network), before
        self._switch(on=False)

    # -- asking ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        embedding: Float[Tensor, "B L D"],
        hints: Hints,
        camera: bool = True,
    ) -> Float[Tensor, "B C h w"]:
        """The adapted estimate of the noise, as `Prior.predict`; without `camera` its embedding is 0."""
        return self._predict(noisy, t, embedding, hints, torch.full((len(noisy),), float(camera), device=noisy.device))

    @torch.no_grad()
    def guided(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        embedding: Float[Tensor, "B L D"],
        hints: Hints,
        scale: float,
    ) -> Float[Tensor, "B C h w"]:
        """Classifier-free guidance of the camera: eps_0 + scale (eps_camera - eps_0) (Wang et al. 2024, ESD). A scale of 1 (VSD) or 0 asks
        once a sample, any other twice, in one call of the denoiser."""
        if scale in (0, 1):
            return self.predict(noisy, t, embedding, hints, camera=scale == 1)
        seen = torch.ones(2 * len(noisy), device=noisy.device)
        seen[: len(noisy)] = 0
        twice = {name: torch.cat([hint] * 2) for name, hint in self._known(hints).items()}
        eps = self._predict(*(torch.cat([rows] * 2) for rows in (noisy, t, embedding)), twice, seen)
        without, with_camera = eps.chunk(2)
        return without + scale * (with_camera - without)

    def _predict(
        self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints, seen: Float[Tensor, "B"]
    ) -> Float[Tensor, "B C h w"]:
        eps = []
        with self._switched_on():
            for piece in self.prior.pieces(len(noisy)):
                some = {name: hint[piece] for name, hint in self._known(hints).items()}
                self._embedding = self._camera_of(some, seen[piece])
                eps.append(self.prior.predict(noisy[piece], t[piece], embedding[piece], some))
        return torch.cat(eps)

    # -- learning --------------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def learn(
        self, latents: Float[Tensor, "B C h w"], embedding: Float[Tensor, "B L D"], hints: Hints
    ) -> Float[Tensor, ""]:
        """One step of AdamW on the denoising loss of the scene's own latents: mean |f(z_t', t') - f*|^2, where f is what the network
        predicts (noise, velocity or clean latents) and t' is uniform over all timesteps (ProlificDreamer, equation 8).

        Returns the loss before the step, without a gradient. A step whose gradient is not finite is not taken.
        """
        prior, latents = self.prior, latents.detach().float()
        groups, device = len(latents) // prior.view_group, latents.device
        draw = {"generator": self.generator, "device": device}
        t = mine(lambda count: torch.randint(prior.num_timesteps, (count,), **draw), groups)
        seen = (mine(lambda count: torch.rand(count, **draw), groups) >= DROPPED).float()
        t, seen = (drawn.repeat_interleave(prior.view_group) for drawn in (t, seen))
        noise = mine(lambda count: torch.randn(count, *latents.shape[1:], **draw), len(latents))
        signal, sigma = (table[t][:, None, None, None] for table in (prior.signal, prior.sigma))
        noisy = signal * latents + sigma * noise
        wanted = from_epsilon(noise, latents, signal, sigma, prior.prediction_type)
        total = torch.zeros((), device=device)
        self.optimizer.zero_grad(set_to_none=True)
        with self._switched_on():
            for piece in self.prior.pieces(len(latents)):
                some = {name: hint[piece] for name, hint in self._known(hints).items()}
                self._embedding = self._camera_of(some, seen[piece])
                output = prior.denoise(noisy[piece], t[piece], embedding[piece], some).float()
                error = (output - wanted[piece]).square().sum()
                error.backward()  # of the sum: gradients of about unit size survive in half precision
                total += error.detach()
        self._step(latents.numel())
        return total / latents.numel()

    def _step(self, count: int) -> None:
        """AdamW with the gradients of a sum over `count` numbers."""
        average_gradients(list(self.trained.values()))
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        torch._foreach_div_(gradients, count)
        self.steps += 1
        if bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(self.steps / max(self.warm_up, 1), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    # -- how it works ----------------------------------------------------------------------------------------------

    @contextmanager
    def _switched_on(self) -> Iterator[None]:
        """Inside the block the denoiser is the adapted one; if it has been compiled, that stays with the frozen one. No autocast."""
        frozen, self.prior.denoiser = self.prior.denoiser, self.network
        self._switch(on=True)
        try:
            with torch.autocast(self.prior.device.type, enabled=False):
                yield
        finally:
            self._switch(on=False)
            self._embedding, self.prior.denoiser = None, frozen

    def _switch(self, on: bool) -> None:
        for layer in self._layers:
            others = self._others.get(layer, [])
            switch(layer, [*others, _NAME] if on and _NAME in layer.scaling else others)

    def _known(self, hints: Hints) -> Hints:
        """The hints that are looked at."""
        return {name: hint for name, hint in hints.items() if name == "c2w" or name in self.prior.wants}

    def _camera_of(self, hints: Hints, seen: Float[Tensor, "B"]) -> Float[Tensor, "B W"] | None:
        """The embedding of each camera, 0 where it is not to be `seen`."""
        if "c2w" not in hints:
            return None
        return self.camera(hints["c2w"].float().flatten(1)) * seen[:, None]

    def _add_camera(self, module: nn.Module, arguments: Any, output: Float[Tensor, "B W"]) -> Tensor | None:
        return None if self._embedding is None else output + self._embedding.to(output.dtype)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Weights, optimiser, number of steps and random numbers, for the checkpoint."""
        return {
            "weights": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state. Raises UserError if that was of another rank or of another model."""
        weights = state["weights"]
        for name in sorted(weights.keys() | self.trained.keys()):
            here, there = (table[name].shape if name in table else None for table in (self.trained, weights))
            if here != there:
                raise UserError(
                    f"--lora_rank: the checkpoint's adaptation is of another rank or another model ({name}); give the --lora_rank "
                    "and the model it was trained with, or --ckpt scratch"
                )
        for name, parameter in self.trained.items():
            parameter.data.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        if self.generator is not None and state["generator"] is not None:
            try:
                self.generator.set_state(state["generator"].cpu())
            except RuntimeError:  # from another kind of device: its random numbers cannot go on here
                pass


def from_epsilon(
    noise: Float[Tensor, "B C h w"],
    clean: Float[Tensor, "B C h w"],
    signal: Float[Tensor, "B 1 1 1"],
    sigma: Float[Tensor, "B 1 1 1"],
    kind: str,
) -> Float[Tensor, "B C h w"]:
    """What a network of this kind (see `prior.to_epsilon`) should answer about signal clean + sigma noise."""
    if kind == "v_prediction":
        return signal * noise - sigma * clean
    if kind == "flow_prediction":
        return noise - clean
    return clean if kind == "sample" else noise


def _time_embedding(network: nn.Module) -> nn.Module | None:
    """Where a diffusers denoiser turns the timestep into a vector: of its UNets, or of its transformers of the SD3 family."""
    for name in ("time_embedding", "time_text_embed"):
        if hasattr(network, name):
            return getattr(network, name)
    return None


def _targets(network: nn.Module) -> list[str]:
    """The layers to adapt, as full names."""
    names = [name for name, _ in network.named_modules()]
    attention = [name for name in names if name.endswith(ATTENTION)]
    middle = all(name.startswith("mid_block.") for name in attention)
    return attention + [name for name in names if name.endswith(CONVOLUTIONS) and attention and middle]


def _camera_embedding(width: int) -> nn.Sequential:
    """16 numbers of a camera matrix -> a vector like the time embedding; 0 to begin with."""
    last = nn.Linear(width, width)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(16, width), nn.SiLU(), last)
