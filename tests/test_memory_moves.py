"""Weights that come and go, and networks that are compiled."""

import pytest
import torch
from switches import assert_same, loader, noise, predict, refusal, sizes_seen, step

from guidance import memory
from guidance.memory import apply
from guidance.visits import Visit, visit_as_a_whole, visit_by_layer


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    return loader(tmp_path_factory.mktemp("memory"))


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


def test_vram_O_leaves_compiled_networks_where_they_are(load, options):
    prior = load()
    prior.device = torch.device("cuda")
    assert "cannot move" in memory.offload(prior, options("--vram_O", "--compile"))


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


def test_a_break_in_the_graph_is_an_error(load, options):
    prior = load()
    memory.compile_networks(prior, options(), lambda graph, inputs: graph)
    prior.denoiser.time_proj.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        predict(prior)


def test_compiling_needs_a_compiler(load, options, monkeypatch):
    monkeypatch.setattr(memory.shutil, "which", lambda name: None)
    assert "--compile: it needs a C++ compiler" in refusal(apply, load(), options("--compile"))
    monkeypatch.setattr(memory.shutil, "which", lambda name: name)
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    prior = load()
    prior.device = torch.device("cuda")
    assert "triton" in refusal(apply, prior, options("--compile"))
