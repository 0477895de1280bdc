"""Many servers behind one address: Ray Serve starts api.py's app on every machine of a cluster.

    serve run deploy.cluster:app        from the folder where api.py lies

Settings are the same CHAT_... variables, and the CLUSTER_... ones below. A conversation whose
requests carry one X-Session-Id comes back to the server that has it in its cache.
"""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from pydantic_settings import BaseSettings, SettingsConfigDict
from ray import serve
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

import api
from engine import ChatModel
from serving.log_queue import start_log
from serving.settings import Settings, read_settings

Load = Callable[[Settings], ChatModel]


class ClusterSettings(BaseSettings):
    """How many servers, and what each of them gets."""

    model_config = SettingsConfigDict(env_prefix="CLUSTER_", frozen=True)

    gpus: float = 1
    cpus: float = 1
    min_replicas: int = 1
    max_replicas: int = 1


class HomeFirst(ConsistentHashRouter):
    """Sends a conversation home while a place in the batch there is free, else to who has less."""

    def initialize_state(self, *, batch: int) -> None:
        super().initialize_state()
        self.batch = batch

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        ranked = await super().choose_replicas(candidate_replicas, pending_request)
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request and pending_request.metadata.session_id and ranked:
            home = ranked[0][0]
            if (self.replica_queue_len_cache.get(home.replica_id) or 0) < self.batch:
                return [[home], two]
        return [two]


class Chat:
    """One server; Serve counts it as starting until its model is loaded."""

    app: FastAPI  # by serve.ingress

    def __init__(self, settings: Settings, load: Load):
        self.settings, self.load = settings, load

    async def __serve_build_asgi_app__(self) -> FastAPI:
        start_log(self.settings.log_json)
        # On a thread that ends, as in the app itself, which would end the process if this failed:
        # Serve would log that it died, and not the sentence that says why.
        with ThreadPoolExecutor(1) as loader:
            model = await asyncio.wrap_future(loader.submit(self.load, self.settings))
        return api.build_app(self.settings, lambda _: model)

    def check_health(self) -> None:
        if self.app.state.service.health["status"] == "dead":
            raise api.NotServing("the engine is dead")


def build(settings: Settings, cluster: ClusterSettings, load: Load = api.load_served) -> Any:
    """What `serve run` takes: so many servers with these settings."""
    deployment = serve.deployment(
        name="chat",
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        autoscaling_config={
            "min_replicas": cluster.min_replicas,
            "max_replicas": max(cluster.min_replicas, cluster.max_replicas),
            "target_ongoing_requests": settings.max_batch / 2,
        },
        # Room for more than a server takes: it says itself when to come back, in each dialect.
        max_ongoing_requests=2 * (settings.max_batch + settings.max_waiting),
        # Those who wait while there is no server at all.
        max_queued_requests=10_000,
        backpressure_config={"status_code": 429, "retry_after_s": 5},
        health_check_period_s=2,
        # Serve lets the answers under way finish, and none takes longer than that.
        graceful_shutdown_timeout_s=settings.request_timeout,
        request_router_config={
            "request_router_class": HomeFirst,
            "request_router_kwargs": {"batch": settings.max_batch},
        },
    )
    return deployment(serve.ingress()(Chat)).bind(settings, load)


# Without the page, which keeps its state in one server, while Serve sends each call anywhere.
app = build(read_settings(["--no-chat-page"]), ClusterSettings())
