"""What an NBD server says of areas; used by engine modules only."""

from vmbackupd.engine.nbd import NbdConnection

class BlockStatus:
    """Which areas read as zeros, or with ``bitmap`` those marked in the bitmap that the connection has negotiated."""

    def __init__(self, connection: NbdConnection, room: int, *, bitmap: bool = False) -> None: ...
