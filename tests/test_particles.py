"""Particles: different from the start, trained one at a time at their own rhythm, saved, resumed and shown like a scene alone."""

import io
from types import SimpleNamespace

import pytest
import torch
from standins import BallGuidance, VoxelScene

import guidance
import main as program
from errors import UserError
from nerf import build_scene, results
from nerf.particles import Particles, each
from nerf.trainer import Trainer

QUICK = """--iters 12 --lr 0.2 --optim adam --num_steps 12 --upsample_steps 0 --background white --radius_range 3.2 3.2
    --fovy_range 30 30 --theta_range 60 100 --default_fovy 30 --latent_iter_ratio 0 --albedo_iter_ratio 1 --lambda_orient 0
    --lambda_entropy 0 --lambda_opacity 0 --lambda_center 0 --eval_interval 0 --ema_decay 0.9 --no_cuda_ray --bg_radius 0""".split()


@pytest.fixture(autouse=True)
def _in_the_tests_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trainer(options):
    """`trainer(3, "--iters", 5)`: a trainer of three particles (voxels; `real`: hash grids), in one workspace."""

    def build(count, *typed, real=False, guided=True):
        opt = options(*QUICK, "--particles", count, *typed)
        torch.manual_seed(0)
        voxels = [VoxelScene(opt) for _ in range(count)]
        scene = build_scene(opt) if real else Particles(voxels) if count > 1 else voxels[0]
        return Trainer(opt, scene, BallGuidance() if guided else None, "cpu")

    return build


def turns_of(run, order):
    """Let the particles have their turns in this order, instead of at random."""
    order = iter(order)

    def take_turn(generator):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randint", lambda *arguments, **named: torch.tensor(next(order)))
            return Particles.take_turn(run.scene, generator)

    run.scene.take_turn = take_turn


def copied(scene):
    return {name: value.detach().clone() for name, value in scene.state_dict().items()}


def differ(one, other):
    """Whether two files that are there have different bytes."""
    return one.read_bytes() != other.read_bytes()


def same(a, b):
    """Whether two nests of dicts, lists and tensors are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_one_particle_is_a_scene_as_ever(options):
    plain = build_scene(options())
    assert not isinstance(plain, Particles) and [(one is plain, name) for one, name in each(plain)] == [(True, "")]


def test_they_differ_from_the_start(options):
    opt = options("--particles", 3)
    torch.manual_seed(1)
    scene = build_scene(opt)
    torch.manual_seed(1)
    alone = build_scene(options())
    first, second, third = (dict(one.named_parameters()) for one in scene.scenes)
    assert same(first, dict(alone.named_parameters()))
    for other in (second, third):
        assert not torch.equal(first["encoder.embeddings"], other["encoder.embeddings"])
    assert not torch.equal(second["trunk.0.weight"], third["trunk.0.weight"])
    names = [name for _, name in each(scene)]
    assert names == ["", "particle_2", "particle_3"] and [one for one, _ in each(scene)] == list(scene.scenes)


def test_what_is_asked_of_it_is_asked_of_the_active_one(options):
    scene = build_scene(options("--particles", 2, "--progressive_level"))
    x = torch.rand(5, 3) - 0.5
    for number in (0, 1):
        scene.active, one = number, scene.scenes[number]
        assert torch.equal(scene.density(x)["albedo"], one.density(x)["albedo"]) and scene.encoder is one.encoder
        assert scene.channels == 3 and scene.bound == one.bound and scene.background_network is one.background_network
    scene.set_progress(0.1)
    assert [one.max_level for one in scene.scenes] == [0.45, 0.45]
    groups = scene.parameter_groups(0.1)
    assert [group["name"] for group in groups] == [group["name"] for group in one.parameter_groups(0.1)]
    assert sum(len(group["params"]) for group in groups) == len(list(scene.parameters()))
    assert [group["lr"] for group in groups] == [group["lr"] for group in one.parameter_groups(0.1)]
    with pytest.raises(AttributeError, match="absent"):
        _ = scene.absent


def test_all_get_their_turn_and_the_count_is_saved():
    scene = Particles([torch.nn.Identity() for _ in range(3)])
    generator, elsewhere = torch.Generator().manual_seed(0), torch.get_rng_state()
    done = {number: [] for number in range(3)}
    for _ in range(300):
        turn = scene.take_turn(generator)
        done[scene.active].append(turn)
    assert all(turns == list(range(len(turns))) and 75 < len(turns) < 125 for turns in done.values())
    again = Particles([torch.nn.Identity() for _ in range(3)])
    again.load_state_dict(scene.state_dict())
    assert again.turns == scene.turns == [len(turns) for turns in done.values()]
    assert torch.equal(torch.get_rng_state(), elsewhere)  # the order follows from the generator alone


@pytest.mark.parametrize("optimiser", ["adam", "adan"])
def test_a_step_moves_the_active_one_alone(trainer, optimiser):
    run = trainer(3, "--optim", optimiser, "--lambda_tv", 1e-3, real=True)
    run._ready()
    seen = set()
    for _ in range(10):
        before = [copied(one) for one in run.scene.scenes]
        run._train_step()
        moved = [not same(copied(one), old) for one, old in zip(run.scene.scenes, before, strict=True)]
        assert moved == [number == run.scene.active for number in range(3)]
        seen.add(run.scene.active)
    assert seen == {0, 1, 2} and sum(run.scene.turns) == run.step == 10


def test_a_run_in_which_one_has_all_the_turns_is_the_run_of_that_scene_alone(trainer):
    flags = ("-O", "--cuda_ray", "--update_extra_interval", 3, "--albedo_iter_ratio", 0, "--lambda_tv", 1e-3)
    alone = trainer(1, *flags, "--ema_decay", 0.3, "--workspace", "alone", real=True)
    alone.train()
    run = trainer(2, *flags, "--ema_decay", 0.3**2, real=True)  # 0.3 a step: half of the steps are another's
    turns_of(run, [0] * 12)
    before = copied(run.scene.scenes[1])
    run.train()
    assert same(copied(run.scene.scenes[0]), copied(alone.scene)) and same(copied(run.scene.scenes[1]), before)
    mine = [average for name, average in run.average.state_dict()["average"].items() if name.startswith("scenes.0.")]
    assert all(torch.allclose(a, b) for a, b in zip(mine, alone.average.average, strict=True))
    assert run.metrics.history["loss/total"] == alone.metrics.history["loss/total"]


def test_occupancy_follows_each_ones_own_steps(trainer):
    run = trainer(2, "-O", "--cuda_ray", "--update_extra_interval", 2, real=True)
    turns_of(run, [0, 1, 1, 0, 1, 0, 0, 0])
    updates = []
    for number, one in enumerate(run.scene.scenes):

        def update(density, step, generator, number=number, inner=one.occupancy.update):
            updates.append((run.step, number, step))
            inner(density, step, generator)

        one.occupancy.update = update
    run._ready()
    for _ in range(8):
        run._train_step()
    assert updates == [(0, 0, 0), (1, 1, 0), (4, 1, 2), (5, 0, 2), (7, 0, 4)]
    assert all((one.mean_density > 0).all() for one in run.scene.scenes)


def test_resume_equals_never_having_stopped(trainer):
    flags = ("-O", "--cuda_ray", "--update_extra_interval", 2, "--lambda_tv", 1e-3)
    straight = trainer(2, *flags, "--workspace", "straight", real=True)
    straight.train()
    first = trainer(2, *flags, "--iters", 12, real=True)
    first._ready()
    for _ in range(5):
        first._train_step()
    first.save()
    second = trainer(2, *flags, real=True)
    second.train()
    a, b = straight.state(), second.state()
    a.pop("times"), b.pop("times")
    assert second.guidance.calls == 7 and same(a, b) and sum(second.scene.turns) == 12
    file = io.BytesIO()
    torch.save(b, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True)["scene"], b["scene"])


def test_another_number_of_particles_is_a_users_error(trainer):
    trainer(2, "--iters", 1, real=True).train()
    for count in (1, 3):
        with pytest.raises(UserError, match="does not fit these options"):
            trainer(count, "--iters", 2, real=True).train()


def test_every_one_is_shown(trainer, monkeypatch, capsys):
    monkeypatch.setattr(results, "MESH_VIEW_SIZE", 32)
    run = trainer(2, "--iters", 16, "--dataset_size_test", 2, "--save_mesh", "--mcubes_resolution", 24)
    run.train()
    run.test()
    meshes = run.export_mesh()
    run.report()
    folder = run.workspace
    kinds = ("rgb", "depth", "normal")
    videos, sheets = ({f"step_0000016_{kind}.{end}" for kind in kinds} for end in ("mp4", "png"))
    files = {"mesh.obj", "mesh.glb", "mesh.mtl", "albedo.png"}
    for place, names in (("results", videos), ("validation", sheets), ("mesh", files)):
        for particle in ("", "particle_2"):
            assert {path.name for path in (folder / place / particle).iterdir() if path.is_file()} == names
        assert all(
            differ(folder / place / name, folder / place / "particle_2" / name) for name in names if name != "mesh.mtl"
        )
    assert [path.relative_to(folder / "mesh").as_posix() for path in meshes] == [
        *("mesh.obj", "mesh.glb", "particle_2/mesh.obj", "particle_2/mesh.glb")
    ]
    assert {"mesh/iou", "particle_2/mesh/iou"} <= run.metrics.history.keys()
    assert "particles:" in capsys.readouterr().err

    shown = trainer(2, "--iters", 16, guided=False)
    shown.opt.__dict__["six_views"] = True
    assert len(shown.test()) == 36
    assert differ(*(folder / "results" / name / "step_0000016_front_rgb.png" for name in ("", "particle_2")))


def test_the_program_trains_two(options, monkeypatch):
    built, told = [], BallGuidance()
    told.prior = SimpleNamespace(wants=())
    monkeypatch.setattr(guidance, "build_guidance", lambda opt, device: told)
    inner = program.build
    monkeypatch.setattr(program, "build", lambda opt: built.append(inner(opt)) or built[-1])
    opt = options("--particles", 2, "--iters", 6, "--latent_iter_ratio", 0, "--albedo_iter_ratio", 1, "-O")
    program.run(opt)
    (run,) = built
    assert run.step == 6 and sum(run.scene.turns) == 6 and len(run.scene.scenes) == 2
    assert len(list((run.workspace / "results").rglob("*.mp4"))) == 6
    opt.save(run.workspace / "config.yaml")
    program.run(options("--test"))  # --particles comes from the folder
    assert isinstance(built[-1].scene, Particles) and built[-1].scene.turns == run.scene.turns
