"""Authenticated encryption through OpenSSL: AES-256-GCM and ChaCha20-Poly1305."""

from typing_extensions import Buffer

AES_GCM: int
"""Cipher id 1: AES-256-GCM."""
CHACHA_POLY: int
"""Cipher id 2: ChaCha20-Poly1305."""
TAG: int
"""Bytes by which a sealed content is longer: 16."""

class Aead:
    """Contexts of OpenSSL, made once; one thread at a time."""

    def __init__(self) -> None: ...

def preferred() -> int:
    """The id of the cipher that is faster on this processor."""

def encrypt(cipher: int, key: bytes, nonce: bytes, bound: Buffer, data: Buffer) -> bytes:
    """Ciphertext and tag. ``bound`` is authenticated with the content but not part of the result.

    ``key`` has 32 bytes, ``nonce`` 12: never the same pair for two contents. ValueError for other lengths or ciphers.
    """

def decrypt(cipher: int, key: bytes, nonce: bytes, bound: Buffer, data: Buffer) -> bytes | None:
    """The content of what ``encrypt`` made with just these arguments, None for anything else.

    ValueError for wrong lengths of key and nonce and for a cipher that there is not.
    """
