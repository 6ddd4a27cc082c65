"""The kernels over an engine's blocks compile for a GPU, which Triton's interpreter does not show."""

from pathlib import Path

import prepared
import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["mean", "cap"])
def test_a_step_over_blocks_compiles(name, tmp_path):
    code = f"import compile_blocks; compile_blocks.main([{name!r}])"
    env = {"TRITON_CACHE_DIR": str(tmp_path)}
    done = prepared.python("compiler", code, env=env, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"  # append, attend, merge
