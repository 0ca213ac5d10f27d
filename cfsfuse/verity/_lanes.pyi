from typing import Final

from cfsfuse.verity.digest import Bytes

VARIANTS: Final[tuple[str, ...]]
"""Kinds of vector registers that this processor has, the fastest first."""

LANES: Final[int]
"""Blocks that are hashed at once."""

SHA_INSTRUCTIONS: Final[int]
"""Not 0 when the processor has instructions for SHA-256, which hashlib uses."""

def sha256_blocks(data: Bytes, variant: int = 0, /) -> bytes: ...
