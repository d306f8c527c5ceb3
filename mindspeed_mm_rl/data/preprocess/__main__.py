"""python -m mindspeed_mm_rl.data.preprocess CONFIG [key=value ...]: what examples/rl/data_preprocess/preprocess_data.sh calls."""

import sys

from mindspeed_mm_rl.data.preprocess.command import main

# Worker processes import this file again.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
