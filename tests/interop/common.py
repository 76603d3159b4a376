"""What the tests with transformers share. To be imported before transformers, which reads the environment once."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = Path(tempfile.mkdtemp(prefix=f"hla_{Path(sys.argv[0]).stem}_"))
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may look at the network
os.environ["HF_MODULES_CACHE"] = str(SCRATCH / "modules")  # where trust_remote_code copies the Python files


def skip(error):
    """Ends the test, which ctest then shows as skipped."""
    SCRATCH.rmdir()
    print(f"skipped: {error} (scripts/setup.sh installs it)")
    sys.exit(77)


def run(*command):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: exit {result.returncode}\n{result.stderr}")
    return result.stdout
