"""A ring of buffers with requests in flight over one NBD connection; used by engine modules only."""

from vmbackupd.engine.nbd import NbdConnection

class Pipeline:
    buffer_size: int
    def __init__(self, connection: NbdConnection, buffer_size: int, count: int) -> None: ...
