"""The D-Bus API: the objects on the bus, who may call them, and the client's side of it."""
