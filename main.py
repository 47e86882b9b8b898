#!/usr/bin/env python3
"""Text in, a 3-D model out: `main.py --text "a hamburger" --workspace trial -O --save_mesh`; `main.py --help` lists every flag."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent
INTERRUPTED = 130  # the exit status that a shell expects after Ctrl-C
MISTAKE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the flags say; returns the exit status. A user's mistake is one line on stderr and status 2, a bug keeps its traceback."""
    from errors import UserError

    try:
        from options import parse

        run(parse(argv))
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or (ROOT / package).exists() or (ROOT / f"{package}.py").exists():
            raise
        return _complain(
            f"the package {package} is not installed: run scripts/setup.sh, then start me with .venv/bin/python"
        )
    return 0


def run(opt) -> None:
    """Train if that is asked for, then show the scene: video or six views, mesh, report."""
    from errors import say
    from files import claimed

    check_workspace(opt.workspace)
    for line in opt.changes.splitlines():
        say(line)
    training = not (opt.test or opt.six_views)
    try:
        with claimed(Path(opt.workspace)) if training else nullcontext():
            trainer = build(opt)
            if training:
                trainer.train()
            trainer.test()
            if opt.save_mesh:
                trainer.export_mesh()
            trainer.report()
    except (MemoryError, RuntimeError) as error:
        raise _explained(error, opt) from None


def build(opt):
    """The trainer with its scene and, unless only results are wanted, its guidance."""
    import torch

    from errors import UserError
    from nerf import build_scene
    from nerf.trainer import Trainer

    device = choose_device(opt.device)
    torch.manual_seed(
        opt.seed
    )  # the weights that a scene starts from; later random numbers have generators of their own
    scene = build_scene(opt, device=device, model=_folder_of_latents(opt))
    guidance = None
    if not (opt.test or opt.six_views):
        from guidance import build_guidance

        guidance = build_guidance(opt, device)
        if "original" in guidance.wants:
            raise UserError(
                f"--hf_key {opt.hf_key}: this model edits pictures, and a new scene has none; try it on a picture with "
                "scripts/playground2d.py --image FILE"
            )
        if opt.latent:
            from nerf.latent import decode_with

            if guidance.prior.latent_channels != scene.channels:
                raise UserError(
                    f"--latent: needs a model with {scene.channels} latent channels, this one has {guidance.prior.latent_channels}; leave it out"
                )
            decode_with(scene, guidance.prior)
    return Trainer(opt, scene, guidance, device)


def _folder_of_latents(opt) -> Path | None:
    """For `--latent`: where the prior lies, if on this disk; there may be a map from its latents to colours. A finished run has its own."""
    if not opt.latent or opt.test or opt.six_views:
        return None
    from guidance.weights import resolve

    source = resolve(opt)
    return Path(source.path_or_id) if source.local else None


def choose_device(name: str):
    """The torch device for `--device auto|cpu|cuda`; UserError if there is no GPU to take."""
    import torch

    from errors import UserError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        build = "no GPU answers" if torch.version.cuda else "this torch is a CPU build"
        raise UserError(f"--device cuda: {build}; leave the flag out, or run scripts/setup.sh on a machine with a GPU")
    return torch.device(name)


def check_workspace(workspace: str) -> None:
    """Look, before anything slow, whether the workspace can be written; nothing is created yet."""
    from errors import UserError

    folder = Path(workspace).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--workspace {workspace}: {existing} is a file, not a folder; choose another --workspace")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workspace {workspace}: {existing} cannot be written; choose another --workspace")


def _explained(error: Exception, opt) -> Exception:
    """Out of memory as a user's line that names the flags that help, the best first; every other error as it is."""
    from errors import UserError

    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not full and "can't allocate memory" not in str(error):
        return error
    flags = [] if opt.vram_O else ["--vram_O"]
    flags += [] if opt.offload == "sequential" else ["--offload sequential"]
    flags += [] if opt.taesd or opt.IF or (opt.sd_version == "embedded" and not opt.hf_key) else ["--taesd"]
    flags += [] if opt.fp16 else ["--fp16"]
    flags += ["--batch_size 1"] if opt.batch_size > 1 else []
    flags += ["smaller --w and --h", "less --max_steps", "less --max_ray_batch", "smaller --W and --H"]
    flags += ["less --mcubes_resolution"] if opt.save_mesh else []
    return UserError(f"out of memory: try, in this order, {', '.join(flags)}, less --log2_hashmap_size")


def _complain(text: str) -> int:
    print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
