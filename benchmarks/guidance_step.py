"""Where the time and the memory of a guidance step go: encode, predict, backward (the gradient through the encoder), for any prior.

    python benchmarks/guidance_step.py --prior sd1.5 --compare taesd vram_O channels_last bf16
    python benchmarks/guidance_step.py --prior tiny-sd --repeat 20
    python benchmarks/guidance_step.py --prior /path/to/a/diffusers/folder --vram_O

The published architectures are built with random weights, straight on the device: speed and memory do not depend on what the weights are.
`predict` is one question of classifier-free guidance: two samples for every picture. `--compare` measures the same step again with one more
switch each, in the same run; the ratios are what to look at. Each measurement has a process of its own, so that no memory is counted twice:
one for encode and backward, which share a graph, one for predict.

Seconds are the median of --repeat after a first call that warms up (and compiles, and counts the operations); with one CPU thread they are
processor time, in which other work on the machine does not show. Peak memory is, on a GPU, all that PyTorch held at once, weights
included; on a CPU, how far the process grew beyond its weights.
"""

import argparse
import ctypes
import gc
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.architectures import ARCHITECTURES, random_network  # noqa: E402
from errors import UserError  # noqa: E402

PLAIN = {
    "vram_O": False, "attention_slicing": False, "vae_slicing": False, "vae_tiling": False, "channels_last": False, "xformers": False,
    "compile": False, "taesd": False, "taesd_key": None, "tomesd": 0.0, "offload": "none", "precision": "auto",
}  # fmt: skip
VARIANTS = {
    **{name: {name: True} for name, value in PLAIN.items() if value is False},
    **{name: {"precision": name} for name in ("fp32", "fp16", "bf16")},
    **{f"offload_{how}": {"offload": how} for how in ("model", "sequential")},
    "tomesd": {"tomesd": 0.5},
}

EMBEDDED = {"tiny-sd": "tiny-sd", "tiny-if": "tiny-if"}  # by their folders' names


# -- one measurement ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What a process is to measure."""

    prior: str
    batch: int
    size: int | None
    device: str
    threads: int
    repeat: int
    options: dict[str, Any] = field(default_factory=lambda: dict(PLAIN))


def build(case: Case):
    """-> the prior, as the options want it."""
    from guidance.memory import apply, precision, tiny_autoencoder

    opt = SimpleNamespace(**case.options, fp16=False, origins={})
    dtype = precision(opt, case.device)
    if case.prior in ARCHITECTURES:
        prior = _from_architecture(case, opt, dtype)
    else:
        from guidance.priors import load_prior

        prior = load_prior(_folder(case.prior), case.device, dtype)
        if opt.taesd:
            tiny_autoencoder(opt, prior)
    apply(prior, opt)
    return prior


def _from_architecture(case: Case, opt: SimpleNamespace, dtype: torch.dtype):
    import diffusers

    plan, autoencoder, where = ARCHITECTURES[case.prior], None, (case.device, dtype)
    config = dict(plan.denoiser)
    if case.size:
        config["sample_size"] = case.size // (8 if plan.autoencoder else 1)
    denoiser = random_network(getattr(diffusers, plan.network), config, *where)
    if plan.autoencoder and opt.taesd:
        channels = plan.autoencoder.get("latent_channels", 4)
        autoencoder = random_network(diffusers.AutoencoderTiny, {"latent_channels": channels}, *where)
    elif plan.autoencoder:
        overflows = (
            case.prior == "sdxl" and dtype == torch.float16
        )  # as its prior: half precision is too narrow for this one
        autoencoder = random_network(
            diffusers.AutoencoderKL, plan.autoencoder, case.device, torch.float32 if overflows else dtype
        )
    elif opt.taesd:
        raise UserError("--taesd: this model works on pixels and has no autoencoder; leave it out")
    sigma = torch.linspace(0.05, 0.99, 1000)
    signal = 1 - sigma if plan.prediction == "flow_prediction" else (1 - sigma**2).sqrt()
    return plan.prior(denoiser, autoencoder, signal, sigma, plan.prediction, case.device)


def _folder(name: str):
    from guidance.weights import Source, read_json

    folder = ROOT / "toybox" / "models" / EMBEDDED[name] if name in EMBEDDED else Path(name).expanduser()
    if not (folder / "model_index.json").is_file():
        known = ", ".join([*EMBEDDED, *ARCHITECTURES])
        raise UserError(f"--prior {name}: not a diffusers folder, and none of {known}")
    kind = read_json(folder / "model_index.json")["_class_name"]
    return Source(str(folder), True, folder.name, f"--prior {name}", (), kind)


def embedding_shape(prior, case: Case) -> tuple[int, int]:
    """[rows, width] of what the denoiser is told; a pooled vector is one row more."""
    if case.prior in ARCHITECTURES:
        return ARCHITECTURES[case.prior].embedding
    config = prior.denoiser.config
    joint = config.get("joint_attention_dim")
    width = joint or config.get("encoder_hid_dim") or config.cross_attention_dim
    return 77 + (joint is not None or config.get("addition_embed_type") == "text_time"), width


class Memory:
    """The highest amount of memory since `reset`, in bytes; None where it cannot be told."""

    def __init__(self, device: str):
        self.device = device
        self.start = 0 if device == "cuda" else _status("VmRSS") or 0

    def reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        highest = _status("VmHWM")
        return None if highest is None else max(highest - self.start, 0)


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _tidy() -> None:
    """Gives freed memory back to the system, so that it can be seen when it is taken again."""
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)


def measure(case: Case, part: str) -> dict[str, Any]:
    """part "picture": encode and backward; "predict": predict -> {name: (seconds, bytes, FLOP or None)}, and facts under "".

    Runs in a process of its own.
    """
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    prior = build(case)
    networks = {"denoiser": prior.denoiser, "encoder": getattr(prior.autoencoder, "encoder", None)}
    counted = {
        name: sum(p.numel() for p in network.parameters()) for name, network in networks.items() if network is not None
    }
    generator = torch.Generator(prior.device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=prior.device)

    both, size = 2 * case.batch, prior.latent_size
    noisy, embedding = noise(both, prior.latent_channels, size, size), noise(both, *embedding_shape(prior, case))
    t = torch.full((both,), prior.num_timesteps // 2, device=prior.device)
    image = noise(case.batch, 3, prior.image_size, prior.image_size).sigmoid().requires_grad_()
    gradient = noise(case.batch, prior.latent_channels, size, size)
    state: dict[str, torch.Tensor] = {}

    def encode() -> torch.Tensor:
        state["latents"] = prior.encode(image, generator)
        return state["latents"].detach()

    def backward() -> torch.Tensor:
        return torch.autograd.grad(state.pop("latents"), image, gradient)[0]

    def predict() -> torch.Tensor:
        return prior.predict(noisy, t, embedding, _hints(both, prior))

    steps = {"predict": predict} if part == "predict" else {"encode": encode, "backward": backward}
    started = time.perf_counter()
    operations = {name: _first_call(step, name, case) for name, step in steps.items()}
    first = time.perf_counter() - started
    _tidy()
    memory, found, calls = Memory(case.device), {}, {name: [] for name in steps}
    for _ in range(case.repeat):
        for name, step in steps.items():
            memory.reset()
            calls[name].append((_timed(step, case), memory.peak()))
    for name, several in calls.items():
        peaks = [peak for _, peak in several if peak is not None]
        found[name] = statistics.median(seconds for seconds, _ in several), max(peaks, default=None), operations[name]
    facts = {"parameters": counted, "first": first, "size": prior.image_size, "dtype": str(prior.dtype).split(".")[1]}
    return found | {"": facts}


def _first_call(step: Callable[[], torch.Tensor], name: str, case: Case) -> int | None:
    """-> floating-point operations (what is compiled cannot be counted). The result is checked. Not a call to measure: counting makes
    recomputed activations take more room."""
    counter = None if case.options["compile"] else _counter()
    with counter or nullcontext():
        result = step()
    if not torch.isfinite(result).all():
        raise ValueError(f"{name} gives numbers that are not finite")
    return counter and counter.get_total_flops()


def _counter():
    """Of floating-point operations, those of the CPU's fused attention included, which PyTorch's own counter passes over."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def forward(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *_, **__) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    operations = torch.ops.aten
    mapping = {
        operations._scaled_dot_product_flash_attention_for_cpu: forward,
        operations._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _timed(step: Callable[[], torch.Tensor], case: Case) -> float:
    wait = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    clock = time.process_time if (case.device, case.threads) == ("cpu", 1) else time.perf_counter
    wait()
    started = clock()
    step()
    wait()
    return clock() - started


def _hints(count: int, prior) -> dict[str, torch.Tensor]:
    """For priors that want to see more than the prompt."""
    size, device = prior.image_size, prior.device
    picture = torch.full((count, size, size, 3), 0.5, device=device)
    return {"c2w": torch.eye(4, device=device).expand(count, 4, 4), "picture": picture}


# -- the table ---------------------------------------------------------------------------------------------------------

HEAD = """| variant | part | seconds | share | peak memory, GB | TFLOP | TFLOP/s | time, relative | memory, relative |
|---|---|---:|---:|---:|---:|---:|---:|---:|"""


def in_own_process(case: Case, part: str) -> dict[str, Any]:
    """`measure` in a fresh process. Raises UserError with what the process says, or if it was killed."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, case, part).result()
    except BrokenProcessPool:
        raise UserError("the process was ended from outside, which usually means that memory ran out") from None
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory ran out") from None


def table_rows(name: str, found: dict[str, tuple], base: dict[str, tuple] | None) -> list[str]:
    """Rows of a variant; `base`: what its ratios refer to."""
    rows, total = [], sum(seconds for seconds, _, _ in found.values())
    largest = max((bytes_ or 0 for _, bytes_, _ in found.values()), default=0)
    sums = [operations for _, _, operations in found.values()]
    found = found | {"step": (total, largest or None, None if None in sums else sum(sums))}
    for part, (seconds, bytes_, operations) in found.items():
        cells = [name, part, f"{seconds:.3g}", f"{100 * seconds / total:.0f} %"]
        cells.append("" if bytes_ is None else f"{bytes_ / 1e9:.3g}")
        cells += ["", ""] if operations is None else [f"{operations / 1e12:.3g}", f"{operations / 1e12 / seconds:.3g}"]
        if base is None:
            cells += ["1", "1"]
        else:
            before = _with_step(base)[part]
            cells.append(f"{seconds / before[0]:.2f}")
            cells.append(f"{bytes_ / before[1]:.2f}" if bytes_ and before[1] else "")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _with_step(found: dict[str, tuple]) -> dict[str, tuple]:
    return found | {"step": (sum(row[0] for row in found.values()), max((row[1] or 0) for row in found.values()))}


def report(case: Case, compare: list[str], show: Callable[[str], None]) -> None:
    """Measures the case and its variants and shows a Markdown section as it grows."""
    typed = " ".join(
        f"--{name} {value}".removesuffix(" True") for name, value in case.options.items() if value != PLAIN[name]
    )
    base, notes = None, []
    for name in ["plain", *compare]:
        one = replace(case, options=case.options | VARIANTS.get(name, {}))
        try:
            halves = [in_own_process(one, part) for part in ("picture", "predict")]
        except UserError as problem:
            if base is None:
                raise
            notes.append(f"`{name}`: {problem}.")
            continue
        facts = halves[0][""]
        found = {part: halves[part == "predict"][part] for part in ("encode", "predict", "backward")}
        if base is None:
            where = torch.cuda.get_device_name() if case.device == "cuda" else f"{case.threads} thread(s) of a CPU"
            sizes = ", ".join(f"{part} {number / 1e6:.1f} M" for part, number in facts["parameters"].items())
            show(f"\n## {case.prior}{f', {typed}' if typed else ''}\n")
            show(
                f"{case.batch} picture(s) of {facts['size']} x {facts['size']} pixels, {facts['dtype']}; parameters: {sizes}. {where}, "
                f"{platform.machine()}, torch {torch.__version__}; median of {case.repeat}.\n"
            )
            show(HEAD)
        show("\n".join(table_rows(name, found, base)))
        if one.options["compile"]:
            notes.append(f"`{name}`: the first calls took {sum(half['']['first'] for half in halves):.0f} s.")
        base = base or found
    if notes:
        show("\n" + "\n".join(notes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*EMBEDDED, *ARCHITECTURES])
    parser.add_argument("--prior", default="tiny-sd", help=f"{names}, or a diffusers folder")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step")
    parser.add_argument("--size", type=int, help="pixels a side, instead of the model's own (published architectures)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeat", type=int, default=5, help="calls of which the median counts, after a first one")
    parser.add_argument(
        "--compare", nargs="*", default=[], choices=VARIANTS, help="the same step with one more switch each"
    )
    parser.add_argument("--output", type=Path, help="add the section to this file")
    for name, value in PLAIN.items():
        if value is False:
            parser.add_argument(f"--{name}", action="store_true", help="as in main.py")
        else:
            kind = float if value == 0 else str
            parser.add_argument(f"--{name}", type=kind, default=value, help="as in main.py")
    given = parser.parse_args()

    def show(text: str) -> None:
        print(text, flush=True)
        if given.output:
            with given.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    options = {name: getattr(given, name) for name in PLAIN}
    case = Case(given.prior, given.batch, given.size, given.device, given.threads, given.repeat, options)
    try:
        report(case, given.compare, show)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
