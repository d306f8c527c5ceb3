#!/usr/bin/env bash
# Edits vendored MindSpeed, Megatron-LM and MindSpeed-RL trees; one set of trees then serves GRPO and DAPO, text and VL.
#
#   bash examples/rl/scripts/apply_dapo_mindspeed_patches.sh [PATH]            apply; again changes nothing
#   bash examples/rl/scripts/apply_dapo_mindspeed_patches.sh --check [PATH]    say what there is, change nothing
#   bash examples/rl/scripts/apply_dapo_mindspeed_patches.sh --revert [PATH]   put the original bytes back
#
# PATH  a tree, or a folder that holds several, itself or up to two levels below (default: the current folder)
#
# Exit code: 0 done, or nothing to do; 2 refused, nothing was changed; 3 (--check) there is something to apply.
# docs/vendored-trees.md says what is edited and why.
set -euo pipefail

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)"

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2> /dev/null; then
    echo "error: no python3 in PATH, or one older than 3.9: activate the environment that you train with" >&2
    exit 2
fi
# -I: folders called patches in the current folder or in PYTHONPATH are not ours. -B: nothing is written beside the sources.
exec python3 -IB "$REPOSITORY/patches/trees" "$@"
