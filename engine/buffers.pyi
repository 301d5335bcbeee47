"""Page-aligned buffers: one block, and a pool of equal buffers cut from one block."""

class AlignedBuffer:
    """``size`` zeroed bytes, aligned to 4096, writable through the buffer protocol."""

    size: int
    def __init__(self, size: int) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class BufferPool:
    """``count`` aligned buffers of ``buffer_size`` bytes, handed out and taken back by engine code only."""

    buffer_size: int
    count: int
    available: int
    def __init__(self, buffer_size: int, count: int) -> None: ...
