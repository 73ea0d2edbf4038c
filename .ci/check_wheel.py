"""Build the wheel and check that it installs the six packages and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {"memory_models", "htm", "memformer", "memorizing", "memxl", "benchmarks"}


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, str(root)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    if top != PACKAGES:
        sys.exit(f"{wheel.name} installs {sorted(top)}, expected {sorted(PACKAGES)}")
    untyped = sorted(package for package in PACKAGES if f"{package}/py.typed" not in names)
    if untyped:
        sys.exit(f"{wheel.name} has no py.typed in {', '.join(untyped)}")
    if f"{wheel.stem.split('-')[0]}-{wheel.stem.split('-')[1]}.dist-info/licenses/LICENSE" not in names:
        sys.exit(f"{wheel.name} has no LICENSE")
    print(f"{wheel.name}: {', '.join(sorted(top))}")


if __name__ == "__main__":
    main()
