"""launch/slurm with stand-ins for SLURM's commands that record what they are asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = r"""#!/bin/bash
name=$(basename "$0")
echo "$name $*" >>"$STAND_IN/calls"
if [ -e "$STAND_IN/$name.says" ]; then cat "$STAND_IN/$name.says"; fi
if [ -e "$STAND_IN/$name.fails" ]; then
  cat "$STAND_IN/$name.fails" >&2
  exit "$(cat "$STAND_IN/code")"
fi
"""


class Cluster:
    """A login node and a compute node over one folder, which holds a copy of the scripts and an empty environment."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("sbatch", "squeue", "srun", "scancel", "scontrol"):
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)
        self.code = folder / "repository"
        shutil.copytree(ROOT / "launch" / "slurm", self.code / "launch" / "slurm")
        self.make_environment()
        self.workdir = folder / "run"
        self.logs = self.workdir / "slurm"

    def make_environment(self):
        (self.code / ".venv/bin").mkdir(parents=True)
        (self.code / ".venv/bin/activate").touch()
        (self.code / ".venv/bin/python").touch()
        (self.code / ".venv/bin/python").chmod(0o755)

    def run(self, script, *arguments, path=None, **environment):
        path = path or f"{self.bin}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", self.code / "launch" / "slurm" / script, *arguments],
            env=os.environ | {"STAND_IN": str(self.folder), "PATH": path} | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def submit(self, *arguments, **others):
        return self.run("submit.sh", "--config=configs/stage1.py", f"--workdir={self.workdir}", *arguments, **others)

    def job(self, *arguments, **others):
        """job.sh as SLURM starts it on the first node."""
        self.logs.mkdir(parents=True, exist_ok=True)
        given = {"SLURM_SUBMIT_DIR": str(self.code), "SLURM_JOB_ID": "41", "SLURM_NTASKS": "8", "LOGS": str(self.logs)}
        return self.run("job.sh", *arguments, **(given | others))

    def answer(self, command, says="", fails="", code=1):
        (self.folder / f"{command}.says").write_text(says)
        if fails or code != 1:
            (self.folder / f"{command}.fails").write_text(fails)
            (self.folder / "code").write_text(str(code))

    @property
    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def assert_one_line_error(result, *words, code=1):
    assert result.returncode == code, result
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


def test_submit_asks_for_one_process_a_gpu(cluster):
    cluster.answer("sbatch", says="Submitted batch job 41\n")
    result = cluster.submit("--nodes=4", "--gpus=8", "--partition=gpu", "--sbatch-flag=--qos=low", "--", "--config.x=1")
    assert result.returncode == 0, result.stderr
    assert "Submitted batch job 41" in result.stdout
    assert [call.split()[0] for call in cluster.calls] == ["squeue", "sbatch"]
    words = cluster.calls[1].split()
    flags = words[1 : words.index("launch/slurm/job.sh")]
    assert {"--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8"} <= set(flags)
    assert {"--signal=TERM@300", "--partition=gpu", "--qos=low", "--time=24:00:00"} <= set(flags)
    assert {f"--output={cluster.logs}/%j.log", f"--export=ALL,LOGS={cluster.logs}"} <= set(flags)
    assert not any(flag.startswith(("--gpus-per-task", "--gpu-bind")) for flag in flags)
    assert words[words.index("launch/slurm/job.sh") + 1 :] == [
        "--config=configs/stage1.py",
        f"--workdir={cluster.workdir}",
        "--config.x=1",
    ]
    assert cluster.logs.is_dir()


def test_submit_refuses_beside_a_queued_one(cluster):
    cluster.answer("squeue", says="40\n")
    assert_one_line_error(cluster.submit("--name=stage1"), "stage1", "40")
    assert [call.split()[0] for call in cluster.calls] == ["squeue"]


def test_a_dry_run_calls_nothing(cluster):
    for arguments, commands in (
        (["--nodes=2"], ["squeue --me", f"mkdir -p {cluster.logs}", "sbatch --job-name=unialign --nodes=2"]),
        (["--stop=41"], [f"touch {cluster.logs}/stop-41", "squeue --noheader --jobs=41", "scancel --signal=TERM 41"]),
        (["--setup"], ["bash -c 'source launch/environment.sh && make_environment requirements.txt "]),
    ):
        result = cluster.submit(*arguments, "--dry-run", "--", "--config.name=two words")
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert all(line.startswith(command) for line, command in zip(lines, commands, strict=True)), lines
    assert cluster.calls == [] and not cluster.workdir.exists()


def test_errors_of_submit_are_one_line(cluster):
    assert_one_line_error(cluster.run("submit.sh", "--config=c"), "--workdir")
    assert_one_line_error(cluster.run("submit.sh", f"--workdir={cluster.workdir}"), "--config")
    assert_one_line_error(cluster.submit("--nodes=many"), "--nodes", "many")
    assert_one_line_error(cluster.submit("--colour=red"), "--colour=red")
    for folder in ("a,b", "a b", "run%j"):
        assert_one_line_error(
            cluster.submit(f"--workdir=/shared/{folder}"), folder, "without commas, % and white space"
        )
    cluster.answer("sbatch", fails="sbatch: error: invalid partition specified: gpu\nBatch job submission failed\n")
    assert_one_line_error(cluster.submit(), "invalid partition specified: gpu", "Batch job submission failed")
    shutil.rmtree(cluster.code / ".venv")
    assert_one_line_error(cluster.submit(), "--setup")


def test_submit_away_from_a_cluster(cluster):
    tools = cluster.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "realpath"):
        (tools / name).symlink_to(shutil.which(name))
    assert_one_line_error(cluster.submit(path=str(tools)), "squeue is not installed", "--dry-run")


def test_help(cluster):
    result = cluster.run("submit.sh", "--help")
    assert result.returncode == 0 and "bash launch/slurm/submit.sh --nodes=4" in result.stdout


def test_a_job_that_finishes(cluster):
    result = cluster.job("--config=c", "--workdir=w", SLURM_CPUS_PER_TASK="8")
    assert result.returncode == 0, result.stderr
    (call,) = cluster.calls
    assert call.startswith("srun ") and call.endswith("python launch/train.py --noprogress --config=c --workdir=w")
    for flag in ("--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=900", "--cpus-per-task=8", "--open-mode=append"):
        assert f" {flag} " in call
    assert f"--output={cluster.logs}/%j-process%t.log" in call


def test_a_job_that_was_stopped_before_its_limit_is_queued_again(cluster):
    cluster.answer("srun", code=143)
    result = cluster.job("--config=c", "--workdir=w")
    assert result.returncode == 0, result.stderr
    assert cluster.calls[-1] == "scontrol requeue 41" and "queued again" in result.stdout


def test_a_job_that_cannot_be_queued_again_says_so(cluster):
    cluster.answer("srun", code=143)
    (cluster.folder / "scontrol.fails").touch()
    assert_one_line_error(cluster.job("--config=c", "--workdir=w"), "job 41", "submit it again")


def started(cluster):
    cluster.logs.mkdir(parents=True)
    (cluster.logs / "41.log").touch()


@pytest.mark.parametrize(
    ("code", "words"), [(143, "stopped on request, saved"), (75, "exit code 75 when it was stopped")]
)
def test_a_job_that_was_stopped_on_request_is_not_queued_again(cluster, code, words):
    started(cluster)
    # The request comes while srun runs.
    srun = (cluster.bin / "srun").read_text()
    (cluster.bin / "srun").write_text(srun + f'touch "$LOGS/stop-41"\nexit {code}\n')
    result = cluster.job("--config=c", "--workdir=w")
    assert result.returncode == (0 if code == 143 else code) and words in result.stdout + result.stderr
    assert [call.split()[0] for call in cluster.calls] == ["srun"]


def test_stop_signals_a_running_job_once(cluster):
    started(cluster)
    cluster.answer("scancel", fails="scancel: error: Unable to contact slurm controller\n")
    assert_one_line_error(cluster.submit("--stop=41"), "Unable to contact slurm controller")
    (cluster.folder / "scancel.fails").unlink()
    (cluster.folder / "calls").unlink()
    assert cluster.submit("--stop=41").returncode == 0
    assert [call.split()[0] for call in cluster.calls] == ["squeue", "scancel"]
    assert cluster.calls[-1] == "scancel --signal=TERM 41"
    assert_one_line_error(cluster.submit("--stop=41"), "asked to stop already")
    assert len(cluster.calls) == 2


def test_a_job_that_is_stopped_while_it_waits_does_not_start_again(cluster):
    started(cluster)
    cluster.answer("squeue", says="41\n")
    result = cluster.submit("--stop=41")
    assert result.returncode == 0 and "waits in the queue" in result.stdout
    assert [call.split()[0] for call in cluster.calls] == ["squeue"]
    result = cluster.job("--config=c", "--workdir=w")
    assert result.returncode == 0 and "stopped on request and does not start again" in result.stdout
    assert [call.split()[0] for call in cluster.calls] == ["squeue"]


def test_stop_wants_the_folder_of_the_job(cluster):
    cluster.logs.mkdir(parents=True)
    (cluster.logs / "40.log").touch()
    assert_one_line_error(cluster.submit("--stop=41"), f"{cluster.logs}/41.log", "scancel 41")
    assert cluster.calls == [] and not (cluster.logs / "stop-41").exists()


@pytest.mark.parametrize("code", [7, 137])
def test_a_job_that_fails_is_not_queued_again(cluster, code):
    cluster.answer("srun", code=code)
    result = cluster.job("--config=c", "--workdir=w")
    assert result.returncode == code
    assert f"error: training failed with exit code {code}" in result.stderr
    assert not any(call.startswith("scontrol") for call in cluster.calls)


@pytest.mark.parametrize("code", [75, 134])
def test_a_job_that_lost_a_process_is_queued_again_once_between_two_checkpoints(cluster, code):
    cluster.answer("srun", code=code)
    # 7 is not newer than 30 as text is; 40 has not become whole.
    for step in (None, "7", "30"):
        if step:
            (cluster.workdir / "checkpoints" / step).mkdir(parents=True)
        result = cluster.job("--config=c", "--workdir=w")
        assert result.returncode == 0, result.stderr
        assert cluster.calls[-1] == "scontrol requeue 41" and "a process was lost" in result.stdout
    (cluster.workdir / "checkpoints/40.orbax-checkpoint-tmp").mkdir()
    result = cluster.job("--config=c", "--workdir=w")
    assert_one_line_error(result, f"exit code {code} twice since the newest checkpoint (30)", code=code)
    assert cluster.calls.count("scontrol requeue 41") == 3


def test_the_job_script_says_that_it_may_be_queued_again():
    head = (ROOT / "launch/slurm/job.sh").read_text().splitlines()
    assert head[0] == "#!/usr/bin/env bash" and head[1:3] == ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
