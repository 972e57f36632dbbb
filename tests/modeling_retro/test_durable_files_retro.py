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
"""What has a name is on the disk, and a folder that is replaced is there at every moment."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_retro import durable_files_retro
from modeling_retro.durable_files_retro import recover, recover_all, replace, whole, whole_files, write_text


def fill(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "inside").mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "inside" / "b.txt").write_text(text)
    return folder


def test_a_file_or_folder_takes_its_name_when_it_is_on_the_disk(tmp_path, disk_log):
    write_text(tmp_path / "new" / "deeper" / "file.txt", "one")
    with whole(tmp_path / "folder") as temporary:
        fill(temporary, "one")
    with whole(tmp_path / "folder") as temporary:
        fill(temporary, "two")
    assert (tmp_path / "folder" / "inside" / "b.txt").read_text() == "two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]
    assert disk_log.check() == 3


def test_files_of_a_folder_are_replaced_one_by_one(tmp_path, disk_log):
    fill(tmp_path / "model", "one")
    with whole_files(tmp_path / "model") as temporary:
        (temporary / "a.txt").write_text("two")
        (temporary / "c.txt").write_text("two")
    found = {file.name: file.read_text() for file in (tmp_path / "model").rglob("*.txt")}
    assert found == {"a.txt": "two", "b.txt": "one", "c.txt": "two"}
    assert disk_log.check() == 2


def test_what_fails_while_it_is_written_changes_nothing(tmp_path):
    fill(tmp_path / "folder", "one")
    with pytest.raises(OSError, match="No space"), whole(tmp_path / "folder") as temporary:
        fill(temporary, "two")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (tmp_path / "folder" / "a.txt").read_text() == "one"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.hostile(
    "a power cut while a folder is replaced, on a file system that cannot exchange two names",
    "the next run finds the old folder or the new one",
)
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_without_exchange_a_cut_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path, monkeypatch, moment):
    """The file system cannot exchange names, and the power fails before the first, second or third step."""
    old, new = fill(tmp_path / "folder", "old"), fill(tmp_path / ".tmp-folder", "new")
    monkeypatch.setattr(durable_files_retro, "_exchange", lambda first, second: False)
    steps = []

    def cut(function):
        def step(*args):
            steps.append(function)
            if len(steps) == moment:
                raise KeyboardInterrupt
            return function(*args)

        return step

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(os, "replace", cut(os.replace))
        context.setattr(durable_files_retro, "remove", cut(durable_files_retro.remove))
        replace(new, old)
    # What the next start does under the lock of the folder.
    recover_all(tmp_path)
    assert (old / "inside" / "b.txt").read_text() == {1: "old", 2: "old", 3: "new"}[moment]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_is_written_again_is_recovered_first(tmp_path):
    fill(tmp_path / ".old-folder", "old")
    recover(tmp_path / "folder")
    assert (tmp_path / "folder" / "a.txt").read_text() == "old"
    fill(tmp_path / ".old-folder", "older")
    recover(tmp_path / "folder")
    assert (tmp_path / "folder" / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["folder"]


def test_errors_of_the_exchange_are_not_taken_for_a_file_system_without_it(tmp_path):
    fill(tmp_path / "folder", "old")
    with pytest.raises(FileNotFoundError):
        durable_files_retro._exchange(tmp_path / "missing", tmp_path / "folder")


PROGRAM = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("durable", sys.argv[1])
durable = importlib.util.module_from_spec(spec)
spec.loader.exec_module(durable)
for text in ("one", "two"):
    with durable.whole(Path(sys.argv[2], "folder")) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text(text)
durable.write_json(Path(sys.argv[2], "manifest.json"), {})
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_order_of_the_system_calls_themselves(tmp_path):
    log = tmp_path / "log"
    command = ["strace", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", str(log)]
    command += [sys.executable, "-c", PROGRAM, durable_files_retro.__file__, str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine allows no strace")
    calls = [re.match(r"(fsync|rename)", line)[1] + " " + line for line in log.read_text().splitlines() if "(" in line]
    calls = [call for call in calls if str(tmp_path) in call]

    def short(call: str) -> str:
        names = re.findall(rf"{re.escape(str(tmp_path))}[^>\",]*", call)
        names = [re.sub(r"\.tmp-[^/]*-\d+-", "tmp-", os.path.relpath(name, tmp_path)) for name in names]
        return " ".join([call.split()[0] + "-exchange" * ("EXCHANGE" in call), *names])

    assert [short(call) for call in calls] == [
        "fsync tmp-folder/file",
        "fsync tmp-folder",
        "rename tmp-folder folder",
        "fsync .",
        "fsync tmp-folder/file",
        "fsync tmp-folder",
        "rename-exchange tmp-folder folder",
        "fsync .",
        "fsync tmp-manifest.json",
        "rename tmp-manifest.json manifest.json",
        "fsync .",
    ]
