"""``python -m vmbackupd`` is the daemon."""

import sys

from vmbackupd.daemon.main import main

sys.exit(main())
