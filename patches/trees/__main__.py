import sys
from pathlib import Path

# Started as a folder (`python3 patches/trees`), from any current folder, so that nothing needs to be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from patches.trees.command import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
