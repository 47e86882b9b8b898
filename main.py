#!/usr/bin/env python3
"""Text in, a 3-D model out: `main.py --text "a hamburger" --workspace trial -O --save_mesh`; `main.py --help` lists every flag."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the flags say; returns the exit status (`errors.status_of`)."""
    from errors import status_of

    def work() -> None:
        from options import parse

        run(parse(argv))

    return status_of(work)


def run(opt) -> None:
    """Train if that is asked for, then show the scene: video or six views, mesh, report. With a viewer: whatever is done there."""
    from errors import UserError, leads, say
    from files import claimed

    check_workspace(opt.workspace)
    for line in opt.changes.splitlines():
        say(line)
    training = not (opt.test or opt.six_views)
    if training and opt.image_config:
        from nerf.photos import default_view

        opt = opt.changed(**{k: v for k, v in default_view(opt).items() if opt.origins[k] != "typed"})
    if opt.gui:
        from nerf.gui import need_display

        need_display()
    if opt.viewer:
        from nerf.viewer import need_server

        need_server(opt.viewer_host, opt.viewer_port)
    from ranks import launched, together

    if launched() and (not training or opt.gui or opt.viewer):
        raise UserError(
            "torchrun: several processes can only train together; leave out --test, --six_views, --gui, --viewer"
        )
    try:
        with claimed(Path(opt.workspace)) if training and leads() else nullcontext():
            with together():
                trainer = build(opt)
                if opt.gui or opt.viewer:
                    look(opt, trainer)
                    return
                if training:
                    trainer.train()
            if not leads():
                return
            trainer.test()
            if opt.save_mesh:
                trainer.export_mesh()
            trainer.report()
    except (MemoryError, RuntimeError) as error:
        raise _explained(error, opt) from None


def look(opt, trainer) -> None:
    """A viewer, until it is closed; it trains, saves and exports. A run that was trained then gets its report."""
    if opt.gui:
        from nerf.gui import show

        show(trainer)
    else:
        from nerf.viewer import serve

        serve(trainer, opt.viewer_host, opt.viewer_port)
    if trainer.guidance is not None:
        trainer.report()


def build(opt):
    """The trainer with its scene and, unless only results are wanted, its guidance."""
    import torch

    from devices import choose_device
    from errors import UserError
    from nerf import begun_again, build_scene
    from nerf.trainer import Trainer

    device = choose_device(opt.device)
    torch.manual_seed(
        opt.seed
    )  # the weights that a scene starts from; later random numbers have generators of their own
    scene = build_scene(opt, device=device, model=_folder_of_latents(opt))
    guidance = references = None
    if not (opt.test or opt.six_views):
        from nerf.photos import load_references

        references = load_references(opt)
        guidance = build_guidances(opt, device, references)
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
    anew = partial(begun_again, opt, device=device, model=_folder_of_latents(opt))
    return Trainer(opt, scene, guidance, device, anew, references)


def build_guidances(opt, device, references):
    """Who judges the pictures: the prior of the prompt, that of the photographs (`--lambda_zero123`), CLIP by the photographs
    (`--lambda_clip`), or several of them; or nobody."""
    parts = {}
    if opt.text is not None:
        from guidance import build_guidance

        parts["text"] = build_guidance(opt, device)
    if opt.lambda_zero123.max() > 0:
        from guidance.zero123 import build_view_guidance

        parts["zero123"] = build_view_guidance(opt, _known_views(references), device)
    if references is not None and opt.lambda_clip.max() > 0:
        from guidance.clip import build_picture_opinion
        from guidance.memory import precision

        reader = parts["text"].clip.clip if "text" in parts else None
        parts["picture"] = build_picture_opinion(opt, _known_views(references), device, precision(opt, device), reader)
    if len(parts) == 1:
        return next(iter(parts.values()))
    from guidance.several import Several

    return Several(parts)


def _known_views(references) -> list:
    """The photographs as priors are shown them."""
    import torch

    from guidance.zero123 import View

    c = references.cameras
    numbers = torch.stack([c.polar, c.azimuth, c.radius, references.weight], -1).tolist()
    masks = references.mask.permute(0, 3, 1, 2)
    return [View(references.picture(i), *row, masks[i]) for i, row in enumerate(numbers)]


def _folder_of_latents(opt) -> Path | None:
    """For `--latent`: where the prior lies, if on this disk; there may be a map from its latents to colours. A finished run has its own."""
    if not opt.latent or opt.test or opt.six_views:
        return None
    from guidance.weights import resolve

    source = resolve(opt)
    return Path(source.path_or_id) if source.local else None


def check_workspace(workspace: str) -> None:
    """Look, before anything slow, whether the workspace can be written; nothing is created yet."""
    from errors import UserError

    folder = Path(workspace).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
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


if __name__ == "__main__":
    sys.exit(main())
