"""pip install -e . works from a clone; pip install . says that it cannot, instead of installing nothing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_plain_install_is_refused_with_the_way_out(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target",
                           tmp_path, ROOT], capture_output=True, text=True, timeout=120)
    assert done.returncode and not list(tmp_path.rglob("*.py"))
    assert "pip install -e ." in done.stdout + done.stderr
