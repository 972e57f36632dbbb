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
"""The options by which a stage is made by tasks of a job array, or of Ray"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass
class TaskOptions:
    """Options of the stages whose shards independent tasks can make (docs/cluster.md)."""

    num_tasks: int | None = field(
        default=None, metadata={"help": "Number of tasks that share the shards: those of a job array, or of Ray."}
    )
    task_index: int | None = field(
        default=None,
        metadata={
            "help": (
                "Make only the shards of this task, from 0, and publish nothing. When all tasks have ended, the same "
                "command without it publishes."
            )
        },
    )
    store: str | None = field(
        default=None,
        metadata={
            "help": (
                "Object store that holds the datastore, such as s3://bucket/articles. The folder on this machine is a "
                "copy, which is brought up to date first; what is made is published in the store."
            )
        },
    )
    ray: str | None = field(
        default=None,
        metadata={"help": "Run all tasks on this Ray cluster: its address, 'auto', or 'local' to start one here."},
    )
    ray_cpus: float = field(default=1, metadata={"help": "Cores of a task of Ray."})
    ray_gpus: float = field(default=0, metadata={"help": "GPUs of a task of Ray."})


def run_stage(stage: Callable[..., Any], options: dict[str, Any], tasks: TaskOptions) -> Any | None:
    """
    Runs a stage: here, on Ray, or only the share of a task.

    Args:
        stage (`Callable`): The function of the stage.
        options (`dict`): Its arguments.
        tasks ([`TaskOptions`]): Who runs it.

    Returns:
        what the stage returns, or None for a share, which publishes nothing and says so.

    Raises:
        ValueError: If the options contradict one another.
    """
    call = partial(stage, **options)
    folder = options.get("datastore") or options.get("output_dir")
    if tasks.num_tasks is None:
        if tasks.task_index is not None or tasks.ray is not None:
            raise ValueError("give --num_tasks, the number of tasks that share the shards")
        if tasks.store is not None:
            from data_prep.object_store import run_on_store

            return run_on_store(call, folder, tasks.store)
        return call()
    if (tasks.task_index is None) == (tasks.ray is None):
        raise ValueError("--num_tasks needs either --task_index, the number of this task, or --ray, which starts all")
    if tasks.num_tasks < 1:
        raise ValueError(f"--num_tasks is {tasks.num_tasks}, expected at least 1")
    if tasks.ray is not None:
        if tasks.store is not None:
            raise ValueError(
                "--ray works on a folder that all nodes see, and --store on copies; leave out one of them"
            )
        if options.get("force"):
            raise ValueError("--force removes what is there, and tasks remove nothing; leave out --ray with it")
        from data_prep.ray_tasks import run_on_ray

        return run_on_ray(call, tasks.num_tasks, tasks.ray, tasks.ray_cpus, tasks.ray_gpus)
    if tasks.store is not None:
        from data_prep.object_store import run_share_on_store

        made = run_share_on_store(call, folder, tasks.store, tasks.task_index, tasks.num_tasks)
    else:
        from data_prep.shares import run_share

        made = run_share(call, tasks.task_index, tasks.num_tasks)
    print(f"task {tasks.task_index} of {tasks.num_tasks} made {made} shards; nothing is published yet", flush=True)
    return None
