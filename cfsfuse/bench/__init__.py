"""Speed of mounts, side by side: each way to mount an image, and other programs that can, in turns.

All of them mount the same image in one run, so that a ratio compares what the machine did within a minute; the figures
are medians over the rounds.
"""
