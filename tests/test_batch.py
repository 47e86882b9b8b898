"""Many prompts on Ray: against a stand-in for main.py, killed in every way, and once for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from PIL import Image

sys.path.insert(0, str(ROOT / "scripts"))

import batch  # noqa: E402
from batch_ray import in_use  # noqa: E402

from errors import UserError  # noqa: E402
from nerf.batch_page import Entry, entries, finished, write_index  # noqa: E402

# Does what main.py would do to its workspace; the prompt says what goes wrong in the first attempt.
STAND_IN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path

prompt = next(word.removeprefix("--text=") for word in sys.argv if word.startswith("--text="))
workspace = Path(sys.argv[sys.argv.index("--workspace") + 1])
lock = open(workspace / ".lock", "a")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("error: another run is at work there")
    sys.exit(2)
attempts = workspace / "attempts"
first = not attempts.exists()
seen = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RAY_AUTH_TOKEN")}
with open(attempts, "a") as file:
    file.write(json.dumps([os.getpid(), sys.argv[1:], seen]) + chr(10))

def save(*_):
    time.sleep(4 if prompt == "orphan" else 0.5)
    (workspace / "saved").touch()
    os._exit(143)

signal.signal(signal.SIGTERM, save)
if prompt == "mistaken":
    print("error: --sd_version 9: no such model")
    sys.exit(2)
if prompt == "broken":
    raise RuntimeError("a <bug>")
if first and prompt == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if first and prompt == "orphan":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
if first and prompt == "stopped":
    sys.exit(0)
if prompt.startswith("long"):
    time.sleep(60)
while prompt.startswith("pair") and len(list(workspace.parent.glob("pair*/attempts"))) < 2:
    time.sleep(0.05)
(workspace / "checkpoints").mkdir()
(workspace / "checkpoints" / "step_0000004_final.pt").touch()
time.sleep(0.02)
(workspace / "report.html").touch()
"""
DRIVER = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import batch; "
DRIVER += "sys.exit(batch.main(sys.argv[4:], Path(sys.argv[2]), int(sys.argv[3]) or None))"


@pytest.fixture
def start(tmp_path):
    """`start(["a chair", ...], *flags, gpus=2)`: the batch on the stand-in, with the folder `made`, as a process that runs."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    processes = []

    def begin(prompts, *flags, gpus=0):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        words = [ROOT / "scripts", tmp_path / "stand_in.py", gpus, "prompts.txt", "made", *flags]
        command = [sys.executable, "-c", DRIVER, *map(str, words)]
        processes.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.stderr.close()


@pytest.fixture
def run(start):
    """The same to its end: (exit status, what it said)."""

    def whole(*args, **more):
        process = start(*args, **more)
        told = process.communicate(timeout=100)[1]
        return process.returncode, told

    return whole


def attempts(folder: Path, prompt: str) -> list:
    """(process, arguments, environment) of every attempt of a prompt."""
    path = folder / batch.workspace_name(prompt) / "attempts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(truth, seconds=40.0):
    """Until `truth()`; fails after so many seconds."""
    until = time.monotonic() + seconds
    while not truth():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


class Links(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src", "poster")]

    def handle_data(self, data):
        self.text += data


# ---- the list -----------------------------------------------------------------------------------------------------------


def test_a_prompt_has_the_folder_that_run_prompts_gives_it(tmp_path):
    """The same list through the shell script, with a Python that only notes the workspace."""
    prompts = [
        "a red chair",
        "a  'quoted' \"mug\" $HOME *",
        "a red  chair",
        "  _x_ ",
        "lib:red_chair",
        "größe 東京",
        "東京",
    ]
    prompts += ["long " * 30, "a" * 59 + " b", "tab\there", "\ta comment? # no"]
    for folder in ("scripts", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    texts = {
        "scripts/run_prompts.sh": (ROOT / "scripts/run_prompts.sh").read_text(),
        "scripts/setup.sh": "#!/bin/sh\n",
        ".venv/bin/python": '#!/bin/sh\necho "$5" >>"${0%/.venv*}/noted"\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "list").write_text("# mine\r\n\n" + "\r\n".join(prompts) + "\n  \nlast")
    subprocess.run([tmp_path / "scripts/run_prompts.sh", "list", "made"], cwd=tmp_path, check=True, capture_output=True)
    noted = (tmp_path / "noted").read_text().splitlines()
    ours = batch.read_prompts(tmp_path / "list")
    assert noted == [f"made/{batch.workspace_name(prompt)}" for prompt in ours]
    assert len(set(noted)) == len(prompts) + 1 and ours[3] == "_x_"


def test_the_checksum_is_that_of_posix():
    for data in (b"", b"a", b"a red chair\n", bytes(range(256)) * 9):
        assert batch.cksum(data) == int(subprocess.run("cksum", input=data, capture_output=True).stdout.split()[0])


def test_a_prompt_that_stands_twice_is_made_once(tmp_path):
    (tmp_path / "list").write_bytes(b"one\ntwo\r\none\n#two\n caf\xe9 ")
    assert [p.encode("utf-8", "surrogateescape") for p in batch.read_prompts(tmp_path / "list")] == [
        b"one",
        b"two",
        b"caf\xe9",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "prompts.txt FOLDER"),
        (["list"], "prompts.txt FOLDER"),
        (["absent", "made"], "absent: cannot be read"),
        (["empty", "made"], "there is no prompt in it"),
        (["list", "made", "--iters", "5"], "flags of main.py stand behind --"),
        (["list", "made", "--", "--workspace=x"], "--workspace: is chosen"),
        (["list", "made", "--", "--text", "x"], "--text: is chosen"),
        (["list", "made", "--", "--ckpt", "scratch"], "--ckpt: is chosen"),
        (["list", "made", "--", "--itters", "5"], '"a chair": unknown flag --itters (did you mean --iters'),
        (["lib", "made"], '"lib:zebra_crossing": --text'),
        (["list", "made", "--jobs", "0"], "--jobs 0: must be >= 1"),
        (["list", "made", "--retries", "-1"], "--retries -1: must be >= 0"),
        (["list", "made", "--gpus_per_job", "1.5"], "whole number"),
        (["list", "list"], "cannot write there"),
        (["--index", "absent"], "no such folder"),
        (["--index", "made", "list"], "nothing else"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_before_anything_is_made(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("list", "a chair\n"), ("lib", "lib:zebra_crossing\n"), ("empty", "\n# no\n")):
        Path(name).write_text(text)
    assert batch.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line.replace("; did you mean", " (did you mean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "lib", "list"]


# ---- attempts -----------------------------------------------------------------------------------------------------------


def test_an_address_where_nobody_is_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("list").write_text("a chair\n")
    assert batch.main(["list", "made", "--address", "127.0.0.1:1"]) == 2
    assert "error: --address 127.0.0.1:1: no Ray cluster answers there" in capsys.readouterr().err


@pytest.mark.slow
def test_what_dies_is_tried_again_and_what_is_mistaken_is_not(run, tmp_path):
    prompts = ["fine", "orphan", "killed", "stopped", "mistaken", "broken"]
    status, told = run(prompts, "--cpus_per_job", "1", "--retries", "1", "--", "-O", "--iters", "5")
    made = tmp_path / "made"
    assert status == 1, told
    counts = {prompt: len(attempts(made, prompt)) for prompt in prompts}
    assert counts == {"fine": 1, "orphan": 2, "killed": 2, "stopped": 2, "mistaken": 1, "broken": 2}
    for prompt in ("fine", "orphan", "killed", "stopped"):
        assert finished(made / batch.workspace_name(prompt)), told
    # the run whose worker was killed has saved, and the next attempt waited for it
    assert (made / batch.workspace_name("orphan") / "saved").exists()
    assert '"orphan": its Ray worker died (WorkerCrashedError); once more (1 of 1)' in told
    assert '"killed": killed by SIGKILL; once more (1 of 1)' in told
    assert '"mistaken": failed: --sd_version 9: no such model' in told and '"broken": failed: RuntimeError: a' in told
    assert "6 prompts, 2 failed" in told and "(raylet)" not in told
    _, words, seen = attempts(made, "fine")[0]
    assert words == ["--text=fine", "--workspace", str(made / batch.workspace_name("fine")), "-O", "--iters", "5"]
    assert seen["OMP_NUM_THREADS"] == "1" and seen["RAY_AUTH_TOKEN"] is None
    page = Links((made / "index.html").read_text())
    assert all(prompt in page.text for prompt in prompts) and "RuntimeError: a <bug>" in page.text
    assert "6 prompts · 4 finished · 2 failed" in page.text

    # what is finished is left alone, without Ray
    status, told = run(["fine", "orphan"])
    assert status == 0 and told.count("finished already") == 2 and "at once" not in told
    assert len(attempts(made, "fine")) == 1


@pytest.mark.slow
def test_runs_at_the_same_time_have_gpus_of_their_own(run, tmp_path):
    status, told = run(["pair 1", "pair 2"], gpus=2)
    assert status == 0 and "2 GPUs and" in told, told
    seen = [attempts(tmp_path / "made", prompt)[0][2]["CUDA_VISIBLE_DEVICES"] for prompt in ("pair 1", "pair 2")]
    assert sorted(seen) == ["0", "1"] and "GPU 1" in told
    status, told = run(["more"], "--gpus_per_job", "3", gpus=2)
    assert status == 2 and told.splitlines()[-1].startswith("error: --gpus_per_job 3: no machine has as many (2 GPUs")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_batch_that_is_stopped_leaves_nobody_behind(number, status, start, tmp_path):
    made, prompts = tmp_path / "made", ["long 1", "fine"]
    process = start(prompts, "--jobs", "1")
    wait_for(lambda: attempts(made, "long 1"))
    time.sleep(0.3)
    (runs, _, _), *_ = attempts(made, "long 1")
    family = [int(line) for line in subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)]).split()]
    assert alive(runs) and len(family) > 1
    told = subprocess.check_output(["ps", "-ww", "-o", "args=", "--ppid", str(process.pid)], text=True)
    store = Path(re.search(r"/tmp/ray\w+", told).group())
    if number == "SIGINT":  # nobody else may work there meanwhile
        with pytest.raises(UserError, match="another batch"), batch.alone(made):
            pass
        assert "running" in Links((made / "index.html").read_text()).text
    process.send_signal(getattr(signal, number))
    process.wait(40)
    assert process.returncode == status
    wait_for(lambda: not any(alive(number) for number in (runs, *family)), 20)
    workspace = made / batch.workspace_name("long 1")
    assert (workspace / "saved").exists() and not in_use(workspace) and not attempts(made, "fine")
    if number == "SIGKILL":
        shutil.rmtree(store)
    else:
        assert not store.exists()
        assert "2 prompts · 2 unfinished" in Links((made / "index.html").read_text()).text


# ---- the page -----------------------------------------------------------------------------------------------------------


def test_the_page_tells_of_every_run_and_its_links_lead_somewhere(tmp_path):
    folder = tmp_path / "my runs"
    done, poor, new = (folder / name for name in ("done", "poor", "new"))
    for path in (done / "checkpoints", done / "mesh", done / "validation", poor / "checkpoints", folder / "notes"):
        path.mkdir(parents=True)
    (done / "config.yaml").write_text('text: "a <b>red</b> chair"\niters: 700\n')
    (done / "checkpoints/step_0000700_final.pt").touch()
    (done / "mesh/mesh.glb").touch()
    Image.new("RGB", (64, 16), "red").save(done / "validation/step_0000700_rgb.png")
    log = "2026-01-01 00:00:00  seconds: training 1.0\n2026-01-01 00:00:00  seconds: training 26.1, video 3.2, report 1.1\n"
    (done / "log.txt").write_text(log)
    time.sleep(0.02)
    (done / "report.html").touch()
    (poor / "config.yaml").write_text("text: poor thing\niters: 700\n")
    (poor / "checkpoints/step_0000350.pt").touch()
    (poor / "output.txt").write_text("hello\nerror: out of memory: try less\n")
    assert batch.main(["--index", str(folder)]) == 0
    text = (folder / "index.html").read_text()
    page = Links(text)
    assert "2 prompts · 1 finished · 1 failed" in page.text and "refresh" not in text
    assert "a <b>red</b> chair" in page.text and "<b>red" not in text
    assert "700 steps" in page.text and "30 s" in page.text and "350 of 700 steps" in page.text
    assert "out of memory" in page.text and "no picture yet" in page.text
    files = [link for link in page.found if not link.startswith("data:")]
    assert {"done/report.html", "done/mesh/mesh.glb", "done/log.txt", "poor/output.txt"} <= set(files)
    assert all((folder / link).is_file() for link in files) and any("jpeg" in link for link in page.found)

    (poor / "output.txt").write_text("somnium: training 420/700, 3.0/s, 90 s left\n")
    running = [Entry(poor, "poor thing", "running"), Entry(new, "later", "waiting")]
    text = write_index(folder, running).read_text()
    assert "420 of 700 steps" in text and "1 waiting · 1 running" in text and 'http-equiv="refresh"' in text


def test_a_report_older_than_the_training_does_not_count(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "report.html").touch()
    assert not finished(tmp_path) and not entries(tmp_path)
    (tmp_path / "checkpoints/step_0000009_final.pt").touch()
    os.utime(tmp_path / "report.html", ns=(0, 0))
    assert not finished(tmp_path)
    os.utime(tmp_path / "report.html")
    os.utime(tmp_path / "checkpoints/step_0000009_final.pt", ns=(0, 0))
    assert finished(tmp_path)


# ---- for real -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_six_prompts_all_finish_though_a_worker_is_killed(tmp_path):
    """The worker of one run is killed when a checkpoint lies there; the run goes on from it."""
    prompts = ["a red chair", "a hamburger", "a blue mug", "a penguin", "an orange teapot", "a green car"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    flags = [*TINY[2:], "--iters", "6", "--eval_interval", "2", "--dataset_size_test", "2"]
    victim = tmp_path / "made" / batch.workspace_name(prompts[1])
    command = [sys.executable, ROOT / "scripts" / "batch.py", "prompts.txt", "made", "--", *flags]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list(victim.glob("checkpoints/step_*.pt")), 90)
        owner = (victim / ".lock").read_text().strip()
        status = Path(f"/proc/{owner}/status").read_text()
        os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGKILL)
        told = process.communicate(timeout=300)[1]
    assert process.returncode == 0, told
    assert told.count("its Ray worker died") == 1 and "6 prompts, 0 failed" in told
    assert "going on from step_" in (victim / "log.txt").read_text()
    page = Links((tmp_path / "made" / "index.html").read_text())
    assert all(prompt in page.text for prompt in prompts) and "6 prompts · 6 finished" in page.text
    assert sum(link.endswith("report.html") for link in page.found) >= 6
    assert all((tmp_path / "made" / link).is_file() for link in page.found if not link.startswith("data:"))
