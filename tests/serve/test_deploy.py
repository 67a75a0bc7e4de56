"""The files for deployment: their commands are ones that this package has. Nothing here starts a container."""

import argparse
import contextlib
import http.client
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import Serving

from turbochain.engines import cli
from turbochain.runtime.serve import command
from turbochain.runtime.serve.settings import Settings

DEPLOY = Path(command.__file__).parent / "deploy"
ROOT = Path(__file__).parents[2]


def entrypoint(name: str) -> list[list[str]]:
    """The commands of a Dockerfile's entry point, in order."""
    text = (DEPLOY / name).read_text()
    words = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.M)[-1])
    if words[:2] != ["sh", "-c"]:
        return [words]
    return [shlex.split(part.strip().removeprefix("exec ").replace('"$@"', "")) for part in words[2].split("&&")]


def settings(words: list[str], tmp_path: Path) -> Settings:
    """What the server makes of its options, with a key's file that is there."""
    assert words[:2] == ["turbochain", "serve"]
    key = tmp_path / "api-key"
    key.write_text("secret\n")
    given = [str(key) if word.endswith("/api-key") else word for word in words[2:]]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.settings_of(parser.parse_args(given))


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("service", ["cpu", "gpu"])
def test_the_containers_command_is_the_servers(service: str, tmp_path: Path) -> None:
    found = compose()["services"][service]
    folder, file = found["build"]["context"], found["build"]["dockerfile"]
    assert (DEPLOY / folder).resolve() == ROOT and (ROOT / file).parent == DEPLOY
    read = settings([*entrypoint(Path(file).name)[-1], *found["command"]], tmp_path)
    assert (read.host, read.port, read.bundles, read.api_keys) == ("0.0.0.0", 8000, ("/bundle",), ("secret",))
    assert float(found["stop_grace_period"].removesuffix("s")) > read.timeout
    assert f"{read.bundles[0]}:ro" in found["volumes"][0]
    assert found["ports"] == [f"127.0.0.1:8000:{read.port}"]


def test_what_dockerfiles_copy_exists_and_no_server_runs_as_root() -> None:
    for name in ("cpu.Dockerfile", "gpu.Dockerfile"):
        text = (DEPLOY / name).read_text()
        for paths in re.findall(r"^COPY (.*) \S+$", text, re.M):
            assert all((ROOT / path).exists() for path in paths.split())
        check = json.loads(re.findall(r"CMD (\[.+\])$", text, re.M)[0])
        compile(check[2], "HEALTHCHECK", "exec")
        assert re.search(r"^USER turbochain$", text, re.M) and re.search(r"^STOPSIGNAL SIGTERM$", text, re.M)


def test_the_gpus_engine_is_built_by_a_command_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    build, serve = entrypoint("gpu.Dockerfile")
    assert build[0] == "build-engine" and build[1] == serve[2]
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"{option} " in told for option in build if option.startswith("--"))


def test_the_unit_starts_the_server(tmp_path: Path) -> None:
    lines = (DEPLOY / "turbochain.service").read_text().splitlines()
    unit = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    program, *words = shlex.split(unit["ExecStart"])
    read = settings([Path(program).name, *words], tmp_path)
    assert read.api_keys == ("secret",) and float(unit["TimeoutStopSec"]) > read.timeout
    if analyze := shutil.which("systemd-analyze"):
        here = tmp_path / "turbochain.service"
        here.write_text("\n".join(lines).replace(program, sys.executable))
        done = subprocess.run([analyze, "verify", str(here)], capture_output=True, text=True)
        told = [line for line in done.stderr.splitlines() if "turbochain.service" in line]
        assert not told, told


def test_another_servers_clients_need_a_key(server: Serving) -> None:
    """Whoever comes from elsewhere, by a proxy that says so or because Ray listens at every address."""

    def status(path: str, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status

    elsewhere = {"X-Forwarded-For": "203.0.113.9"}
    assert status("/v1/models", {}) == status("/readyz", elsewhere) == 200
    assert status("/v1/models", elsewhere) == 403


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
@pytest.mark.parametrize("name", ["ray-cpu.yaml", "ray-gpu.yaml"])
def test_ray_reads_its_configuration(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from turbochain.runtime.serve import ray

    config = ServeDeploySchema.model_validate(yaml.safe_load((DEPLOY / name).read_text()))
    [application] = config.applications
    assert application.import_path == f"{ray.__name__}:{ray.app.__name__}"
    arguments = ray.Arguments.model_validate(application.args)
    assert arguments.settings.threads == arguments.num_cpus
    assert config.http_options.request_timeout_s > arguments.timeout  # type: ignore[operator]
    assert isinstance(ray.app(arguments), ray.serve.Application)
