"""Several opinions about one picture: a prompt's, a photograph's (Magic123, Qian et al. 2024), CLIP's; each with its own weight; or none."""

from typing import Any

import torch
from torch import Tensor


class Several:
    """To the trainer one guidance; `parts` by name, the first being the main one, whose prior decodes latents and whose numbers have plain names."""

    def __init__(self, parts: dict[str, Any]):
        self.parts = parts
        self.silent = not parts  # nobody judges: there are only known views to learn from

    def __call__(self, *seen: Any, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses, and what each says; `nonfinite` counts for all."""
        losses, told, broken = [], {}, []
        for name, part in self.parts.items():
            loss, log = part(*seen, **more)
            losses.append(loss)
            broken.append(log.get("nonfinite", torch.zeros_like(loss)))
            told |= {key if part is self.main else f"{name}_{key}": value for key, value in log.items()}
        return torch.stack(losses).sum(), {**told, "nonfinite": torch.stack(broken).sum()}

    @property
    def main(self) -> Any:
        return next(iter(self.parts.values()), None)

    @property
    def prior(self) -> Any:
        return self.main.prior

    @property
    def wants(self) -> tuple[str, ...]:
        """The hints that any of them looks at."""
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.wants))

    def debug_images(self, *seen: Any, **more: Any) -> Tensor:
        """What each of them sees and wants, one below the other, [B N, S, W, 3]."""
        rows = [part.debug_images(*seen, **more) for part in self.parts.values()]
        width = max(row.shape[2] for row in rows)
        size = max(row.shape[1] for row in rows)
        pad = torch.nn.functional.pad
        return torch.cat([pad(r, (0, 0, 0, width - r.shape[2], 0, size - r.shape[1]), value=1.0) for r in rows])

    def follow(self, opt: Any) -> None:
        """Prompt and strengths as these options say."""
        for part in self.parts.values():
            part.follow(opt)

    def state(self) -> dict[str, Any]:
        """What the future depends on, of each."""
        return {name: part.state() for name, part in self.parts.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for name, part in self.parts.items():
            if name in state:
                part.load_state(state[name])
