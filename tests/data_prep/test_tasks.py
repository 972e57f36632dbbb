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
"""The tasks of a job array and of Ray leave the bytes of one process, whatever their order and whoever is killed."""

import json
import random
import signal
import threading
import time
from functools import partial

import pytest
from child_processes import CHILDREN
from executor_stages import stages_of

from data_prep import join, shares
from data_prep.index import build_index, read_embeddings
from data_prep.neighbors import find_neighbors
from data_prep.scripts import embed as embed_script
from data_prep.shares import TASKS_LOCK, run_share
from modeling_retro.datastore.datastore import RetroDatastore
from modeling_retro.datastore.manifest import read_manifest


@pytest.fixture
def stages(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    return stages_of(tmp_path, tiny_tokenizer, tiny_encoder_dir, num_texts=90)


@pytest.fixture
def reference(stages, tmp_path):
    for stage in stages(tmp_path / "reference"):
        stage()
    return files_of(tmp_path / "reference")


def is_shared(stage):
    return stage.func is not build_index


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 2, 0, 0)])
def test_shares_in_any_order_are_published_by_the_stage_itself(stages, reference, tmp_path, order):
    path = tmp_path / "datastore"
    for name, stage in zip(("chunks", "embeddings", "", "neighbors"), stages(path), strict=True):
        if is_shared(stage):
            made = [run_share(stage, index, 3) for index in order]
            assert sum(made) == len(read_manifest(path).train.chunks.parts) > 3
            assert getattr(read_manifest(path).train, name).shards == []  # not published
        stage()
    assert files_of(path) == reference


def test_a_share_that_is_missing_is_made_by_the_run_that_publishes(stages, reference, tmp_path):
    for stage in stages(tmp_path / "datastore"):
        if is_shared(stage):
            run_share(stage, 1, 2)
        stage()
    assert files_of(tmp_path / "datastore") == reference
    for stage in filter(is_shared, stages(tmp_path / "datastore")):
        assert run_share(stage, 0, 2) == 0  # all is there
    assert files_of(tmp_path / "datastore") == reference


def task(stage, index, number):
    run_share(stage, index, number)


def run_array(stage, number, kill=None):
    """
    Runs the tasks of an array in three processes at a time, as a scheduler does. `kill` says after how many seconds a
    task is killed, or None; a killed task is queued again.

    Returns the number of kills.
    """
    queue, running, kills = list(range(number)), {}, 0
    while queue or running:
        while queue and len(running) < 3:
            index = queue.pop(0)
            process = CHILDREN.Process(target=task, args=(stage, index, number))
            process.start()
            seconds = kill() if kill is not None else None
            running[index] = process, None if seconds is None else time.monotonic() + seconds
        for index, (process, deadline) in list(running.items()):
            if deadline is not None and time.monotonic() > deadline and process.is_alive():
                process.kill()
            if not process.is_alive():
                process.join()
                del running[index]
                if process.exitcode:
                    assert process.exitcode == -signal.SIGKILL
                    kills += 1
                    queue.append(index)
        time.sleep(0.005)
    return kills


def test_tasks_at_the_same_time_agree_who_begins(stages, reference, tmp_path):
    for stage in stages(tmp_path / "datastore"):
        if is_shared(stage):
            run_array(stage, 4)
        stage()
    assert files_of(tmp_path / "datastore") == reference


@pytest.mark.slow
def test_arrays_whose_tasks_are_killed_end_with_the_same_bytes(stages, reference, tmp_path):
    generator, kills, trial = random.Random(0), {}, 0
    while sum(kills.values()) < 20:
        path = tmp_path / f"trial-{trial}"
        for stage in stages(path):
            if is_shared(stage):
                # Two of three tasks are killed; those that are queued again live longer.
                number = run_array(stage, 4, lambda: generator.choice([None, *[generator.uniform(0.02, 2.5)] * 2]))
                kills[stage.func.__name__] = kills.get(stage.func.__name__, 0) + number
            stage()
        assert files_of(path) == reference
        trial += 1
    print(f"kills of tasks of an array: {kills}")
    assert len(kills) == 3


def test_only_tasks_write_beside_tasks(stages, tmp_path):
    path = tmp_path / "datastore"
    chunk, embed, *_ = stages(path)
    chunk()
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        share = shares.Share(0, 2)
        with share.lock(path):
            share.begin()
            inside.set()
            go_on.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(60)
    try:
        with pytest.raises(ValueError, match="another run is writing to"):
            embed()
        waiting = threading.Thread(target=run_share, args=(embed, 1, 2))
        waiting.start()  # may not begin the stage, because another task runs, which could have
        waiting.join(2)
        assert waiting.is_alive() and read_manifest(path).train.embeddings is None
    finally:
        go_on.set()
        holder.join()
    waiting.join(60)
    assert not waiting.is_alive() and (path / TASKS_LOCK).exists()
    embed()
    RetroDatastore.from_pretrained(path).verify()


def test_tasks_share_the_copy_of_a_join(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(join, "_QUERIES_OF_A_LIST", 0)
    for name in ("reference", "datastore"):
        chunk, embed, index, neighbors = stages(tmp_path / name)
        chunk(), embed(), partial(index, factory="IVF4,SQ8")()
        if not join.can_join(RetroDatastore.from_pretrained(tmp_path / name), "dense", 1000):
            pytest.skip("this processor does not multiply 8-bit integers")
        if name == "datastore":
            assert run_share(neighbors, 1, 2) and list((tmp_path / name).glob(".join-*"))
            monkeypatch.setattr(shares, "_share", shares.Share(0, 2))
            opened = RetroDatastore.from_pretrained(tmp_path / name)
            embeddings = read_embeddings(tmp_path / name, "train", opened.manifest)
            join.ListJoin(opened, embeddings)  # uses the copy
            shares.remove_shared_work(tmp_path / name)
            with pytest.raises(shares.NotBegunError):
                join.ListJoin(opened, embeddings)  # may not write it
            monkeypatch.setattr(shares, "_share", None)
            assert run_share(neighbors, 0, 2)
        neighbors()
    found = files_of(tmp_path / "datastore")  # of which this test read a version
    assert {name: found[name] for name in found if "versions/" not in name} == files_of(tmp_path / "reference")


def test_a_task_with_other_options_or_another_datastore_is_refused(stages, tmp_path, tiny_encoder_dir):
    path = tmp_path / "datastore"
    chunk, embed, *_ = stages(path)
    run_share(chunk, 0, 2)
    with pytest.raises(ValueError, match="`chunk` was begun with shard_bytes=2000, not 500"):
        run_share(partial(chunk.func, *chunk.args, **chunk.keywords | {"shard_bytes": 500}), 1, 2)
    with pytest.raises(ValueError, match="no finished chunks"):
        run_share(embed, 0, 2)  # before the chunks are published
    chunk()
    run_share(embed, 0, 2)
    with pytest.raises(ValueError, match="`embed` was begun with dtype='float32', not 'bfloat16'"):
        run_share(partial(embed, dtype="bfloat16"), 1, 2)
    with pytest.raises(ValueError, match="a task makes shards and removes nothing"):
        run_share(partial(embed, force=True), 1, 2)


def test_what_tasks_cannot_do_is_refused(stages, tmp_path, monkeypatch):
    chunk = stages(tmp_path / "datastore")[0]
    with pytest.raises(ValueError, match="with max_chunks are made in order"):
        run_share(partial(chunk, max_chunks=5), 0, 2)
    for index, number in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"task {index} of {number} does not exist"):
            run_share(chunk, index, number)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a task is one process"):
        run_share(chunk, 0, 2)


def test_the_command_makes_shares_and_then_publishes(stages, tmp_path, tiny_encoder_dir, capsys):
    path = tmp_path / "datastore"
    stages(path)[0]()
    words = ["--datastore", str(path), "--encoder", str(tiny_encoder_dir)]
    for index in range(2):
        embed_script.main([*words, "--num_tasks", "2", "--task_index", str(index)])
        assert f"task {index} of 2 made" in capsys.readouterr().out
        assert json.loads((path / "datastore.json").read_text())["splits"]["train"]["embeddings"]["shards"] == []
    embed_script.main(words)
    assert "chunks are embedded, in" in capsys.readouterr().out
    for options, error in (
        (["--num_tasks", "2"], "needs either --task_index"),
        (["--task_index", "2"], "give --num_tasks"),
        (["--num_tasks", "2", "--task_index", "0", "--ray", "auto"], "needs either"),
        (["--num_tasks", "0", "--ray", "auto"], "--num_tasks is 0, expected at least 1"),
        (["--num_tasks", "2", "--ray", "auto", "--force"], "leave out --ray"),
    ):
        with pytest.raises(ValueError, match=error):
            embed_script.main([*words, *options])


@pytest.fixture(scope="module")
def ray_cluster():
    """A Ray cluster of a head that runs no tasks, and functions to add and to kill nodes."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    patience = {"worker_register_timeout_seconds": 600}  # of a machine that does other work too
    arguments = {"num_cpus": 0, "include_dashboard": False, "_system_config": patience}
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def test_ray_makes_the_same_bytes(stages, reference, tmp_path, ray_cluster):
    from data_prep.ray_tasks import run_on_ray

    for stage in stages(tmp_path / "datastore"):
        if is_shared(stage):
            run_on_ray(stage, 3, ray_cluster.address)
        else:
            stage()
    assert files_of(tmp_path / "datastore") == reference
    with pytest.raises(ValueError, match="num_neighbors must lie between 1 and the"):
        run_on_ray(partial(find_neighbors, tmp_path / "datastore", num_neighbors=10**6), 2, ray_cluster.address)


@pytest.mark.slow
def test_ray_whose_workers_and_nodes_are_killed_ends_with_the_same_bytes(stages, reference, tmp_path, ray_cluster):
    import psutil

    from data_prep.ray_tasks import run_on_ray

    generator, kills, trial = random.Random(0), {"worker": 0, "node": 0}, 0
    over = threading.Event()

    def workers():
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or [""]
            found += [process] if words[0].startswith("ray::_run_task") else []
        return found

    def kill():
        while not over.wait(generator.uniform(1, 10)):
            if not (running := workers()):
                continue
            if len(nodes := list(ray_cluster.worker_nodes)) > 1 and generator.random() < 0.3:
                ray_cluster.remove_node(nodes[0], allow_graceful=False)
                kills["node"] += 1
            else:
                victim = generator.choice(running)
                try:
                    victim.kill()
                    kills["worker"] += 1
                except psutil.NoSuchProcess:
                    pass

    for _ in range(2):  # only the main thread can start nodes
        ray_cluster.add_node(num_cpus=2)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while sum(kills.values()) < 20 or not kills["node"]:
            for stage in stages(tmp_path / f"trial-{trial}"):
                if is_shared(stage):
                    run_on_ray(stage, 3, ray_cluster.address)
                else:
                    stage()
            assert files_of(tmp_path / f"trial-{trial}") == reference
            trial += 1
            print(f"the same bytes after {kills}")
    finally:
        over.set()
        killer.join()
    print(f"kills on Ray in {trial} datastores: {kills}")


def run_stages_on_ray(stages, address):
    from data_prep.ray_tasks import run_on_ray

    for stage in stages:
        if is_shared(stage):
            run_on_ray(stage, 3, address)
        else:
            stage()


@pytest.mark.slow
def test_a_run_on_ray_that_is_killed_itself_ends_with_the_same_bytes(stages, reference, tmp_path, ray_cluster):
    """The process that starts the tasks and publishes is killed, and run again."""
    generator, kills, trial = random.Random(1), 0, 0
    while kills < 15:
        path, limit = tmp_path / f"trial-{trial}", 10.0
        while True:
            process = CHILDREN.Process(target=run_stages_on_ray, args=(stages(path), ray_cluster.address))
            process.start()
            process.join(generator.uniform(0.2, 1) * limit)
            process.kill()
            process.join()
            if not process.exitcode:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            limit *= 1.15  # so that a run gets somewhere
        assert files_of(path) == reference
        trial += 1
        print(f"the same bytes in {trial} datastores after {kills} kills of the run itself")
