"""The processes in which the command line runs here: each that imports everything again takes seconds."""

from support.kdpipe_process import environment
from support.warm_process import WarmProcess


def test_a_fork_has_warm_imports(tmp_path):
    script = tmp_path / "imported.py"
    script.write_text("import sys\nprint('torch' in sys.modules)")
    process = WarmProcess([str(script)], environment())
    assert process.communicate(timeout=60)[0] == "True\n", "the server has threads: name what starts them in warm_up()"
