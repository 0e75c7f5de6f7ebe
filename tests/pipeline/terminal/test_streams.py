import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import PYTHONPATH

from kdpipe.pipeline.terminal.streams import STDOUT, NamedOutput

FULL = Path("/dev/full")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE])
def test_an_error_of_stdout_is_named_and_comes_once(code):
    if code == errno.ENOSPC:
        descriptor = os.open(FULL, os.O_WRONLY)
    else:
        read, descriptor = os.pipe()
        os.close(read)
    with NamedOutput(descriptor, "w") as output:
        with pytest.raises(OSError, match=STDOUT) as raised:
            output.write(b"text")
        assert raised.value.errno == code
        assert output.write(b"more") == 4


def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path):
    code = (
        "import os, sys; from kdpipe.pipeline.terminal.streams import set_up_streams; set_up_streams(); "
        f"file = open({str(tmp_path / 'data')!r}, 'wb'); print('out'); print('err', file=sys.stderr); input; "
        "sys.stdout.flush(); assert file.fileno() > 2"
    )
    shell = f'exec "{sys.executable}" -c "$0" <&- >&- 2>&-'
    ended = subprocess.run(["sh", "-c", shell, code], env={**os.environ, "PYTHONPATH": PYTHONPATH}, check=False)
    assert ended.returncode == 0
    assert (tmp_path / "data").read_bytes() == b""
