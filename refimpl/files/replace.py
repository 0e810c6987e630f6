"""Files come into being whole: written beside their place, synced, then renamed over it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give the name of a temporary file in the same directory; what was written there becomes `path` at the end.

    Where the body raises, the temporary file goes and `path` stays as it was. The new file has the permissions that
    the process gives to new files.
    """
    target = os.path.abspath(os.fspath(path))
    fd, temporary = tempfile.mkstemp(prefix=".refimpl-", dir=os.path.dirname(target))
    os.close(fd)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files private
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
