"""What tests/test_ranks.py starts under torchrun: a training run whose every process keeps the scene that it ended with."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from main import build  # noqa: E402
from options import parse  # noqa: E402
from ranks import count, part, together  # noqa: E402


def train(argv: list[str]) -> None:
    opt = parse(argv)
    with together():
        trainer = build(opt)
        trainer.train()
        torch.save(
            {"scene": dict(trainer.scene.state_dict()), "processes": count()},
            Path(opt.workspace) / f"end_{part(1).start}.pt",
        )


if __name__ == "__main__":
    train(sys.argv[1:])
