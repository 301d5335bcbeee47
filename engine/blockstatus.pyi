"""What an NBD server says of which areas read as zeros; used by engine modules only."""

from vmbackupd.engine.nbd import NbdConnection

class BlockStatus:
    def __init__(self, connection: NbdConnection, room: int) -> None: ...
