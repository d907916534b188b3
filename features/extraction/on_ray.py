"""Shards made by an actor pool of Ray Data: on one machine or a cluster.

Knows Ray. Must not know what a shard is: it hands out numbers and collects what is said of them. Ray starts an actor
that died anew and gives its number out again; what makes this safe is that work on a shard resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError, require_extra
from deltaclip.base.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# Of a number, plain values; `error` among them is (message, place, remedy) where the input was wrong.
Worker = Callable[[int], dict[str, Any]]


def run_on_ray(
    make_worker: Callable[[], Worker], numbers: Sequence[int], *, address: str, workers: int, use_gpus: bool
) -> list[dict[str, Any]]:
    """Do the work of every number in a pool of actors and return what they said, in any order.

    Args:
        make_worker: called once in every actor; it can be sent to another machine, and keeps what is costly to make.
        numbers: what to do.
        address: `local` starts Ray on this machine and stops it afterwards; else that of a cluster, or `auto`.
        workers: actors; fewer where the cluster has no room for so many.
        use_gpus: give each actor a GPU where the cluster has any.

    Raises:
        UserError: Ray is not installed, no cluster answers, or a worker says that the input is wrong.
    """
    require_extra("distributed", "ray", place="--ray")
    import ray
    import ray.data

    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no cluster answers ({reason})", place="--ray", remedy="give local, or its address") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, num_cpus, num_gpus = share_of_actor(nodes, workers, use_gpus=use_gpus)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        said = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=len(numbers)).map_batches(
            _Actor,
            fn_constructor_args=(make_worker,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        found = []
        with Progress(len(numbers), "extracting", unit="shards") as progress:
            for row in said.iter_rows():
                found.append(row["said"])
                progress.advance()
    finally:
        ray.shutdown()
    wrong = [one["error"] for one in found if one.get("error")]
    if wrong:
        message, place, remedy = wrong[0]
        more = f" ({len(wrong)} of {len(numbers)} shards failed)" if len(wrong) > 1 else ""
        raise UserError(message + more, place=place, remedy=remedy)
    return found


def share_of_actor(
    nodes: Sequence[Mapping[str, float]], workers: int, *, use_gpus: bool
) -> tuple[int, int, int | None]:
    """Return how many actors have room, and the processors and GPUs of each; one that fits no machine never starts.

    Args:
        nodes: by machine what it has; `CPU` and `GPU` count.
        workers: how many are asked for.
        use_gpus: give each a GPU where any machine has one.
    """
    with_gpus = [node for node in nodes if node.get("GPU")] if use_gpus else []
    if with_gpus:
        workers = min(workers, max(1, sum(int(node["GPU"]) for node in with_gpus)))
    cpus = [int(node.get("CPU", 0)) for node in with_gpus or nodes]
    workers = min(workers, max(1, sum(cpus)))
    fitting = (share for share in range(max(cpus, default=1), 0, -1) if sum(n // share for n in cpus) >= workers)
    return workers, next(fitting, 1), 1 if with_gpus else None


class _Actor:
    """One process of the pool: its worker is made once."""

    def __init__(self, make_worker: Callable[[], Worker]) -> None:
        self.worker = make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"said": [self.worker(int(number)) for number in batch["number"]]}
