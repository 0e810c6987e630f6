"""Large files appear whole or not at all; a killed run goes on where its journal says."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from refimpl.errors import BadFile, Usage
from refimpl.writers import output
from refimpl.writers.output import Piece, write_pieces

COUNT, SIZE, HEAD = 40, 1000, b"head" * 8
PIECES = [Piece(len(HEAD) + i * SIZE, SIZE, i) for i in range(COUNT)]
WHOLE = HEAD + b"".join(bytes([i]) * SIZE for i in range(COUNT))

KILLED = """
import sys, time
import numpy as np
from refimpl.writers import output
output.JOURNAL_SECONDS = 0
def produce(i):
    if i == 20:
        print("half", flush=True)
        time.sleep(60)
    return np.full({size}, i, np.uint8)
pieces = [output.Piece({head} + i * {size}, {size}, i) for i in range({count})]
output.write_pieces(sys.argv[1], b"head" * 8, {head} + {count} * {size}, pieces, produce, "job", jobs=1)
"""


def produce(i):
    return np.full(SIZE, i, np.uint8)


def write(path, make=produce, job="job", **options):
    return write_pieces(path, HEAD, len(WHOLE), PIECES, make, job, **options)


def kill_half_way(path):
    """Run the same job in a process of its own, and kill it at its 21st piece."""
    code = KILLED.format(size=SIZE, head=len(HEAD), count=COUNT)
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"half\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()


@pytest.mark.parametrize("jobs", [1, 4])
def test_pieces_from_any_number_of_threads_make_one_file(tmp_path, jobs):
    path = tmp_path / "out"
    assert write(path, jobs=jobs) == 0
    assert path.read_bytes() == WHOLE and os.listdir(tmp_path) == ["out"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_kill_9_leaves_nothing_under_the_name_and_resume_goes_on(tmp_path):
    path = tmp_path / "out"
    kill_half_way(path)
    assert not path.exists() and sorted(os.listdir(tmp_path)) == [".out.journal", ".out.partial"]
    made = []
    done = write(path, lambda i: made.append(i) or produce(i), resume=True, jobs=1)
    assert done == 20 and made == list(range(20, COUNT))
    assert path.read_bytes() == WHOLE and os.listdir(tmp_path) == ["out"]


def test_without_resume_a_killed_run_is_started_over(tmp_path):
    path, made = tmp_path / "out", []
    kill_half_way(path)
    assert write(path, lambda i: made.append(i) or produce(i), jobs=1) == 0
    assert made == list(range(COUNT)) and path.read_bytes() == WHOLE and os.listdir(tmp_path) == ["out"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    kill_half_way(path)
    assert path.read_bytes() == b"old"


def test_another_job_is_not_resumed(tmp_path):
    path = tmp_path / "out"
    kill_half_way(path)
    with pytest.raises(Usage, match="of another job"):
        write(path, job="other", resume=True)
    journal = tmp_path / ".out.journal"
    journal.write_text("nonsense")
    with pytest.raises(BadFile, match="not a journal"):
        write(path, resume=True)
    journal.write_text(json.dumps({"fingerprint": "0", "done": 3}))
    with pytest.raises(Usage, match="of another job"):
        write(path, resume=True)


def test_an_error_in_a_piece_leaves_nothing_unless_resume_was_asked(tmp_path):
    def fail(i):
        if i == 5:
            raise BadFile("source", 7, "broken")
        return produce(i)

    with pytest.raises(BadFile, match="broken"):
        write(tmp_path / "out", fail)
    assert os.listdir(tmp_path) == []
    with pytest.raises(BadFile, match="broken"):
        write(tmp_path / "out", fail, resume=True)
    assert os.listdir(tmp_path) == [".out.partial"]


def test_two_runs_do_not_write_one_file(tmp_path):
    fd = os.open(tmp_path / ".out.partial", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(Usage, match="another run is writing"):
        write(tmp_path / "out")
    os.close(fd)
    write(tmp_path / "out")


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "precious")
    with pytest.raises(BadFile, match="cannot be written"):
        write(tmp_path / "out")
    (tmp_path / ".out.partial").unlink()
    os.link(tmp_path / "precious", tmp_path / ".out.partial")
    with pytest.raises(Usage, match="not a file of ours"):
        write(tmp_path / "out")
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_write_that_fails_is_an_error_of_the_output(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "pwrite", full)
    with pytest.raises(BadFile, match="No space left"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_progress_counts_bytes_up_to_the_size(tmp_path):
    seen = []
    write(tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (COUNT * SIZE, len(WHOLE)) and seen == sorted(seen)
