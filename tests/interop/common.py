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


def ours_of(folders, ids, *options):
    """By folder, the tensors that hla_logits (tests/interop/logits.cpp) makes of ids (B, T)."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        save_file({"input_ids": ids}, Path(scratch) / "ids.safetensors")
        run(os.environ["HLA_LOGITS"], *options, Path(scratch) / "ids.safetensors", *folders)
    made = [Path(f"{folder}.{'gradients' if options else 'logits'}.safetensors") for folder in folders]
    tensors = [load_file(path) for path in made]
    for path in made:
        path.unlink()
    return tensors


def our_logits(folders, ids):
    """By folder, (B, T, V)."""
    return [tensors["logits"] for tensors in ours_of(folders, ids)]


def our_gradients(folders, ids):
    """By folder, the mean `loss` of the next tokens in ids, and its gradient by every parameter."""
    return ours_of(folders, ids, "--gradients")
