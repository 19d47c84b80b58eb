"""An artifact is complete or not there, and is trusted only after its hashes are checked."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from qcompile.artifact import MANIFEST, open_artifact, staged, write_manifest
from qcompile.errors import ArtifactError


@pytest.fixture
def artifact(tmp_path):
    with staged(tmp_path / "a") as folder:
        (folder / "lib").mkdir()
        (folder / "lib" / "model.so").write_bytes(b"code")
        write_manifest(folder, {"recipe": {}})
    return tmp_path / "a"


def test_files_are_listed_with_their_size(artifact):
    opened = open_artifact(artifact)
    assert opened.file("lib/model.so").read_bytes() == b"code"
    assert opened.size == sum(p.stat().st_size for p in artifact.rglob("*") if p.is_file())


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "a") as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept(artifact):
    with pytest.raises(ArtifactError, match=r"overwrite=True.*--force"), staged(artifact):
        pass
    assert open_artifact(artifact)


def test_force_replaces_an_artifact_but_no_other_directory(artifact, tmp_path):
    with staged(artifact, overwrite=True) as folder:
        (folder / "new").write_text("new")
        write_manifest(folder, {})
    assert [p.name for p in artifact.iterdir() if p.name != MANIFEST] == ["new"]
    other = tmp_path / "home"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not an artifact"), staged(other, overwrite=True):
        pass
    assert (other / "letter.txt").read_text() == "dear"


def test_a_failed_replacement_keeps_the_old_artifact(artifact):
    with pytest.raises(RuntimeError), staged(artifact, overwrite=True):
        raise RuntimeError
    assert open_artifact(artifact)


def test_an_unwritable_place_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ArtifactError, match="file"), staged(file / "a"):
        pass


@pytest.mark.parametrize("damage", ["altered", "missing", "truncated"])
def test_damage_is_found(artifact, damage):
    target = artifact / "lib" / "model.so"
    if damage == "altered":
        target.write_bytes(b"evil")
    elif damage == "missing":
        target.unlink()
    else:
        target.write_bytes(b"co")
    with pytest.raises(ArtifactError, match=r"model\.so"):
        open_artifact(artifact)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "lib/../../secret"])
def test_a_path_that_leaves_the_directory_is_refused(artifact, name):
    (artifact.parent / "secret").write_text("s")
    manifest = json.loads((artifact / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": "0", "bytes": 1}
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="outside"):
        open_artifact(artifact)


def test_a_link_that_leaves_the_directory_is_refused(artifact):
    (artifact.parent / "secret").write_bytes(b"code")
    (artifact / "lib" / "model.so").unlink()
    (artifact / "lib" / "model.so").symlink_to(artifact.parent / "secret")
    with pytest.raises(ArtifactError, match="outside"):
        open_artifact(artifact)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": {}}', '{"schema": 99, "files": {}}'])
def test_a_foreign_manifest_is_refused(artifact, text):
    (artifact / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError):
        open_artifact(artifact)


SLOW = """
import sys, time
from qcompile.artifact import staged
with staged(sys.argv[1]) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs inherit that it is ignored
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.wait(20) != 0
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_leaves_is_removed_by_the_next_compile(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "a")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    process.stdout.close()
    time.sleep(0.05)
    assert not (tmp_path / "a").exists()
    assert len(list(tmp_path.iterdir())) == 1
    with staged(tmp_path / "a") as folder:
        write_manifest(folder, {})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
