"""fs-verity in user space: digests, Merkle trees, and what the kernel says of a file.

Format: https://docs.kernel.org/filesystems/fsverity.html. Blocks are of 4096 bytes and there is no salt, as composefs
has it.
"""
