"""The original checkpoints' names, in small: they become a folder that the prior reads, and other files are told apart in one line."""

import importlib.util
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from guidance.zero123 import View, ViewBank, Zero123
from guidance.zero123_reference import embed_picture, read_view_model, view_source

specification = importlib.util.spec_from_file_location("convert_zero123", ROOT / "scripts" / "convert_zero123.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

WIDTHS, CONTEXT, CLIP, SIZE = (32, 64), 24, (64, 8, 2), 32  # channels; CLIP: width, patch, layers; pixels


class Names(dict):
    """Random weights under the names that latent-diffusion gives them."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def put(self, name, *shape, bias=True):
        self[f"{name}.weight"] = 0.1 * torch.randn(*shape, generator=self.generator) + float(len(shape) == 1)
        if bias:
            self[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=self.generator)

    def conv(self, name, into, out, kernel=3):
        self.put(name, out, into, kernel, kernel)

    def residual(self, name, into, out):
        self.put(f"{name}.in_layers.0", into)
        self.conv(f"{name}.in_layers.2", into, out)
        self.put(f"{name}.emb_layers.1", out, 4 * WIDTHS[0])
        self.put(f"{name}.out_layers.0", out)
        self.conv(f"{name}.out_layers.3", out, out)
        if into != out:
            self.conv(f"{name}.skip_connection", into, out, 1)

    def attention(self, name, width):
        self.put(f"{name}.norm", width)
        self.conv(f"{name}.proj_in", width, width, 1)
        self.conv(f"{name}.proj_out", width, width, 1)
        block = f"{name}.transformer_blocks.0"
        for number, seen in (("attn1", width), ("attn2", CONTEXT)):
            self.put(f"{block}.{number}.to_q", width, width, bias=False)
            self.put(f"{block}.{number}.to_k", width, seen, bias=False)
            self.put(f"{block}.{number}.to_v", width, seen, bias=False)
            self.put(f"{block}.{number}.to_out.0", width, width)
        self.put(f"{block}.ff.net.0.proj", 8 * width, width)
        self.put(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            self.put(f"{block}.{norm}", width)

    def unet(self, start="model.diffusion_model."):
        first, last = WIDTHS
        self.put(f"{start}time_embed.0", 4 * first, first)
        self.put(f"{start}time_embed.2", 4 * first, 4 * first)
        self.conv(f"{start}input_blocks.0.0", 8, first)
        self.residual(f"{start}input_blocks.1.0", first, first)
        self.attention(f"{start}input_blocks.1.1", first)
        self.conv(f"{start}input_blocks.2.0.op", first, first)
        self.residual(f"{start}input_blocks.3.0", first, last)
        self.attention(f"{start}input_blocks.3.1", last)
        self.residual(f"{start}middle_block.0", last, last)
        self.attention(f"{start}middle_block.1", last)
        self.residual(f"{start}middle_block.2", last, last)
        for i, (into, out) in enumerate(
            ((2 * last, last), (last + first, last), (last + first, first), (2 * first, first))
        ):
            self.residual(f"{start}output_blocks.{i}.0", into, out)
            self.attention(f"{start}output_blocks.{i}.1", out)
        self.conv(f"{start}output_blocks.1.2.conv", last, last)
        self.put(f"{start}out.0", first)
        self.conv(f"{start}out.2", first, 4)

    def vae(self, start="first_stage_model."):
        def residual(name, into, out):
            for number, (a, b) in enumerate(((into, out), (out, out)), 1):
                self.put(f"{name}.norm{number}", a)
                self.conv(f"{name}.conv{number}", a, b)
            if into != out:
                self.conv(f"{name}.nin_shortcut", into, out, 1)

        def middle(name, width):
            residual(f"{name}.block_1", width, width)
            self.put(f"{name}.attn_1.norm", width)
            for part in ("q", "k", "v", "proj_out"):
                self.conv(f"{name}.attn_1.{part}", width, width, 1)
            residual(f"{name}.block_2", width, width)

        first, last = WIDTHS
        self.conv(f"{start}encoder.conv_in", 3, first)
        residual(f"{start}encoder.down.0.block.0", first, first)
        self.conv(f"{start}encoder.down.0.downsample.conv", first, first)
        residual(f"{start}encoder.down.1.block.0", first, last)
        middle(f"{start}encoder.mid", last)
        self.put(f"{start}encoder.norm_out", last)
        self.conv(f"{start}encoder.conv_out", last, 8)
        self.conv(f"{start}quant_conv", 8, 8, 1)
        self.conv(f"{start}post_quant_conv", 4, 4, 1)
        self.conv(f"{start}decoder.conv_in", 4, last)
        middle(f"{start}decoder.mid", last)
        for i, into, out in ((1, last, last), (0, last, first)):
            residual(f"{start}decoder.up.{i}.block.0", into, out)
            residual(f"{start}decoder.up.{i}.block.1", out, out)
        self.conv(f"{start}decoder.up.1.upsample.conv", last, last)
        self.put(f"{start}decoder.norm_out", first)
        self.conv(f"{start}decoder.conv_out", first, 3)

    def clip(self, start="cond_stage_model.model."):
        width, patch, layers = CLIP
        self.put(f"{start}visual.conv1", width, 3, patch, patch, bias=False)
        self[f"{start}visual.class_embedding"] = torch.randn(width, generator=self.generator)
        self[f"{start}visual.positional_embedding"] = torch.randn(
            1 + (SIZE // patch) ** 2, width, generator=self.generator
        )
        self[f"{start}visual.proj"] = torch.randn(width, CONTEXT, generator=self.generator) / 8
        for name in ("ln_pre", "ln_post"):
            self.put(f"{start}visual.{name}", width)
        for i in range(layers):
            block = f"{start}visual.transformer.resblocks.{i}"
            self[f"{block}.attn.in_proj_weight"] = torch.randn(3 * width, width, generator=self.generator) / 8
            self[f"{block}.attn.in_proj_bias"] = torch.randn(3 * width, generator=self.generator) / 8
            self.put(f"{block}.attn.out_proj", width, width)
            self.put(f"{block}.ln_1", width)
            self.put(f"{block}.ln_2", width)
            self.put(f"{block}.mlp.c_fc", 4 * width, width)
            self.put(f"{block}.mlp.c_proj", width, 4 * width)
        self.put(f"{start}ln_final", width)  # left over from the half that reads: to be ignored


@pytest.fixture(scope="module")
def original():
    """What `state_dict` holds in the published files, in small."""
    names = Names()
    names.unet()
    names.vae()
    names.clip()
    names.put("cc_projection", CONTEXT, CONTEXT + 4)
    names["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return dict(names)


@pytest.fixture
def convert(tmp_path, original):
    """`convert(state)` -> (status, folder): the script's own main, of a checkpoint with this state."""

    def run(state=original, *flags, wrap=lambda state: {"state_dict": state, "global_step": 7}):
        torch.save(wrap(state), tmp_path / "model.ckpt")
        arguments = [tmp_path / "model.ckpt", "--out", tmp_path / "folder", "--size", SIZE, *flags]
        return script.main([str(word) for word in arguments]), tmp_path / "folder"

    return run


def seen_by_openai(state, pixels):
    """OpenAI's image tower, written out."""
    width, patch, layers = CLIP

    def value(name):
        return state[f"cond_stage_model.model.visual.{name}"]

    def norm(x, name):
        return F.layer_norm(x, (width,), value(f"{name}.weight"), value(f"{name}.bias"))

    x = F.conv2d(pixels, value("conv1.weight"), stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([value("class_embedding").expand(len(x), 1, -1), x], 1) + value("positional_embedding")
    x = norm(x, "ln_pre")
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        q, k, v = F.linear(
            norm(x, f"{block}.ln_1"), value(f"{block}.attn.in_proj_weight"), value(f"{block}.attn.in_proj_bias")
        ).chunk(3, -1)
        x = x + F.linear(
            F.scaled_dot_product_attention(q, k, v), value(f"{block}.attn.out_proj.weight"), value(f"{block}.attn.out_proj.bias")
        )  # fmt: skip
        hidden = F.linear(norm(x, f"{block}.ln_2"), value(f"{block}.mlp.c_fc.weight"), value(f"{block}.mlp.c_fc.bias"))
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + F.linear(hidden, value(f"{block}.mlp.c_proj.weight"), value(f"{block}.mlp.c_proj.bias"))
    return norm(x[:, 0], "ln_post") @ value("proj")


def test_it_becomes_a_folder_that_the_prior_reads(convert, original):
    status, folder = convert()
    assert status == 0
    parts = read_view_model(view_source(str(folder)), "cpu")
    prior = Zero123.of(parts, "cpu")
    assert (prior.latent_size, prior.latent_channels, prior.image_size, parts.pose) == (16, 4, SIZE, "radius")
    assert prior.scaling == 0.18215 and prior.prediction_type == "epsilon"
    torch.testing.assert_close(prior.sigma.square(), 1 - torch.cumprod(1 - original["betas"], 0), atol=1e-5, rtol=1e-4)

    picture = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = seen_by_openai(original, (picture - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(embed_picture(parts, picture, SIZE), expected, atol=1e-4, rtol=1e-4)

    unet, vae = parts.unet.state_dict(), parts.vae.state_dict()
    for ours, theirs in (
        (unet["conv_in.weight"], "model.diffusion_model.input_blocks.0.0.weight"),
        (unet["up_blocks.1.resnets.1.conv2.weight"], "model.diffusion_model.output_blocks.3.0.out_layers.3.weight"),
        (unet["mid_block.attentions.0.proj_in.weight"], "model.diffusion_model.middle_block.1.proj_in.weight"),
        (vae["encoder.down_blocks.1.resnets.0.conv1.weight"], "first_stage_model.encoder.down.1.block.0.conv1.weight"),
        (vae["decoder.up_blocks.0.resnets.1.conv2.weight"], "first_stage_model.decoder.up.1.block.1.conv2.weight"),
        (parts.projection[0].weight, "cc_projection.weight"),
    ):  # fmt: skip
        assert torch.equal(ours, original[theirs])

    bank = ViewBank(parts, prior, [View(picture[0], 80.0, 0.0, 3.0)])
    told = bank.condition(torch.tensor([80.0]), torch.tensor([90.0])).text
    eps = prior.predict(torch.randn(1, 4, 16, 16), torch.tensor([500]), told)
    assert eps.shape == (1, 4, 16, 16) and torch.isfinite(eps).all()


def test_stable_zero123_is_told_the_polar_angle_and_half_precision_is_kept(convert, original):
    status, folder = convert(original, "--stable", "--dtype", "fp16")
    assert status == 0 and read_view_model(view_source(str(folder)), "cpu").pose == "polar"
    from safetensors.torch import load_file

    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16


def test_the_averaged_weights_are_taken_where_there_are_any(convert, original):
    start = "model.diffusion_model."
    plain = {name[len(start) :]: value for name, value in original.items() if name.startswith(start)}
    averages = {"model_ema.diffusion_model" + name.replace(".", ""): value + 1 for name, value in plain.items()}
    status, folder = convert({**original, **averages})
    unet = read_view_model(view_source(str(folder)), "cpu").unet
    assert status == 0
    torch.testing.assert_close(unet.conv_in.weight, original[f"{start}input_blocks.0.0.weight"] + 1)


def test_what_a_trainer_left_beside_the_weights_is_neither_run_nor_needed(convert, monkeypatch):
    """Old checkpoints have a callback's class as a key, and settings of a package that need not be installed."""
    ran = []

    class ModelCheckpoint:
        def __setstate__(self, state):
            ran.append(state)

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = (
        "pytorch_lightning.callbacks.model_checkpoint",
        "ModelCheckpoint",
    )
    home = types.ModuleType(ModelCheckpoint.__module__)
    home.ModelCheckpoint = ModelCheckpoint
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, ModelCheckpoint.__module__, home)
    callback = ModelCheckpoint()
    callback.best = 3
    beside = {"callbacks": {ModelCheckpoint: {"best": 3}}, "hyper_parameters": callback}
    status, folder = convert(wrap=lambda state: {**beside, "state_dict": state})
    assert status == 0 and (folder / "model_index.json").is_file() and not ran


class Dangerous:
    def __reduce__(self):
        return print, ("this must not run",)


def refused(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == "", captured
    return captured.err


def test_code_in_a_checkpoint_is_refused_in_one_line(convert, capsys):
    status, folder = convert(wrap=lambda state: {"state_dict": state, "extra": Dangerous()})
    line = refused(capsys)
    assert status == 2 and "cannot be read safely" in line and "print" in line and not folder.exists()


@pytest.mark.parametrize(
    ("lost", "said"),
    (
        ("cc_projection.weight", "projection of the pose"),
        ("cond_stage_model.model.visual.conv1.weight", "image encoder"),
        ("model.diffusion_model.middle_block.1.proj_in.weight", "denoiser"),
        ("first_stage_model.encoder.mid.block_1.conv1.weight", "autoencoder"),
        ("cond_stage_model.model.visual.ln_post.bias", "image encoder"),
    ),
)
def test_what_is_missing_is_named_in_one_line(lost, said, convert, original, capsys):
    status, folder = convert({name: value for name, value in original.items() if name != lost})
    line = refused(capsys)
    assert status == 2 and said in line and not (folder / "model_index.json").exists()


def test_other_files_are_told_apart_in_one_line(tmp_path, capsys):
    def said(name, content):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        assert script.main([str(path), "--out", str(tmp_path / "folder")]) == 2
        return refused(capsys)

    assert "no such file" in said("nothing.ckpt", None)
    assert "cannot be read" in said("text.ckpt", b"hello")
    assert "cannot be read" in said("empty.ckpt", b"")
    assert "cannot be read" in said("text.safetensors", b"hello")
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "not an original Zero-1-to-3" in said("list.ckpt", None)


def test_nothing_is_overwritten_unless_asked_to(convert, original, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    status, folder = convert()
    assert status == 2 and "--force" in refused(capsys) and [path.name for path in folder.iterdir()] == ["mine.txt"]
    status, folder = convert(original, "--force")
    assert status == 0 and json.loads((folder / "model_index.json").read_text())["cc_projection"]
