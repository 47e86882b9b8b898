"""The switches that save memory or time: each is in force, the result stays what it was, and what cannot be had is said in one line.

torch.compile is tested with stand-ins for its back end: the real one takes minutes of a CPU.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tiny_models import autoencoder_of, build_folder

from errors import UserError
from flags import GROUPS
from guidance import memory
from guidance.memory import apply, precision, tiny_autoencoder
from guidance.priors import load_prior
from guidance.visits import Visit, visit_as_a_whole, visit_by_layer
from guidance.weights import resolve

WIDTHS = {"xl-eps": 48, "sd3": 48, "if": 24}  # of an embedding's rows


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """`load(kind, dtype)`: a fresh prior from a tiny folder, written when it is first asked for."""
    root = tmp_path_factory.mktemp("memory")

    def fresh(kind="eps-kl", dtype=torch.float32, device="cpu"):
        folder = root / kind
        if kind == "if":
            prior = small_if()
        else:
            if not folder.exists():
                build_folder(folder, kind)
            prior = load_prior(resolve(SimpleNamespace(hf_key=str(folder), IF=False)), device, dtype)
        prior.kind = kind
        return prior

    return fresh


def small_if():
    """DeepFloyd's own kinds of blocks, which tiny-if does not have."""
    from diffusers import UNet2DConditionModel

    from benchmarks.architectures import deepfloyd, random_network
    from guidance.deepfloyd_if import DeepFloydIF

    few = {"layers_per_block": 1, "sample_size": 16, "block_out_channels": (32, 64), "attention_head_dim": 8}
    text = {"cross_attention_dim": 64, "encoder_hid_dim": 24, "addition_embed_type_num_heads": 4}
    large = deepfloyd(32)
    down, up = large["down_block_types"][:2], large["up_block_types"][-2:]
    config = large | few | text | {"down_block_types": down, "up_block_types": up}
    denoiser = random_network(UNet2DConditionModel, config, "cpu", torch.float32)
    sigma = torch.linspace(0.05, 0.99, 1000)
    return DeepFloydIF(denoiser, None, (1 - sigma**2).sqrt(), sigma, "epsilon", "cpu")


@pytest.fixture
def said(monkeypatch):
    """The lines that the user is told."""
    lines = []
    monkeypatch.setattr(memory, "say", lines.append)
    return lines


def noise(prior, seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(prior.device)


def predict(prior, count=4):
    size = prior.latent_size
    noisy = noise(prior, 1, count, prior.latent_channels, size, size)
    t = torch.tensor([3, 400, 700, 990], device=prior.device)[:count]
    return prior.predict(noisy, t, noise(prior, 2, count, 17, WIDTHS.get(prior.kind, 16)))


def step(prior):
    """What a step asks of a prior: latents of two pictures, the noise in four, and the pictures' gradient."""
    image = noise(prior, 3, 2, 3, prior.image_size, prior.image_size).sigmoid().requires_grad_()
    latents = prior.encode(image, torch.Generator(prior.device).manual_seed(4))
    eps = predict(prior)
    (gradient,) = torch.autograd.grad(latents, image, noise(prior, 5, *latents.shape))
    return latents.detach(), eps, gradient


def assert_same(prior, plain, tolerance=1e-5):
    for one, other in zip(step(prior), step(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())


def sizes_seen(network, *at):
    """A list to which every call of the network adds the size of its first argument, at these dimensions."""
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[i] for i in at)))
    return seen


def refusal(act, *arguments):
    with pytest.raises(UserError) as caught:
        act(*arguments)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_flag_does_something():
    elsewhere = {"vram_O", "precision", "taesd", "taesd_key"}
    group = {flag.name for flag in GROUPS["Memory and speed of the prior"]}
    assert {measure.flag for measure in memory.MEASURES if measure.flag} == group - elsewhere


def test_nothing_happens_unasked(load, options, said):
    prior = load()
    assert apply(prior, options()) == {}
    assert prior.max_batch == 0 and not prior.autoencoder.use_slicing and not said


@pytest.mark.parametrize("kind", ("eps-kl", "v-tiny", "xl-eps", "sd3", "if"))
@pytest.mark.parametrize("switch", ("--vram_O", "--channels_last", "--vae_slicing", "--attention_slicing"))
def test_the_result_stays_the_same(switch, kind, load, options):
    prior = load(kind)
    if (kind, switch) in (("if", "--vae_slicing"), ("sd3", "--attention_slicing")):
        assert refusal(apply, prior, options(switch)).startswith(f"{switch}: ")
        return
    apply(prior, options(switch))
    assert_same(prior, load(kind))


def test_vram_O_takes_all_that_can_be_taken_and_says_so(load, options, said):
    prior = load()
    answers = apply(prior, options("--vram_O"))
    assert [name for name, problem in answers.items() if problem] == ["offload"]
    assert said == [
        "--vram_O: split batches, checkpoint encoder, slice autoencoder, channels last",
        "--vram_O: no offload: there is no GPU to relieve",
    ]
    calls, pictures = sizes_seen(prior.denoiser, 0), sizes_seen(prior.autoencoder.encoder, 0)
    step(prior)
    assert calls == [(1,)] * 4 and pictures == [(1,)] * 2
    for network in (prior.denoiser, prior.autoencoder.encoder):
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    apply(load("if"), options("--vram_O"))
    assert "--vram_O: no slice autoencoder: there is no autoencoder" in said


def saved(prior):
    """How many numbers autograd keeps of an encoded picture."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        prior.encode(torch.rand(2, 3, 32, 32, requires_grad=True))
    return sum(sizes)


@pytest.mark.parametrize("switch", ("--vram_O", "--vae_slicing", "--vae_tiling"))
def test_the_encoder_s_activations_are_not_kept(switch, load, options):
    plain, saving = load(), load()
    apply(saving, options(switch))
    assert saved(saving) < 0.7 * saved(plain)


def test_attention_goes_head_by_head(load, options, monkeypatch):
    from diffusers.models.attention_processor import Attention

    prior, scores, whole = load(), [], Attention.get_attention_scores
    apply(prior, options("--attention_slicing"))
    monkeypatch.setattr(
        Attention, "get_attention_scores", lambda self, q, *rest: (scores.append(len(q)), whole(self, q, *rest))[1]
    )
    predict(prior)
    assert scores and set(scores) == {1}


def test_large_pictures_go_through_the_encoder_in_tiles(load, options):
    prior = load()
    apply(prior, options("--vae_tiling"))
    tiles = sizes_seen(prior.autoencoder.encoder, 2, 3)
    latents, _, gradient = step(prior)
    assert len(tiles) == 9 and max(tiles) == (16, 16)
    plain = step(load())
    assert latents.shape == plain[0].shape and not torch.allclose(latents, plain[0], atol=1e-3)
    assert torch.isfinite(gradient).all() and (gradient.abs() > 0).float().mean() > 0.95
    picture = prior.decode(latents)
    assert picture.shape == (2, 3, 32, 32) and torch.isfinite(picture).all()
    assert "tiny autoencoder" in refusal(apply, load("eps-tiny"), options("--vae_tiling"))


@pytest.mark.parametrize("kind", ("eps-kl", "xl-eps"))
def test_merged_tokens_are_fewer(kind, load, options):
    plain, prior = load(kind), load(kind)
    apply(prior, options("--tomesd", 0.5))
    tokens = []
    for name, module in prior.denoiser.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    before = torch.get_rng_state()
    merged = predict(prior)
    assert set(tokens) == {8}  # of 4 x 4
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(merged, predict(prior))
    assert not torch.allclose(merged, predict(plain), atol=1e-3)
    prior.max_batch = 1  # how the samples are spread over calls makes no difference
    torch.testing.assert_close(predict(prior), merged, rtol=1e-4, atol=1e-4)


def test_no_merged_tokens_is_the_plain_network(load):
    prior = load()
    assert memory.merge_tokens(prior, SimpleNamespace(tomesd=0.0)) == ""
    assert type(prior.denoiser.mid_block.attentions[0].transformer_blocks[0]).__name__ == "ToMeBlock"
    assert_same(prior, load())


@pytest.mark.parametrize("kind", ("sd3", "if"))
def test_tokens_of_other_networks_are_not_merged(kind, load, options):
    text = refusal(apply, load(kind), options("--tomesd", 0.5))
    assert text.startswith("--tomesd 0.5: ") and type(load(kind).denoiser).__name__ in text


def test_a_missing_package_is_named(load, options, monkeypatch):
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    assert "--xformers: the package is not installed" in refusal(apply, load(), options("--xformers"))
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: object())
    assert "--xformers: the package works on a GPU alone" in refusal(apply, load(), options("--xformers"))
    assert "exclude each other" in refusal(apply, load(), options("--xformers", "--attention_slicing"))
    monkeypatch.setitem(sys.modules, "tomesd", None)
    assert "needs the package tomesd" in refusal(apply, load(), options("--tomesd", 0.3))


# -- offload -----------------------------------------------------------------------------------------------------------


def at_home(visits):
    return [all(p.data_ptr() == home.data_ptr() for p, home in visit.homes) for visit in visits]


@pytest.mark.parametrize("kind", ("eps-kl", "sd3", "if"))
def test_layers_visit_one_by_one(kind, load):
    prior = load(kind)
    visits = visit_by_layer([prior.denoiser], prior.device)
    owned = {id(p) for visit in visits for p, _ in visit.homes}
    assert owned == {id(p) for p in prior.denoiser.parameters()} and all(at_home(visits))
    here = []
    for module in prior.denoiser.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, args: here.append(at_home(visits).count(False)))
    assert_same(prior, load(kind), tolerance=0)
    assert 1 in here and max(here) <= 2 and all(at_home(visits))  # 2: a module with weights and parts of its own


def test_a_network_visits_as_a_whole_and_leaves_before_the_encoder_s_work(load):
    prior = load()
    (visit,) = visit_as_a_whole([prior.denoiser], prior)
    assert_same(prior, load(), tolerance=0)
    predict(prior)
    weight = prior.denoiser.conv_in.weight
    assert at_home([visit]) == [False]
    where = weight.data_ptr()
    predict(prior)
    assert weight.data_ptr() == where  # it was not fetched again
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    encoding = sizes_seen(prior.autoencoder.encoder, 0)
    prior.autoencoder.encoder.register_forward_pre_hook(lambda module, args: encoding.append(at_home([visit])))
    latents = prior.encode(image)
    assert encoding == [(1,), [True]]
    predict(prior)
    states = [at_home([visit])]
    image.register_hook(lambda gradient: states.append(at_home([visit])))
    torch.autograd.grad(latents, image, torch.ones_like(latents))
    assert states == [[False], [True]]


def test_what_is_trained_stays_and_has_its_backward_pass(load):
    from peft import LoraConfig

    gradients = []
    for visiting in (False, True):
        prior = load()
        torch.manual_seed(0)
        prior.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        trained = [p for p in prior.denoiser.parameters() if p.requires_grad]
        places = [p.data_ptr() for p in trained]
        if visiting:
            visit_as_a_whole([prior.denoiser], prior)
        prior.encode(torch.rand(1, 3, 32, 32))
        noisy, text = noise(prior, 1, 2, 4, 8, 8), noise(prior, 2, 2, 17, 16)
        prior.denoise(noisy, torch.tensor([10, 900]), text, {}).square().sum().backward()
        assert [p.data_ptr() for p in trained] == places
        gradients.append([p.grad for p in trained])
    assert gradients[0] and all(map(torch.equal, *gradients))


@pytest.mark.parametrize("how", ("model", "sequential"))
def test_offload_needs_a_gpu_and_nothing_that_forbids_it(how, load, options):
    prior = load()
    assert refusal(apply, prior, options("--offload", how)) == f"--offload {how}: there is no GPU to relieve"
    prior.device = torch.device("cuda")  # what is refused is refused before anything moves
    assert "leave out --compile" in refusal(apply, prior, options("--offload", how, "--compile"))
    prior.denoiser.conv_in.requires_grad_(True)
    assert "--offload model" in refusal(apply, prior, options("--offload", "sequential"))


def test_a_visit_changes_nothing_it_does_not_own():
    layer = torch.nn.Linear(2, 2).requires_grad_(False)
    layer.bias.requires_grad_(True)
    bias, visit = layer.bias.data_ptr(), Visit(layer.parameters(), torch.device("cpu"))
    before = layer.weight.clone()
    visit.come()
    visit.come()
    assert torch.equal(layer.weight, before) and layer.bias.data_ptr() == bias
    visit.leave()
    assert torch.equal(layer.weight, before) and at_home([visit]) == [True]


@pytest.mark.cuda
@pytest.mark.parametrize("how", ("model", "sequential"))
def test_an_offloaded_denoiser_on_a_gpu(how, load, options):
    plain, prior = load(device="cuda"), load(device="cuda")
    apply(prior, options("--offload", how))
    assert_same(prior, plain, tolerance=1e-4)
    prior.encode(torch.rand(1, 3, 32, 32, device="cuda"))
    assert {p.device.type for p in prior.denoiser.parameters()} == {"cpu"}
    assert {p.device.type for p in prior.autoencoder.parameters()} == {"cuda"}


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("switches", ((), ("--vae_slicing", "--tomesd", 0.5)))
def test_compiled_networks_are_whole_graphs_and_say_the_same(switches, load, options):
    plain, prior, graphs = load(), load(), []
    for one in (plain, prior):
        apply(one, options(*switches))

    def backend(graph, inputs):
        """Like a CUDA graph, returns the same memory every time."""
        graphs.append(graph)
        results = []

        def run(*arguments):
            new = graph(*arguments)
            if any(x.requires_grad for x in new):
                return new
            results.append(new) if not results else [old.copy_(x) for old, x in zip(results[0], new, strict=True)]
            return results[0]

        return run

    assert memory.compile_networks(prior, options(), backend) == ""
    prior.max_batch = 1  # four calls, whose results must all survive
    assert_same(prior, plain)
    first = len(graphs)
    assert first >= 2 and "conv2d" in graphs[0].code and "conv2d" in graphs[-1].code
    step(prior)
    assert len(graphs) == first
    assert prior.denoiser.config.in_channels == 4


def test_compiling_needs_a_compiler(load, options, monkeypatch):
    monkeypatch.setattr(memory.shutil, "which", lambda name: None)
    assert "--compile: it needs a C++ compiler" in refusal(apply, load(), options("--compile"))
    monkeypatch.setattr(memory.shutil, "which", lambda name: name)
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    prior = load()
    prior.device = torch.device("cuda")
    assert "triton" in refusal(apply, prior, options("--compile"))


# -- precision ---------------------------------------------------------------------------------------------------------


def test_precision_follows_the_flags_and_the_device(options, monkeypatch, said):
    single, half = torch.float32, torch.float16
    for device, typed, wanted in (
        ("cpu", (), single), ("cpu", ("-O",), single), ("cpu", ("--precision", "fp32"), single),
        ("cuda", (), half), ("cuda", ("-O",), half), ("cuda", ("--no_fp16",), single),
        ("cuda", ("-O", "--no_fp16"), single), ("cuda", ("--precision", "fp32"), single),
        ("cuda", ("--no_fp16", "--precision", "fp16"), half),
    ):  # fmt: skip
        assert precision(options(*typed), torch.device(device)) == wanted, (device, typed)
    assert refusal(precision, options("--precision", "fp16"), "cpu").startswith("--precision fp16: a CPU")
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert precision(options("--precision", "bf16"), "cpu") == torch.bfloat16
        assert len(said) == (0 if able else 1)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able: able)
        if able:
            assert precision(options("--precision", "bf16"), "cuda") == torch.bfloat16
        else:
            assert "use fp16" in refusal(precision, options("--precision", "bf16"), "cuda")


@pytest.mark.parametrize("switch", (None, "--vram_O"))
def test_bfloat16_says_about_the_same(switch, load, options):
    prior = load(dtype=torch.bfloat16)
    if switch:
        apply(prior, options(switch))
    for one, other in zip(step(prior), step(load()), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.05 * other.norm()


# -- the tiny autoencoder ----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_folder(tmp_path):
    autoencoder_of("tiny").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_tiny_autoencoder_takes_the_place_of_the_large_one(dtype, load, options, tiny_folder):
    from diffusers import AutoencoderTiny

    prior = load(dtype=dtype)
    tiny_autoencoder(options("--taesd", "--taesd_key", tiny_folder), prior)
    own = AutoencoderTiny.from_pretrained(tiny_folder, dtype=dtype)
    image = torch.rand(2, 3, 32, 32)
    expected = own.encode((2 * image - 1).to(dtype)).latents.float() * 0.84
    torch.testing.assert_close(prior.encode(image), expected)
    assert prior.autoencoder.dtype == dtype and not any(p.requires_grad for p in prior.autoencoder.parameters())
    apply(prior, options("--vram_O"))
    step(prior)


def test_the_published_one_is_found_by_the_latents(load, options, monkeypatch, tmp_path, tiny_folder):
    from diffusers import AutoencoderKL, AutoencoderTiny

    asked, tiny = [], AutoencoderTiny.from_pretrained(tiny_folder)
    monkeypatch.setattr("guidance.parts.read_part", lambda kind, source, dtype: (asked.append(source), tiny)[1])

    def with_factor(factor):
        prior = load()
        autoencoder_of("kl", scaling_factor=factor).save_pretrained(tmp_path / str(factor))
        prior.use_autoencoder(AutoencoderKL.from_pretrained(tmp_path / str(factor)))
        return prior

    for factor, name in ((0.18215, "madebyollin/taesd"), (0.13025, "madebyollin/taesdxl")):
        prior = with_factor(factor)
        tiny_autoencoder(options("--taesd"), prior)
        assert (asked[-1].path_or_id, asked[-1].flag) == (name, "--taesd") and prior.scaling == 0.84
    assert "--taesd: none is published" in refusal(tiny_autoencoder, options("--taesd"), with_factor(0.5))


def test_an_autoencoder_that_does_not_fit_is_refused(load, options, tmp_path, tiny_folder):
    from diffusers import AutoencoderTiny

    assert "works on pixels" in refusal(tiny_autoencoder, options("--taesd"), load("if"))
    assert "tiny one already" in refusal(tiny_autoencoder, options("--taesd"), load("eps-tiny"))
    tiny_autoencoder(options("--taesd", "--taesd_key", tiny_folder), load("eps-tiny"))
    blocks = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    counts = {"num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3}
    wrong = {"channels": AutoencoderTiny(latent_channels=16, **blocks, **counts), "factor": AutoencoderTiny()}
    for name, network in (wrong | {"kind": autoencoder_of("kl")}).items():
        network.save_pretrained(tmp_path / name)
        prior = load()
        before = prior.autoencoder
        text = refusal(tiny_autoencoder, options("--taesd", "--taesd_key", tmp_path / name), prior)
        assert text.startswith(f"--taesd_key {tmp_path / name}: ") and prior.autoencoder is before
        assert {"channels": "16 channels", "factor": "8 times", "kind": "AutoencoderTiny"}[name] in text
    assert "--taesd: madebyollin/taesd cannot be read" in refusal(tiny_autoencoder, options("--taesd"), load())
    assert "no such folder" in refusal(tiny_autoencoder, options("--taesd", "--taesd_key", "./nowhere"), load())


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/guidance_step.py, measuring in this process: `benchmark(name, *compared) -> lines`."""
    from benchmarks import guidance_step

    def run(prior, *compared, **more):
        case = guidance_step.Case(prior, batch=1, size=more.get("size"), device="cpu", threads=1, repeat=1)
        lines = []
        guidance_step.report(case, list(compared), lambda text: lines.extend(text.splitlines()))
        return lines

    monkeypatch.setattr(guidance_step, "in_own_process", guidance_step.measure)
    return run


def test_the_benchmark_tells_parts_and_ratios(benchmark):
    lines = benchmark("tiny-sd", "bf16", "offload_model")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[:2] for row in table[1:5]] == [["plain", part] for part in ("encode", "predict", "backward", "step")]
    assert [row[0] for row in table[5:]] == ["bf16"] * 4
    seconds = [float(row[2]) for row in table[1:5]]
    assert min(seconds) > 0 and sum(seconds[:3]) == pytest.approx(seconds[3], rel=0.01)
    operations = [float(row[5]) for row in table[1:5]]
    assert min(operations) > 0 and sum(operations[:3]) == pytest.approx(operations[3], rel=0.01)
    assert [row[5] for row in table[5:]] == [row[5] for row in table[1:5]]  # the same work
    assert lines[-1] == "`offload_model`: --offload model: there is no GPU to relieve."


def test_the_benchmark_s_architectures_are_the_published_ones():
    import diffusers

    from benchmarks.architectures import ARCHITECTURES, random_network

    millions = {"sd1.5": 860, "sd2.1": 866, "sdxl": 2567, "sd3": 2028, "if-m": 372, "if-l": 935, "if-xl": 4305}
    assert set(millions) == set(ARCHITECTURES)
    for name, plan in ARCHITECTURES.items():
        with torch.device("meta"):
            network = getattr(diffusers, plan.network)(**plan.denoiser)
        assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions[name]
    small = random_network(diffusers.AutoencoderTiny, {}, "cpu", torch.float32)
    assert sum(p.numel() for p in small.parameters()) == 2_445_063
    assert 0.05 < small.encode(torch.rand(1, 3, 64, 64)).latents.std() < 50


@pytest.mark.slow
def test_the_benchmark_is_a_program(main):
    import subprocess

    command = [sys.executable, ROOT / "benchmarks" / "guidance_step.py", "--threads", "1", "--repeat", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "| plain | step |" in done.stdout
    wrong = subprocess.run([*command, "--prior", "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "error: --prior nowhere" in wrong.stderr and "Traceback" not in wrong.stderr
