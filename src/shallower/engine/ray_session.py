"""A connection to Ray: started on this machine, or a cluster that runs; quiet in both cases."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shallower.errors import UserError, first_line
from shallower.resources import cluster

ASIDE = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent home
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # without it Ray warns of what it will do in later versions
}


@dataclass(frozen=True)
class Session:
    """What Ray offers. ray: the module.

    count: workers that it has room for. neighbours: most of them on one machine. sharing: most of them in one memory:
    on one machine, or on one GPU. threads: of torch, for each.
    placement: what Ray reserves for each. ours: we started or joined it, and leave it again.
    """

    ray: Any
    count: int
    neighbours: int
    sharing: int
    threads: int
    placement: Mapping[str, float]
    ours: bool

    def close(self) -> None:
        """Leave Ray; one that was started on this machine ends."""
        if self.ours:
            self.ray.shutdown()


def connect(asked: int | str, device: torch.device) -> Session:
    """Start Ray on this machine for a number of workers, or join the cluster at an address (`auto:4`: with at most 4).

    A Ray that this process is connected to already is used as it is. Raises UserError when no cluster answers, it has
    no processor or GPU to offer, or a GPU other than the first was chosen by its number.
    """
    if device.type == "cuda" and device.index:
        raise UserError(
            f"--device {device} with --workers {asked}: Ray decides which GPU each worker has. Write --device cuda "
            f"(for that GPU alone after setting CUDA_VISIBLE_DEVICES={device.index}), or drop --workers."
        )
    for name, value in ASIDE.items():
        os.environ.setdefault(name, value)
    import ray

    address, limit = ("local", None) if isinstance(asked, int) else cluster(asked)
    ours = not ray.is_initialized()
    if ours:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        before = signal.getsignal(signal.SIGTERM)
        try:
            if isinstance(asked, int):
                ray.init(address=address, num_cpus=asked, include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, ImportError, RuntimeError, ValueError, TimeoutError) as error:
            reason = first_line(error).rstrip(".")
            raise UserError(
                f"--workers {asked}: Ray cannot be reached ({reason}). Start a cluster with 'ray start --head', set "
                "RAY_ADDRESS, or write --workers N for workers on this machine."
            ) from error
        finally:
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray's own would end the process without a word
    key = "GPU" if device.type == "cuda" else "CPU"
    offered = float(ray.cluster_resources().get(key, 0))
    if isinstance(asked, int):
        placement = {"num_cpus": 0.0}  # they share the cores by their number of threads, whatever Ray counts
        sharing = asked
        if key == "GPU" and offered >= 1:
            sharing = -(-asked // int(offered))
            placement["num_gpus"] = 1 / sharing
        return Session(ray, asked, asked, sharing, max(1, torch.get_num_threads() // asked), placement, ours)
    if offered < 1:
        raise UserError(
            f"--workers {asked}: the Ray cluster has no {key}; choose another --device, or add a node to it."
        )
    most = max(int(node["Resources"].get(key, 0)) for node in ray.nodes() if node["Alive"])
    placement = {"num_cpus": 0.0, "num_gpus": 1.0} if key == "GPU" else {"num_cpus": 1.0}
    count = int(offered) if limit is None else min(limit, int(offered))
    neighbours = max(1, min(count, most))
    return Session(ray, count, neighbours, 1 if key == "GPU" else neighbours, 1, placement, ours)
