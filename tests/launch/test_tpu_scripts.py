"""launch/tpu with stand-ins for gcloud and kubectl that record what they are asked and answer from a script."""

import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["--name=run1", "--project=p", "--zone=z", "--accelerator=v5litepod-256", "--provisioning=spot", "--poll=0"]
TRAINING = ["--config=configs/stage1.py", "--workdir=/mnt/unialign/runs/a", "--storage=10.0.0.2:/share"]

# Each `describe` answers the next line of `states`, each status call of the hosts the next line of `workers` ("|" is
# between hosts); the last line of either answers for ever.
GCLOUD = r"""#!/bin/bash
echo "$@" >>"$STAND_IN/calls"
next() { head -n 1 "$1"; if [ "$(wc -l <"$1")" -gt 1 ]; then sed -i 1d "$1"; fi; }
case "$4 $*" in
  describe*error.message*) cat "$STAND_IN/reason" ;;
  describe*)
    state=$(next "$STAND_IN/states")
    if [ "$state" = ABSENT ]; then
      printf 'ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource\n was not found\n' >&2
      exit 1
    fi
    if [ "$state" = OFFLINE ]; then echo 'ERROR: gcloud crashed (TransportError): no route to host' >&2; exit 1; fi
    echo "$state"
    ;;
  create*) if [ -e "$STAND_IN/create_error" ]; then cat "$STAND_IN/create_error" >&2; exit 1; fi ;;
  scp*) cp "$5" "$STAND_IN/copied.tgz" ;;
  ssh*worker.sh\ status* | ssh*worker.sh\ stop*) next "$STAND_IN/workers" | tr '|' '\n' ;;
esac
"""
KUBECTL = r"""#!/bin/bash
echo "$@" >>"$STAND_IN/calls"
if [ "$1" = apply ]; then cat >"$STAND_IN/manifest"; fi
if [ "$1" = get ] && [ -e "$STAND_IN/conditions" ]; then cat "$STAND_IN/conditions"; fi
if [ -e "$STAND_IN/kubectl_error" ]; then cat "$STAND_IN/kubectl_error" >&2; exit 1; fi
"""


def hosts(*states, workdir="/mnt/unialign/runs/a"):
    return "|".join(f"unialign-worker host-{n} {state} {workdir} step {n}" for n, state in enumerate(states))


def both(state):
    return hosts(state, state)


class Desk:
    """A machine with stand-ins for gcloud and kubectl."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name, text in (("gcloud", GCLOUD), ("kubectl", KUBECTL)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        (folder / "reason").write_text("There is no more capacity in the zone.\n")
        self.script(states=["ABSENT"], workers=[hosts("absent")])

    def script(self, **answers):
        for name, lines in answers.items():
            (self.folder / name).write_text("\n".join(lines) + "\n")

    def run(self, script, *arguments, path=None, cwd=None):
        environment = os.environ | {"STAND_IN": str(self.folder), "PATH": path or f"{self.bin}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", ROOT / "launch" / "tpu" / script, *arguments],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def tpu(self, *arguments, **others):
        return self.run("tpu.sh", *arguments, **others)

    @property
    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def steps(self):
        """What was asked of gcloud, in a word each; what worker.sh was asked in place of ssh."""
        words = []
        for call in self.calls:
            verb = call.split()[3]
            match = re.findall(r"worker\.sh (\w+)", call)
            words.append(match[-1] if verb == "ssh" and match else verb)
        return words

    def no_queries(self):
        return [step for step in self.steps if step not in ("describe", "status")]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def assert_one_line_error(result, *words, code=1):
    assert result.returncode == code, result
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --node-id=run1 --spot"),
        (
            ["--accelerator=v4-128", "--provisioning=reserved", "--slices=4"],
            "--accelerator-type=v4-128 --runtime-version=tpu-ubuntu2204-base "
            "--node-count=4 --node-prefix=run1 --reserved",
        ),
        (
            ["--accelerator=v5p-128", "--provisioning=on-demand", "--create-flag=--network=n"],
            "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 --node-id=run1 --network=n",
        ),
        (
            ["--accelerator=v6e-8", "--runtime=mine"],
            "--accelerator-type=v6e-8 --runtime-version=mine --node-id=run1 --spot",
        ),
    ],
)
def test_create_asks_for_the_slices(desk, flags, expected):
    result = desk.tpu("create", *SETTINGS, *flags)
    assert result.returncode == 0, result.stderr
    assert desk.steps == ["describe", "create"]
    assert desk.calls[1] == f"compute tpus queued-resources create run1 {expected} --project=p --zone=z"


def test_create_of_an_existing_one_says_so(desk):
    desk.script(states=["PROVISIONING"])
    result = desk.tpu("create", *SETTINGS)
    assert result.returncode == 0 and desk.steps == ["describe"]
    assert "run1 exists already and is PROVISIONING" in result.stdout


def test_create_of_a_preempted_one_says_what_to_do(desk):
    desk.script(states=["SUSPENDED"])
    assert_one_line_error(desk.tpu("create", *SETTINGS), "run1", "SUSPENDED", "delete")
    assert desk.steps == ["describe"]


def test_wait_goes_through_the_states(desk):
    desk.script(states=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    result = desk.tpu("wait", *SETTINGS)
    assert result.returncode == 0
    assert re.findall(r"run1 is (\w+)", result.stdout) == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert desk.steps == ["describe"] * 4


def test_wait_passes_on_why_it_failed(desk):
    desk.script(states=["WAITING_FOR_RESOURCES", "FAILED"])
    assert_one_line_error(desk.tpu("wait", *SETTINGS), "FAILED", "There is no more capacity in the zone.")


def test_setup_copies_the_committed_code(desk):
    result = desk.tpu("setup", *SETTINGS, *TRAINING, "--ssh-flag=--tunnel-through-iap")
    assert result.returncode == 0, result.stderr
    assert desk.steps == ["status", "scp", "setup"]
    assert "run1:unialign.tgz --node=all --worker=all --tunnel-through-iap" in desk.calls[1]
    assert "worker.sh setup 10.0.0.2:/share /mnt/unialign" in desk.calls[2]
    with tarfile.open(desk.folder / "copied.tgz") as archive:
        assert {"launch/train.py", "requirements.txt", "launch/environment.sh"} <= set(archive.getnames())


def test_start_reaches_every_host_with_its_words_whole(desk):
    desk.script(workers=[hosts("ready", "ready")])
    result = desk.tpu("start", *SETTINGS, *TRAINING, "--", "--config.name=two words", "--config.steps=7")
    assert result.returncode == 0, result.stderr
    assert desk.steps == ["status", "start"]
    assert "--node=all --worker=all" in desk.calls[1]
    words = "--config=configs/stage1.py --workdir=/mnt/unialign/runs/a '--config.name=two words' --config.steps=7"
    assert f"worker.sh start {words}" in desk.calls[1]


def test_start_refuses_beside_a_running_one(desk):
    desk.script(workers=[hosts("ready", "running")])
    assert_one_line_error(desk.tpu("start", *SETTINGS, *TRAINING), "running already", "host-1", "stop")
    assert desk.steps == ["status"]


def test_start_wants_a_setup_on_every_host(desk):
    desk.script(workers=[hosts("ready", "absent")])
    assert_one_line_error(desk.tpu("start", *SETTINGS, *TRAINING), "setup")


def test_watch_shows_all_and_follows_the_first(desk):
    desk.script(states=["ACTIVE"], workers=[hosts("running", "failed:1")])
    result = desk.tpu("watch", *SETTINGS)
    assert result.returncode == 0
    assert "host-0 running" in result.stdout and "host-1 failed:1" in result.stdout
    assert "--node=0 --worker=0" in desk.calls[-1] and "worker.sh log --follow" in desk.calls[-1]


def test_stop_and_delete(desk):
    desk.script(states=["ACTIVE", "ABSENT"], workers=[hosts("stopped", "stopped")])
    assert "host-1 stopped" in desk.tpu("stop", *SETTINGS).stdout
    assert desk.tpu("delete", *SETTINGS).returncode == 0
    assert desk.calls[-1] == "compute tpus queued-resources delete run1 --force --quiet --project=p --zone=z"
    count = desk.steps.count("delete")
    again = desk.tpu("delete", *SETTINGS)
    assert again.returncode == 0 and "there is no queued resource run1" in again.stdout
    assert desk.steps.count("delete") == count


def test_stop_says_that_a_host_has_not_saved(desk):
    desk.script(states=["ACTIVE"], workers=[hosts("stopped", "stopped:137")])
    result = desk.tpu("stop", *SETTINGS)
    assert_one_line_error(result, "host-1 ended with 137, not saved")
    assert "host-0 stopped " in result.stdout


def test_keep_goes_on_after_a_preemption(desk):
    desk.script(
        states=[
            *("ABSENT", "ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE"),
            *("SUSPENDING", "SUSPENDED", "SUSPENDED", "ABSENT", "ABSENT", "PROVISIONING", "ACTIVE"),
        ],
        workers=[
            *(both("absent"), both("absent"), both("ready"), both("running")),
            *(both("absent"), both("absent"), both("ready"), both("running")),
            *(hosts("finished", "running"), both("finished")),
        ],
    )
    result = desk.tpu("keep", *SETTINGS, *TRAINING)
    assert result.returncode == 0, result.stderr
    rent = ["create", "scp", "setup", "start"]
    assert desk.no_queries() == [*rent, "delete", *rent]
    assert "was preempted" in result.stdout and "training has finished" in result.stdout


def test_keep_joins_a_running_one_and_ends_when_it_is_stopped(desk):
    desk.script(states=["ACTIVE"], workers=[hosts("running"), hosts("running"), hosts("stopped")])
    result = desk.tpu("keep", *SETTINGS, *TRAINING)
    assert result.returncode == 0 and "stopped on request" in result.stdout
    assert desk.no_queries() == []


@pytest.mark.parametrize("last", [hosts("stopped", "stopped:137"), hosts("failed:143", "stopped:1")])
def test_keep_leaves_a_run_alone_that_is_being_stopped(desk, last):
    desk.script(states=["ACTIVE"], workers=[both("running"), *[hosts("stopped", "running")] * 5, last])
    result = desk.tpu("keep", *SETTINGS, *TRAINING)
    assert result.returncode == 0 and "stopped on request" in result.stdout
    assert desk.no_queries() == []


def test_keep_does_not_take_another_run_for_this_one(desk):
    desk.script(states=["ACTIVE"], workers=[hosts("running", workdir="/mnt/unialign/runs/b")])
    assert_one_line_error(desk.tpu("keep", *SETTINGS, *TRAINING), "/mnt/unialign/runs/b", "/mnt/unialign/runs/a")


@pytest.mark.parametrize("broken", [hosts("failed:1", "lost"), hosts("failed:75", "failed:137")])
def test_keep_starts_again_what_broke_off(desk, broken):
    desk.script(
        states=["ACTIVE"],
        workers=[both("running"), broken, broken, broken, broken, both("ready"), both("finished")],
    )
    result = desk.tpu("keep", *SETTINGS, *TRAINING)
    assert result.returncode == 0, result.stderr
    assert desk.no_queries() == ["end", "scp", "setup", "start"]


def test_keep_gives_up_on_a_run_that_always_fails(desk):
    desk.script(states=["ACTIVE"], workers=[hosts("failed:1", "failed:1")])
    result = desk.tpu("keep", *SETTINGS, *TRAINING, "--max-restarts=1")
    assert_one_line_error(result, "2 times", "failed:1")
    assert desk.no_queries() == ["end", "scp", "setup", "start"]


def test_keep_bears_a_network_that_fails_for_a_while(desk):
    desk.script(states=["OFFLINE", "OFFLINE", "ACTIVE"], workers=[hosts("finished")])
    result = desk.tpu("keep", *SETTINGS, *TRAINING)
    assert result.returncode == 0 and result.stdout.count("warning: ERROR: gcloud crashed") == 2
    desk.script(states=["OFFLINE"])
    assert_one_line_error(desk.tpu("keep", *SETTINGS, *TRAINING), "no route to host")


def test_keep_counts_the_failures_of_the_network_in_a_row(desk):
    waiting = ["OFFLINE", "OFFLINE", "OFFLINE", "WAITING_FOR_RESOURCES"]
    desk.script(states=[*waiting, *waiting, *waiting, "ACTIVE"], workers=[hosts("finished")])
    result = desk.tpu("keep", *SETTINGS, *TRAINING)
    assert result.returncode == 0 and result.stdout.count("warning: ERROR: gcloud crashed") == 9
    desk.script(states=["ACTIVE"], workers=[""])
    assert_one_line_error(desk.tpu("keep", *SETTINGS, *TRAINING), "the hosts of run1 answered nothing")


def test_keep_asks_three_times_for_what_fails(desk):
    desk.script(states=["FAILED"])
    assert_one_line_error(desk.tpu("keep", *SETTINGS, *TRAINING), "There is no more capacity in the zone.")
    assert desk.no_queries() == ["delete", "delete"]


@pytest.mark.parametrize("step", ["create", "keep"])
def test_a_quota_error_is_passed_on_in_one_line(desk, step):
    error = (
        "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPerProject'\n"
        "  has been exceeded. Limit: 16 in zone z.\n"
    )
    (desk.folder / "create_error").write_text(error)
    result = desk.tpu(step, *SETTINGS, *TRAINING)
    assert_one_line_error(result, "Quota limit 'TPUV5sPerProject' has been exceeded. Limit: 16 in zone z.")
    assert desk.no_queries() == ["create"]


@pytest.mark.parametrize("step", ["create", "wait", "setup", "start", "status", "watch", "stop", "delete", "keep"])
def test_a_dry_run_calls_nothing(desk, step):
    result = desk.tpu(step, *SETTINGS, *TRAINING, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert desk.calls == []
    assert "gcloud compute tpus queued-resources" in result.stdout
    remote = re.findall(r"queued-resources (create|scp|delete) run1|worker\.sh (\w+)", result.stdout)
    steps = [first or second for first, second in remote if first != "scp"]
    begin = ["status", "setup", "status", "start"]
    if step == "keep":
        assert steps == ["create", *begin, "status", "end", *begin, "delete"]
        assert "queued-resources scp /tmp/unialign.tgz run1:unialign.tgz" in result.stdout
        assert "state.failedData.error.message" in result.stdout
    if step == "setup":
        assert steps == ["status", "setup"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "--name=run1"], ["--project", "--zone", "--accelerator"]),
        (["start", *SETTINGS], ["--config", "--workdir"]),
        (["create", *SETTINGS, "--accelerator=v5e-256"], ["v5litepod-256"]),
        (["create", *SETTINGS, "--accelerator=h100"], ["h100", "v5litepod-N"]),
        (["create", *SETTINGS, "--name=Run_1"], ["Run_1"]),
        (["create", *SETTINGS, "--slices=two"], ["two"]),
        (["create", *SETTINGS, "--provisioning=cheap"], ["cheap", "spot"]),
        (["setup", *SETTINGS, "--storage=disk"], ["disk", "gs://"]),
        (["create", *SETTINGS, "--colour=red"], ["--colour=red"]),
        (["keep", *SETTINGS, *TRAINING, "--workdir=/mnt/unialign/my run"], ["/mnt/unialign/my run", "without commas"]),
        (["status", *SETTINGS, "--workdir=/mnt/a,b"], ["/mnt/a,b", "% and white space"]),
        (["create", "--settings=/nowhere/settings.sh"], ["/nowhere/settings.sh"]),
    ],
)
def test_bad_settings_are_one_line(desk, arguments, words):
    assert_one_line_error(desk.tpu(*arguments), *words)
    assert desk.calls == []


def test_without_gcloud(desk):
    bare = desk.folder / "bare"
    bare.mkdir()
    (bare / "bash").symlink_to(shutil.which("bash"))
    assert_one_line_error(desk.tpu("create", *SETTINGS, path=str(bare)), "gcloud is not installed")


def test_unknown_command_and_help(desk):
    assert_one_line_error(desk.tpu("rent"), "rent", "create", code=2)
    for script in ("tpu.sh", "jobset.sh", "worker.sh"):
        result = desk.run(script, "--help")
        assert result.returncode == 0 and f"bash launch/tpu/{script} " in result.stdout


def test_a_settings_file_and_flags_that_win_over_it(desk):
    text = (ROOT / "launch/tpu/settings.example.sh").read_text()
    (desk.folder / "mine.sh").write_text(text + "SLICES=2\n")
    (desk.bin / "mine.sh").write_text("exit 7  # of the same name, on PATH\n")
    result = desk.tpu("create", "--settings=mine.sh", "--zone=elsewhere", cwd=desk.folder)
    assert result.returncode == 0, result.stderr
    assert "--node-count=2 --node-prefix=stage1 --spot" in desk.calls[-1]
    assert "--project=my-project --zone=elsewhere" in desk.calls[-1]


# --- worker.sh, on this machine as if it were a host ---

TRAIN = """#!/bin/bash
trap 'echo saved; exit 143' TERM
echo "$@"
for _ in $(seq 200); do [ ! -e "$HOME/ends" ] || exit "$(cat "$HOME/ends")"; sleep 0.05; done
"""
# It saves once $HOME/storage is there, and a second SIGTERM acts at once.
SLOW_SAVE = TRAIN.replace(
    "echo saved", 'trap - TERM; echo saving; until [ -e "$HOME/storage" ]; do sleep 0.05; done; echo saved'
)


class Host:
    def __init__(self, folder: Path):
        self.home = folder / "home"
        code = self.home / "unialign"
        (code / "launch/tpu").mkdir(parents=True)
        shutil.copy(ROOT / "launch/tpu/worker.sh", code / "launch/tpu")
        (code / "launch/environment.sh").write_text('make_environment() { echo "$PYTHON $*" >>"$HOME/environment"; }\n')
        (code / ".venv/bin").mkdir(parents=True)
        (code / ".venv/bin/python").write_text(TRAIN)
        (code / ".venv/bin/python").chmod(0o755)
        self.bin = folder / "host_bin"
        self.bin.mkdir()
        self.workdir = folder / "run"
        self.stand_in("python3.13", "")

    def stand_in(self, name, text):
        (self.bin / name).write_text("#!/bin/bash\n" + text)
        (self.bin / name).chmod(0o755)

    def __call__(self, *arguments, **environment):
        environment = os.environ | {"HOME": str(self.home), "PATH": f"{self.bin}:{os.environ['PATH']}"} | environment
        command = ["bash", "unialign/launch/tpu/worker.sh", *arguments]
        return subprocess.run(command, env=environment, cwd=self.home, capture_output=True, text=True, timeout=60)

    def train_with(self, python):
        (self.home / "unialign/.venv/bin/python").write_text(python)

    def start(self):
        return self("start", "--config=c", f"--workdir={self.workdir}", LOCAL_DISK="1")

    def start_training(self):
        """Started, and train.py there to be signalled."""
        assert self("setup").returncode == 0
        assert self.start().returncode == 0
        assert self.logs("launch/train.py --noprogress")

    def logs(self, words):
        path = self.home / "unialign-run/train.log"
        return self.holds(lambda: path.exists() and words in path.read_text())

    def state(self, *arguments):
        return self("status", *arguments).stdout.split()[2]

    def becomes(self, state):
        return self.holds(lambda: self.state() == state)

    def holds(self, condition):
        for _ in range(500):
            if condition():
                return True
            time.sleep(0.02)
        return False


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_a_host_starts_once_and_stops(host):
    assert host.state() == "absent"
    assert host("setup").returncode == 0
    assert host.state() == "ready"
    started = host.start()
    assert started.returncode == 0, started.stderr
    assert host.state() == "running"
    assert_one_line_error(host.start(), "running already", str(host.workdir))
    assert_one_line_error(host("setup"), "running")
    assert host("stop").stdout.split()[2] == "stopped"
    log = (host.home / "unialign-run/train.log").read_text()
    assert f"launch/train.py --noprogress --config=c --workdir={host.workdir}" in log and "saved" in log


def test_a_host_tells_how_a_run_ended(host):
    host("setup")
    for code, state in (("0", "finished"), ("3", "failed:3")):
        (host.home / "ends").write_text(code)
        assert host.start().returncode == 0
        assert host.becomes(state)
        assert host.state("/another/folder") == "ready"  # says nothing about a run elsewhere
    (host.home / "unialign-run/exit").unlink()  # the host went down in the middle
    assert host.state() == "lost"


@pytest.mark.parametrize("second", ["stop", "end"])
def test_a_host_is_signalled_once(host, second):
    host.train_with(SLOW_SAVE)
    host.start_training()
    command = ["bash", "unialign/launch/tpu/worker.sh", "stop"]
    with subprocess.Popen(command, env=os.environ | {"HOME": str(host.home)}, cwd=host.home) as first:
        assert host.logs("saving")
        first.kill()  # the connection breaks off
    # The storage answers again when the second call has come to its wait.
    host.stand_in("sleep", f'[ "$1" != 0.2 ] || touch "$HOME/storage"\nexec {shutil.which("sleep")} "$1"\n')
    assert host(second).returncode == 0
    assert host.state() == "stopped" and host.logs("saved")
    host.train_with(TRAIN)
    host.start_training()
    assert host("stop").stdout.split()[2] == "stopped"


@pytest.mark.parametrize(
    ("at_sigterm", "state"),
    [("exit 130", "stopped"), ("exit 134", "stopped:134"), ("exit 0", "finished"), (":", "stopped:137")],
)
def test_a_host_tells_whether_it_has_saved(host, at_sigterm, state):
    host.train_with(TRAIN.replace("echo saved; exit 143", at_sigterm))
    host.start_training()
    stopped = host("stop", GRACE="0" if at_sigterm == ":" else "60")
    assert stopped.stdout.split()[2] == state == host.state()
    _, _, code = state.partition(":")
    assert not code or f"ended with {code}, not saved" in stopped.stderr


def test_a_stop_holds_beside_a_run_that_is_not_running(host):
    for code, state in (("0", "finished"), ("75", "stopped:75")):
        (host.home / "ends").write_text(code)
        host.start_training()
        assert host.becomes("finished" if code == "0" else f"failed:{code}")
        assert host("stop").stdout.split()[2] == state
    (host.home / "unialign-run/exit").unlink()
    assert host.state() == "stopped:lost"
    assert host.start().returncode == 0 and host.becomes("failed:75")


def test_a_host_refuses_a_folder_that_the_others_do_not_see(host):
    host("setup")
    host.stand_in("stat", "echo ext2/ext3\n")
    result = host("start", "--config=c", f"--workdir={host.workdir}")
    assert_one_line_error(result, str(host.workdir), "ext2/ext3", "--storage")
    for disk, workdir in (("nfs", str(host.workdir)), ("ext2/ext3", "gs://bucket/run")):
        host.stand_in("stat", f"echo {disk}\n")
        assert host("start", "--config=c", f"--workdir={workdir}").returncode == 0
        assert host.state() == "running" and host("status").stdout.split()[3] == workdir
        assert host("stop").returncode == 0
    assert not (host.home / "unialign/gs:").exists()


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        ("10.0.0.2:/share", "sudo mount -t nfs -o hard,noatime 10.0.0.2:/share /mnt/x"),
        ("gs://bucket", "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 bucket /mnt/x"),
    ],
)
def test_a_host_mounts_the_storage_once(host, storage, expected):
    for name in ("sudo", "gcsfuse", "mount.nfs"):
        host.stand_in(name, f'echo {name} "$@" >>"$HOME/calls"\n')
    host.stand_in("mountpoint", '[ -e "$HOME/mounted" ]\n')
    assert host("setup", storage, "/mnt/x").returncode == 0
    assert expected in (host.home / "calls").read_text().splitlines()
    (host.home / "mounted").touch()
    before = (host.home / "calls").read_text()
    assert host("setup", storage, "/mnt/x").returncode == 0
    assert (host.home / "calls").read_text() == before
    assert "requirements.txt launch/tpu/requirements.txt" in (host.home / "environment").read_text()


# --- GKE ---

JOBSET = [
    *("--name=stage1", "--image=repo/unialign:1", "--claim=filestore", "--config=configs/stage1.py"),
    *("--accelerator=v5e", "--topology=16x16", "--workdir=/mnt/unialign/runs/a"),
]


def render(desk, *arguments):
    yaml = pytest.importorskip("yaml", reason="PyYAML, which reads the manifest back, is not installed")
    result = desk.run("jobset.sh", "render", *JOBSET, *arguments)
    assert result.returncode == 0, result.stderr
    assert "__" not in re.sub("#.*", "", result.stdout)
    return yaml.safe_load(result.stdout)


def test_the_manifest_is_one_pod_a_host_that_restart_together(desk):
    manifest = render(desk, "--slices=2", "--spot", "--namespace=team", "--", '--config.text="a & b"')
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "stage1" and manifest["metadata"]["namespace"] == "team"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 10
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2
    assert job["parallelism"] == job["completions"] == 64 and job["backoffLimit"] == 0
    assert manifest["spec"]["failurePolicy"]["rules"] == [
        {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    disrupted, ended = job["podFailurePolicy"]["rules"]
    assert disrupted["action"] == ended["action"] == "FailJob"
    assert [condition["type"] for condition in disrupted["onPodConditions"]] == ["DisruptionTarget"]
    # Kubernetes wants them in order. 1 and 134 (crashes) are not among them: they count.
    assert ended["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [75, 143]}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 600
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert container["args"][:2] == ["--config=configs/stage1.py", "--workdir=/mnt/unialign/runs/a"]
    assert container["args"][2:] == ['--config.text="a & b"']
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "filestore"
    assert container["volumeMounts"][0]["mountPath"] == "/mnt/unialign"


def test_a_manifest_without_spot(desk):
    manifest = render(desk, "--accelerator=v4", "--topology=4x4x8", "--grace=90", "--max-restarts=3")
    (slices,) = manifest["spec"]["replicatedJobs"]
    pod = slices["template"]["spec"]["template"]["spec"]
    assert slices["replicas"] == 1 and slices["template"]["spec"]["parallelism"] == 32
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["google.com/tpu"]
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3 and pod["terminationGracePeriodSeconds"] == 90


def test_jobset_commands(desk):
    assert desk.run("jobset.sh", "apply", *JOBSET).returncode == 0
    assert [call.split()[0] for call in desk.calls] == ["get", "apply"] and desk.calls[-1] == "apply -f -"
    assert "kind: JobSet" in (desk.folder / "manifest").read_text()
    deleted = desk.run("jobset.sh", "delete", "--name=stage1", "--namespace=team")
    assert deleted.returncode == 0
    assert desk.calls[-1] == "delete jobset stage1 --namespace=team --ignore-not-found"
    # The pods outlive the JobSet while they save.
    wait = "kubectl wait --for=delete pods --namespace=team --selector=jobset.sigs.k8s.io/jobset-name=stage1"
    assert f"{wait} --timeout=600s" in deleted.stdout.splitlines()


@pytest.mark.parametrize(
    ("conditions", "ended"),
    [("StartupPolicyCompleted", False), ("StartupPolicyCompleted Completed", True), ("Failed", True)],
)
def test_apply_says_that_a_jobset_has_ended(desk, conditions, ended):
    (desk.folder / "conditions").write_text(conditions)
    result = desk.run("jobset.sh", "apply", *JOBSET)
    if ended:
        assert_one_line_error(result, f"stage1 has ended ({conditions})", "delete it first", "/mnt/unialign/runs/a")
    else:
        assert result.returncode == 0, result.stderr
    assert ("apply -f -" in desk.calls) == (not ended)


def test_a_dry_jobset_calls_nothing(desk):
    result = desk.run("jobset.sh", "apply", *JOBSET, "--dry-run")
    assert result.returncode == 0 and desk.calls == []
    assert "kubectl apply -f -" in result.stdout and "kind: JobSet" in result.stdout
    assert "kubectl get jobset stage1 " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["apply", "--name=a"], ["--image", "--topology", "--claim"]),
        (["render", *JOBSET, "--topology=16"], ["16", "4x4x8"]),
        (["render", *JOBSET, "--topology=3x3"], ["9 chips", "--chips-per-host"]),
        (["render", *JOBSET, "--accelerator=h100"], ["h100"]),
        (["apply", *JOBSET, "--workdir=/tmp/run"], ["/tmp/run", "/mnt/unialign"]),
    ],
)
def test_bad_jobset_flags_are_one_line(desk, arguments, words):
    assert_one_line_error(desk.run("jobset.sh", *arguments), *words)
    assert desk.calls == []


def test_kubectl_errors_are_one_line(desk):
    (desk.folder / "kubectl_error").write_text("error: no matches for kind JobSet\nensure CRDs are installed first\n")
    assert_one_line_error(desk.run("jobset.sh", "apply", *JOBSET), "no matches for kind JobSet ensure CRDs")
