"""What lies in deploy/, as far as it can be tried without a cluster: read, and the commands in it run."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from tests.launches import ROOT, finish, small_config, small_data, wait_for

DEPLOY = ROOT / "deploy"
SRUN = '#!/bin/bash\necho "$@" >> "$PWD/ran"\nexec "$@"\n'
SCONTROL = '#!/bin/bash\nif [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$PWD/queued"; fi\n'


def test_the_image_is_made_of_files_and_extras_that_there_are() -> None:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert {words[0] for words in lines} <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT"}
    copied = [name.strip("/") for words in lines if words[0] == "COPY" for name in words[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    kept = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == set(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert 'ENTRYPOINT ["distkgd"]' in text and "distkgd" in project["scripts"]


def test_the_job_of_kubernetes_runs_a_command_that_there_is(tmp_path: Path) -> None:
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    python, launcher, config, *rest = shlex.split(spec["entrypoint"])
    assert python == "python" and (ROOT / launcher).is_file() and (ROOT / config).is_file()
    asked = subprocess.run([sys.executable, launcher, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(word in asked.stdout for word in rest if word.startswith("--"))
    assert (
        environment["working_dir"] == "/opt/distkgd" and "WORKDIR /opt/distkgd" in (DEPLOY / "Dockerfile").read_text()
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"ray[default,tune,train]=={spec['rayClusterSpec']['rayVersion']}" in project["optional-dependencies"]["ray"]
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for group in groups:  # every pod sees the run folder, and knows the token
        (container,) = group["template"]["spec"]["containers"]
        assert rest[-1].startswith(container["volumeMounts"][0]["mountPath"])
        assert {one["name"] for one in container["env"]} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_a_job_of_slurm_that_is_stopped_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    config = small_config(tmp_path / "plan.yaml", small_data(tmp_path / "data"), student={"epochs": 30})
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here"}
    programs = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    job |= {"PATH": programs, "PYTHONPATH": str(ROOT), "RDZV_PORT": str(port)}

    def submitted(cpus: int) -> "subprocess.Popen[str]":
        command = ["bash", str(DEPLOY / "slurm.sh"), str(config), "--out", "run"]
        with (tmp_path / "output.txt").open("a", encoding="utf-8") as output:
            where = {"cwd": tmp_path, "env": os.environ | job | {"SLURM_CPUS_PER_TASK": str(cpus)}}
            where |= {"stdout": output, "stderr": output}
            return subprocess.Popen(command, text=True, **where)

    first, stage = submitted(2), tmp_path / "run/stages/student"
    wait_for(first, tmp_path, lambda: any((stage / "checkpoint").glob("step_*")))
    first.send_signal(signal.SIGTERM)
    code, said = finish(first, tmp_path)
    assert code != 0 and "--resume" in said, said
    assert (tmp_path / "queued").read_text().split() == ["requeue", "7"]
    assert not (tmp_path / "run/report.json").exists()
    code, said = finish(submitted(1), tmp_path)
    assert code == 0 and (tmp_path / "run/report.json").is_file(), said
    assert "goes on" in said or "resum" in said, said
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert [words[words.index("--nproc-per-node") + 1] for words in ran] == ["2", "1"]


def test_a_job_of_slurm_without_a_run_folder_says_so() -> None:
    done = subprocess.run(["bash", DEPLOY / "slurm.sh", "x.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "give --out FOLDER, on a disk that all nodes see\n"
