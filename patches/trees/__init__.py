"""Edits of vendored MindSpeed, Megatron-LM and MindSpeed-RL trees: what examples/rl/scripts/apply_dapo_mindspeed_patches.sh applies.

    megatron.py, mindspeed.py, mindspeed_rl.py   which versions are known, and what is edited in which file, with the reason
    edits.py                                     what an edit is
    finding.py                                   the trees below a folder, and whether they work together
    files.py, backup.py                          files changed all or none, and put back to the same bytes
    state.py, command.py                         what was found, applied or refused, as a table

Plain Python 3.9 without packages: it runs where these trees are, not where this suite is installed.
"""
