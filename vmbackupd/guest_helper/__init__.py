"""What runs in the guest: a program of its own, standard library only, packed as one zipapp.

Nothing here may import from the rest of the project, nor use what Python 3.6 does not know.
"""

PROTOCOL = 1
"""Version of the control protocol and of what stands on the data port."""
HELPER_VERSION = "1.0"
