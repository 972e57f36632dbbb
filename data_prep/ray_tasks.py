# Copyright 2026 The RETRO for Hugging Face authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Runs the tasks of a stage on a Ray cluster, whose nodes all see the folder of the datastore"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

from data_prep.shares import run_share


# A task is made again as often, if its worker or its node dies.
_RETRIES = 10


def run_on_ray(
    stage: Callable[[], Any], num_tasks: int, address: str = "local", cpus: float = 1, gpus: float = 0
) -> Any:
    """
    Runs a stage as tasks of Ray, and then publishes it here. If this process is killed, the same call goes on.

    Args:
        stage (`Callable`): Runs the stage, such as `partial(embed_chunks, "datastore", "encoder")`.
        num_tasks (`int`): Number of tasks. Each opens the datastore and the encoder once and makes its share.
        address (`str`, *optional*, defaults to `"local"`):
            Address of the cluster, `"auto"` for the one that this machine belongs to, or `"local"` to start one here.
        cpus (`float`, *optional*, defaults to 1): Cores of a task.
        gpus (`float`, *optional*, defaults to 0): GPUs of a task.

    Returns:
        what the stage returns.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If a task fails as the stage fails: the error is that of the stage. Finished shards stay.
        ConnectionError: If there is no cluster, or the worker of one task died again and again.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('Ray is not installed: pip install "retro-transformers[ray]"') from error
    with _connected(ray, address):
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(_run_task)
        # Relative paths mean the same in all tasks.
        waiting = [remote.remote(stage, index, num_tasks, os.getcwd()) for index in range(num_tasks)]
        try:
            with tqdm(total=num_tasks, desc="Tasks of Ray", unit="task") as progress:
                while waiting:
                    done, waiting = ray.wait(waiting)
                    ray.get(done)
                    progress.update(len(done))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConnectionError(f"Ray could not run a task, after {_RETRIES} retries if it died: {first}") from error
        finally:
            for task in waiting:
                ray.cancel(task, force=True)
    return stage()


def _run_task(stage: Callable[[], Any], index: int, number: int, folder: str) -> int:
    os.chdir(folder)
    return run_share(stage, index, number)


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """A connection to the cluster, unless this process has one already."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"there is no Ray cluster at {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
