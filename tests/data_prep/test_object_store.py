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
"""A datastore in an object store: the same bytes, one publication at a time, and what is refused."""

import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from child_processes import CHILDREN
from conftest import TINY_CHUNK_SIZE, make_texts, write_jsonl
from executor_stages import stages_of

from data_prep.chunk import chunk_documents
from data_prep.embed import embed_chunks
from data_prep.index import build_index
from data_prep.object_store import (
    ObjectStore,
    pull_datastore,
    push_datastore,
    run_on_store,
    run_share_on_store,
)
from data_prep.scripts import embed as embed_script
from data_prep.scripts import pull as pull_script
from data_prep.scripts import push as push_script
from modeling_retro.datastore.datastore import RetroDatastore


@pytest.fixture(scope="module")
def s3_endpoint():
    """Address of an S3 server on the loopback."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint, monkeypatch):
    """Address of an empty folder in a bucket."""
    import boto3

    keys = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{time.monotonic_ns()}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/articles"


@pytest.fixture(params=["folder", "s3"])
def address(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else f"file://{tmp_path}/store"


@pytest.fixture
def stages(tmp_path, tiny_tokenizer, tiny_encoder_dir):
    return stages_of(tmp_path, tiny_tokenizer, tiny_encoder_dir, num_texts=50)


@pytest.fixture
def reference(stages, tmp_path):
    for stage in stages(tmp_path / "reference"):
        stage()
    return files_of(tmp_path / "reference")


def files_of(path):
    """The files of a datastore, without hidden ones."""
    names = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in names.items() if not name.startswith(".")}


def test_tasks_without_a_common_file_system_end_with_the_same_bytes(address, stages, reference, tmp_path):
    for number, stage in enumerate(stages(tmp_path / "publisher")):
        if stage.func is not build_index:
            made = 0
            for index in (1, 0, 1):  # one of them twice
                folder = tmp_path / f"node-{index}"
                made += run_share_on_store(stages(folder)[number], folder, address, index, 2)
            assert made > 2
        run_on_store(stage, tmp_path / "publisher", address)
    pull_datastore(address, tmp_path / "copy")
    assert files_of(tmp_path / "copy") == reference == files_of(tmp_path / "publisher")
    RetroDatastore.from_pretrained(tmp_path / "copy").verify()
    before = ObjectStore(address).latest()
    embed = stages(tmp_path / "node-0")[1]
    assert run_share_on_store(embed, tmp_path / "node-0", address, 0, 2) == 0  # all is published
    run_on_store(stages(tmp_path / "publisher")[3], tmp_path / "publisher", address)
    assert ObjectStore(address).latest() == before  # nothing has changed


def task(stage, folder, address, index, number):
    run_share_on_store(stage, folder, address, index, number)


def run_until_done(calls, kill):
    """Runs calls in processes, two at a time. A process that is killed runs again. Returns the number of kills."""
    queue, running, kills = list(calls), [], 0
    while queue or running:
        while queue and len(running) < 2:
            call = queue.pop(0)
            process = CHILDREN.Process(target=call)
            process.start()
            seconds = kill()
            running.append((call, process, None if seconds is None else time.monotonic() + seconds))
        for entry in list(running):
            call, process, deadline = entry
            if deadline is not None and time.monotonic() > deadline and process.is_alive():
                process.kill()
            if not process.is_alive():
                process.join()
                running.remove(entry)
                if process.exitcode:
                    assert process.exitcode == -signal.SIGKILL
                    kills += 1
                    queue.append(call)
        time.sleep(0.005)
    return kills


def set_environment(values, call):
    os.environ.update(values)
    call()


@pytest.mark.slow
def test_tasks_and_publishers_that_are_killed_end_with_the_same_bytes(s3, stages, reference, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    generator, kills, trial = random.Random(0), {"task": 0, "publisher": 0}, 0

    def kill():
        return generator.choice([None, generator.uniform(0.05, 4), generator.uniform(0.05, 4)])

    while sum(kills.values()) < 20:
        address, root = f"{s3}/{trial}", tmp_path / f"trial-{trial}"
        for number, stage in enumerate(stages(root / "publisher")):
            if stage.func is not build_index:
                calls = [
                    partial(task, stages(root / f"node-{index}")[number], root / f"node-{index}", address, index, 3)
                    for index in range(3)
                ]
                kills["task"] += run_until_done([partial(set_environment, environment, call) for call in calls], kill)
            publish = partial(run_on_store, stage, root / "publisher", address)
            kills["publisher"] += run_until_done([partial(set_environment, environment, publish)], kill)
        pull_datastore(address, root / "copy")
        assert files_of(root / "copy") == reference
        trial += 1
    print(f"kills over {trial} datastores in S3: {kills}")


def test_of_two_that_publish_one_is_refused(address, stages, tmp_path):
    stages(tmp_path / "a")[0]()
    assert push_datastore(tmp_path / "a", address) == 1
    pull_datastore(address, tmp_path / "b")
    for name in ("a", "b"):
        (tmp_path / name / "notes.txt").write_text(name)
        (tmp_path / name / "empty.txt").touch()
    assert push_datastore(tmp_path / "b", address) == 2
    with pytest.raises(ValueError, match=r"has a version 2 already, which is not in .*/a; pull it into"):
        push_datastore(tmp_path / "a", address)
    with pytest.raises(ValueError, match="holds changes that no version of .* has, such as empty.txt"):
        pull_datastore(address, tmp_path / "a")
    pull_datastore(address, tmp_path / "c")
    assert (tmp_path / "c" / "notes.txt").read_text() == "b"
    (tmp_path / "c" / "notes.txt").unlink()
    assert push_datastore(tmp_path / "c", address) == 3
    assert pull_datastore(address, tmp_path / "b") == 3
    assert not (tmp_path / "b" / "notes.txt").exists()
    stages(tmp_path / "d")[0]()
    with pytest.raises(ValueError, match="has a version 1 already"):
        push_datastore(tmp_path / "d", address)


def test_the_commands(address, stages, tmp_path, tiny_encoder_dir, capsys):
    stages(tmp_path / "a")[0]()
    push_script.main([str(tmp_path / "a"), "--store", address])
    options = ["--encoder", str(tiny_encoder_dir), "--store", address]
    embed_script.main([str(tmp_path / "b"), *options, "--num_tasks", "2", "--task_index", "1"])
    embed_script.main([str(tmp_path / "c"), *options])
    pull_script.main([str(tmp_path / "a"), "--store", address])
    output = capsys.readouterr().out
    assert "holds version 1" in output and "nothing is published yet" in output and "chunks are embedded, in" in output
    assert files_of(tmp_path / "a") == files_of(tmp_path / "c")
    with pytest.raises(ValueError, match="leave out one"):
        embed_script.main([str(tmp_path / "c"), *options, "--num_tasks", "2", "--ray", "auto"])


@pytest.mark.hostile(
    "an object store that lists files outside the folder, a damaged object, text in place of a list, a shard of "
    "another datastore; that refuses, or replaces objects that exist; a folder that is no copy of it",
    "an error that names the address and what is wrong; nothing is published, and nothing is written elsewhere",
)
def test_a_store_that_cannot_be_right_is_refused(stages, tmp_path, tiny_encoder_dir):
    address, store = f"file://{tmp_path}/store", tmp_path / "store"
    with pytest.raises(ValueError, match="there is no datastore at"):
        pull_datastore(address, tmp_path / "none")
    stages(tmp_path / "a")[0]()
    push_datastore(tmp_path / "a", address)
    version = store / "versions" / "00000001.json"
    good = version.read_text()
    for name in ("../outside", "/etc/outside", ".lock", "chunks/../../outside", "a\\b", ".ssh/keys"):
        version.write_text(json.dumps({"files": {name: "0" * 64}}))
        with pytest.raises(ValueError, match="which is no file inside a datastore"):
            pull_datastore(address, tmp_path / "b")
    for text in ("[]", "hello", '{"files": 5}', '{"files": {"a": 5}}'):
        version.write_text(text)
        with pytest.raises(ValueError, match=r"versions/00000001.json does not list files"):
            pull_datastore(address, tmp_path / "b")
    version.write_text(good)
    pull_datastore(address, tmp_path / "b")
    victim = next(file for file in (store / "objects").iterdir() if file.stat().st_size > 100)
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=f"objects/{victim.name} is damaged"):
        pull_datastore(address, tmp_path / "c")
    victim.unlink()
    with pytest.raises(ConnectionError, match="did not give files: FileNotFoundError"):
        pull_datastore(address, tmp_path / "c")
    victim.write_bytes(content)
    pull_datastore(address, tmp_path / "c")
    assert files_of(tmp_path / "c") == files_of(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("1")
    with pytest.raises(ValueError, match="is no copy of .*it holds precious"):
        pull_datastore(address, tmp_path / "full")
    other = f"file://{tmp_path}/other-store"
    stages(tmp_path / "d")[0]()
    push_datastore(tmp_path / "d", other)
    with pytest.raises(ValueError, match="is a copy of .*, not of"):
        pull_datastore(other, tmp_path / "c")
    for wrong in ("articles", "s3://key:secret@bucket/articles", "S3//x"):
        with pytest.raises(ValueError, match="is no address of an object store"):
            ObjectStore(wrong)


def test_a_shard_of_another_datastore_is_named_and_not_published(stages, tmp_path, tiny_tokenizer, tiny_encoder_dir):
    address = f"file://{tmp_path}/store"
    run_on_store(stages(tmp_path / "a")[0], tmp_path / "a", address)
    run_share_on_store(stages(tmp_path / "node")[1], tmp_path / "node", address, 0, 2)
    # The same stage of a datastore with other documents, whose share comes to this store.
    other = f"file://{tmp_path}/other"
    file = write_jsonl(tmp_path / "other.jsonl", [text for text in make_texts(50, seed=9) if text.strip()])
    chunk = partial(
        chunk_documents, str(file), tmp_path / "o", tiny_tokenizer, chunk_size=TINY_CHUNK_SIZE, shard_bytes=2000
    )
    run_on_store(chunk, tmp_path / "o", other)
    run_share_on_store(partial(embed_chunks, tmp_path / "n", str(tiny_encoder_dir)), tmp_path / "n", other, 0, 2)
    before = ObjectStore(address).latest()
    share = ObjectStore(other).read_shares(2)[0]
    ObjectStore(address).upload(tmp_path / "n", share)
    ObjectStore(address).write_share(before, 0, share)
    with pytest.raises(ValueError, match="the embeddings of shard-00000 belong to other chunks"):
        run_on_store(stages(tmp_path / "a")[1], tmp_path / "a", address)
    assert ObjectStore(address).latest() == before


def test_a_store_that_refuses_is_named(s3, s3_endpoint, stages, tmp_path, monkeypatch):
    stages(tmp_path / "a")[0]()
    missing = s3.replace("bucket-", "missing-")
    with pytest.raises(ConnectionError, match=f"{missing} did not take files"):
        push_datastore(tmp_path / "a", missing)
    push_datastore(tmp_path / "a", s3)
    (tmp_path / "a" / "notes.txt").write_text("a")

    async def forbidden(*_, **__):
        raise PermissionError("Forbidden")

    async def unconditional(*_, **__):
        return None

    import s3fs

    with monkeypatch.context() as patched:
        patched.setattr("s3fs.S3FileSystem._pipe_file", forbidden)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(ConnectionError, match="did not take a version: PermissionError Forbidden"):
            push_datastore(tmp_path / "a", s3)
    with monkeypatch.context() as patched:
        patched.setattr("s3fs.S3FileSystem._pipe_file", unconditional)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(ValueError, match="replaces objects that exist although it was asked not to"):
            push_datastore(tmp_path / "a", s3)
    s3fs.S3FileSystem.clear_instance_cache()
    assert ObjectStore(s3).latest() == 1
    assert push_datastore(tmp_path / "a", s3) == 2


def test_two_processes_do_not_work_on_one_copy(stages, tmp_path):
    address = f"file://{tmp_path}/store"
    stages(tmp_path / "a")[0]()
    push_datastore(tmp_path / "a", address)

    def again():
        pull_datastore(address, tmp_path / "b")

    with pytest.raises(ValueError, match="another process works on the copy"):
        run_on_store(again, tmp_path / "b", address)
    assert Path(tmp_path / "b" / "datastore.json").exists()
