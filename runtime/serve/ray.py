"""The server on Ray Serve: the same application in an ingress, and pictures from replicas on any number of machines.

    serve run turbochain.runtime.serve.ray:app bundle=sd-turbo.bundle max_replicas=4

Needs the extras `serve` and `ray`. The ingress reads the manifests alone: it checks a request, draws its seed and sends
the job; a replica is a worker as `turbochain serve` has one, in a process of its own.
"""

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt
from ray import serve
from ray.serve.config import AutoscalingConfig
from starlette.types import ASGIApp

from turbochain.runtime.errors import InputError
from turbochain.runtime.serve.app import make_app
from turbochain.runtime.serve.command import keys_of
from turbochain.runtime.serve.errors import Refused
from turbochain.runtime.serve.metrics import Metrics
from turbochain.runtime.serve.models import Models
from turbochain.runtime.serve.replicas import Replicas
from turbochain.runtime.serve.service import Service
from turbochain.runtime.serve.settings import Settings
from turbochain.runtime.serve.source import Drawn, Job
from turbochain.runtime.serve.worker import Worker

log = logging.getLogger("turbochain")

SERVER, DRAWING = "Server", "Drawing"
"""The names of the deployments, by which a configuration file can set more of Ray's options."""
CONNECTIONS = 1000
"""How many requests and sockets an ingress holds at once; what may wait for a picture is `queue`."""


def _several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Several = Annotated[tuple[str, ...], BeforeValidator(_several)]
"""One string, or a list of them, as only a configuration file can give it."""


class Arguments(BaseModel):
    """The arguments of `app`; those that `turbochain serve` has too mean what they mean there."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    bundle: Several
    model_name: Several = ()
    api_key: Several = ()
    api_key_file: Path | None = None
    insecure: bool = False
    allow_host: Several = ()
    allow_origin: Several = ()
    queue: int = 16  # pictures that may wait in the ingress, beside those that Ray has
    timeout: float = 60.0
    strict_size: bool = False
    lora_dir: str | None = None  # at the same path on every machine
    memory: PositiveFloat | None = None  # GiB, of each replica
    backend: str | None = None
    device: str | None = None
    trust_engines: bool = False
    num_cpus: PositiveFloat = 1  # of each replica
    num_gpus: Annotated[float, Field(ge=0)] = 0
    threads: PositiveInt | None = None  # of each replica; None for num_cpus
    max_batch_size: PositiveInt = 1  # the engine's batch
    replicas: PositiveInt | None = None  # a fixed number, in place of the two below
    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: PositiveInt = 1
    upscale_delay: PositiveFloat = 3  # seconds of load before there are more replicas
    downscale_delay: PositiveFloat = 300  # seconds of less before there are fewer
    ingress_cpus: Annotated[float, Field(ge=0)] = 0.1

    @property
    def most(self) -> int:
        """Return the largest number of replicas."""
        return self.replicas or self.max_replicas

    @property
    def ongoing(self) -> int:
        """Return how many jobs a replica holds: those of one pass, and of the next, so that it need not wait."""
        return 2 * self.max_batch_size

    @property
    def settings(self) -> Settings:
        """Return the options of the server. Raises InputError."""
        return Settings(
            bundles=self.bundle,
            model_names=self.model_name,
            api_keys=keys_of(self.api_key, self.api_key_file),
            insecure=self.insecure,
            allow_hosts=self.allow_host,
            allow_origins=tuple(origin.rstrip("/") for origin in self.allow_origin),
            queue=self.queue,
            timeout=self.timeout,
            strict_size=self.strict_size,
            lora_dir=self.lora_dir,
            memory_bytes=None if self.memory is None else int(self.memory * 2**30),
            backend=self.backend,
            device=self.device,
            # Ray's OMP_NUM_THREADS is not enough: OpenVINO does not read it.
            threads=self.threads or math.ceil(self.num_cpus),
            trust_engines=self.trust_engines,
        )


def app(arguments: Arguments) -> serve.Application:
    """Return the application, for `serve run`, a configuration file or `ray.serve.run`. Raises InputError."""
    if arguments.min_replicas > arguments.most:
        raise InputError(f"min_replicas is {arguments.min_replicas} and there are at most {arguments.most} replicas")
    settings = arguments.settings
    return _server(arguments, settings).bind(_drawing(arguments).bind(settings, arguments.ongoing))


def _drawing(arguments: Arguments) -> serve.Deployment:
    scaling = AutoscalingConfig(
        min_replicas=arguments.min_replicas,
        max_replicas=arguments.max_replicas,
        target_ongoing_requests=arguments.max_batch_size,
        upscale_delay_s=arguments.upscale_delay,
        downscale_delay_s=arguments.downscale_delay,
        metrics_interval_s=0.5,
        look_back_period_s=2,
    )
    count: dict[str, Any] = {"num_replicas": arguments.replicas} if arguments.replicas else {}
    return serve.deployment(
        Replica,
        name=DRAWING,
        **(count or {"autoscaling_config": scaling}),
        max_ongoing_requests=arguments.ongoing,
        max_queued_requests=arguments.most * arguments.ongoing,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=arguments.timeout,
    )


def _server(arguments: Arguments, settings: Settings) -> serve.Deployment:
    room = arguments.most * arguments.ongoing

    def make() -> ASGIApp:
        handle = serve.get_deployment_handle(DRAWING, serve.get_replica_context().app_name)
        models, metrics = Models.open(settings), Metrics()
        return make_app(Service(models, Replicas(handle, models, settings, metrics, room), settings, metrics))

    return serve.deployment(
        serve.ingress(make)(),
        name=SERVER,
        num_replicas=1,
        max_ongoing_requests=CONNECTIONS,
        max_queued_requests=CONNECTIONS,
        ray_actor_options={"num_cpus": arguments.ingress_cpus},
        graceful_shutdown_timeout_s=arguments.timeout,
    )


class Replica:
    """A replica: a worker, which takes what it holds of one kind together. Ray starts another if it dies.

    `ray.serve.batch` is not used: it takes requests of different kinds together, and does not cancel them.
    """

    async def __init__(self, settings: Settings, ongoing: int) -> None:  # type: ignore[misc]
        """Load the first model and draw a picture with it; until then Ray sends nothing. Raises what prevents it."""
        settings = dataclasses.replace(settings, queue=max(settings.queue, ongoing))
        self._worker = Worker(Models.open(settings), settings, Metrics())
        await self._worker.start()
        await self._worker.begun()
        await self.check_health()

    async def draw(self, job: Job) -> Drawn | Refused:
        """Return a picture or a refusal. A refusal is not raised, because Ray would log its traceback."""
        try:
            return await self._worker.draw(job)
        except Refused as refused:
            if (refused.status, refused.code) == (503, "failed"):  # the worker ends: only a new process can draw
                log.error("this replica ends: %s", refused)
                os._exit(1)
            return refused

    async def ready(self) -> int:
        """Return the id of this process, once it can draw."""
        return os.getpid()

    async def check_health(self) -> None:
        """Raise what ended the worker; Ray calls it every few seconds."""
        if self._worker.problem is not None:
            raise self._worker.problem

    async def __del__(self) -> None:
        """Draw all accepted pictures; Ray calls this before it stops the process."""
        await self._worker.close()
